package container_test

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/container"
	"github.com/plastron/plastron/internal/fakes/kubepods"
)

func where(t *testing.T, pid int) container.Container {
	t.Helper()
	c, err := container.Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The kernel itself says where real processes are.
func TestKernel(t *testing.T) {
	for name, path := range map[string]func(uid, id string) string{
		"cgroupfs": kubepods.Cgroupfs,
		"systemd":  func(uid, id string) string { return kubepods.Systemd("cri-containerd", uid, id) },
		"CRI-O":    func(uid, id string) string { return kubepods.Systemd("crio", uid, id) },
	} {
		for version, in := range map[string]kubepods.Version{"v1": kubepods.V1, "v2": kubepods.V2, "hybrid": kubepods.Hybrid} {
			t.Run(name+", "+version, func(t *testing.T) {
				uid, id := kubepods.NewUID(), kubepods.NewID()
				pid := kubepods.Make(t, path(uid, id), in).Start(t)
				if got, want := where(t, pid), (container.Container{ID: id, PodUID: uid}); got != want {
					t.Errorf("Of() = %+v, want %+v", got, want)
				}
			})
		}
	}
	if got := where(t, os.Getpid()); got != (container.Container{}) {
		t.Errorf("this test is in %+v", got)
	}
}

// T6, T7, R45, W26, W27: a process does what root in a container with a writable
// group can do to look like another pod's. It stays what it is.
func TestAttack(t *testing.T) {
	victim := kubepods.Make(t, kubepods.Cgroupfs(kubepods.NewUID(), kubepods.NewID()), kubepods.Hybrid)
	of := where(t, victim.Start(t))
	for name, script := range map[string]string{
		// It makes groups named like the victim's below its own, and moves there.
		"groups below": `for d in $OWN; do
			mkdir -p $d/kubepods/burstable/pod$POD/$ID && echo $$ > $d/kubepods/burstable/pod$POD/$ID/cgroup.procs || exit 1; done`,
		"groups below, systemd": `for d in $OWN; do
			mkdir -p $d/pod$POD/cri-containerd-$ID.scope && echo $$ > $d/pod$POD/cri-containerd-$ID.scope/cgroup.procs || exit 1; done`,
		// It mounts the victim's groups where its own are looked for.
		"mounts": `set -- $OTHER; for d in $OWN; do mount --bind $1 $d || exit 1; shift; done`,
		// It has a namespace in which its own group is the top.
		"namespace": ``,
	} {
		t.Run(name, func(t *testing.T) {
			self := container.Container{ID: kubepods.NewID(), PodUID: kubepods.NewUID()}
			g := kubepods.Make(t, kubepods.Cgroupfs(self.PodUID, self.ID), kubepods.Hybrid)
			args := []string{"--cgroup", "--mount", "/bin/sh", "-c", script + "\ncat /proc/self/cgroup; echo done; read x"}
			cmd := g.Command("unshare", args...)
			cmd.Env = append(os.Environ(), "POD="+of.PodUID, "ID="+of.ID, "OWN="+strings.Join(g.Dirs(), " "), "OTHER="+strings.Join(victim.Dirs(), " "))
			cmd.Stderr = os.Stderr
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { in.Close(); cmd.Process.Kill(); cmd.Wait() }()
			seen, done := "", false
			for lines := bufio.NewScanner(out); !done && lines.Scan(); {
				seen += lines.Text() + "\n"
				done = lines.Text() == "done"
			}
			if !done {
				t.Fatal("the attack did not work")
			}
			if strings.Contains(name, "below") != strings.Contains(seen, "pod"+of.PodUID) {
				t.Fatalf("the attacker sees itself in\n%s", seen)
			}
			if got := where(t, cmd.Process.Pid); got != self {
				t.Errorf("Of() = %+v, want %+v", got, self)
			}
		})
	}
}

// A user's own manager can make groups of any name below its own. They are
// marked: nobody believes them.
func TestBelowAUser(t *testing.T) {
	uid, id := kubepods.NewUID(), kubepods.NewID()
	for _, path := range []string{kubepods.Cgroupfs(uid, id), "/user.slice/libpod-" + id + ".scope"} {
		g := kubepods.Make(t, filepath.Join("/user.slice/user-1000.slice/user@1000.service", path), kubepods.Hybrid)
		if got := where(t, g.Start(t)); got.Within != "user.slice" || got.ID != id {
			t.Errorf("%s: %+v", path, got)
		}
	}
}
