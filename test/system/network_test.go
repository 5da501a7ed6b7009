package system_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// link is two network namespaces of the test's own, joined by a veth pair.
type link struct {
	t          testing.TB
	server     string
	agent      string
	serverAddr string
}

// newLink makes link number n.
func newLink(t testing.TB, number int) *link {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root for network namespaces")
		}
		t.Skip("needs root for network namespaces")
	}
	n := fmt.Sprintf("%d-%d", os.Getpid(), number)
	l := &link{t: t, server: "ps" + n, agent: "pa" + n, serverAddr: "10.231.7.1"}
	t.Cleanup(func() {
		exec.Command("ip", "netns", "del", l.server).Run()
		exec.Command("ip", "netns", "del", l.agent).Run()
	})
	for _, c := range []string{
		"ip netns add " + l.server,
		"ip netns add " + l.agent,
		"ip link add vs" + n + " netns " + l.server + " type veth peer name va" + n + " netns " + l.agent,
		"ip -n " + l.server + " addr add 10.231.7.1/24 dev vs" + n,
		"ip -n " + l.agent + " addr add 10.231.7.2/24 dev va" + n,
		"ip -n " + l.server + " link set vs" + n + " up",
		"ip -n " + l.agent + " link set va" + n + " up",
		"ip -n " + l.server + " link set lo up",
		"ip -n " + l.agent + " link set lo up",
	} {
		l.do(strings.Fields(c)...)
	}
	return l
}

func (l *link) do(args ...string) string {
	l.t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func enter(ns string) []string { return []string{"nsenter", "--net=/run/netns/" + ns} }

// connections lists the local ports of connections from the agent's namespace to the server.
func (l *link) connections(port int) map[string]bool {
	l.t.Helper()
	ports := map[string]bool{}
	args := append(enter(l.agent), "ss", "-Htn", "state", "established", "dport", fmt.Sprintf("= :%d", port))
	for line := range strings.Lines(l.do(args...)) {
		f := strings.Fields(line)
		if len(f) >= 4 {
			local := f[2]
			ports[local[strings.LastIndexByte(local, ':')+1:]] = true
		}
	}
	return ports
}

// Packets of the sync connection vanish in one direction only; the agent notices,
// dials anew and is in step again, on an idle machine within 90 s.
func TestOneWayDropHeals(t *testing.T) {
	t.Parallel()
	for i, direction := range []string{"server to agent", "agent to server"} {
		t.Run(direction, func(t *testing.T) {
			t.Parallel()
			l := newLink(t, i)
			d := newDeployment(t)
			d.host = l.serverAddr
			d.serverPrefix, d.agentPrefix = enter(l.server), enter(l.agent)
			agent := d.start()
			d.createEntry(agent, "/before", nil, mine())
			c := d.watchX509(t.Context())
			next(t, c, "the first message", func(r received) bool { return len(r.ids) == 1 })

			old := l.connections(d.port)
			if len(old) == 0 {
				t.Fatal("no connection to cut")
			}
			for p := range old {
				rule := append(enter(l.server), "iptables", "-w", "-A", "OUTPUT", "-p", "tcp", "--dport", p, "-j", "DROP")
				if direction == "agent to server" {
					rule = append(enter(l.agent), "iptables", "-w", "-A", "OUTPUT", "-p", "tcp", "--sport", p, "-j", "DROP")
				}
				l.do(rule...)
			}
			cut := time.Now()
			d.createEntry(agent, "/during", nil, mine(), fmt.Sprintf("unix:gid:%d", os.Getgid()))
			deadline := time.After(90*time.Second + patience) // what is left after 75 s depends on the machine
			for ids := 0; ids < 2; {
				select {
				case r, open := <-c:
					if !open || r.err != nil {
						t.Fatalf("the workload's stream broke: %v", r.err)
					}
					ids = len(r.ids)
				case <-deadline:
					t.Fatal("never healed")
				}
			}
			t.Logf("%s: healed %v after the cut", direction, time.Since(cut).Round(time.Millisecond))
		})
	}
}
