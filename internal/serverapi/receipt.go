package serverapi

import (
	"context"
	"slices"
	"strings"
	"time"

	receiptv1 "github.com/plastron/plastron/api/plastron/receipt/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

const (
	// receiptTrailer names what a call changed, once for each transaction. In a
	// request it says what its caller has changed before.
	receiptTrailer = "plastron-receipt"
	maxReceipts    = 10_000
	maxReceiptWait = 10 * time.Minute
)

// reach waits for what the caller says that it has changed, at whichever server: it
// shows here within 2 s, or the call fails (R76).
func (s *Server) reach(ctx context.Context) error {
	for _, text := range metadata.ValueFromIncomingContext(ctx, receiptTrailer) {
		c, err := registry.ParseCommitted(text)
		if err != nil {
			return err
		}
		if err := s.cfg.Registry.Reach(ctx, c.Position); err != nil {
			return err
		}
	}
	return nil
}

// noteReceipts has every commit of an operator's call named in its trailer.
func noteReceipts(ctx context.Context) context.Context {
	return registry.Noting(ctx, func(c registry.Committed) {
		// It fails only outside of a call, and the change is made either way.
		_ = grpc.SetTrailer(ctx, metadata.Pairs(receiptTrailer, c.String()))
	})
}

// receipts is plastron.receipt.v1.Receipt.
type receipts struct {
	receiptv1.UnsafeReceiptServer
	server *Server
}

// Wait waits for the agents that changes affect.
func (a receipts) Wait(ctx context.Context, req *receiptv1.WaitRequest) (*receiptv1.WaitResponse, error) {
	within := time.Duration(req.WithinMs) * time.Millisecond
	switch {
	case req.WithinMs < 0 || req.WithinMs > maxReceiptWait.Milliseconds():
		return nil, fault.New(fault.Invalid, "wait_invalid", "the time to wait must be between 0 and %s", maxReceiptWait)
	case len(req.Receipts) > maxReceipts:
		return nil, fault.New(fault.Invalid, "batch_too_large", "there are %d receipts, the limit is %d", len(req.Receipts), maxReceipts)
	}
	wanted := map[spiffeid.ID]store.Position{}
	for _, text := range req.Receipts {
		c, err := registry.ParseCommitted(text)
		if err != nil {
			return nil, err
		}
		if err := a.server.cfg.Registry.Reach(ctx, c.Position); err != nil {
			return nil, err
		}
		agents, err := a.server.cfg.Registry.Touched(c)
		if err != nil {
			return nil, err
		}
		for _, id := range agents {
			if c.Position.Revision >= wanted[id].Revision {
				wanted[id] = c.Position
			}
		}
	}
	resp := &receiptv1.WaitResponse{Affected: uint32(len(wanted))}
	w := a.server.followers.await(wanted, time.Now())
	defer a.server.followers.forget(w)
	limit := time.NewTimer(within)
	defer limit.Stop()
	select {
	case <-w.done:
	case <-limit.C:
	case <-a.server.closing:
		return nil, errClosing()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	lagging := a.server.followers.lagging(w, time.Now())
	resp.InForce = resp.Affected - uint32(len(lagging))
	slices.SortFunc(lagging, func(x, y *receiptv1.Laggard) int { return strings.Compare(x.Agent, y.Agent) })
	resp.Laggards = lagging[:min(len(lagging), maxLaggards)]
	return resp, nil
}

// wait is for agents to acknowledge. The followers' lock guards it.
type wait struct {
	missing map[spiffeid.ID]store.Position // what each has to acknowledge yet
	done    chan struct{}                  // closed when nothing is missing
}

// await begins to wait for agents that have not acknowledged these positions.
func (f *Followers) await(wanted map[spiffeid.ID]store.Position, now time.Time) *wait {
	w := &wait{missing: wanted, done: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.registry.View(func(s *registry.Snapshot) {
		seen := f.seen(s, now)
		for id, p := range wanted {
			if f.holdsLocked(id, p, seen) {
				delete(w.missing, id)
				continue
			}
			if f.waits[id] == nil {
				f.waits[id] = map[*wait]struct{}{}
			}
			f.waits[id][w] = struct{}{}
		}
	})
	if len(w.missing) == 0 {
		close(w.done)
	}
	return w
}

func reaches(at, p store.Position) bool { return at.Epoch == p.Epoch && at.Revision >= p.Revision }

// settleLocked ends the waits for an agent that it has fulfilled.
func (f *Followers) settleLocked(id spiffeid.ID, fulfilled func(store.Position) bool) {
	for w := range f.waits[id] {
		if !fulfilled(w.missing[id]) {
			continue
		}
		f.dropLocked(id, w)
		if delete(w.missing, id); len(w.missing) == 0 {
			close(w.done)
		}
	}
}

func (f *Followers) dropLocked(id spiffeid.ID, w *wait) {
	if delete(f.waits[id], w); len(f.waits[id]) == 0 {
		delete(f.waits, id)
	}
}

// forget ends a wait.
func (f *Followers) forget(w *wait) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range w.missing {
		f.dropLocked(id, w)
	}
}

// lagging returns whom a wait still misses. An agent that was put out while it
// had no stream is not missed any more.
func (f *Followers) lagging(w *wait, now time.Time) (all []*receiptv1.Laggard) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.registry.View(func(s *registry.Snapshot) {
		seen := f.seen(s, now)
		for id, missing := range w.missing {
			if f.holdsLocked(id, missing, seen) {
				continue
			}
			reason, server := receiptv1.Laggard_REASON_BEHIND, f.serverOfLocked(id, seen)
			if server == "" {
				reason = receiptv1.Laggard_REASON_NOT_ATTACHED
			}
			all = append(all, &receiptv1.Laggard{Agent: id.String(), Reason: reason, Server: server})
		}
	})
	return all
}
