package parts

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Etcd is a private etcd cluster.
type Etcd struct {
	Endpoints []string // of the members, in order

	dir     string
	program string
	members []*etcdMember
	ports   []*Port
}

type etcdMember struct {
	args    []string
	health  string
	log     string
	process *process
}

// StartEtcd makes a cluster of so many members, with more flags for each, and
// starts it. With --cert-file among the flags its clients use https.
func StartEtcd(ctx context.Context, members int, flags ...string) (*Etcd, error) {
	program, err := find("etcd", "etcd-server")
	if err != nil {
		return nil, err
	}
	e := &Etcd{program: program}
	if e.dir, err = privateDir(); err != nil {
		return nil, err
	}
	scheme := "http"
	if slices.ContainsFunc(flags, func(f string) bool { return strings.HasPrefix(f, "--cert-file") }) {
		scheme = "https"
	}
	var cluster []string
	for i := range members {
		var urls [3]string
		for j := range urls {
			port, err := ReservePort()
			if err != nil {
				e.Close()
				return nil, err
			}
			e.ports = append(e.ports, port)
			urls[j] = fmt.Sprintf("http://127.0.0.1:%d", port.Number)
		}
		name := fmt.Sprintf("m%d", i)
		client, peer, metrics := strings.Replace(urls[0], "http", scheme, 1), urls[1], urls[2]
		cluster = append(cluster, name+"="+peer)
		e.Endpoints = append(e.Endpoints, client)
		e.members = append(e.members, &etcdMember{
			health: metrics + "/health", log: filepath.Join(e.dir, name+".log"),
			args: append([]string{"--name", name, "--data-dir", filepath.Join(e.dir, name), "--log-level", "warn",
				"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-metrics-urls", metrics,
				"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer}, flags...),
		})
	}
	for i, m := range e.members {
		m.args = append(m.args, "--initial-cluster", strings.Join(cluster, ","), "--initial-cluster-token", filepath.Base(e.dir))
		if err := e.begin(i); err != nil {
			e.Close()
			return nil, err
		}
	}
	for i := range e.members {
		if err := e.Ready(ctx, i); err != nil {
			e.Close()
			return nil, err
		}
	}
	return e, nil
}

func (e *Etcd) begin(i int) error {
	m := e.members[i]
	cmd, err := command(e.dir, m.log, e.program, m.args...)
	if err != nil {
		return err
	}
	m.process, err = start(cmd)
	return err
}

// Start starts a member again and waits until it answers.
func (e *Etcd) Start(ctx context.Context, i int) error {
	if err := e.begin(i); err != nil {
		return err
	}
	return e.Ready(ctx, i)
}

// Ready waits until a member says that it is healthy, which needs a leader.
func (e *Etcd) Ready(ctx context.Context, i int) error {
	m := e.members[i]
	ctx, stop := context.WithTimeout(ctx, 120*time.Second)
	defer stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.health, nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
			resp.Body.Close()
			// With an alarm it answers, but not that it is healthy.
			if resp.StatusCode == http.StatusOK || strings.Contains(string(body), "ALARM") {
				return nil
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-m.process.done:
			return fmt.Errorf("etcd ended\n%s", tail(m.log))
		case <-ctx.Done():
			return fmt.Errorf("etcd does not answer: %w\n%s", ctx.Err(), tail(m.log))
		}
	}
}

// Leader returns the member that leads, as a member that runs says.
func (e *Etcd) Leader(ctx context.Context) (int, error) {
	ctx, stop := context.WithTimeout(ctx, 120*time.Second)
	defer stop()
	for {
		for i, endpoint := range e.Endpoints {
			var answer struct {
				Leader string `json:"leader"`
				Header struct {
					Member string `json:"member_id"`
				} `json:"header"`
			}
			if err := ask(ctx, endpoint+"/v3/maintenance/status", &answer); err == nil && answer.Leader == answer.Header.Member {
				return i, nil
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return 0, fmt.Errorf("no member of etcd leads: %w", ctx.Err())
		}
	}
}

// ask calls a method of etcd without arguments through its JSON gateway.
func ask(ctx context.Context, url string, answer any) error {
	ctx, stop := context.WithTimeout(ctx, time.Second) // a frozen member does not answer
	defer stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader("{}"))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(answer)
}

// Save writes a snapshot of the cluster, as etcdctl does.
func (e *Etcd) Save(snapshot string) error {
	return e.etcdctl("--endpoints", e.Endpoints[0], "snapshot", "save", filepath.Join(e.dir, snapshot))
}

// Restore ends the cluster and starts it again from a snapshot, under a token.
func (e *Etcd) Restore(ctx context.Context, snapshot, token string) error {
	for i, m := range e.members {
		if err := e.Kill(i); err != nil {
			return err
		}
		flag := func(name string) string { return m.args[slices.Index(m.args, name)+1] }
		data := flag("--data-dir")
		if err := os.RemoveAll(data); err != nil {
			return err
		}
		if err := e.etcdctl("snapshot", "restore", filepath.Join(e.dir, snapshot), "--data-dir", data, "--name", flag("--name"),
			"--initial-cluster", flag("--initial-cluster"), "--initial-advertise-peer-urls", flag("--initial-advertise-peer-urls"),
			"--initial-cluster-token", token); err != nil {
			return err
		}
	}
	for i := range e.members {
		if err := e.begin(i); err != nil {
			return err
		}
	}
	for i := range e.members {
		if err := e.Ready(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// etcdctl runs that program; newer versions of etcd have etcdutl for restoring.
func (e *Etcd) etcdctl(args ...string) error {
	program, err := find("etcdctl", "etcd-client")
	if err != nil {
		return err
	}
	log := filepath.Join(e.dir, "etcdctl.log")
	cmd, err := command(e.dir, log, program, args...)
	if err != nil {
		return err
	}
	cmd.Env = append(cmd.Env, "ETCDCTL_API=3")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("etcdctl: %w\n%s", err, tail(log))
	}
	return nil
}

// Kill ends a member with SIGKILL.
func (e *Etcd) Kill(i int) error { return e.members[i].process.stop(syscall.SIGKILL) }

// Freeze stops a member where it stands.
func (e *Etcd) Freeze(i int) error { return freeze(e.members[i].process.cmd.Process.Pid) }

// Thaw lets a frozen member go on.
func (e *Etcd) Thaw(i int) error { return e.members[i].process.cmd.Process.Signal(syscall.SIGCONT) }

// Close ends the cluster and removes it.
func (e *Etcd) Close() error {
	for _, m := range e.members {
		if m.process != nil {
			m.process.stop(syscall.SIGKILL)
		}
	}
	for _, port := range e.ports {
		port.Release()
	}
	return os.RemoveAll(e.dir)
}
