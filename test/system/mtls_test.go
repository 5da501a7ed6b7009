package system_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// workloadMain is what the test binary does when a test starts it as a workload:
// SYSTEM_TEST_ROLE is "serve" or "connect"; the rest comes by environment.
func workloadMain(role string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer source.Close()
	switch role {
	case "serve":
		allowed := tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/client"))
		config := tlsconfig.MTLSServerConfig(source, source, allowed)
		config.SessionTicketsDisabled = true
		l, err := tls.Listen("tcp", "127.0.0.1:0", config)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Println(l.Addr())
		for {
			conn, err := l.Accept()
			if err != nil {
				return 1
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	case "connect":
		config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/server")))
		var r connectReport
		r.Serials, r.Authorities = map[string]int{}, map[string]int{}
		duration, _ := time.ParseDuration(os.Getenv("SYSTEM_TEST_DURATION"))
		pause, _ := time.ParseDuration(os.Getenv("SYSTEM_TEST_PAUSE")) // between connections; none: as many as can be
		for end := time.Now().Add(duration); time.Now().Before(end); {
			if err := oneHandshake(os.Getenv("SYSTEM_TEST_ADDR"), config, &r); err != nil {
				r.Failures = append(r.Failures, err.Error())
			}
			r.Connections++
			<-time.After(pause)
		}
		json.NewEncoder(os.Stdout).Encode(r)
		return 0
	}
	return 2
}

// mtlsDuration is how long new connections are made.
const mtlsDuration = 60 * time.Second

// connectReport is what the connecting workload saw of its peer.
type connectReport struct {
	Connections int
	Failures    []string
	Serials     map[string]int
	Authorities map[string]int
}

func oneHandshake(addr string, config *tls.Config, r *connectReport) error {
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil { // the server has accepted our certificate
		return err
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	r.Serials[leaf.SerialNumber.String()]++
	r.Authorities[fmt.Sprintf("%x", leaf.AuthorityKeyId)]++
	return nil
}

// With SVIDs of 6 s, authorities that time replaces within the minute, two rotations
// by force, a taint and a revocation of old authorities, new mutual TLS connections
// never fail, and both sides change their certificates many times. R58, R63, R65, R69, RG33.
func TestMTLSThroughRenewalsAndRotations(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.serverOptions = `ca_ttl = "36s"
  default_x509_svid_ttl = "6s"
  agent_ttl = "6s"`
	agent := d.start()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "client"} {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d.path("bin-"+name), b, 0o755); err != nil {
			t.Fatal(err)
		}
		d.createEntry(agent, "/"+name, func(e *spiretypes.Entry) {}, mine(), "unix:path:"+d.path("bin-"+name))
	}
	environment := func(role string, more ...string) []string {
		return append(append(os.Environ(), "SYSTEM_TEST_ROLE="+role, "SPIFFE_ENDPOINT_SOCKET=unix://"+d.workloadSocket()), more...)
	}
	serve := exec.Command(d.path("bin-server"))
	serve.Env = environment("serve")
	server := start(t, serve)
	var addr string
	eventually(t, "the workload listens", func() bool {
		sc := bufio.NewScanner(strings.NewReader(server.Output()))
		if sc.Scan() && strings.HasPrefix(sc.Text(), "127.0.0.1:") {
			addr = sc.Text()
		}
		return addr != ""
	})
	connect := exec.Command(d.path("bin-client"))
	connect.Env = environment("connect", "SYSTEM_TEST_ADDR="+addr, "SYSTEM_TEST_DURATION="+mtlsDuration.String())
	client := start(t, connect)
	began := time.Now()
	after := func(part int) { // sixths of the time
		t.Helper()
		select {
		case <-time.After(time.Until(began.Add(time.Duration(part) * mtlsDuration / 6))):
		case <-client.done:
			t.Fatal("the client ended early")
		}
	}
	conn := dialUnix(t, d.adminSocket())
	keys, local := authorityv1.NewAuthorityClient(conn), localauthorityv1.NewLocalAuthorityClient(conn)
	active := func() string {
		t.Helper()
		s, err := local.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return s.GetActive().GetAuthorityId()
	}
	after(1)
	compromised := active()
	for part := 1; part <= 2; part++ {
		after(part)
		was := active()
		// The other kind of key waits until the agent has said that it has the bundle (R64).
		for kind, force := range map[string]bool{"x509": true, "jwt": false} {
			got, err := keys.Rotate(t.Context(), &authorityv1.RotateRequest{Kind: kind, Force: force, WithinMs: (5 * patience).Milliseconds()})
			if err != nil {
				t.Fatal(err)
			}
			if !force && (got.GetUnreadyCount() != 0 || got.GetActive().GetReadyAt() == 0) {
				t.Errorf("the %s key signs without all having it: %v", kind, got)
			}
		}
		if active() == was {
			t.Errorf("%s still signs", was)
		}
	}
	// What it signed before ends at the latest within an SVID's life: the taint shows
	// in what is signed anew, and the revocation cuts nothing that is in use.
	if _, err := local.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: compromised}); err != nil {
		t.Fatal(err)
	}
	after(4)
	if _, err := local.RevokeX509Authority(t.Context(), &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: compromised}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-client.done:
	case <-time.After(mtlsDuration + 10*patience):
		t.Fatal("the client did not end")
	}
	server.stop(syscall.SIGTERM)
	var r connectReport
	if err := json.Unmarshal([]byte(client.Output()), &r); err != nil {
		t.Fatalf("the client printed %q: %v", client.Output(), err)
	}
	t.Logf("%d connections, %d failures, %d serials, %d authorities", r.Connections, len(r.Failures), len(r.Serials), len(r.Authorities))
	if len(r.Failures) > 0 {
		t.Errorf("%d of %d connections failed, the first: %s", len(r.Failures), r.Connections, r.Failures[0])
	}
	if len(r.Serials) < 8 {
		t.Errorf("%d serials seen, want at least 8", len(r.Serials))
	}
	if len(r.Authorities) < 3 {
		t.Errorf("%d authorities seen, want at least 3 (two rotations by force)", len(r.Authorities))
	}
}
