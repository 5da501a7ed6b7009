package upkeep

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
)

// Report is what a check found.
type Report struct {
	At       store.Position
	Engine   string
	Rows     uint64
	Batches  uint64 // of the log, that the rows were compared with
	Records  uint64 // of the audit trail
	Repaired []registry.Defect
	Defects  []registry.Defect // faults first
}

// Faults counts what is wrong, and not only odd.
func (r *Report) Faults() (n int) {
	for _, d := range r.Defects {
		if !d.Remark {
			n++
		}
	}
	return n
}

func (r *Report) add(remark bool, code, found, fix string) {
	r.Defects = append(r.Defects, registry.Defect{Code: code, Found: found, Fix: fix, Remark: remark})
}

// Check proves one snapshot of the store, the log up to it, the engine's files
// and the audit trail (R126). Its error says that this could not be done; what
// was found is in the report. With repairer, what can be mended without a
// decision is, in that name, and then all is checked once more.
func (u *Upkeep) Check(ctx context.Context, repairer string) (*Report, error) {
	if !u.busy.TryLock() {
		return nil, fault.New(fault.Exhausted, "check_under_way", "the store is being checked already").Fix("try again later")
	}
	defer u.busy.Unlock()
	r, err := u.check(ctx)
	if err != nil || repairer == "" || !slices.ContainsFunc(r.Defects, func(d registry.Defect) bool { return d.Repair }) {
		return r, err
	}
	if u.Registry == nil {
		return nil, fault.New(fault.Internal, "nothing_runs", "nothing can be repaired without a registry")
	}
	var mended []registry.Defect
	for _, d := range r.Defects {
		if d.Repair {
			mended = append(mended, d)
		}
	}
	if _, err := u.Registry.RepairContents(ctx, repairer, mended); err != nil {
		return nil, err
	}
	if r, err = u.check(ctx); err == nil {
		r.Repaired = mended
	}
	return r, err
}

func (u *Upkeep) check(ctx context.Context) (*Report, error) {
	r := &Report{}
	if err := u.rows(ctx, r); err != nil {
		if fault.ReasonOf(err) != "store_corrupt" {
			return nil, err
		}
		r.broken(err)
	}
	if u.Intact != nil {
		if err := u.Intact(); err != nil && fault.ReasonOf(err) != "check_under_way" {
			r.broken(err)
		}
	}
	u.trail(r)
	slices.SortStableFunc(r.Defects, func(a, b registry.Defect) int {
		switch {
		case a.Remark == b.Remark:
			return 0
		case a.Remark:
			return 1
		}
		return -1
	})
	return r, nil
}

// broken reports what an engine says of itself.
func (r *Report) broken(err error) {
	fix := "see the server's log"
	if f, ok := errors.AsType[*fault.Error](err); ok && f.Remedy != "" {
		fix = f.Remedy
	}
	r.add(false, fault.ReasonOf(err), fault.MessageOf(err), fix)
}

// rows checks the snapshot and the log. If the log is compacted meanwhile, it
// begins again once and then goes without.
func (u *Upkeep) rows(ctx context.Context, r *Report) error {
	for try := 0; ; try++ {
		st, err := u.Store.Stats(ctx)
		if err != nil {
			return err
		}
		check := registry.NewCheck(u.TrustDomain)
		check.After(st.Begin)
		rows := uint64(0)
		at, err := u.Store.Load(ctx, func(key string, rev uint64, value []byte) error {
			rows++
			check.Row(key, rev, value)
			return nil
		})
		if err != nil {
			return err
		}
		batches, err := u.log(ctx, check, st.Begin, at)
		missed := false
		switch fault.ReasonOf(err) {
		case "compacted", "epoch_changed", "position_unknown":
			if try == 0 {
				continue
			}
			missed = true
			check.WithoutLog()
		default:
			if err != nil {
				return err
			}
		}
		r.Engine, r.At, r.Rows, r.Batches = st.Engine, at, rows, batches
		r.Defects = check.Defects(at)
		if missed {
			r.add(true, "log_not_read", "the log was cut off while it was read, so that the rows were not compared with it", "check again")
		}
		u.compareMemory(r, check)
		return nil
	}
}

// log takes in the batches up to a position.
func (u *Upkeep) log(ctx context.Context, check *registry.Check, after, to store.Position) (n uint64, err error) {
	if after.Epoch == to.Epoch && after.Revision == to.Revision {
		return 0, nil
	}
	for b, err := range u.Store.Watch(ctx, after) {
		if err != nil {
			return n, err
		}
		check.Batch(b)
		if n++; b.Position.Revision >= to.Revision {
			return n, nil
		}
	}
	return n, ctx.Err()
}

// compareMemory compares with what the server serves from, if that is at the same
// position. It moves on; then others compare it, by the digest in its row.
func (u *Upkeep) compareMemory(r *Report, check *registry.Check) {
	if u.Registry == nil {
		return
	}
	differs := false
	u.Registry.View(func(s *registry.Snapshot) { differs = s.Position() == r.At && s.Digest() != check.Digest() })
	if differs {
		r.add(false, "memory_differs", "this server's memory does not hold what the store holds", "restart it, and report this: it is a fault of Plastron's")
	}
}

// trail checks this server's audit trail. Where none was ever written there is
// none to check.
func (u *Upkeep) trail(r *Report) {
	if u.Trail == "" {
		return
	}
	sum, err := audit.Verify(u.Trail)
	r.Records = sum.Records
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.add(true, "audit_missing", "there is no audit trail at "+u.Trail, "nothing, if this server has never run")
	case fault.ReasonOf(err) == "audit_broken":
		r.add(false, "audit_broken", fault.MessageOf(err), "keep the file as evidence, find out who could write it, and move it away: the server begins another")
	case err != nil:
		r.add(false, "audit_unreadable", "the audit trail cannot be read: "+err.Error(), "run this as the server's user")
	case sum.Lost > 0:
		r.add(true, "audit_gap", "the audit trail says of itself that events are missing", "see the server's log of the time: its disk could not be written")
	}
}
