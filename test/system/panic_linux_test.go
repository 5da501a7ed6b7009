package system_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// panicTTL is how long SVIDs live: after that time nothing serves one that was there before.
const panicTTL = 16 * time.Second

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
			eventually(t, "the agent is attached to one", func() bool {
				own, _ := bad.list()
				if own.Attached.Agents == 0 {
					bad, good = good, bad
				}
				return own.Attached.Agents > 0
			})
			victim, _ := bad.list()
			client := a.workloads(agent)
			roots := func() int {
				return strings.Count(good.run("server", "bundle", "show", "-socketPath", good.adminSocket()), "BEGIN CERTIFICATE")
			}
			eventually(t, "a root of each", func() bool { return roots() == 2 })
			panicked := func(want string, args ...string) {
				t.Helper()
				out := good.run(append([]string{"server", "panic", victim.Id, "-yes", "-wait", "120s", "-socketPath", good.adminSocket()}, args...)...)
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
				t.Fatalf("the client ended early:\n%s", client.Output())
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

			if r := client.connected(); len(r.Authorities) != 2 {
				t.Errorf("authorities seen: %v, want the one before and the one after", r.Authorities)
			}
		})
	}
}
