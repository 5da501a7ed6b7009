package system_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/api/spire/api/types"
)

// panicTTL is how long SVIDs live: after that time nothing serves one that was there before.
const panicTTL = 6 * time.Second

// The server that an agent is attached to is expelled by the other one: it ends, the
// agent goes over, everything is signed anew, and when the authorities of the expelled
// one are revoked no bundle has them, while new mutual TLS connections never failed. It
// does not come back. R69, R130
func TestPanicServer(t *testing.T) {
	for name, kind := range map[string]func(*testing.T) sharedKind{"postgres": postgresKind, "etcd": etcdKind} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			block := kind(t).block("panic")
			a, b := newDeployment(t), newDeployment(t)
			for _, d := range []*deployment{a, b} {
				d.dataStore = block
				d.serverOptions = fmt.Sprintf("default_x509_svid_ttl = %q\n  agent_ttl = %q", panicTTL, panicTTL)
				d.launchServer()
			}
			a.waitHealthy("server")
			b.waitHealthy("server")
			token, agent := a.token()
			a.writeBundle()
			a.write("agent.conf", strings.NewReplacer(
				fmt.Sprintf("server_address    = %q", a.host), fmt.Sprintf("server_addresses = [\"127.0.0.1:%d\", \"127.0.0.1:%d\"]", a.port, b.port),
				fmt.Sprintf("server_port       = %d", a.port), "",
			).Replace(a.agentConfig(token)))
			a.agent = start(t, exec.Command(plastron, "agent", "run", "-config", a.path("agent.conf")))
			a.waitHealthy("agent")

			// Which of the two it is follows from where the agent went.
			bad, good := a, b
			if own, _ := a.list(); own.Attached.Agents == 0 {
				bad, good = b, a
			}
			victim, _ := bad.list()
			client := a.workloads(agent, 3*panicTTL)
			roots := func() int {
				return strings.Count(good.run("server", "bundle", "show", "-socketPath", good.adminSocket()), "BEGIN CERTIFICATE")
			}
			if n := roots(); n != 2 {
				t.Fatalf("%d roots at first", n)
			}
			panicked := func(want string, args ...string) {
				t.Helper()
				out := good.run(append([]string{"server", "panic", victim.Id, "-yes", "-wait", "60s", "-socketPath", good.adminSocket()}, args...)...)
				if !strings.Contains(out, want) || !strings.Contains(out, "in force on 1/1 agent") {
					t.Errorf("panic did not print %q:\n%s", want, out)
				}
			}
			eventually(t, "the servers know of the agent", func() bool {
				_, others := good.list()
				return len(others) == 1 && others[0].Attached.Agents == 1
			})
			out := good.run("server", "panic", victim.Id[:8], "-dryRun", "-socketPath", good.adminSocket())
			for _, want := range []string{"Would expel the server " + victim.Id + " (live, ", "every ID of the trust domain", "attached to it, and told what it liked: " + agent} {
				if !strings.Contains(out, want) {
					t.Errorf("the dry run did not print %q:\n%s", want, out)
				}
			}
			panicked("They are tainted, and will be revoked")
			ended := func(p *process) {
				t.Helper()
				select {
				case <-p.done:
				case <-time.After(patience):
					t.Fatal("the expelled server goes on")
				}
				if out := p.Output(); p.err == nil || !strings.Contains(out, "was expelled by") {
					t.Errorf("it ended with %v:\n%s", p.err, out)
				}
			}
			ended(bad.server)
			select { // what it signed has ended after that
			case <-time.After(panicTTL):
			case <-client.done:
				t.Fatal("the client ended early")
			}
			panicked("They are revoked", "-now")
			if n := roots(); n != 1 {
				t.Errorf("%d roots in the end", n)
			}
			bad.launchServer()
			ended(bad.server)
			if n := roots(); n != 1 {
				t.Errorf("%d roots after it tried to come back", n)
			}

			select {
			case <-client.done:
			case <-time.After(patience):
				t.Fatal("the client did not end")
			}
			var r connectReport
			if err := json.Unmarshal([]byte(client.Output()), &r); err != nil {
				t.Fatalf("the client printed %q: %v", client.Output(), err)
			}
			t.Logf("%d connections, %d failures, %d serials, authorities %v", r.Connections, len(r.Failures), len(r.Serials), r.Authorities)
			if len(r.Failures) > 0 {
				t.Errorf("%d of %d connections failed, the first: %s", len(r.Failures), r.Connections, r.Failures[0])
			}
			if len(r.Authorities) != 2 {
				t.Errorf("authorities seen: %v, want the one before and the one after", r.Authorities)
			}
		})
	}
}

// workloads starts a workload that listens and one that makes connections to it for a
// time, and returns that one.
func (d *deployment) workloads(agent string, duration time.Duration) *process {
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
	d.t.Cleanup(func() { server.stop(syscall.SIGTERM) })
	var addr string
	eventually(d.t, "the workload listens", func() bool {
		sc := bufio.NewScanner(strings.NewReader(server.Output()))
		if sc.Scan() && strings.HasPrefix(sc.Text(), "127.0.0.1:") {
			addr = sc.Text()
		}
		return addr != ""
	})
	return run("client", "SYSTEM_TEST_ROLE=connect", "SYSTEM_TEST_ADDR="+addr, "SYSTEM_TEST_DURATION="+duration.String(), "SYSTEM_TEST_PAUSE=20ms")
}
