package system_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
	"github.com/plastron/plastron/internal/upstream/spire"
	"github.com/plastron/plastron/internal/upstream/upstreamtest"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func downstream(e *spiretypes.Entry) { e.Downstream = true }

// The contract of an upstream, held by a real server and the agent beside it. An
// identity that is not downstream gets nothing, and hears what it lacks (R13).
func TestUpstreamServer(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	e := d.createEntry(agent, "/nested", nil, mine())
	d.waitServed()
	a, err := d.above().Open(t.Context(), upstreamtest.Env())
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := svid.NewCSR(signer)
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Mint(t.Context(), upstream.Request{CSR: csr, TTL: time.Hour})
	if _, fix := fault.Words(err); fault.KindOf(err) != fault.Denied || !strings.Contains(fix, "-downstream") {
		t.Errorf("without a downstream entry: %v", err)
	}
	if err := a.(io.Closer).Close(); err != nil {
		t.Error(err)
	}
	d.run("server", "entry", "update", "-socketPath", d.adminSocket(), "-entryID", e.Id, "-downstream")
	upstreamtest.Run(t, func(t *testing.T) upstream.Config { return d.above() })
}

// above is the configuration by which a server stands below d.
func (d *deployment) above() *spire.Config {
	return &spire.Config{ServerAddress: d.host, ServerPort: d.port, WorkloadAPISocket: d.workloadSocket()}
}

// below brings up a server, and an agent of its own, below d.
func (d *deployment) below(name, options string) (low *deployment, agent string) {
	d.t.Helper()
	low = newDeployment(d.t)
	low.serverOptions = options
	low.serverAttestor += fmt.Sprintf(`
  UpstreamAuthority "spire" { plugin_data { server_address = %q  server_port = %d  workload_api_socket = %q } }`, d.host, d.port, d.workloadSocket())
	d.waitServed()
	agent = low.start()
	return low, agent
}

// x509Now is what an agent hands out now.
func (d *deployment) x509Now() (chains map[string][][]byte, roots []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := d.workloadAPI().FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		return nil, nil, err
	}
	got, err := stream.Recv()
	if err != nil {
		return nil, nil, err
	}
	chains = map[string][][]byte{}
	for _, s := range got.Svids {
		certificates, err := x509.ParseCertificates(s.X509Svid)
		if err != nil {
			return nil, nil, err
		}
		for _, c := range certificates {
			chains[s.SpiffeId] = append(chains[s.SpiffeId], c.Raw)
		}
		if roots, err = x509.ParseCertificates(s.Bundle); err != nil {
			return nil, nil, err
		}
	}
	return chains, roots, nil
}

// Three servers, each below the other, with an agent each: identities of every
// level verify at every other; the root is rotated; then the server at the top is
// killed for longer than a leaf lives, and those below go on (R56, R67).
func TestNestedTwoDeep(t *testing.T) {
	t.Parallel()
	const leaf = 30 * time.Second // of which half is left when the next one is asked for
	options := fmt.Sprintf("ca_ttl = \"30m\"\n  default_x509_svid_ttl = %q\n  agent_ttl = \"20m\"", leaf)
	top := newDeployment(t)
	top.serverOptions = options
	topAgent := top.start()
	top.createEntry(topAgent, "/mid-server", downstream, mine())
	mid, midAgent := top.below("mid", options)
	mid.createEntry(midAgent, "/low-server", downstream, mine())
	low, lowAgent := mid.below("low", options)
	low.createEntry(lowAgent, "/web", nil, mine())
	low.waitServed()

	levels := []struct {
		d     *deployment
		id    string
		depth int // certificates in the chain
	}{{top, "/mid-server", 1}, {mid, "/low-server", 2}, {low, "/web", 3}}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	// check has each level's identity verified with each level's bundle.
	check := func(from int) (problem string) {
		var all [][]*x509.Certificate
		var chains [][][]byte
		for _, l := range levels[from:] {
			held, roots, err := l.d.x509Now()
			if err != nil {
				return fmt.Sprintf("%s: %v", l.id, err)
			}
			chain := held["spiffe://example.org"+l.id]
			if len(chain) != l.depth {
				return fmt.Sprintf("%s: %d certificates, want %d", l.id, len(chain), l.depth)
			}
			all, chains = append(all, roots), append(chains, chain)
		}
		for i, chain := range chains {
			for j, roots := range all {
				if _, err := svid.VerifyX509(chain, roots, td, time.Now()); err != nil {
					return fmt.Sprintf("%s at %s: %v", levels[from+i].id, levels[from+j].id, err)
				}
			}
		}
		return ""
	}
	settled := func(what string) {
		t.Helper()
		problem := ""
		eventually(t, what, func() bool { problem = check(0); return problem == "" })
	}
	settled("all levels verify one another")
	if out := top.run("server", "healthcheck", "-socketPath", top.adminSocket()); !strings.Contains(out, "healthy") {
		t.Error(out)
	}

	// The root is rotated. Nobody below has to be told; the servers there look for a
	// new root every few seconds, so it signs once the lowest has it.
	always := func() {
		t.Helper()
		if problem := check(0); problem != "" {
			t.Fatalf("while the root is rotated: %s", problem)
		}
	}
	top.run("server", "localauthority", "x509", "prepare", "-socketPath", top.adminSocket())
	eventually(t, "the next root at the lowest level", func() bool {
		always()
		_, roots, err := low.x509Now()
		return err == nil && len(roots) == 2
	})
	before, _, err := top.x509Now()
	if err != nil {
		t.Fatal(err)
	}
	issuer := func(held map[string][][]byte) string {
		c, err := x509.ParseCertificate(held["spiffe://example.org/mid-server"][0])
		if err != nil {
			t.Fatal(err)
		}
		return c.Issuer.String()
	}
	top.run("server", "authority", "rotate", "-socketPath", top.adminSocket(), "x509")
	eventually(t, "an SVID under the new root", func() bool {
		always()
		now, _, err := top.x509Now()
		return err == nil && issuer(now) != issuer(before)
	})
	settled("all levels verify one another under both roots")
	if _, roots, err := low.x509Now(); err != nil || len(roots) != 2 {
		t.Errorf("the lowest level has %d roots, want both; %v", len(roots), err)
	}

	// The server at the top is killed for longer than a leaf lives.
	top.server.stop(syscall.SIGKILL)
	for end := time.Now().Add(leaf + 2*time.Second); time.Now().Before(end); {
		if problem := check(1); problem != "" {
			t.Fatalf("while the server at the top is dead: %s", problem)
		}
		<-time.After(200 * time.Millisecond)
	}
	// And new ones come to life meanwhile.
	low.createEntry(lowAgent, "/late", nil, mine())
	eventually(t, "an identity of an entry made meanwhile", func() bool {
		held, _, err := low.x509Now()
		return err == nil && len(held["spiffe://example.org/late"]) == 3
	})
	top.startServer()
	settled("all is well again")
}

// corporate makes a root and an intermediate with openssl, as docs/upstream.md does.
func corporate(t *testing.T, dir string) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	for _, line := range []string{
		"genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072 -out root.key",
		"req -x509 -new -key root.key -out root.pem -subj /O=Example/CN=Root -days 30",
		"genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out ca.key",
		"req -new -key ca.key -out ca.csr -subj /O=Example/CN=Workloads",
		"x509 -req -in ca.csr -CA root.pem -CAkey root.key -CAcreateserial -days 20 -extfile ca.ext -out ca.pem",
	} {
		if err := os.WriteFile(filepath.Join(dir, "ca.ext"), []byte("basicConstraints=critical,CA:TRUE,pathlen:1\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("openssl", strings.Fields(line)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", line, err, out)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "ca.key"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A corporate root and intermediate, made by openssl, above us: clients that
// trust nothing but that root accept SVIDs with their chains.
func TestCorporateRoot(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	corp := d.path("corp")
	if err := os.Mkdir(corp, 0o700); err != nil {
		t.Fatal(err)
	}
	corporate(t, corp)
	d.serverAttestor += fmt.Sprintf(`
  UpstreamAuthority "disk" { plugin_data { cert_file_path = %q  key_file_path = %q  bundle_file_path = %q } }`, corp+"/ca.pem", corp+"/ca.key", corp+"/root.pem")
	agent := d.start()
	d.createEntry(agent, "/web", func(e *spiretypes.Entry) { e.DnsNames = []string{"web.example.org"} }, mine())
	d.waitServed()
	out := d.path("out")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	d.run("agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-write", out)
	root, err := os.ReadFile(corp + "/root.pem")
	if err != nil {
		t.Fatal(err)
	}
	if got := d.run("server", "bundle", "show", "-socketPath", d.adminSocket()); strings.TrimSpace(got) != strings.TrimSpace(string(root)) {
		t.Errorf("the bundle is not the corporate root alone:\n%s", got)
	}
	cmd := exec.Command("openssl", "verify", "-CAfile", corp+"/root.pem", "-untrusted", out+"/svid.0.pem", out+"/svid.0.pem")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, text)
	}

	// A TLS server with the SVID; clients of the world outside.
	pair, err := tls.LoadX509KeyPair(out+"/svid.0.pem", out+"/svid.0.key")
	if err != nil {
		t.Fatal(err)
	}
	if len(pair.Certificate) != 3 {
		t.Errorf("%d certificates are sent, want leaf, ours and the intermediate", len(pair.Certificate))
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func(conn net.Conn) {
				defer conn.Close()
				conn.Read(make([]byte, 1))
			}(conn)
		}
	}()
	cmd = exec.Command("openssl", "s_client", "-connect", listener.Addr().String(), "-CAfile", corp+"/root.pem", "-verify_return_error", "-verify_hostname", "web.example.org")
	if text, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(text), "Verify return code: 0 (ok)") {
		t.Errorf("openssl s_client: %v\n%s", err, text)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(root)
	conn, err := tls.Dial("tcp", listener.Addr().String(), &tls.Config{RootCAs: pool, ServerName: "web.example.org"})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()

	// A mistake in the files is said, and costs nothing.
	good, err := os.ReadFile(corp + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	d.write("corp/ca.pem", string(root)+string(good))
	eventually(t, "the mistake is said", func() bool { return strings.Contains(d.server.Output(), "is for another key") })
	if text := d.run("server", "healthcheck", "-socketPath", d.adminSocket(), "-verbose"); !strings.Contains(text, "healthy") {
		t.Errorf("healthcheck: %s", text)
	}
	d.write("corp/ca.pem", string(good))

	// A server that is started with it does not start, and says why.
	bad := newDeployment(t)
	bad.serverAttestor += fmt.Sprintf(`
  UpstreamAuthority "disk" { plugin_data { cert_file_path = %q  key_file_path = %q  bundle_file_path = %q } }`, corp+"/root.pem", corp+"/ca.key", corp+"/root.pem")
	bad.launchServer()
	select {
	case <-bad.server.done:
	case <-time.After(patience):
		t.Fatal("the server goes on")
	}
	if text := bad.server.Output(); !strings.Contains(text, "is for another key") {
		t.Errorf("it said:\n%s", text)
	}
}
