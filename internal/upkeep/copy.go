package upkeep

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of the transactions in which a copy is written.
const (
	copyKeys  = 100
	copyBytes = 128 << 10
	copyTxns  = 8 // given to the store at once

	// copyPatience is for how long a store may take nothing.
	copyPatience = 2 * time.Minute
	copyPause    = 500 * time.Millisecond
)

// Side is one of the two stores of a copy.
type Side struct {
	store.Store
	Place  string // what people know it by; no secret
	Shared bool   // servers may have it open besides us
}

// Copying is a copy from one store into another.
type Copying struct {
	From, To    Side
	TrustDomain spiffeid.TrustDomain
}

// Copied says what a copy did.
type Copied struct {
	Rows, Bytes uint64 // of both stores
	Written     uint64 // rows that were not there yet
	Tokens      uint64 // unused and used ones, all void in the new epoch
	Digest      [32]byte
	From, To    store.Position
}

// Run copies everything into an empty store and compares the two. Neither is used
// by a server meanwhile: both are marked first, and the target's mark goes when
// all is there and equal. A copy that was cut off goes on where it was when it is
// run again. Afterwards the source keeps its mark, so that nobody starts on it by
// mistake and there are two trust domains of one name.
//
// Every row is copied as it is, so that agents, which compare what they hold by
// content, notice nothing; only revisions and the epoch are the target's own.
func (c *Copying) Run(ctx context.Context) (*Copied, error) {
	mark, seen, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	out := &Copied{}
	from, err := c.fill(ctx, mark, seen, out)
	if err != nil {
		return nil, err
	}
	to, err := c.scan(ctx, &c.To)
	if err != nil {
		return nil, err
	}
	now, err := c.From.Stats(ctx)
	switch {
	case err != nil:
		return nil, err
	case now.End != from.at || from.running != "":
		return nil, fault.New(fault.Conflict, "source_changed", "something was written to %s while it was copied", c.From.Place).
			Fix("stop every server that uses it, then run the same copy again")
	case to.rows != from.rows || to.sum != from.sum:
		return nil, fault.New(fault.Precondition, "copy_differs", "%s holds %d rows and %s %d, or their contents differ", c.From.Place, from.rows, c.To.Place, to.rows).
			Fix("run the same copy again; if it stays so, report it")
	}
	done := store.Txn{Caller: "copy", Conditions: []store.Condition{mark}, Deletes: []string{registry.CopyingHere}}
	if err := c.commit(ctx, &c.To, done); err != nil {
		return nil, err
	}
	out.Rows, out.Bytes, out.Tokens, out.Digest, out.From = from.rows, from.bytes, from.tokens, from.sum.Bytes(), from.at
	after, err := c.To.Stats(ctx)
	out.To = after.End
	return out, err
}

// Undo takes the mark of a copy away from the source.
func (c *Copying) Undo(ctx context.Context) error {
	s, err := c.scan(ctx, &c.From)
	if err != nil {
		return err
	}
	if s.away == nil {
		return fault.New(fault.Precondition, "not_copied", "%s was not copied away", c.From.Place).
			Fix("nothing is to be done: servers start on it")
	}
	return c.commit(ctx, &c.From, store.Txn{
		Caller: "copy", Conditions: []store.Condition{{Key: registry.CopiedAway, Revision: s.awayAt}}, Deletes: []string{registry.CopiedAway},
	})
}

// scanned is what one store holds, without marks and what is not copied.
type scanned struct {
	at                  store.Position
	rows, bytes, tokens uint64
	sum                 entry.Sum
	here, away          *registry.CopyMark
	hereAt, awayAt      uint64 // revisions of these
	owner               string
	running             string // id of a server that goes on
}

type digest = [sha256.Size]byte

func digestOf(key string, value []byte) (d digest) {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(key))))
	h.Write([]byte(key))
	h.Write(value)
	h.Sum(d[:0])
	return d
}

// copied tells which rows are. What servers say of themselves is left out where
// they are known to be stopped: a server that was killed would seem to live on.
func (c *Copying) copied(key string) bool {
	return key != registry.CopyingHere && key != registry.CopiedAway && (c.From.Shared || !registry.OfServers(key))
}

// scanEach reads a store; each, which may be nil, is called for every row to copy.
func (c *Copying) scanEach(ctx context.Context, side *Side, each func(key string, value []byte, d digest) error) (s scanned, err error) {
	now := time.Now()
	mark := func(value []byte) (*registry.CopyMark, error) {
		m, err := registry.ReadCopyMark(value)
		if err != nil {
			err = fault.New(fault.Precondition, "copy_mark_unreadable", "%s has the mark of a copy that this version cannot read", side.Place).Because(err)
		}
		return &m, err
	}
	s.at, err = side.Load(ctx, func(key string, rev uint64, value []byte) (err error) {
		switch key {
		case registry.CopyingHere:
			s.here, err = mark(value)
			s.hereAt = rev
			return err
		case registry.CopiedAway:
			s.away, err = mark(value)
			s.awayAt = rev
			return err
		}
		if name, ok := registry.Owner(key, value); ok {
			s.owner = name
		}
		if id, runs := registry.RunningServer(c.TrustDomain, key, value, now); runs && side.Shared {
			s.running = id
		}
		if !c.copied(key) {
			return nil
		}
		s.rows++
		s.bytes += uint64(len(key) + len(value))
		if registry.KindOf(key) == "token" {
			s.tokens++
		}
		d := digestOf(key, value)
		s.sum.Add(d)
		if each != nil {
			return each(key, value, d)
		}
		return nil
	})
	return s, err
}

func (c *Copying) scan(ctx context.Context, side *Side) (scanned, error) {
	return c.scanEach(ctx, side, nil)
}

// begin looks at both stores, refuses what must not be, and marks them. It
// returns the target's mark and what is there of an earlier run.
func (c *Copying) begin(ctx context.Context) (mark store.Condition, seen map[string]digest, err error) {
	seen = map[string]digest{}
	to, err := c.scanEach(ctx, &c.To, func(key string, _ []byte, d digest) error {
		seen[key] = d
		return nil
	})
	if err != nil {
		return mark, nil, err
	}
	from, err := c.scan(ctx, &c.From)
	if err != nil {
		return mark, nil, err
	}
	refuse := func(reason, fix, format string, args ...any) error {
		return fault.New(fault.Precondition, reason, format, args...).Fix("%s", fix)
	}
	switch {
	case from.at.Epoch == to.at.Epoch:
		return mark, nil, refuse("same_store", "name the other store in one of the configurations", "%s and %s are one store", c.From.Place, c.To.Place)
	case from.owner != c.TrustDomain.Name():
		return mark, nil, refuse("trust_domain_changed", "use the configuration of its own server", "the store %s belongs to the trust domain %q, not to %q", c.From.Place, from.owner, c.TrustDomain.Name())
	case from.here != nil:
		return mark, nil, refuse("copy_incomplete", "finish that copy first", "%s is itself being filled from %s", c.From.Place, from.here.Place)
	case from.away != nil && from.away.Epoch != to.at.Epoch:
		return mark, nil, refuse("store_copied", "if no server ever ran on that copy, take it back with -undo", "%s was copied to %s before", c.From.Place, from.away.Place)
	case from.away != nil && to.here == nil && to.rows > 0:
		return mark, nil, refuse("already_copied", "start the servers with the new configuration", "%s is copied to %s already", c.From.Place, c.To.Place)
	case from.running != "":
		return mark, nil, refuse("server_runs", "stop it and run this again; one that was killed counts for a minute", "the server %s runs on %s", from.running, c.From.Place)
	case to.here != nil && to.here.Epoch != from.at.Epoch:
		return mark, nil, refuse("target_not_empty", "name an empty database, directory or prefix", "%s is being filled from %s", c.To.Place, to.here.Place)
	case to.here == nil && to.rows > 0 || to.away != nil:
		return mark, nil, refuse("target_not_empty", "name an empty database, directory or prefix", "%s is not empty", c.To.Place)
	}
	mark = store.Condition{Key: registry.CopyingHere, Revision: to.hereAt}
	if to.here == nil {
		if mark.Revision, err = c.put(ctx, &c.To, registry.CopyingHere, registry.CopyMark{Epoch: from.at.Epoch, Place: c.From.Place}); err != nil {
			return mark, nil, err
		}
	}
	if from.away == nil {
		_, err = c.put(ctx, &c.From, registry.CopiedAway, registry.CopyMark{Epoch: to.at.Epoch, Place: c.To.Place})
	}
	return mark, seen, err
}

// put makes a mark that is not there.
func (c *Copying) put(ctx context.Context, side *Side, key string, mark registry.CopyMark) (rev uint64, err error) {
	mark.Begun = time.Now()
	value, err := mark.Seal()
	if err != nil {
		return 0, err
	}
	res := side.Commit(ctx, []store.Txn{{Caller: "copy", Conditions: []store.Condition{{Key: key}}, Puts: []store.Put{{Key: key, Value: value}}}})[0]
	return res.Position.Revision, res.Err
}

func (c *Copying) commit(ctx context.Context, side *Side, txns ...store.Txn) error {
	var err error
	for _, res := range side.Commit(ctx, txns) {
		err = cmp.Or(err, res.Err)
	}
	return err
}

// insist commits what can be written twice. A store that is busy, or has just lost a
// connection, may not have written it or not have said so: it is written again.
func (c *Copying) insist(ctx context.Context, txns ...store.Txn) error {
	for began := time.Now(); ; {
		err := c.commit(ctx, &c.To, txns...)
		if fault.KindOf(err) != fault.Unavailable || time.Since(began) > copyPatience {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(copyPause):
		}
	}
}

// fill writes what is not there yet and removes what should not be, in
// transactions of a bounded size. Each asks for the mark: when another run of
// the same copy has finished, this one can write nothing any more.
func (c *Copying) fill(ctx context.Context, mark store.Condition, seen map[string]digest, out *Copied) (scanned, error) {
	var txns []store.Txn
	size := 0
	flush := func() error {
		err := c.insist(ctx, txns...)
		txns, size = nil, 0
		return err
	}
	next := func(n int) (*store.Txn, error) {
		if len(txns) > 0 {
			last := &txns[len(txns)-1]
			if len(last.Puts)+len(last.Deletes) < copyKeys && size+n <= copyBytes {
				size += n
				return last, nil
			}
		}
		if len(txns) == copyTxns {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		size = n
		txns = append(txns, store.Txn{Caller: "copy", Conditions: []store.Condition{mark}})
		return &txns[len(txns)-1], nil
	}
	from, err := c.scanEach(ctx, &c.From, func(key string, value []byte, d digest) error {
		was, there := seen[key]
		delete(seen, key)
		if there && was == d {
			return nil
		}
		txn, err := next(len(key) + len(value))
		if err != nil {
			return err
		}
		txn.Puts = append(txn.Puts, store.Put{Key: key, Value: slices.Clone(value)})
		out.Written++
		return nil
	})
	if err != nil {
		return from, err
	}
	for key := range seen {
		txn, err := next(len(key))
		if err != nil {
			return from, err
		}
		txn.Deletes = append(txn.Deletes, key)
	}
	return from, flush()
}
