package workloadapi_test

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/workload/unix"
	"github.com/plastron/plastron/internal/workloadapi"
	sysunix "golang.org/x/sys/unix"
)

// The users of the attacks. Only the victim's processes, and those of the
// victim's program, have an identity.
const victim, attacker = 51000, 52000

const theirs = "got spiffe://example.org/victim"

// scene is a real socket with the real attestor, and programs that anybody may run.
type scene struct {
	*rig
	program, other, ofVictim string
}

func newScene(t *testing.T, via process.Via, change ...func(*workloadapi.Config)) *scene {
	t.Helper()
	needRoot(t)
	attestor, err := (&unix.Config{DiscoverWorkloadPath: true}).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &scene{program: copyOfSelf(t, dir, "program"), other: copyOfSelf(t, dir, "other"), ofVictim: copyOfSelf(t, dir, "victims")}
	s.rig = newRig(t, append(change, func(c *workloadapi.Config) {
		c.SocketPath, c.Via = filepath.Join(dir, "s"), via
		c.Attestors = []workloadapi.Attestor{{Name: "unix", Attestor: attestor}}
	})...)
	s.server.Put(s.server.Grant("victim", "/victim", fmt.Sprintf("unix:uid:%d", victim)), s.server.Grant("program", "/program", "unix:path:"+s.ofVictim))
	sub := s.mirror.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", victim)}, {Type: "unix", Value: "path:" + s.ofVictim}}})
	defer sub.Close()
	mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Identities) == 2 })
	return s
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

// start runs an actor as a user and has it connect.
func (s *scene) start(t *testing.T, uid uint32, change ...func(*exec.Cmd)) *child {
	t.Helper()
	c := start(t, s.program, uid, change...)
	c.do("connect %s", s.path)
	return c
}

// pair gives each of two processes one end of a socket, as descriptor 3.
func pair(t *testing.T) (a, b func(*exec.Cmd)) {
	t.Helper()
	fds, err := sysunix.Socketpair(sysunix.AF_UNIX, sysunix.SOCK_STREAM|sysunix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	end := func(fd int) func(*exec.Cmd) {
		f := os.NewFile(uintptr(fd), "pair")
		t.Cleanup(func() { f.Close() })
		return func(c *exec.Cmd) { c.ExtraFiles = []*os.File{f} }
	}
	return end(fds[0]), end(fds[1])
}

// attacks are what a local user can try. Each returns what the attacker got in
// the end; no identity may be in it.
var attacks = map[string]func(t *testing.T, s *scene) string{
	"ask": func(t *testing.T, s *scene) string {
		return s.start(t, attacker).asks()
	},
	// T39: the victim's socket reaches the attacker, used before or not.
	"fd passed, fresh": func(t *testing.T, s *scene) string {
		a, b := pair(t)
		v, x := s.start(t, victim, a), s.start(t, attacker, b)
		v.do("pass")
		x.do("take")
		return x.asks()
	},
	"fd passed, used": func(t *testing.T, s *scene) string {
		a, b := pair(t)
		v, x := s.start(t, victim, a), s.start(t, attacker, b)
		if got := v.asks(); got != theirs {
			t.Fatalf("the victim: %s", got)
		}
		v.do("pass")
		x.do("take")
		return x.asks()
	},
	// R38: the victim leaves a call under way to the attacker, and exits.
	"fd passed, connector gone": func(t *testing.T, s *scene) string {
		a, b := pair(t)
		v, x := s.start(t, victim, a), s.start(t, attacker, b)
		v.do("pass")
		x.do("take")
		fmt.Fprintln(v.in, "exit")
		v.cmd.Wait()
		return x.asks()
	},
	// The attacker's own socket in the victim's hands: the victim speaks on a
	// connection that is judged as the attacker's, or not at all.
	"fd passed to the victim": func(t *testing.T, s *scene) string {
		a, b := pair(t)
		x, v := s.start(t, attacker, a), s.start(t, victim, b)
		x.do("pass")
		v.do("take")
		return v.asks()
	},
	// W14: a zombie that nobody waits for; its socket is held by another.
	"zombie": func(t *testing.T, s *scene) string {
		a, b := pair(t)
		v, x := s.start(t, victim, a), s.start(t, attacker, b)
		v.do("pass")
		x.do("take")
		fmt.Fprintln(v.in, "exit")
		until(t, func() bool {
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", v.cmd.Process.Pid))
			return strings.Contains(string(stat), ") Z ")
		})
		return x.asks()
	},
	"inherited by a child of another user": func(t *testing.T, s *scene) string {
		v := s.start(t, 0)
		v.do("inherit %d", attacker)
		return v.asks()
	},
	"inherited by a child of the same user": func(t *testing.T, s *scene) string {
		v := s.start(t, victim)
		v.do("inherit %d", victim)
		return v.asks()
	},
	// W15, R40
	"exec after connect": func(t *testing.T, s *scene) string {
		v := s.start(t, victim)
		v.do("exec %s", s.other)
		return v.asks()
	},
	"exec after a call": func(t *testing.T, s *scene) string {
		v := s.start(t, victim)
		if got := v.asks(); got != theirs {
			t.Fatalf("the victim: %s", got)
		}
		v.do("exec %s", s.other)
		return v.asks()
	},
	// W19
	"victim before, attacker now": func(t *testing.T, s *scene) string {
		v := s.start(t, 0)
		v.do("setuid %d", attacker)
		return v.asks()
	},
	"attacker before, victim now": func(t *testing.T, s *scene) string {
		v := s.start(t, 0)
		v.do("setuid %d", victim)
		return v.asks()
	},
	// What a user namespace calls the victim is the attacker outside.
	"user namespace": func(t *testing.T, s *scene) string {
		return s.start(t, attacker, func(c *exec.Cmd) {
			c.SysProcAttr = &syscall.SysProcAttr{
				Cloneflags:  syscall.CLONE_NEWUSER,
				UidMappings: []syscall.SysProcIDMap{{ContainerID: victim, HostID: attacker, Size: 1}},
				GidMappings: []syscall.SysProcIDMap{{ContainerID: victim, HostID: attacker, Size: 1}},
				Credential:  &syscall.Credential{Uid: victim, Gid: victim, NoSetGroups: true},
			}
		}).asks()
	},
	// The first process of a pid namespace has number 1 inside, and another outside.
	"pid namespace": func(t *testing.T, s *scene) string {
		return s.start(t, attacker, func(c *exec.Cmd) { c.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID }).asks()
	},
	// R45: the attacker's program under the name of the victim's, in a mount
	// namespace of its own.
	"mount namespace": func(t *testing.T, s *scene) string {
		x := start(t, s.program, 0, func(c *exec.Cmd) { c.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS })
		x.do("bind %s %s", s.other, s.ofVictim)
		x.do("connect %s", s.path)
		x.do("exec %s", s.ofVictim)
		x.do("connect %s", s.path)
		return x.asks()
	},
}

// The attack kit: nobody gets an identity that is not his, by either way of
// telling who calls; and the victim is served throughout. Reuse of process
// numbers is forced in TestForcedPIDReuse of internal/process (R39).
func TestAttacks(t *testing.T) {
	for name, via := range map[string]process.Via{"so_peerpidfd": process.Auto, "pidfd_open": process.PIDFDOpen} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, via)
			for _, name := range slices.Sorted(maps.Keys(attacks)) {
				t.Run(name, func(t *testing.T) {
					if got := attacks[name](t, s); got == "" || got == "ok" || strings.Contains(got, "spiffe://") || strings.HasPrefix(got, "got") {
						t.Errorf("the attacker got %q", got)
					} else {
						t.Log(got)
					}
				})
			}
			if got := s.start(t, victim).asks(); got != theirs {
				t.Errorf("the victim got %q", got)
			}
			c := start(t, s.ofVictim, attacker)
			c.do("connect %s", s.path)
			if got := c.asks(); got != "got spiffe://example.org/program" {
				t.Errorf("the program got %q", got)
			}
		})
	}
}

// R49: a user at 100 times its share costs others less than 1 % of their calls.
func TestOneUserCannotCrowdOutOthers(t *testing.T) {
	const share = 20
	s := newScene(t, process.Auto, func(c *workloadapi.Config) {
		c.Limits = workloadapi.Limits{ConnectionsPerUser: share, CallsPerUser: share, RatePerUser: 500}
	})
	for range 2 {
		c := start(t, s.program, attacker)
		fmt.Fprintln(c.in, "flood", s.path)
	}
	over := func() bool {
		refused := s.api.Stats().OverLimit
		return refused["connections"]+refused["calls"]+refused["rate"] > 100*share
	}
	until(t, over)
	const others, each = 5, 200
	failed := make([]int, others)
	var wg sync.WaitGroup
	for i := range others {
		c := start(t, s.program, uint32(victim+i))
		wg.Go(func() {
			fmt.Fprintln(c.in, "calls", each, s.path)
			line, err := c.out.ReadString('\n')
			if err != nil {
				t.Error(err)
			}
			failed[i], err = strconv.Atoi(strings.TrimSpace(line))
			if err != nil {
				t.Errorf("a caller said %q", line)
			}
		})
	}
	wg.Wait()
	sum := 0
	for _, n := range failed {
		sum += n
	}
	if sum*100 >= others*each {
		t.Errorf("%v of %d calls each failed", failed, each)
	}
	t.Logf("%v of %d calls each failed; %+v", failed, each, s.api.Stats())
}

// R40, R42: an open stream is its opener's; what becomes another program or
// another user in the meantime is sent nothing more, and the stream ends by the clock.
func TestOpenStreamOfWhoChanges(t *testing.T) {
	s := newScene(t, process.Auto, func(c *workloadapi.Config) { c.Hurry(time.Minute, time.Minute, 50*time.Millisecond) })
	for name, change := range map[string]string{"another program": "exec " + s.other, "another user": fmt.Sprintf("setuid %d", attacker)} {
		uid := uint32(victim)
		if name == "another user" {
			s.server.Put(s.server.Grant("root", "/victim", "unix:uid:0"))
			uid = 0 // who may become another
		}
		c := s.start(t, uid)
		var got string
		until(t, func() bool { // the grant may still be on its way
			got = c.asks()
			return got == theirs
		})
		c.do("%s", change)
		if got := c.reads(); !strings.Contains(got, "peer_changed") {
			t.Errorf("%s: %q", name, got)
		}
	}
}
