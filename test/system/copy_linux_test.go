package system_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// handshaker is a workload that makes one mutual TLS connection to itself after
// another, over the identity that the agent gives it.
type handshaker struct {
	made    atomic.Int64
	mu      sync.Mutex
	failure error // the first
	stop    func()
}

func (d *deployment) handshake(id string) *handshaker {
	d.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.workloadSocket())))
	if err != nil {
		cancel()
		d.t.Fatal(err)
	}
	only := tlsconfig.AuthorizeID(spiffeid.RequireFromString(id))
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, only))
	if err != nil {
		cancel()
		d.t.Fatal(err)
	}
	h := &handshaker{}
	var accepting, dialling sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				io.Copy(conn, conn)
				conn.Close()
			}
		}
	})
	dialling.Go(func() {
		config := tlsconfig.MTLSClientConfig(source, source, only)
		for ctx.Err() == nil {
			err := exchange(listener.Addr().String(), config)
			h.mu.Lock()
			if h.failure == nil {
				h.failure = err
			}
			h.mu.Unlock()
			h.made.Add(1)
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	h.stop = sync.OnceFunc(func() {
		cancel()
		dialling.Wait() // before nobody accepts any more
		listener.Close()
		accepting.Wait()
		source.Close()
	})
	d.t.Cleanup(h.stop)
	return h
}

func exchange(addr string, config *tls.Config) error {
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 4))
	return err
}

// copyStore copies as old.conf and new.conf say. It kills the first attempts: the
// next one goes on, or says that all had been done.
func (d *deployment) copyStore() {
	d.t.Helper()
	args := []string{"server", "db", "copy", "-from", d.path("old.conf"), "-to", d.path("new.conf")}
	for _, after := range []time.Duration{30, 80, 130, 180} {
		killed := start(d.t, exec.Command(plastron, args...))
		select {
		case <-time.After(after * time.Millisecond):
		case <-killed.done:
		}
		killed.stop(syscall.SIGKILL)
	}
	out, err := exec.Command(plastron, args...).CombinedOutput()
	if said := string(out); err == nil != strings.Contains(said, "are in both stores") || err != nil && !strings.Contains(said, "is copied to") {
		d.t.Fatalf("copy: %v\n%s", err, out)
	}
}

// TestCopiedStore moves a trust domain from SQLite to PostgreSQL and on to etcd,
// each time with an agent that stays and a workload that makes mutual TLS
// connections all the while: nobody attests again, no identity lapses, join
// tokens of before are void, and no server starts on what was copied away.
// R21, R75.
func TestCopiedStore(t *testing.T) {
	t.Parallel()
	p, e := startPostgres(t), startEtcd(t)
	if err := p.Exec(context.Background(), "postgres", "CREATE DATABASE plastron"); err != nil {
		t.Fatal(err)
	}
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/web", nil, mine())
	d.waitServed()
	work := d.handshake("spiffe://example.org/web")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := d.watchX509(ctx)
	next(t, stream, "the first message", func(r received) bool { return len(r.ids) == 1 })
	first := d.run("server", "agent", "show", "-spiffeID", agent, "-socketPath", d.adminSocket())

	for i, block := range []string{postgresBlock(p, "plastron"), etcdBlock(e, "/moved/")} {
		unused, _ := d.token()
		if out, err := exec.Command(plastron, "server", "db", "copy", "-from", d.path("server.conf"), "-to", d.path("server.conf")).CombinedOutput(); err == nil {
			t.Fatalf("copied from under a server:\n%s", out)
		}
		d.server.stop(syscall.SIGTERM)
		d.write("old.conf", d.serverConfig())
		d.dataStore = block
		d.write("new.conf", d.serverConfig())
		d.copyStore()
		refused, err := exec.Command(plastron, "server", "run", "-config", d.path("old.conf")).CombinedOutput()
		if err == nil || !strings.Contains(string(refused), "was copied to") || !strings.Contains(string(refused), "-undo") {
			t.Errorf("a server on the old store: %v\n%s", err, refused)
		}
		made := work.made.Load()
		d.startServer()
		d.createEntry(agent, []string{"/more", "/most"}[i], nil, mine())
		next(t, stream, "an entry from the new store", func(r received) bool { return len(r.ids) == i+2 })
		if now := d.run("server", "agent", "show", "-spiffeID", agent, "-socketPath", d.adminSocket()); now != first {
			t.Errorf("the agent's row was\n%s\nand is\n%s", first, now)
		}
		other := newDeployment(t)
		other.port, other.server = d.port, d.server
		other.write("bundle.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
		if said := other.runAgentExpectingRefusal(unused); !strings.Contains(said, "token") {
			t.Errorf("a token of before:\n%s", said)
		}
		d.run("server", "db", "check", "-config", d.path("new.conf"))
		eventually(t, "more connections", func() bool { return work.made.Load() > made })
	}
	work.stop()
	if work.failure != nil {
		t.Errorf("of %d mutual TLS connections one failed: %v", work.made.Load(), work.failure)
	}
	if out := d.agent.Output(); strings.Count(out, "attested") != 1 {
		t.Errorf("the agent attested again:\n%s", out)
	}
	t.Logf("%d mutual TLS connections over two moves", work.made.Load())
}
