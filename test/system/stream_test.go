package system_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// received is one message of a FetchX509SVID stream, or its end.
type received struct {
	ids    []string
	leaves map[string]*x509.Certificate // by SPIFFE ID
	err    error
}

// watchX509 opens a stream, once there is something to get, and passes on what it brings.
func (d *deployment) watchX509(ctx context.Context) <-chan received {
	d.t.Helper()
	d.waitServed()
	stream, err := d.workloadAPI().FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		d.t.Fatal(err)
	}
	c := make(chan received, 64)
	go func() {
		defer close(c)
		for {
			msg, err := stream.Recv()
			if err != nil {
				c <- received{err: err}
				return
			}
			r := received{leaves: map[string]*x509.Certificate{}}
			for _, s := range msg.Svids {
				r.ids = append(r.ids, s.SpiffeId)
				certs, err := x509.ParseCertificates(s.X509Svid)
				if err != nil {
					r.err = err
				} else {
					r.leaves[s.SpiffeId] = certs[0]
				}
			}
			c <- r
		}
	}()
	return c
}

// next waits for a message for which ok holds, skipping others.
func next(t testing.TB, c <-chan received, what string, ok func(received) bool) received {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case r, open := <-c:
			if !open {
				t.Fatalf("the stream ended before: %s", what)
			}
			if ok(r) {
				return r
			}
			if r.err != nil {
				t.Fatalf("waiting for %s: %v", what, r.err)
			}
		case <-deadline:
			t.Fatalf("never came: %s", what)
		}
	}
}

// An open stream hears of a new entry, of its new TTL and DNS names, and of its
// end; and nothing polls in between. R42, RG16, RG17.
func TestOpenStreamFollowsTheEntry(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/first", nil, mine())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := d.watchX509(ctx)
	next(t, c, "the first message", func(r received) bool { return len(r.ids) == 1 && r.ids[0] == "spiffe://example.org/first" })

	began := time.Now()
	second := d.createEntry(agent, "/second", nil, mine(), fmt.Sprintf("unix:gid:%d", os.Getgid()))
	next(t, c, "a message with both identities", func(r received) bool { return len(r.ids) == 2 })
	t.Logf("entry create to message: %v", time.Since(began))

	api := d.entries()
	list, err := api.ListEntries(ctx, &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var first *spiretypes.Entry
	for _, e := range list.Entries {
		if e.SpiffeId.Path == "/first" {
			first = e
		}
	}
	first.X509SvidTtl = 600
	update := func(e *spiretypes.Entry, mask *spiretypes.EntryMask) {
		t.Helper()
		resp, err := api.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		if resp.Results[0].Status.Code != 0 {
			t.Fatal(resp.Results[0].Status)
		}
	}
	update(first, &spiretypes.EntryMask{X509SvidTtl: true})
	next(t, c, "a certificate with the new TTL", func(r received) bool {
		leaf := r.leaves["spiffe://example.org/first"]
		return leaf != nil && leaf.NotAfter.Before(time.Now().Add(601*time.Second))
	})
	first.DnsNames = []string{"first.example.org"}
	update(first, &spiretypes.EntryMask{DnsNames: true})
	next(t, c, "a certificate with the DNS name", func(r received) bool {
		leaf := r.leaves["spiffe://example.org/first"]
		return leaf != nil && len(leaf.DNSNames) == 1 && leaf.DNSNames[0] == "first.example.org"
	})

	d.run("server", "entry", "delete", "-socketPath", d.adminSocket(), "-entryID", second.Id)
	next(t, c, "a message without the second identity", func(r received) bool { return len(r.ids) == 1 })
	d.run("server", "entry", "delete", "-socketPath", d.adminSocket(), "-entryID", first.Id)
	last := next(t, c, "the end of the stream", func(r received) bool { return r.err != nil })
	if status.Code(last.err) != codes.PermissionDenied {
		t.Errorf("the stream ended with %v, want PermissionDenied", last.err)
	}
}

// Without exactly one security header every call is InvalidArgument. R51, W1.
func TestHeaderIsAskedFor(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.start()
	api := d.workloadAPI()
	for name, md := range map[string]metadata.MD{
		"none":      {},
		"True":      metadata.Pairs("workload.spiffe.io", "True"),
		"two":       metadata.Pairs("workload.spiffe.io", "true", "workload.spiffe.io", "true"),
		"other key": metadata.Pairs("broker.spiffe.io", "true"),
	} {
		ctx := metadata.NewOutgoingContext(t.Context(), md)
		x509, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = x509.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("FetchX509SVID with header %s: %v", name, err)
		}
		if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("FetchJWTSVID with header %s: %v", name, err)
		}
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "b"}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ValidateJWTSVID with header %s: %v", name, err)
		}
	}
	// and with it, a process without an entry is told so
	_, err := api.FetchJWTSVID(withHeader(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("without an entry: %v", err)
	}
}

// openssl verifies the leaf with its intermediates against the bundle, and the
// written key belongs to it.
func TestOpenSSLVerifies(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/web", func(e *spiretypes.Entry) { e.DnsNames = []string{"web.example.org"} }, mine())
	out := d.path("out")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an SVID", func() bool {
		return exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-write", out).Run() == nil
	})
	openssl := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("openssl", args...)
		cmd.Dir = out
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, b)
		}
		return string(b)
	}
	if got := openssl("verify", "-x509_strict", "-CAfile", "bundle.0.pem", "-untrusted", "svid.0.pem", "svid.0.pem"); !strings.Contains(got, "OK") {
		t.Errorf("openssl verify: %s", got)
	}
	text := openssl("x509", "-in", "svid.0.pem", "-noout", "-text")
	for _, want := range []string{"URI:spiffe://example.org/web", "DNS:web.example.org", "CA:FALSE", "TLS Web Server Authentication, TLS Web Client Authentication"} {
		if !strings.Contains(text, want) {
			t.Errorf("the certificate does not say %q:\n%s", want, text)
		}
	}
	if a, b := openssl("x509", "-in", "svid.0.pem", "-noout", "-pubkey"), openssl("pkey", "-in", "svid.0.key", "-pubout"); a != b {
		t.Errorf("key and certificate differ:\n%s%s", a, b)
	}
	info, err := os.Stat(filepath.Join(out, "svid.0.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v %v", info.Mode(), err)
	}
}

// While nothing happens nothing is done: neither the database is read nor a
// message sent. strace sees every system call of both processes.
func TestIdleCostsNothing(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/idle", nil, mine())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := d.watchX509(ctx)
	next(t, c, "the first message", func(r received) bool { return len(r.ids) == 1 })
	// That the agent holds the bundle is written once, a second after it has said so.
	eventually(t, "everything that the start brought is written", func() bool {
		wal, err := os.Stat(d.path("server/plastron.db-wal"))
		return err == nil && time.Since(wal.ModTime()) > 3*time.Second
	})

	for name, p := range map[string]*process{"server": d.server, "agent": d.agent} {
		trace := d.path(name + ".trace")
		// file and socket input and output; not futex and the like
		cmd := exec.Command("strace", "-f", "-y", "-o", trace, "-p", fmt.Sprint(p.cmd.Process.Pid),
			"-e", "trace=pread64,pwrite64,read,write,sendto,recvfrom,sendmsg,recvmsg,fsync,fdatasync")
		began := time.Now()
		tracer := start(t, cmd)
		eventually(t, "strace is attached", func() bool { return strings.Contains(tracer.Output(), "attached") })
		select { // the idle time that is looked at; long enough for any poll of 5 s to show three times
		case <-time.After(16 * time.Second):
		case r := <-c:
			t.Fatalf("a message came while nothing happened: %+v", r)
		}
		tracer.stop(syscall.SIGINT)
		took := time.Since(began)
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		var messages, syncs int
		for line := range strings.Lines(string(b)) {
			switch {
			case strings.Contains(line, "plastron.db"), strings.Contains(line, "/position>"):
				t.Errorf("the idle %s touched its store: %s", name, line)
			case strings.Contains(line, "sync("):
				syncs++
			case strings.Contains(line, "TCP:["), strings.Contains(line, "socket:["), strings.Contains(line, "UNIX"):
				if !strings.Contains(line, "EAGAIN") {
					messages++
				}
			}
		}
		// what was recorded before may be made durable once
		if syncs > 1 {
			t.Errorf("the idle %s synced %d times:\n%s", name, syncs, b)
		}
		// one keepalive exchange in 30 s may fall into the window: a ping and its answer
		if messages > 4*(1+int(took/(30*time.Second))) {
			t.Errorf("the idle %s sent or received %d times in %v:\n%s", name, messages, took, b)
		}
		t.Logf("%s: %d reads or writes on sockets in %v", name, messages, took.Round(time.Second))
	}
}

// The server is killed with SIGKILL under writes; the agent serves on, comes
// back by itself, and every acknowledged entry is there. R56, R73.
func TestServerKilledUnderLoad(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/steady", nil, mine())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := d.watchX509(ctx)
	next(t, c, "the first message", func(r received) bool { return len(r.ids) == 1 })

	var acked []string
	for round := range 3 {
		api := d.entries()
		writing, first := make(chan []string), make(chan struct{})
		writeCtx, stopWriting := context.WithCancel(ctx)
		go func() {
			var ids []string
			defer func() { writing <- ids }()
			for i := 0; ; i++ {
				id := fmt.Sprintf("e-%d-%d", round, i)
				resp, err := api.BatchCreateEntry(writeCtx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
					Id: id, ParentId: wireID(agent), SpiffeId: wireID("spiffe://example.org/" + id),
					Selectors: []*spiretypes.Selector{{Type: "unix", Value: "uid:4242"}},
				}}})
				if err != nil {
					return
				}
				if resp.Results[0].Status.Code == 0 {
					if ids = append(ids, id); len(ids) == 1 {
						close(first)
					}
				}
			}
		}()
		select {
		case <-first:
		case <-time.After(patience):
			t.Fatal("no write was acknowledged")
		}
		kill := time.NewTimer(time.Duration(300+200*round) * time.Millisecond)
		<-kill.C
		d.server.stop(syscall.SIGKILL)
		ids := <-writing
		stopWriting()
		acked = append(acked, ids...)

		// a new workload is served while the server is away
		fresh, cancelFresh := context.WithCancel(ctx)
		r := next(t, d.watchX509(fresh), "an answer from the agent alone", func(r received) bool { return len(r.ids) == 1 })
		if r.leaves[r.ids[0]].NotAfter.Before(time.Now()) {
			t.Error("an expired certificate was served")
		}
		cancelFresh()
		d.startServer()
	}
	d.createEntry(agent, "/after", nil, mine(), fmt.Sprintf("unix:gid:%d", os.Getgid()))
	next(t, c, "the entry made after the last restart", func(r received) bool { return len(r.ids) == 2 })
	list, err := d.entries().ListEntries(ctx, &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, e := range list.Entries {
		have[e.Id] = true
	}
	for _, id := range acked {
		if !have[id] {
			t.Errorf("acknowledged entry %s is gone", id)
		}
	}
	t.Logf("%d entries acknowledged over 3 kills, all there", len(acked))
}

// A store put back from a backup is a new epoch; the agent compares hashes and
// goes on without refusing the server. R75, R83 in part.
func TestRestoredStore(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/kept", nil, mine())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := d.watchX509(ctx)
	next(t, c, "the first message", func(r received) bool { return len(r.ids) == 1 })
	unused, _ := d.token()

	d.server.stop(syscall.SIGTERM)
	backup := map[string][]byte{}
	files, err := filepath.Glob(d.path("server/plastron.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no database in %s: %v", d.path("server"), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		backup[f] = b
	}
	d.startServer()
	d.createEntry(agent, "/lost", nil, mine(), fmt.Sprintf("unix:gid:%d", os.Getgid()))
	next(t, c, "both identities", func(r received) bool { return len(r.ids) == 2 })
	d.server.stop(syscall.SIGTERM)
	for _, f := range files {
		os.Remove(f)
	}
	now, _ := filepath.Glob(d.path("server/plastron.db*"))
	for _, f := range now {
		os.Remove(f)
	}
	for f, b := range backup {
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.startServer()
	next(t, c, "the restored grants: one identity again", func(r received) bool { return len(r.ids) == 1 })
	d.createEntry(agent, "/new", nil, mine(), fmt.Sprintf("unix:gid:%d", os.Getgid()))
	next(t, c, "a change after the restore", func(r received) bool { return len(r.ids) == 2 })

	// R21: a token made before the restore is void
	second := newDeployment(t)
	second.port, second.server = d.port, d.server
	second.write("bundle.pem", d.run("server", "bundle", "show", "-socketPath", d.adminSocket()))
	p := second.runAgentExpectingRefusal(unused)
	if !strings.Contains(p, "token") {
		t.Errorf("a token of before the restore was answered:\n%s", p)
	}
}

// runAgentExpectingRefusal starts an agent that must end by itself with an error; it returns what it printed.
func (d *deployment) runAgentExpectingRefusal(token string) string {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, plastron, "agent", "run", "-config", "/dev/stdin")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(`agent {
  data_dir = %q
  server_address = "127.0.0.1"
  server_port = %d
  socket_path = %q
  trust_domain = "example.org"
  trust_bundle_path = %q
  join_token = %q
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, d.path("agent"), d.port, d.workloadSocket(), d.path("bundle.pem"), token))
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		d.t.Fatalf("the agent neither joined nor ended:\n%s", out)
	}
	if exit := new(exec.ExitError); !errors.As(err, &exit) {
		d.t.Fatalf("the agent was let in with a void token: %v\n%s", err, out)
	}
	return string(out)
}
