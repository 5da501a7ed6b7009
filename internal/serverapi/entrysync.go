package serverapi

import (
	"context"
	"errors"
	"io"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

const (
	syncPage     = 500     // entries or revisions in one message
	syncPageSize = 1 << 20 // bytes of entries in one message
)

// authorized returns what an agent is entitled to, from one snapshot.
func (s *Server) authorized(ctx context.Context) []entry.Entry {
	var all []entry.Entry
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		for e := range snap.Authorized(callerFrom(ctx).id) {
			all = append(all, e)
		}
	})
	return all
}

// GetAuthorizedEntries gives all that the calling agent is entitled to.
func (a entries) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	resp, total := &entryv1.GetAuthorizedEntriesResponse{}, sized(0)
	for _, e := range a.server.authorized(ctx) {
		out := writeEntry(&e, req.OutputMask)
		if err := total.add(out); err != nil {
			return nil, err
		}
		resp.Entries = append(resp.Entries, out)
	}
	return resp, nil
}

// SyncAuthorizedEntries is how SPIRE's agents poll. A short list goes out whole;
// of a long one the agent gets the revisions and asks for what it lacks.
func (a entries) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(req.Ids) > 0 { // Q8
		return fault.New(fault.Invalid, "ids_too_early", "the first message cannot ask for entries by id")
	}
	mask := req.OutputMask
	all := a.server.authorized(stream.Context())
	whole, size := make([]*spiretypes.Entry, 0, min(len(all), syncPage)), 0
	for i := range all[:min(len(all), syncPage)] {
		out := writeEntry(&all[i], mask)
		whole, size = append(whole, out), size+proto.Size(out)
	}
	if len(all) <= syncPage && size <= syncPageSize {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: whole})
	}
	byID := make(map[string]*entry.Entry, len(all))
	for from := 0; from < len(all); from += syncPage {
		page := &entryv1.SyncAuthorizedEntriesResponse{More: from+syncPage < len(all)}
		for i := from; i < min(from+syncPage, len(all)); i++ {
			e := &all[i]
			byID[e.ID] = e
			page.EntryRevisions = append(page.EntryRevisions, &entryv1.EntryRevision{Id: e.ID, RevisionNumber: int64(e.Revision), CreatedAt: rpc.Unix(e.CreatedAt)})
		}
		if err := stream.Send(page); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case len(req.Ids) > maxBatch:
			return fault.New(fault.Invalid, "batch_too_large", "%d ids are more than the %d allowed", len(req.Ids), maxBatch)
		}
		if err := sendAsked(stream, byID, req.Ids, mask); err != nil {
			return err
		}
	}
}

// sendAsked answers one request for entries in pages. Ids that the agent is not
// entitled to are left out: to it they do not exist.
func sendAsked(stream grpc.BidiStreamingServer[entryv1.SyncAuthorizedEntriesRequest, entryv1.SyncAuthorizedEntriesResponse],
	byID map[string]*entry.Entry, ids []string, mask *spiretypes.EntryMask) error {
	page, size := &entryv1.SyncAuthorizedEntriesResponse{}, 0
	for _, id := range ids {
		e, ok := byID[id]
		if !ok {
			continue
		}
		out := writeEntry(e, mask)
		if n := proto.Size(out); len(page.Entries) == syncPage || size+n > syncPageSize && len(page.Entries) > 0 {
			page.More = true
			if err := stream.Send(page); err != nil {
				return err
			}
			page, size = &entryv1.SyncAuthorizedEntriesResponse{}, 0
		}
		page.Entries, size = append(page.Entries, out), size+proto.Size(out)
	}
	return stream.Send(page)
}
