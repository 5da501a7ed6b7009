//go:build kubernetes

// Package cluster_test runs a Kubernetes of one node for tests: the real API server,
// controllers, scheduler, kubelet, containerd and service proxy, in one set of
// namespaces with a process tree, mounts, cgroups and a network of its own. When
// its first process ends, all of it does; nothing of the host's is used but files.
// What is run on the cluster is the business of the test.
package cluster_test

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/plastron/plastron/test/parts"
)

// What the cluster's own addresses are, in a network that nothing else sees.
const (
	NodeName = "node1"
	nodeIP   = "172.31.253.1"
	// Issuer is who issues the cluster's tokens.
	Issuer = "https://kubernetes.default.svc.cluster.local"
	// pauseImage keeps a pod's namespaces.
	pauseImage   = "plastron.test/pause:1"
	busyboxImage = "docker.io/library/busybox:1.37"
)

//go:embed node.sh
var nodeScript string

// Cluster is a running cluster of one node.
type Cluster struct {
	// Dir holds its files: a directory per part, logs, and pki with the CA and the keys.
	Dir string

	programs string // of Kubernetes
	cgroups  []string
	machine  *parts.Program
	pid      int // the machine's first process, as seen from here
	dns      *dns
}

// Start starts a cluster with the programs of Kubernetes in a directory, and
// waits until its node is ready. After an error nothing is left running.
func Start(ctx context.Context, programs string) (_ *Cluster, err error) {
	dir, err := os.MkdirTemp("", "k8s")
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: dir, programs: programs}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w\n%s", err, c.Logs()), c.Close())
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	if err := writePKI(filepath.Join(dir, "pki")); err != nil {
		return nil, err
	}
	if err := c.startMachine(ctx); err != nil {
		return nil, err
	}
	if c.dns, err = serveDNS(c); err != nil {
		return nil, err
	}
	for _, p := range c.parts() {
		if err := c.start(ctx, p); err != nil {
			return nil, err
		}
	}
	return c, c.Until(ctx, "the node is ready", func() error {
		_, err := c.Kubectl(ctx, "", "wait", "--for=condition=Ready", "node/"+NodeName, "--timeout=5s")
		return err
	})
}

// startMachine makes the cgroups and the first process of the machine, which
// node.sh turns into one with its own mounts and network.
func (c *Cluster) startMachine(ctx context.Context) error {
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return err
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil { // version 2 alone
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"}
	}
	name := "plastron-" + filepath.Base(c.Dir)
	for _, h := range hierarchies {
		group := filepath.Join(filepath.Dir(h), name)
		if err := os.Mkdir(group, 0o755); err != nil {
			return err
		}
		c.cgroups = append(c.cgroups, group)
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // a new cpuset is empty, and takes no process
			if all, err := os.ReadFile(filepath.Join(filepath.Dir(group), file)); err == nil {
				if err := os.WriteFile(filepath.Join(group, file), all, 0o644); err != nil {
					return err
				}
			}
		}
	}
	script := filepath.Join(c.Dir, "node.sh")
	if err := os.WriteFile(script, []byte(nodeScript), 0o755); err != nil {
		return err
	}
	// The shell goes into the cgroups, becomes unshare, and that starts another,
	// which ends with it: however the test ends, so does the machine.
	enter := ""
	for _, group := range c.cgroups {
		enter += "echo 0 >" + group + "/cgroup.procs && "
	}
	cmd := exec.Command("/bin/sh", "-c", enter+`exec unshare --kill-child --fork --pid --mount-proc --mount --propagation slave --net --uts --ipc --cgroup \
		/bin/bash "$0" "$1"`, script, c.Dir)
	if c.machine, err = parts.StartProgram(cmd); err != nil {
		return err
	}
	return c.Until(ctx, "the machine is up", func() error {
		if _, err := os.Stat(filepath.Join(c.Dir, "up")); err != nil {
			return err
		}
		c.pid, err = c.child(c.machine.Pid())
		return err
	})
}

// child is the only child of a process.
func (c *Cluster) child(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// Command prepares a program that runs on the machine.
func (c *Cluster) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(c.pid), "--mount", "--net", "--uts", "--ipc", "--cgroup", "--pid", "--", c.program(program)}, args...)...)
	cmd.Dir = c.Dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME="+c.Dir, "KUBECONFIG="+filepath.Join(c.Dir, "pki", "admin.conf"))
	return cmd
}

// program is the path of one of Kubernetes' programs, or the name as it is.
func (c *Cluster) program(name string) string {
	path := filepath.Join(c.programs, name)
	if _, err := os.Stat(path); err != nil {
		return name
	}
	return path
}

// Kubectl runs kubectl as the cluster's administrator and returns what it prints.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := c.Command(ctx, "kubectl", args...)
	var out, problems bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &problems
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, &problems)
	}
	return out.String(), nil
}

// Import makes the images of an archive known to the node.
func (c *Cluster) Import(ctx context.Context, archive string) error {
	if out, err := c.Command(ctx, "ctr", "-n", "k8s.io", "images", "import", archive).CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w: %s", archive, err, out)
	}
	return nil
}

// Until calls a function until it succeeds, with a patience far beyond what
// anything here takes.
func (c *Cluster) Until(ctx context.Context, what string, done func() error) error {
	ctx, stop := context.WithTimeout(ctx, 3*time.Minute)
	defer stop()
	for {
		err := done()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-c.machine.Done():
			return fmt.Errorf("the machine ended before %s: %w: %s", what, err, c.machine.Output())
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, err)
		}
	}
}

// Logs are the ends of all logs.
func (c *Cluster) Logs() string {
	var out strings.Builder
	logs, _ := filepath.Glob(filepath.Join(c.Dir, "*.log"))
	for _, path := range logs {
		b, _ := os.ReadFile(path)
		fmt.Fprintf(&out, "== %s\n%s\n", filepath.Base(path), b[max(0, len(b)-3000):])
	}
	return out.String()
}

// Close ends every process of the machine, with which its mounts and networks go,
// and removes its cgroups and files.
func (c *Cluster) Close() error {
	if c.dns != nil {
		c.dns.close()
	}
	var errs []error
	if c.machine != nil {
		errs = append(errs, c.machine.Stop(syscall.SIGKILL))
	}
	for _, group := range c.cgroups {
		errs = append(errs, removeCgroup(group))
	}
	return errors.Join(append(errs, os.RemoveAll(c.Dir))...)
}

// removeCgroup removes a cgroup and those below. The kernel may still be ending
// the last processes in it.
func removeCgroup(group string) error {
	deadline := time.Now().Add(time.Minute)
	for {
		var left error
		dirs := []string{}
		_ = filepath.WalkDir(group, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := syscall.Rmdir(dirs[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
				left = fmt.Errorf("remove %s: %w", dirs[i], err)
			}
		}
		if left == nil || time.Now().After(deadline) {
			return left
		}
		time.Sleep(20 * time.Millisecond)
	}
}
