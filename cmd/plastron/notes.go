package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// maxParents is how many entries above one are looked at for a circle.
const maxParents = 100

// maxNoted is the largest batch whose entries are compared with those that are
// there already.
const maxNoted = 100

// printNotes tells what the operator should know about entries that were created
// or changed: it is allowed, and probably not meant.
func (p *program) printNotes(ctx context.Context, conn grpc.ClientConnInterface, all []*spiretypes.Entry) {
	s := surroundings{entryv1.NewEntryClient(conn), bundlev1.NewBundleClient(conn)}
	looks := []func(context.Context, *spiretypes.Entry) (string, error){s.sameHint, s.circle, s.longTTL}
	if len(all) > maxNoted {
		looks = nil
	}
	for _, e := range all {
		notes := entry.Lint(&entry.Entry{Selectors: selectorsOf(e)})
		for _, look := range looks {
			// The change is done: a look that fails is not worth a failure.
			if note, err := look(ctx, e); err == nil && note != "" {
				notes = append(notes, note)
			}
		}
		for _, note := range notes {
			fmt.Fprintf(p.stderr, "Note on entry %s: %s\n", e.GetId(), note)
		}
	}
}

// surroundings is what an entry may clash with.
type surroundings struct {
	entries entryv1.EntryClient
	bundles bundlev1.BundleClient
}

func selectorsOf(e *spiretypes.Entry) (out []entry.Selector) {
	for _, s := range e.GetSelectors() {
		out = append(out, entry.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	return out
}

// sameHint finds entries with the same hint whose processes overlap for sure:
// of those only the oldest is handed out (E22).
func (s surroundings) sameHint(ctx context.Context, e *spiretypes.Entry) (string, error) {
	if e.GetHint() == "" {
		return "", nil
	}
	found, err := s.entries.ListEntries(ctx, &entryv1.ListEntriesRequest{
		Filter:     &entryv1.ListEntriesRequest_Filter{ByParentId: e.GetParentId(), ByHint: wrapperspb.String(e.GetHint())},
		OutputMask: &spiretypes.EntryMask{Selectors: true}, PageSize: 1000,
	})
	if err != nil {
		return "", err
	}
	own := selectorsOf(e)
	for _, other := range found.GetEntries() {
		theirs := selectorsOf(other) // both as the server sorts them
		if other.GetId() != e.GetId() && (entry.Subset(own, theirs) || entry.Subset(theirs, own)) {
			return fmt.Sprintf("the entry %s has the same hint, and a process that fits both gets only the older one's identity", other.GetId()), nil
		}
	}
	return "", nil
}

// circle follows the parents of an entry up to where they come back to it: what
// lies on a circle reaches an agent only if something outside it leads in (E10).
func (s surroundings) circle(ctx context.Context, e *spiretypes.Entry) (string, error) {
	above, seen := []*spiretypes.SPIFFEID{e.GetParentId()}, map[string]bool{}
	if e.GetSpiffeId() == nil { // of a server that answers without
		return "", nil
	}
	for len(above) > 0 && len(seen) < maxParents {
		id := above[0]
		above = above[1:]
		if seen[idText(id)] {
			continue
		}
		seen[idText(id)] = true
		if idText(id) == idText(e.GetSpiffeId()) {
			return fmt.Sprintf("its parents lead back to %s itself", idText(id)), nil
		}
		found, err := s.entries.ListEntries(ctx, &entryv1.ListEntriesRequest{
			Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: id}, OutputMask: &spiretypes.EntryMask{ParentId: true}, PageSize: maxParents,
		})
		if err != nil {
			return "", err
		}
		for _, other := range found.GetEntries() {
			above = append(above, other.GetParentId())
		}
	}
	return "", nil
}

// longTTL says what a lifetime comes to when no authority lives that long (E14).
func (s surroundings) longTTL(ctx context.Context, e *spiretypes.Entry) (string, error) {
	asked := time.Duration(e.GetX509SvidTtl()) * time.Second
	if asked == 0 {
		return "", nil
	}
	own, err := s.bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &spiretypes.BundleMask{X509Authorities: true}})
	if err != nil {
		return "", err
	}
	var longest time.Duration
	for _, a := range own.GetX509Authorities() {
		root, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return "", err
		}
		longest = max(longest, time.Until(root.NotAfter))
	}
	if asked <= longest {
		return "", nil
	}
	return fmt.Sprintf("X.509-SVIDs live no longer than the authority that signs them, now %s", longest.Round(time.Minute)), nil
}
