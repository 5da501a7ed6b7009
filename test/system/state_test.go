package system_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// beside prepares one more agent for the server of d.
func (d *deployment) beside() *deployment {
	d.t.Helper()
	other := newDeployment(d.t)
	other.port, other.server = d.port, d.server
	if err := os.Symlink(d.path("admin"), other.path("admin")); err != nil {
		d.t.Fatal(err)
	}
	return other
}

// agentCommand is the agent with the configuration that startAgent wrote.
func (d *deployment) agentCommand(prefix ...string) *exec.Cmd {
	args := append(prefix, plastron, "agent", "run", "-config", d.path("agent.conf"))
	return exec.Command(args[0], args[1:]...)
}

// startAgentAgain starts the agent as it was, with what it has stored.
func (d *deployment) startAgentAgain(prefix ...string) {
	d.t.Helper()
	d.agent = start(d.t, d.agentCommand(prefix...))
	d.waitHealthy("agent")
}

// trace has strace do something to the system calls of a running process.
func trace(t testing.TB, pid int, args ...string) *process {
	t.Helper()
	tracer := start(t, exec.Command("strace", append([]string{"-f", "-o", "/dev/null", "-p", fmt.Sprint(pid)}, args...)...))
	eventually(t, "strace is attached", func() bool { return strings.Contains(tracer.Output(), "attached") })
	return tracer
}

// steps are the system calls with which the agent replaces its state and its
// keys, in order, each with the file that it is about.
func (d *deployment) steps() [][2]string {
	var steps [][2]string
	for _, name := range []string{"keys.json.tmp", "agent.json.new"} {
		for _, call := range []string{"unlinkat", "openat", "write", "fsync", "renameat"} {
			steps = append(steps, [2]string{call, d.path("agent/" + name)})
		}
	}
	return append(steps, [2]string{"fsync", d.path("agent")})
}

// R54: whatever the agent was doing to its state when it was killed, when it
// first attested as well as when it renewed, the next start needs nobody: not
// another token, and no file removed.
func TestAgentKilledAtEachStepOfItsState(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.serverOptions = `agent_ttl = "120s"` // until the last of them is started again
	d.startServer()
	count := len(d.steps())
	agents, ids := make([]*deployment, count), make([]string, count)
	var tracers []*process
	killed := func(i int, when string, p *process) {
		t.Helper()
		call := agents[i].steps()[i]
		select {
		case <-p.done:
		case <-time.After(2 * patience):
			t.Fatalf("%s: the agent was not killed at %s of %s", when, call[0], filepath.Base(call[1]))
		}
	}
	again := func(i int, when string) {
		t.Helper()
		agents[i].startAgentAgain()
		if when == "attesting" {
			agents[i].createEntry(ids[i], "/w", nil, mine())
		}
		agents[i].waitServed()
		if out := agents[i].agent.Output(); strings.Contains(out, "set aside") || strings.Contains(out, "not usable") {
			t.Errorf("%s, step %v: the restarted agent found torn state:\n%s", when, agents[i].steps()[i], out)
		}
	}
	for i := range count {
		agents[i] = d.beside()
		agents[i].writeBundle()
		token, id := agents[i].token()
		ids[i] = id
		agents[i].write("agent.conf", agents[i].agentConfig(token))
		step := agents[i].steps()[i]
		tracers = append(tracers, start(t, agents[i].agentCommand("strace", "-f", "-o", "/dev/null", "-P", step[1], "-e", "trace="+step[0], "-e", "inject="+step[0]+":signal=KILL:when=1")))
	}
	for i, p := range tracers {
		killed(i, "attesting", p)
		again(i, "attesting")
	}
	for i, a := range agents {
		step := a.steps()[i]
		trace(t, a.agent.cmd.Process.Pid, "-P", step[1], "-e", "trace="+step[0], "-e", "inject="+step[0]+":signal=KILL:when=1")
	}
	for i, a := range agents {
		killed(i, "renewing", a.agent)
		again(i, "renewing")
	}
	t.Logf("%d steps, each at the first attestation and at a renewal", count)
}

// stored is what the agent has on disk, which is at every moment whole.
type stored struct {
	leaf *x509.Certificate // of the agent's own SVID
	ours bool              // its key is there too
}

func readStored(dir string) (s stored, err error) {
	for _, name := range []string{"agent.json", "keys.json", "dropped.json"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if os.IsNotExist(err) && name == "dropped.json" {
			continue
		}
		if err != nil {
			return s, err
		}
		if !json.Valid(data) {
			return s, fmt.Errorf("%s is torn: %q", name, data)
		}
	}
	var state struct {
		KeyID string
		SVID  [][]byte
	}
	var keys struct{ Keys map[string][]byte }
	for name, v := range map[string]any{"agent.json": &state, "keys.json": &keys} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = json.Unmarshal(data, v)
		}
		if err != nil {
			return s, err
		}
	}
	if len(state.SVID) == 0 {
		return s, nil
	}
	if s.leaf, err = x509.ParseCertificate(state.SVID[0]); err != nil {
		return s, err
	}
	if key, err := x509.ParsePKCS8PrivateKey(keys.Keys[state.KeyID]); err == nil {
		s.ours = key.(*ecdsa.PrivateKey).PublicKey.Equal(s.leaf.PublicKey)
	}
	return s, nil
}

// onDisk is an agent with a disk of its own, and someone who listens to it.
type onDisk struct {
	*deployment
	name    string
	dir     string // the disk, from outside
	before  stored
	api     workload.SpiffeWorkloadAPIClient
	watch   <-chan received
	serials map[string]bool
}

// newOnDisk starts an agent in a mount namespace of its own, which outlives it.
func newOnDisk(d *deployment, name string) *onDisk {
	d.t.Helper()
	a := &onDisk{deployment: d.beside(), name: name, serials: map[string]bool{}}
	holder := start(d.t, exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mkdir -m 700 "$1" && mount -t tmpfs -o size=64k,mode=0700 none "$1" && echo ready && exec sleep 3600`, "sh", a.path("agent")))
	eventually(d.t, "a small disk", func() bool { return strings.Contains(holder.Output(), "ready") })
	a.dir = fmt.Sprintf("/proc/%d/root%s", holder.cmd.Process.Pid, a.path("agent"))
	a.agentPrefix = []string{"nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", holder.cmd.Process.Pid)}
	token, id := a.token()
	a.startAgent(token)
	a.createEntry(id, "/w", nil, mine())
	a.watch, a.api = a.watchX509(d.t.Context()), a.workloadAPI()
	if a.before = a.whole(); !a.before.ours {
		d.t.Fatalf("%s: what is stored at first: %+v", name, a.before)
	}
	return a
}

// whole reads what is stored, which is never torn.
func (a *onDisk) whole() stored {
	a.t.Helper()
	s, err := readStored(a.dir)
	if err != nil {
		a.t.Fatalf("%s: %v", a.name, err)
	}
	return s
}

// served takes what came on the open stream, and asks anew as well.
func (a *onDisk) served() {
	a.t.Helper()
	for more := true; more; {
		select {
		case r, open := <-a.watch:
			if !open || r.err != nil {
				a.t.Fatalf("%s: the stream ended: %v", a.name, r.err)
			}
			a.serials[r.leaves["spiffe://example.org/w"].SerialNumber.String()] = true
		default:
			more = false
		}
	}
	ctx, cancel := context.WithTimeout(withHeader(a.t.Context()), patience)
	defer cancel()
	asked := time.Now()
	stream, err := a.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		a.t.Fatalf("%s: %v", a.name, err)
	}
	msg, err := stream.Recv()
	if err != nil {
		a.t.Fatalf("%s: nothing is served: %v", a.name, err)
	}
	leaf, err := x509.ParseCertificates(msg.Svids[0].X509Svid)
	if err != nil || !asked.Before(leaf[0].NotAfter) { // R35
		a.t.Fatalf("%s: asked for at %v: until %v, %v", a.name, asked, leaf[0].NotAfter, err)
	}
}

// inside runs a shell line where the agent is, with its directory as $1.
func (a *onDisk) inside(line string) {
	a.t.Helper()
	out, err := exec.Command(a.agentPrefix[0], a.agentPrefix[1], "sh", "-c", line, "sh", a.path("agent")).CombinedOutput()
	if err != nil {
		a.t.Fatalf("%s: %s: %v: %s", a.name, line, err, out)
	}
}

// A disk that is full, read-only, broken or slow does not keep the agent from
// renewing itself and what it serves; no file is ever torn; and when the disk is
// well again, so is what is stored, without a restart (R54, R56).
func TestAgentOutlivesItsDisk(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting a small disk needs root")
		}
		t.Skip("mounting a small disk needs root")
	}
	d := newDeployment(t)
	d.serverOptions = `agent_ttl = "60s"
  default_x509_svid_ttl = "20s"`
	d.startServer()
	cases := []struct {
		name  string
		begin func(*onDisk) (end func())
		says  string // what the agent says once it went on without its disk
	}{
		{"full", fillDisk, "kept in memory"},
		{"read-only", func(a *onDisk) func() {
			a.inside(`mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"`)
			return func() { a.inside(`umount "$1"`) }
		}, "kept in memory"},
		{"no space to write", injected("write", "error=ENOSPC"), "kept in memory"},
		{"sync fails", injected("fsync", "error=EIO"), "kept in memory"},
		{"rename fails", injected("renameat", "error=EIO"), "kept in memory"},
		{"slow", injected("write,fsync,renameat", "delay_enter=2000000"), "own SVID renewed"},
	}
	agents, ends := make([]*onDisk, len(cases)), make([]func(), len(cases))
	for i, c := range cases {
		agents[i] = newOnDisk(d, c.name)
		ends[i] = c.begin(agents[i])
	}
	all := func(what string, holds func(i int, a *onDisk) bool) {
		t.Helper()
		done := make([]bool, len(agents))
		eventually(t, what, func() bool {
			left := len(agents)
			for i, a := range agents {
				a.served()
				a.whole()
				if done[i] = done[i] || holds(i, a); done[i] {
					left--
				}
			}
			return left == 0
		})
	}
	all("the agents go on without their disks", func(i int, a *onDisk) bool { return strings.Contains(a.agent.Output(), cases[i].says) })
	for i, a := range agents {
		if len(a.serials) < 2 {
			t.Errorf("%s: what is served was not renewed meanwhile", a.name)
		}
		ends[i]()
	}
	healed := time.Now()
	all("what is stored is well again", func(i int, a *onDisk) bool {
		s := a.whole()
		return s.ours && s.leaf.SerialNumber.Cmp(a.before.leaf.SerialNumber) != 0
	})
	t.Logf("all is stored %v after the disks were well", time.Since(healed).Round(time.Second))
	for _, a := range agents {
		a.agent.stop(syscall.SIGKILL)
		a.startAgentAgain(a.agentPrefix...)
		a.waitServed()
		if out := a.agent.Output(); !strings.Contains(out, "stored SVID is used") {
			t.Errorf("%s: it did not begin with what was stored:\n%s", a.name, out)
		}
	}
}

// fillDisk leaves no room on the agent's disk.
func fillDisk(a *onDisk) func() {
	ballast := filepath.Join(a.dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err == nil {
		a.t.Fatal("the disk does not fill")
	}
	return func() {
		if err := os.Remove(ballast); err != nil {
			a.t.Error(err)
		}
	}
}

// injected has system calls on the agent's files fail, or take their time.
func injected(calls, how string) func(*onDisk) func() {
	return func(a *onDisk) func() {
		args := []string{"-e", "trace=" + calls, "-e", "inject=" + calls + ":" + how}
		for _, name := range []string{"", "/agent.json.new", "/keys.json.tmp", "/dropped.json.new", "/agent.json", "/keys.json", "/dropped.json"} {
			args = append(args, "-P", a.path("agent")+name)
		}
		tracer := trace(a.t, a.agent.cmd.Process.Pid, args...)
		return func() { tracer.stop(syscall.SIGINT) }
	}
}
