package serverlink

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
)

const (
	maxPolled       = 1 << 20 // entries
	federatedAtOnce = 10
	fetchEntries    = "fetch the entries"
)

// entryMask is what SPIRE's agents ask for, and the two fields more that tell us
// where an entry hangs and when it ends.
func entryMask() *spiretypes.EntryMask {
	return &spiretypes.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true, StoreSvid: true,
		Hint: true, CreatedAt: true, AdditionalAttributes: true, ParentId: true, ExpiresAt: true,
	}
}

// fetchEntries returns what the agent is entitled to now. Of a long list only
// what is new by its numbers is fetched, or, if whole, everything.
func (p *poller) fetchEntries(ctx context.Context, conn *connection, whole bool) (map[string]polledEntry, error) {
	got, err := p.syncEntries(ctx, conn, whole)
	if fault.KindOf(err) == fault.Unsupported { // before SyncAuthorizedEntries there was a call that gives all at once
		resp, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask()})
		if err != nil {
			return nil, conn.fault(fetchEntries, err)
		}
		got = map[string]polledEntry{}
		p.takeEntries(got, resp.GetEntries(), nil)
		return got, nil
	}
	return got, err
}

// syncEntries is one conversation of SyncAuthorizedEntries: the server sends a
// short list whole, of a long one the numbers, by which we ask.
func (p *poller) syncEntries(ctx context.Context, conn *connection, whole bool) (map[string]polledEntry, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	stream, err := entryv1.NewEntryClient(conn).SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, conn.fault(fetchEntries, err)
	}
	if err := send(stream, &entryv1.SyncAuthorizedEntriesRequest{OutputMask: entryMask()}); err != nil {
		return nil, conn.fault(fetchEntries, err)
	}
	got, listed, pageSize := map[string]polledEntry{}, map[string]bool{}, 0
	var missing []string
	for more := true; more; {
		page, err := stream.Recv()
		if err != nil {
			return nil, conn.fault(fetchEntries, err)
		}
		more, pageSize = page.GetMore(), max(pageSize, len(page.GetEntryRevisions()))
		p.takeEntries(got, page.GetEntries(), nil)
		for _, r := range page.GetEntryRevisions() {
			if r.GetId() == "" || listed[r.GetId()] {
				continue
			}
			listed[r.GetId()] = true
			held, ok := p.entries[r.GetId()]
			if ok && !whole && held.number == r.GetRevisionNumber() && held.created == r.GetCreatedAt() {
				got[r.GetId()] = held
			} else {
				missing = append(missing, r.GetId())
			}
		}
		if len(page.GetEntries()) > 0 && len(listed) > 0 {
			return nil, malformed("it mixes entries with their numbers")
		}
		if len(got)+len(missing) > maxPolled {
			return nil, malformed("there is no end to the entries")
		}
	}
	slices.Sort(missing)
	for ids := range slices.Chunk(missing, max(pageSize, 1)) {
		if err := send(stream, &entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
			return nil, conn.fault(fetchEntries, err)
		}
		for more := true; more; {
			page, err := stream.Recv()
			if err != nil {
				return nil, conn.fault(fetchEntries, err)
			}
			more = page.GetMore()
			p.takeEntries(got, page.GetEntries(), ids) // what does not come is gone meanwhile
		}
	}
	return got, nil
}

// send leaves the reason why a stream is at its end to Recv.
func send[Req, Resp any](stream grpc.BidiStreamingClient[Req, Resp], m *Req) error {
	if err := stream.Send(m); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// takeEntries adds entries in our form to got; of those that were asked for by id
// no others. What is wrong with one of them is found out where it is read (R59).
func (p *poller) takeEntries(got map[string]polledEntry, entries []*spiretypes.Entry, asked []string) {
	for _, e := range entries {
		if _, wanted := slices.BinarySearch(asked, e.GetId()); e.GetId() == "" || asked != nil && !wanted {
			continue
		}
		held, known := p.entries[e.GetId()]
		out := polledEntry{number: e.GetRevisionNumber(), created: e.GetCreatedAt(), revision: uint64(max(e.GetRevisionNumber(), 0))}
		switch {
		case known && held.number == out.number && held.created == out.created:
			out.revision = held.revision
		case known: // a server may count from the start again
			out.revision = max(out.revision, held.revision+1)
		}
		for _, name := range e.GetFederatesWith() {
			if td, err := identity.ParseTrustDomain(name); err == nil && td != p.client.td {
				out.federates = append(out.federates, td.Name())
			}
		}
		out.body = newBody(&syncv1.Body{Body: &syncv1.Body_Grant{Grant: p.grant(e, out.revision)}})
		got[e.GetId()] = out
	}
}

// grant writes an entry as the sync protocol has it.
func (p *poller) grant(e *spiretypes.Entry, revision uint64) *syncv1.Grant {
	g := &syncv1.Grant{
		Id: e.GetId(), Revision: revision, SpiffeId: textOf(e.GetSpiffeId()), ParentId: textOf(e.GetParentId()), FederatesWith: e.GetFederatesWith(),
		Hint: e.GetHint(), Admin: e.GetAdmin(), Downstream: e.GetDownstream(), StoreSvid: e.GetStoreSvid(),
		DisableX509SvidPrefetch: e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JwtSvidIncludeJti:       e.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		CreatedAt:               e.GetCreatedAt(), ExpiresAt: e.GetExpiresAt(),
	}
	if e.GetParentId() == nil { // what we were given hangs below us, wherever else it does
		g.ParentId = p.client.ownID()
	}
	for _, s := range e.GetSelectors() {
		g.Selectors = append(g.Selectors, &syncv1.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	return g
}

// fetchBundles returns the own trust domain's bundle and those that entries name.
// What is wrong with a foreign one concerns that alone (R59).
func (p *poller) fetchBundles(ctx context.Context, conn *connection, entries map[string]polledEntry, now time.Time) (map[string]polledBundle, error) {
	own := p.client.td.Name()
	resp, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, conn.fault("fetch the bundle", err)
	}
	switch {
	case resp.GetTrustDomain() != own:
		return nil, malformed("the bundle is for another trust domain")
	case !slices.ContainsFunc(resp.GetX509Authorities(), func(a *spiretypes.X509Certificate) bool {
		_, err := x509.ParseCertificate(a.GetAsn1())
		return err == nil
	}):
		return nil, malformed("the bundle has no X.509 authority")
	}
	bundles := map[string]polledBundle{own: p.takeBundle(resp, now)}
	foreign := map[string]bool{}
	for _, e := range entries {
		for _, td := range e.federates {
			foreign[td] = true
		}
	}
	names := slices.Collect(maps.Keys(foreign))
	answers := make([]*spiretypes.Bundle, len(names))
	faults := make([]error, len(names))
	var g errgroup.Group
	g.SetLimit(federatedAtOnce)
	for i, td := range names {
		g.Go(func() error {
			resp, err := bundlev1.NewBundleClient(conn).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td})
			answers[i], faults[i] = resp, conn.fault("fetch a federated bundle", err)
			return nil
		})
	}
	g.Wait()
	for i, td := range names {
		held, had := p.bundles[td]
		switch err := faults[i]; {
		case err == nil && answers[i].GetTrustDomain() == td:
			bundles[td] = p.takeBundle(answers[i], now)
		case fault.KindOf(err) != fault.NotFound && had: // it is there and could not be fetched
			bundles[td] = held
		}
	}
	return bundles, nil
}

// takeBundle writes a bundle as the sync protocol has it, unless it is older than
// the one that is held: then it is what a replica still remembers, and may hold a
// key that was revoked (R55, R69, R75).
func (p *poller) takeBundle(b *spiretypes.Bundle, now time.Time) polledBundle {
	out := polledBundle{sequence: b.GetSequenceNumber(), seen: now}
	w := &syncv1.Bundle{TrustDomain: b.GetTrustDomain(), Sequence: b.GetSequenceNumber(), RefreshHint: b.GetRefreshHint()}
	for _, a := range b.GetX509Authorities() {
		w.X509Authorities = append(w.X509Authorities, &syncv1.X509Authority{Asn1: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	for _, k := range b.GetJwtAuthorities() {
		w.JwtAuthorities = append(w.JwtAuthorities, &syncv1.JWTAuthority{
			KeyId: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: k.GetExpiresAt(), Tainted: k.GetTainted()})
	}
	out.authorities = w.X509Authorities
	out.body = newBody(&syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: w}})
	held, had := p.bundles[b.GetTrustDomain()]
	if had && held.sequence > 0 && held.hash != out.hash && out.sequence <= held.sequence && now.Sub(held.seen) < staleHold {
		return held
	}
	return out
}

func textOf(id *spiretypes.SPIFFEID) string { return "spiffe://" + id.GetTrustDomain() + id.GetPath() }
