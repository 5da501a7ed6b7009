//go:build linux

package fleet_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/registry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

const (
	perTerm = 12                     // contents that the writers fight about
	term    = 400 * time.Millisecond // after which they go on to others, so that histories stay short
	nobody  = "spiffe://example.org/spire/agent/join_token/nobody"
)

// writers use the entry API of all servers at once and write down what they
// asked and what they were told.
type writers struct {
	f     *fleet
	began time.Time
	done  atomic.Int64 // calls that were answered with a yes
	stop  context.CancelFunc
	all   sync.WaitGroup
	hasty []*grpc.ClientConn
	wrong atomic.Pointer[string] // an answer that no fault explains

	mu     sync.Mutex // guards what is below
	ops    []op
	newest map[int]version // by content, what somebody was told last
}

// startWriters has n writers at work, until end is called.
func (f *fleet) startWriters(n int) *writers {
	f.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	w := &writers{f: f, began: time.Now(), stop: stop, newest: map[int]version{}}
	f.t.Cleanup(func() { stop(); w.all.Wait() })
	for _, s := range f.servers {
		w.hasty = append(w.hasty, f.dial(s.path("admin/api.sock"), grpc.WithStatsHandler(sentHandler{})))
	}
	for i := range n {
		w.all.Go(func() { w.run(ctx, i) })
	}
	return w
}

// more waits until n more calls have succeeded.
func (w *writers) more(n int64) {
	w.f.t.Helper()
	until := w.done.Load() + n
	eventually(w.f.t, "writers succeed", func() bool {
		if wrong := w.wrong.Load(); wrong != nil {
			w.f.t.Fatal(*wrong)
		}
		return w.done.Load() >= until
	})
}

func (w *writers) run(ctx context.Context, writer int) {
	rnd := rand.New(rand.NewPCG(uint64(writer), 7))
	wait := 20 * time.Millisecond
	for n := 0; ctx.Err() == nil; n++ {
		o := w.draw(rnd, fmt.Sprintf("w%d-%d", writer, n))
		o, sent := w.do(ctx, o)
		if sent {
			w.note(o)
		}
		if o.outcome != unknown && o.outcome != never {
			wait = 20 * time.Millisecond
			w.done.Add(1)
			continue
		}
		select {
		case <-time.After(wait/2 + rand.N(wait/2)):
		case <-ctx.Done():
		}
		wait = min(2*wait, 500*time.Millisecond)
	}
}

// draw decides what a writer does next.
func (w *writers) draw(rnd *rand.Rand, hint string) op {
	now := int(time.Since(w.began) / term)
	if now > 0 && rnd.IntN(4) == 0 {
		now--
	}
	o := op{server: rnd.IntN(len(w.f.servers)), content: now*perTerm + rnd.IntN(perTerm), hint: hint}
	if o.content%2 == 0 {
		o.id = fmt.Sprintf("c%d", o.content) // the same id again after a deletion
	}
	w.mu.Lock()
	known := w.newest[o.content]
	w.mu.Unlock()
	if known.id == "" && o.id == "" {
		return o
	}
	switch draw := rnd.IntN(20); {
	case draw < 7:
		return o
	case draw < 12:
		o.kind = update
		if known.rev != 0 && rnd.IntN(2) == 0 {
			o.expect = known.rev
		}
	case draw < 16:
		o.kind, o.hint = remove, ""
	default:
		o.kind, o.hint = read, ""
	}
	if o.id == "" {
		o.id = known.id
	}
	return o
}

func (w *writers) note(o op) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ops = append(w.ops, o)
	if o.got.rev > w.newest[o.content].rev {
		w.newest[o.content] = o.got
	}
}

// do makes the call and fills in what came of it. sent is false if the request
// never left, so that nothing can have happened.
func (w *writers) do(ctx context.Context, o op) (_ op, sent bool) {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	var left atomic.Bool
	call = context.WithValue(call, sentKey{}, &left)
	api := entryv1.NewEntryClient(w.hasty[o.server])
	var trailer metadata.MD
	var st *spiretypes.Status
	var e *spiretypes.Entry
	var err error
	wanted := &spiretypes.Entry{Id: o.id, ParentId: wireID(nobody), SpiffeId: wireID(fmt.Sprintf("spiffe://example.org/c/%d", o.content)),
		Selectors: []*spiretypes.Selector{{Type: "test", Value: "x"}}, Hint: o.hint}

	o.call = time.Since(w.began)
	switch o.kind {
	case create:
		var resp *entryv1.BatchCreateEntryResponse
		if resp, err = api.BatchCreateEntry(call, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{wanted}}, grpc.Trailer(&trailer)); err == nil {
			st, e = resp.Results[0].Status, resp.Results[0].Entry
		}
	case update:
		mask := &spiretypes.EntryMask{Hint: true}
		if o.expect != 0 {
			mask.RevisionNumber, wanted.RevisionNumber = true, int64(o.expect)
		}
		var resp *entryv1.BatchUpdateEntryResponse
		if resp, err = api.BatchUpdateEntry(call, &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{wanted}, InputMask: mask}, grpc.Trailer(&trailer)); err == nil {
			st, e = resp.Results[0].Status, resp.Results[0].Entry
		}
	case remove:
		var resp *entryv1.BatchDeleteEntryResponse
		if resp, err = api.BatchDeleteEntry(call, &entryv1.BatchDeleteEntryRequest{Ids: []string{o.id}}, grpc.Trailer(&trailer)); err == nil {
			st = resp.Results[0].Status
		}
	case read:
		e, err = api.GetEntry(call, &entryv1.GetEntryRequest{Id: o.id})
	}
	o.ret = time.Since(w.began)
	if st == nil {
		st = &spiretypes.Status{Code: int32(status.Code(err)), Message: status.Convert(err).Message()}
	}
	if e != nil {
		o.got = version{e.Id, e.Hint, uint64(e.RevisionNumber)}
	}
	o.rev = receipt(trailer)
	switch code := codes.Code(st.Code); {
	case code == codes.OK && (o.kind == read || o.rev != 0):
		o.outcome = ok
	case code == codes.AlreadyExists && o.kind == create && e != nil:
		o.outcome = exists
	case code == codes.NotFound && (o.kind != create):
		o.outcome = notFound
	case code == codes.Aborted && o.expect != 0 && strings.Contains(st.Message, "is at revision"):
		o.outcome = stale
	case promised(code, st.Message):
		o.outcome = never
	case code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.Canceled:
		// A server that was stopped or lost, or could not tell what became of it.
		o.outcome, o.ret = unknown, endless
	default:
		text := fmt.Sprintf("answer %v %q (receipt %d, entry %v) to %v", code, st.Message, o.rev, e, o)
		w.wrong.CompareAndSwap(nil, &text)
		o.outcome, o.ret = unknown, endless
	}
	if o.kind == read && (o.outcome == unknown || o.outcome == never) {
		return o, false
	}
	return o, left.Load()
}

// promised tells whether a refusal says that nothing was done.
func promised(code codes.Code, message string) bool {
	return code == codes.Aborted && strings.Contains(message, "others changed the same rows") ||
		code == codes.Unavailable && (strings.Contains(message, "nothing was written") || strings.Contains(message, "nothing of the change is there"))
}

// receipt is the revision that the trailer of a call names.
func receipt(trailer metadata.MD) uint64 {
	for _, text := range trailer.Get("plastron-receipt") {
		if c, err := registry.ParseCommitted(text); err == nil {
			return c.Position.Revision
		}
	}
	return 0
}

// sentHandler notes whether a request has left.
type sentHandler struct{}

type sentKey struct{}

func (sentHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (sentHandler) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, payload := s.(*stats.OutPayload); payload {
		if left, there := ctx.Value(sentKey{}).(*atomic.Bool); there {
			left.Store(true)
		}
	}
}
func (sentHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (sentHandler) HandleConn(context.Context, stats.ConnStats)                       {}

// end stops the writers and checks everything that must hold when the faults are
// over: servers that hold the same soon, a history that can be, whole rows.
func (w *writers) end(fresh time.Duration) {
	w.f.t.Helper()
	t := w.f.t
	w.stop()
	w.all.Wait()
	if wrong := w.wrong.Load(); wrong != nil {
		t.Fatal(*wrong)
	}
	for i, s := range w.f.servers { // each can write
		eventually(t, s.name+" writes", func() bool {
			o, _ := w.do(context.Background(), op{kind: remove, server: i, id: "none"})
			return o.outcome == notFound
		})
	}
	agreed := w.f.agree()

	// What is there at rest is told by each server alike.
	var first map[int]version
	for i := range w.f.servers {
		shown := w.shown(i)
		if i == 0 {
			first = shown
		}
		if fmt.Sprint(shown) != fmt.Sprint(first) {
			t.Errorf("servers 0 and %d list different entries: %v, %v", i, first, shown)
		}
	}
	now := time.Since(w.began)
	contents := map[int]bool{}
	for _, o := range w.ops {
		contents[o.content] = true
	}
	counts := map[outcome]int{}
	for _, o := range w.ops {
		counts[o.outcome]++
	}
	for content := range first {
		if !contents[content] {
			t.Errorf("there is an entry of content %d, which nobody asked for", content)
		}
	}
	for content := range contents {
		o := op{kind: last, content: content, outcome: notFound, call: now, ret: now + 1}
		if v, there := first[content]; there {
			o.outcome, o.got = ok, v
		}
		w.ops = append(w.ops, o)
	}
	began := time.Now()
	lag, err := check(w.ops, fresh)
	if err != nil {
		t.Error(err)
	}
	checked := w.f.whole()
	t.Logf("%d calls on %d contents (%d ok, %d exist, %d not found, %d stale, %d unknown, %d promised not to be), checked in %v; reads were up to %v behind; servers agreed after %v; %s",
		len(w.ops), len(contents), counts[ok], counts[exists], counts[notFound], counts[stale], counts[unknown], counts[never],
		time.Since(began).Round(time.Millisecond), lag.Round(time.Millisecond), agreed.Round(time.Millisecond), checked)
}

// shown is what a server lists, by content.
func (w *writers) shown(server int) map[int]version {
	t := w.f.t
	t.Helper()
	list, err := w.f.servers[server].entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	out := map[int]version{}
	for _, e := range list.Entries {
		var content int
		if _, err := fmt.Sscanf(e.SpiffeId.Path, "/c/%d", &content); err != nil {
			continue // an agent's
		}
		if _, twice := out[content]; twice {
			t.Errorf("two entries of content %d", content)
		}
		out[content] = version{e.Id, e.Hint, uint64(e.RevisionNumber)}
	}
	return out
}

// whole has each server prove that the rows of the store fit one another and the
// log, and that its own audit trail is unbroken (R126). It returns how
// the last of them begins.
func (f *fleet) whole() (said string) {
	f.t.Helper()
	for _, s := range f.servers {
		said, _, _ = strings.Cut(s.run("server", "db", "check"), "\n")
	}
	return said
}
