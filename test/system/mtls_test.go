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
	"os/signal"
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
// SYSTEM_TEST_ROLE is "serve" or "connect"; it ends on SIGTERM.
func workloadMain(role string) int {
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	source, err := workloadapi.NewX509Source(told)
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
		context.AfterFunc(told, func() { l.Close() })
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
		for told.Err() == nil {
			if err := oneHandshake(os.Getenv("SYSTEM_TEST_ADDR"), config, &r); err != nil {
				r.Failures = append(r.Failures, err.Error())
			}
			r.Connections++
			<-time.After(10 * time.Millisecond)
		}
		json.NewEncoder(os.Stdout).Encode(r)
		return 0
	}
	return 2
}

// workloads starts a workload that listens and one that makes connections to it, and
// returns that one.
func (d *deployment) workloads(agent string) *process {
	d.t.Helper()
	self, err := os.Executable()
	if err != nil {
		d.t.Fatal(err)
	}
	binary, err := os.ReadFile(self)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, name := range []string{"server", "client"} {
		if err := os.WriteFile(d.path("bin-"+name), binary, 0o755); err != nil {
			d.t.Fatal(err)
		}
		d.createEntry(agent, "/"+name, func(*spiretypes.Entry) {}, mine(), "unix:path:"+d.path("bin-"+name))
	}
	run := func(name string, environment ...string) *process {
		cmd := exec.Command(d.path("bin-" + name))
		cmd.Env = append(append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+d.workloadSocket()), environment...)
		return start(d.t, cmd)
	}
	server := run("server", "SYSTEM_TEST_ROLE=serve")
	var addr string
	eventually(d.t, "the workload listens", func() bool {
		sc := bufio.NewScanner(strings.NewReader(server.Output()))
		if sc.Scan() && strings.HasPrefix(sc.Text(), "127.0.0.1:") {
			addr = sc.Text()
		}
		return addr != ""
	})
	return run("client", "SYSTEM_TEST_ROLE=connect", "SYSTEM_TEST_ADDR="+addr)
}

// connected has the client make no more connections, none of which may have failed.
func (p *process) connected() (r connectReport) {
	p.t.Helper()
	p.stop(syscall.SIGTERM)
	if err := json.Unmarshal([]byte(p.Output()), &r); err != nil {
		p.t.Fatalf("the client printed %q: %v", p.Output(), err)
	}
	p.t.Logf("%d connections, %d failures, %d serials, authorities %v", r.Connections, len(r.Failures), len(r.Serials), r.Authorities)
	if len(r.Failures) > 0 {
		p.t.Errorf("%d of %d connections failed, the first: %s", len(r.Failures), r.Connections, r.Failures[0])
	}
	return r
}

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

// With SVIDs of 16 s, or 6 s in the soak, two rotations by force, a taint and a
// revocation of old authorities, new mutual TLS connections never fail, and both
// sides change their certificates many times. R58, R63, R65, R69, RG33.
func TestMTLSThroughRenewalsAndRotations(t *testing.T) {
	t.Parallel()
	const duration = 80 * time.Second
	life := 16 * time.Second // half of it is there to renew in, however busy the machine
	if os.Getenv("PLASTRON_SOAK") != "" {
		life = 6 * time.Second
	}
	d := newDeployment(t)
	d.serverOptions = fmt.Sprintf("ca_ttl = %q\n  default_x509_svid_ttl = %q\n  agent_ttl = %q", 6*life, life, life)
	agent := d.start()
	client := d.workloads(agent)
	began := time.Now()
	after := func(moment time.Time) {
		t.Helper()
		select {
		case <-time.After(time.Until(moment)):
		case <-client.done:
			t.Fatalf("the client ended early:\n%s", client.Output())
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
	compromised := active()
	var tainted time.Time
	for part := range 2 {
		after(began.Add(time.Duration(part+1) * duration / 8))
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
		if part == 0 { // while all that is in use is under it
			if _, err := local.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: compromised}); err != nil {
				t.Fatal(err)
			}
			tainted = time.Now()
		}
	}
	// What it signed before has ended by now, so the revocation cuts nothing that is in use.
	after(tainted.Add(life + time.Second))
	if _, err := local.RevokeX509Authority(t.Context(), &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: compromised}); err != nil {
		t.Fatal(err)
	}
	after(began.Add(duration))
	r := client.connected()
	if len(r.Serials) < 5 {
		t.Errorf("%d serials seen, want at least 5", len(r.Serials))
	}
	if len(r.Authorities) < 3 {
		t.Errorf("%d authorities seen, want at least 3 (two rotations by force)", len(r.Authorities))
	}
}
