package serverapi

import (
	"context"
	"math"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
)

// writeBatch is how many items of a batch share a transaction. Each item is
// judged alone; only a failure of the store takes its neighbours along.
const writeBatch = 200

// entries is spire.api.server.entry.v1.Entry.
type entries struct {
	entryv1.UnsafeEntryServer
	server *Server
}

// CountEntries counts what a filter lets through; without one it costs nothing.
func (a entries) CountEntries(_ context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	f, err := a.server.readEntryFilter(req.Filter)
	if err != nil {
		return nil, err
	}
	count := 0
	a.server.cfg.Registry.View(func(s *registry.Snapshot) { count = s.Count(f) })
	return &entryv1.CountEntriesResponse{Count: int32(min(count, math.MaxInt32))}, nil
}

// ListEntries gives a page, or everything if no page size is given.
func (a entries) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	f, err := a.server.readEntryFilter(req.Filter)
	if err != nil {
		return nil, err
	}
	c := a.server.cursor("entries", req.Filter)
	after, err := c.key(req.PageToken)
	if err != nil {
		return nil, err
	}
	resp, page := &entryv1.ListEntriesResponse{}, newPage(req.PageSize)
	err = a.server.eachEntry(ctx, f, after, page.piece(), func(e *entry.Entry) (bool, error) {
		out := writeEntry(e, req.OutputMask)
		fits, err := page.take(out)
		if !fits {
			resp.NextPageToken = c.token(resp.Entries[len(resp.Entries)-1].Id)
			return false, nil
		}
		resp.Entries = append(resp.Entries, out)
		return true, err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// GetEntry gives one entry.
func (a entries) GetEntry(_ context.Context, req *entryv1.GetEntryRequest) (*spiretypes.Entry, error) {
	if err := entry.CheckID(req.Id); err != nil {
		return nil, err
	}
	var found entry.Entry
	var err error
	a.server.cfg.Registry.View(func(s *registry.Snapshot) { found, err = s.Entry(req.Id) })
	if err != nil {
		return nil, err
	}
	return writeEntry(&found, req.OutputMask), nil
}

// BatchCreateEntry creates entries, each with its own outcome. An entry that is
// there already is returned with AlreadyExists.
func (a entries) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if err := checkBatch(len(req.Entries)); err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	made, err := write(ctx, a.server, req.Entries, func(tx *registry.Tx, in *spiretypes.Entry) (*entry.Entry, error) {
		return a.create(tx, in, now)
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchCreateEntryResponse{}
	for _, m := range made {
		r := &entryv1.BatchCreateEntryResponse_Result{Status: itemStatus(m.err)}
		if m.entry != nil {
			r.Entry = writeEntry(m.entry, req.OutputMask)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

func (a entries) create(tx *registry.Tx, in *spiretypes.Entry, now time.Time) (*entry.Entry, error) {
	e := entry.Entry{ID: in.GetId(), CreatedAt: now}
	if in == nil {
		return nil, fault.New(fault.Invalid, "entry_missing", "the batch has an empty item")
	}
	if e.ID == "" {
		e.ID = entry.NewID()
	}
	if err := a.server.changeEntry(&e, in, allEntry()); err != nil {
		return nil, err
	}
	if err := a.server.validate(&e, now); err != nil {
		return nil, err
	}
	same, err := tx.EntryByContent(entry.ContentHash(&e))
	switch {
	case err == nil:
		return &same, fault.New(fault.Exists, "entry_exists", "an entry with this parent, SPIFFE ID and selectors exists: %q", same.ID)
	case fault.KindOf(err) != fault.NotFound:
		return nil, err
	}
	switch _, err := tx.Entry(e.ID); {
	case err == nil: // E24: another's body is not this caller's business, and it is not what was asked for
		return nil, fault.New(fault.Exists, "entry_id_taken", "an entry with the id %q exists", e.ID)
	case fault.KindOf(err) != fault.NotFound:
		return nil, err
	}
	return &e, tx.PutEntry(e)
}

// BatchUpdateEntry changes the fields that the input mask names, each item with
// its own outcome. An item that carries a revision is only changed if it is
// still at that revision (E28).
func (a entries) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if err := checkBatch(len(req.Entries)); err != nil {
		return nil, err
	}
	now := time.Now()
	mask := req.InputMask
	if mask == nil {
		mask = allEntry()
	}
	changed, err := write(ctx, a.server, req.Entries, func(tx *registry.Tx, in *spiretypes.Entry) (*entry.Entry, error) {
		return a.update(tx, in, mask, now)
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchUpdateEntryResponse{}
	for _, c := range changed {
		r := &entryv1.BatchUpdateEntryResponse_Result{Status: itemStatus(c.err)}
		if c.err == nil {
			r.Entry = writeEntry(c.entry, req.OutputMask)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

func (a entries) update(tx *registry.Tx, in *spiretypes.Entry, mask *spiretypes.EntryMask, now time.Time) (*entry.Entry, error) {
	if err := entry.CheckID(in.GetId()); err != nil {
		return nil, err
	}
	e, err := tx.Entry(in.Id)
	switch {
	case err != nil:
		return nil, err
	case mask.RevisionNumber && in.RevisionNumber != 0 && uint64(in.RevisionNumber) != e.Revision:
		return nil, fault.New(fault.Conflict, "revision_stale", "the entry %q is at revision %d, not %d", e.ID, e.Revision, in.RevisionNumber).
			Fix("read it again and repeat the change")
	}
	expired := e.ExpiresAt
	if err := a.server.changeEntry(&e, in, mask); err != nil {
		return nil, err
	}
	if e.ExpiresAt.Equal(expired) {
		now = time.Time{} // an end that was there before may have come
	}
	if err := a.server.validate(&e, now); err != nil {
		return nil, err
	}
	switch same, err := tx.EntryByContent(entry.ContentHash(&e)); {
	case err == nil && same.ID != e.ID:
		return nil, fault.New(fault.Exists, "entry_exists", "an entry with this parent, SPIFFE ID and selectors exists: %q", same.ID)
	case err != nil && fault.KindOf(err) != fault.NotFound:
		return nil, err
	}
	return &e, tx.PutEntry(e)
}

// BatchDeleteEntry deletes entries by id, each with its own outcome.
func (a entries) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if err := checkBatch(len(req.Ids)); err != nil {
		return nil, err
	}
	gone, err := write(ctx, a.server, req.Ids, func(tx *registry.Tx, id string) (*entry.Entry, error) {
		if err := entry.CheckID(id); err != nil {
			return nil, err
		}
		return nil, tx.DeleteEntry(id)
	})
	if err != nil {
		return nil, err
	}
	resp := &entryv1.BatchDeleteEntryResponse{}
	for i, g := range gone {
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Id: req.Ids[i], Status: itemStatus(g.err)})
	}
	return resp, nil
}

func checkBatch(n int) error {
	if n > maxBatch {
		return fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", n, maxBatch).Fix("split it") // E32
	}
	return nil
}

// outcome is what became of one item of a batch.
type outcome struct {
	entry *entry.Entry
	err   error
}

// write runs one function per item in transactions of many items. An item's
// refusal is its outcome; an error of the store fails the transaction, and with
// it the outcome of every item in it. The error that write returns is the
// caller's deadline.
func write[T any](ctx context.Context, s *Server, items []T, one func(*registry.Tx, T) (*entry.Entry, error)) ([]outcome, error) {
	all := make([]outcome, len(items))
	for from := 0; from < len(items); from += writeBatch {
		part := all[from:min(from+writeBatch, len(items))]
		position, err := s.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
			for i := range part {
				part[i].entry, part[i].err = one(tx, items[from+i])
			}
			tx.Confirm()
			return nil
		})
		if ctxErr := ctx.Err(); err != nil && ctxErr != nil {
			return nil, ctxErr
		}
		stamp(part, position, err)
	}
	return all, nil
}

// stamp completes the outcomes of one transaction. A refusal that follows from
// what is stored is not told when the store could not confirm it.
func stamp(part []outcome, at store.Position, err error) {
	confirmed := err == nil || fault.ReasonOf(err) == "committed_not_visible"
	for i := range part {
		switch {
		case part[i].err != nil && (confirmed || fault.KindOf(part[i].err) == fault.Invalid):
		case err != nil:
			part[i] = outcome{err: err}
		case part[i].entry != nil:
			part[i].entry.Revision = at.Revision
		}
	}
}
