package registry

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// keptBatches is how many of the latest batches that affected some agent are
	// remembered, and keptTouches how many agents in all of them.
	keptBatches = 16384
	keptTouches = 1 << 20
)

// Committed names one committed transaction: a write of a batch. Every server
// folds the same batches, so each of them knows what it names.
type Committed struct {
	Position store.Position
	Write    int // its place in the batch
}

// String returns a text that ParseCommitted reads.
func (c Committed) String() string {
	return fmt.Sprintf("%x.%d.%d", c.Position.Epoch[:], c.Position.Revision, c.Write)
}

// ParseCommitted reads what String wrote.
func ParseCommitted(text string) (c Committed, err error) {
	bad := fault.New(fault.Invalid, "receipt_invalid", "%q names no change", cutText(text)).Fix("give what the server said with the change")
	parts := strings.Split(text, ".")
	if len(parts) != 3 || len(parts[0]) != hex.EncodedLen(len(c.Position.Epoch)) {
		return c, bad
	}
	if _, err := hex.Decode(c.Position.Epoch[:], []byte(parts[0])); err != nil {
		return c, bad
	}
	if c.Position.Revision, err = strconv.ParseUint(parts[1], 10, 64); err != nil {
		return c, bad
	}
	if c.Write, err = strconv.Atoi(parts[2]); err != nil || c.Write < 0 || c.String() != text {
		return c, bad
	}
	return c, nil
}

func cutText(text string) string { return text[:min(len(text), 100)] }

type noteKey struct{}

// Noting returns a context with which every Update that commits calls note,
// before it returns.
func Noting(ctx context.Context, note func(Committed)) context.Context {
	return context.WithValue(ctx, noteKey{}, note)
}

// touches remembers which agents the latest transactions affected. The
// registry's lock guards it.
type touches struct {
	after   uint64         // what was committed after this revision is remembered
	batches []touchedBatch // in the order of revisions; those that affected nobody are left out
	agents  int            // in all of them

	turn uint64   // grows with each transaction, so that an agent is noted once for each
	now  []string // paths of the agents that the present transaction affects
	made []touchedWrite
}

type touchedBatch struct {
	revision uint64
	writes   []touchedWrite
}

type touchedWrite struct {
	key    string // one that the transaction wrote; no other of the batch did
	agents []string
}

// add notes that the present transaction affects an agent.
func (t *touches) add(n *node) {
	if n.touched != t.turn+1 {
		n.touched = t.turn + 1
		t.now = append(t.now, n.path)
	}
}

// wrote ends the present transaction.
func (t *touches) wrote(w store.Write) {
	made := touchedWrite{agents: t.now}
	if len(w.Changes) > 0 {
		made.key = w.Changes[0].Key
	}
	t.made = append(t.made, made)
	t.now = nil
	t.turn++
}

// folded ends the present batch.
func (t *touches) folded(revision uint64) {
	agents := 0
	for _, w := range t.made {
		agents += len(w.agents)
	}
	if agents > 0 {
		t.batches = append(t.batches, touchedBatch{revision, t.made})
		t.agents += agents
	}
	t.made = nil
	for len(t.batches) > keptBatches || t.agents > keptTouches && len(t.batches) > 1 {
		for _, w := range t.batches[0].writes {
			t.agents -= len(w.agents)
		}
		t.after = t.batches[0].revision
		t.batches[0] = touchedBatch{}
		t.batches = t.batches[1:]
	}
}

// forget begins anew at a revision, after the log could not be followed.
func (t *touches) forget(revision uint64) { *t = touches{after: revision, turn: t.turn} }

// at returns what is remembered of a batch; nil: it affected nobody.
func (t *touches) at(revision uint64) []touchedWrite {
	i, found := slices.BinarySearchFunc(t.batches, revision, func(b touchedBatch, r uint64) int { return cmp.Compare(b.revision, r) })
	if !found {
		return nil
	}
	return t.batches[i].writes
}

// note tells whoever Noting named which transaction was committed. It is visible here.
func (r *Registry) note(ctx context.Context, at store.Position, txn *store.Txn) {
	note, ok := ctx.Value(noteKey{}).(func(Committed))
	if !ok {
		return
	}
	wrote := func(w touchedWrite) bool {
		return slices.Contains(txn.Deletes, w.key) || slices.ContainsFunc(txn.Puts, func(p store.Put) bool { return p.Key == w.key })
	}
	r.mu.RLock()
	write := slices.IndexFunc(r.touches.at(at.Revision), wrote)
	r.mu.RUnlock()
	note(Committed{at, max(write, 0)}) // not found: then nobody is affected, whichever it is
}

// Touched returns the agents that a transaction affects: what each is granted
// changed by it, or the agent itself came or went. An agent may be named twice.
// A transaction that is of another epoch, too old, or not yet seen here is
// fault.Precondition, "receipt_unknown".
func (r *Registry) Touched(c Committed) ([]spiffeid.ID, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	at := r.state.position
	if c.Position.Epoch != at.Epoch || c.Position.Revision > at.Revision || c.Position.Revision <= r.touches.after {
		return nil, receiptUnknown(c.Position)
	}
	writes := r.touches.at(c.Position.Revision)
	if c.Write < 0 || c.Write >= len(writes) {
		return nil, nil
	}
	agents := make([]spiffeid.ID, len(writes[c.Write].agents))
	for i, path := range writes[c.Write].agents {
		agents[i] = spiffeid.RequireFromPath(r.td, path) // it was checked on its way in
	}
	return agents, nil
}

func receiptUnknown(p store.Position) error {
	return fault.New(fault.Precondition, "receipt_unknown", "which agents the change at revision %d affects is not known any more", p.Revision).
		Fix("the change is made; see with 'plastron server agent list' which agents there are")
}
