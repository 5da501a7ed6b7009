package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
)

// benchList asks for the entries that a process with one selector would get:
// one of all that were made for this.
func benchList(ctx context.Context, o options) (result, error) {
	return amongEntries(ctx, o, func(ctx context.Context, client entryv1.EntryClient, _ *spiretypes.SPIFFEID, call int) error {
		reply, err := client.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{
			BySelectors: &spiretypes.SelectorMatch{Match: spiretypes.SelectorMatch_MATCH_SUBSET, Selectors: []*spiretypes.Selector{selector(call % o.entries)}},
		}})
		if err == nil && len(reply.GetEntries()) == 0 {
			err = errors.New("the list lacks the entry that was made for it")
		}
		return err
	})
}

// benchCount counts the entries that were made for this, by their parent.
func benchCount(ctx context.Context, o options) (result, error) {
	return amongEntries(ctx, o, func(ctx context.Context, client entryv1.EntryClient, parent *spiretypes.SPIFFEID, _ int) error {
		reply, err := client.CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{ByParentId: parent}})
		if err == nil && int(reply.GetCount()) != o.entries {
			err = fmt.Errorf("%d entries were counted, not %d", reply.GetCount(), o.entries)
		}
		return err
	})
}

// amongEntries measures a call while there are o.entries entries more.
func amongEntries(ctx context.Context, o options, call func(context.Context, entryv1.EntryClient, *spiretypes.SPIFFEID, int) error) (result, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer s.Close()
	parent := s.absentAgent()
	ids, err := s.fill(ctx, parent, o.entries)
	var r result
	if err == nil {
		client := entryv1.NewEntryClient(s.admin)
		r, err = measure(ctx, o, 1, func(ctx context.Context, _, i int) error { return call(ctx, client, parent, i) })
	}
	return r, errors.Join(err, s.remove(context.WithoutCancel(ctx), ids))
}

// absentAgent names an agent that does not exist, so that nobody has to be told
// of what is created below it.
func (s *target) absentAgent() *spiretypes.SPIFFEID {
	return &spiretypes.SPIFFEID{TrustDomain: s.trustDomain, Path: fmt.Sprintf("/spire/agent/join_token/bench-%d", time.Now().UnixNano())}
}

// selector is that of the entry with this number.
func selector(number int) *spiretypes.Selector {
	return &spiretypes.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", 100000+number)}
}
