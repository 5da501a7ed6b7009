package system_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// lister goes through one list of the API.
type lister struct {
	name string
	page func(ctx context.Context, size int32, token string) (names []string, next string, err error)
	// count counts what the list shows; others is what it counts besides.
	count  func(ctx context.Context) (int32, error)
	others int
	// steady are the names that are there all the while, coming at most so many
	// more at any one time.
	steady []string
	coming int
}

// scan collects all pages.
func (l lister) scan(ctx context.Context, size int32) (map[string]int, error) {
	seen, token := map[string]int{}, ""
	for {
		names, next, err := l.page(ctx, size, token)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		if size > 0 && len(names) > int(size) {
			return nil, fmt.Errorf("%s: a page of %d names, asked for %d", l.name, len(names), size)
		}
		for _, n := range names {
			seen[n]++
		}
		if token = next; token == "" {
			return seen, nil
		}
	}
}

// check is one scan and one count while others write: what was there all the
// while is seen exactly once, nothing is seen twice, and the count lies between
// what stayed and all that could be there.
func (l lister) check(ctx context.Context, size int32) error {
	seen, err := l.scan(ctx, size)
	if err != nil {
		return err
	}
	for _, name := range l.steady {
		if seen[name] != 1 {
			return fmt.Errorf("%s by pages of %d: %s was there all the while and is listed %d times", l.name, size, name, seen[name])
		}
	}
	for name, n := range seen {
		if n != 1 {
			return fmt.Errorf("%s by pages of %d: %s is listed %d times", l.name, size, name, n)
		}
	}
	count, err := l.count(ctx)
	if low := len(l.steady) + l.others; err != nil || int(count) < low || int(count) > low+l.coming {
		return fmt.Errorf("%s: counted %d, %v, want %d to %d", l.name, count, err, low, low+l.coming)
	}
	return nil
}

// quiet is what holds when nobody writes: every page size gives the same names,
// and the count is their number.
func (l lister) quiet(t *testing.T) {
	t.Helper()
	var first []string
	for _, size := range []int32{0, 1, 7, 100, 10_000} {
		seen, err := l.scan(t.Context(), size)
		if err != nil {
			t.Fatal(err)
		}
		names := slices.Sorted(maps.Keys(seen))
		for name, n := range seen {
			if n != 1 {
				t.Errorf("%s, quiet, by pages of %d: %s is listed %d times", l.name, size, name, n)
			}
		}
		if first == nil {
			first = names
		}
		if !slices.Equal(names, first) {
			t.Errorf("%s, quiet: pages of %d give %d names, everything at once %d", l.name, size, len(names), len(first))
		}
	}
	for _, name := range l.steady {
		if !slices.Contains(first, name) {
			t.Errorf("%s, quiet: %s is not there", l.name, name)
		}
	}
	if count, err := l.count(t.Context()); err != nil || int(count) != len(first)+l.others {
		t.Errorf("%s, quiet: counted %d, %v, want %d", l.name, count, err, len(first)+l.others)
	}
}

// R86, Q10: lists by pages of any size, and counts, while 50 clients create,
// change and delete on a real server.
func TestListsUnderWriters(t *testing.T) {
	t.Parallel()
	const writers, steadyEntries, steadyBundles, steadyAgents, scans = 50, 1500, 120, 25, 6
	d := newDeployment(t)
	d.serverOptions = "ratelimit {\n attestation = false\n signing = false\n }"
	d.startServer()
	admin := dialUnix(t, d.adminSocket())
	entries, bundles, agents := entryv1.NewEntryClient(admin), bundlev1.NewBundleClient(admin), agentv1.NewAgentClient(admin)
	own, err := bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	root := own.X509Authorities

	// What stays.
	var batch []*spiretypes.Entry
	var entryIDs, hintedIDs []string
	for i := range steadyEntries {
		e := churnEntry(fmt.Sprintf("steady-%04d", i), "/steady")
		if i%3 == 0 {
			e.Hint = "third"
			hintedIDs = append(hintedIDs, e.Id)
		}
		batch, entryIDs = append(batch, e), append(entryIDs, e.Id)
	}
	if err := createAll(t.Context(), entries, batch); err != nil {
		t.Fatal(err)
	}
	var domains []string
	set := &bundlev1.BatchSetFederatedBundleRequest{}
	for i := range steadyBundles {
		domains = append(domains, fmt.Sprintf("steady-%03d.test", i))
		set.Bundle = append(set.Bundle, &spiretypes.Bundle{TrustDomain: domains[i], X509Authorities: root})
	}
	if _, err := bundles.BatchSetFederatedBundle(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	anybody := d.dialServer(nil)
	join := func(ctx context.Context) (string, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return "", err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			return "", err
		}
		token, err := agents.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600})
		if err != nil {
			return "", err
		}
		chain, err := attest(ctx, anybody, []byte(token.Value), csr)
		if err != nil {
			return "", err
		}
		leaf, err := x509.ParseCertificate(chain[0])
		if err != nil {
			return "", err
		}
		return leaf.URIs[0].Path, nil
	}
	var agentIDs []string
	for range steadyAgents {
		id, err := join(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		agentIDs = append(agentIDs, id)
	}

	listEntries := func(filter *entryv1.ListEntriesRequest_Filter) func(context.Context, int32, string) ([]string, string, error) {
		return func(ctx context.Context, size int32, token string) (names []string, next string, err error) {
			page, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: size, PageToken: token, Filter: filter, OutputMask: &spiretypes.EntryMask{}})
			for _, e := range page.GetEntries() {
				names = append(names, e.Id)
			}
			return names, page.GetNextPageToken(), err
		}
	}
	countEntries := func(filter *entryv1.CountEntriesRequest_Filter) func(context.Context) (int32, error) {
		return func(ctx context.Context) (int32, error) {
			count, err := entries.CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: filter})
			return count.GetCount(), err
		}
	}
	hint := wrapperspb.String("third")
	shared := &spiretypes.SelectorMatch{Match: spiretypes.SelectorMatch_MATCH_SUPERSET, Selectors: []*spiretypes.Selector{{Type: "unix", Value: "gid:7"}}}
	lists := []lister{
		{"entries", listEntries(nil), countEntries(nil), 0, entryIDs, writers * 3},
		{"entries with a hint", listEntries(&entryv1.ListEntriesRequest_Filter{ByHint: hint}), countEntries(&entryv1.CountEntriesRequest_Filter{ByHint: hint}), 0, hintedIDs, writers * 3},
		{"entries with a selector", listEntries(&entryv1.ListEntriesRequest_Filter{BySelectors: shared}), countEntries(&entryv1.CountEntriesRequest_Filter{BySelectors: shared}), 0, entryIDs, writers * 3},
		{"bundles", func(ctx context.Context, size int32, token string) (names []string, next string, err error) {
			page, err := bundles.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: size, PageToken: token, OutputMask: &spiretypes.BundleMask{}})
			for _, b := range page.GetBundles() {
				names = append(names, b.TrustDomain)
			}
			return names, page.GetNextPageToken(), err
		}, func(ctx context.Context) (int32, error) {
			count, err := bundles.CountBundles(ctx, &bundlev1.CountBundlesRequest{})
			return count.GetCount(), err
		}, 1, domains, writers},
		{"agents", func(ctx context.Context, size int32, token string) (names []string, next string, err error) {
			page, err := agents.ListAgents(ctx, &agentv1.ListAgentsRequest{PageSize: size, PageToken: token, OutputMask: &spiretypes.AgentMask{}})
			for _, a := range page.GetAgents() {
				names = append(names, a.Id.Path)
			}
			return names, page.GetNextPageToken(), err
		}, func(ctx context.Context) (int32, error) {
			count, err := agents.CountAgents(ctx, &agentv1.CountAgentsRequest{})
			return count.GetCount(), err
		}, 0, agentIDs, writers},
		{"agents not banned", func(ctx context.Context, size int32, token string) (names []string, next string, err error) {
			page, err := agents.ListAgents(ctx, &agentv1.ListAgentsRequest{PageSize: size, PageToken: token,
				Filter: &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false), ByAttestationType: "join_token"}})
			for _, a := range page.GetAgents() {
				names = append(names, a.Id.Path)
			}
			return names, page.GetNextPageToken(), err
		}, func(ctx context.Context) (int32, error) {
			count, err := agents.CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false), ByAttestationType: "join_token"}})
			return count.GetCount(), err
		}, 0, agentIDs, writers},
	}

	// Who writes: each its own names between those that stay, so that what comes
	// and goes lies on every page. Each writer's changes succeed, or the test fails.
	var writing, reading sync.WaitGroup
	var rounds atomic.Int64
	var enough atomic.Bool
	for w := range writers {
		conn := dialUnix(t, d.adminSocket()) // clients of their own
		c := churner{entryv1.NewEntryClient(conn), bundlev1.NewBundleClient(conn), agentv1.NewAgentClient(conn), join, w, root}
		writing.Go(func() {
			for round := 0; !enough.Load(); round++ {
				if err := c.round(t.Context(), round, entryIDs, domains); err != nil {
					t.Errorf("writer %d, round %d: %v", w, round, err)
					return
				}
				rounds.Add(1)
			}
		})
	}
	for i, l := range lists {
		reading.Go(func() {
			sizes := []int32{1, 7, 50, 333, 10_000, 0}
			for scan := range scans {
				size := sizes[(scan+i)%len(sizes)]
				if size == 1 && len(l.steady) > 1000 {
					size = 3 // a scan by ones is not done before the test is
				}
				before := rounds.Load()
				for { // again until somebody wrote meanwhile
					if err := l.check(t.Context(), size); err != nil {
						t.Error(err)
						return
					}
					if rounds.Load() > before || t.Failed() {
						break
					}
				}
			}
		})
	}
	reading.Wait()
	enough.Store(true)
	writing.Wait()
	t.Logf("%d rounds of the writers meanwhile", rounds.Load())
	for _, l := range lists {
		l.quiet(t)
	}

	// Q10: everything goes between two pages.
	names, token, err := lists[0].page(t.Context(), 50, "")
	if err != nil || len(names) != 50 || token == "" {
		t.Fatal(names, token, err)
	}
	if _, err := entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: entryIDs}); err != nil {
		t.Fatal(err)
	}
	if names, token, err := lists[0].page(t.Context(), 50, token); err != nil || len(names) > 0 || token != "" {
		t.Errorf("after all is deleted the next page has %v, %q, %v", names, token, err)
	}
}

func createAll(ctx context.Context, client entryv1.EntryClient, batch []*spiretypes.Entry) error {
	resp, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: batch})
	if err != nil {
		return err
	}
	for _, r := range resp.Results {
		if r.Status.Code != 0 {
			return errors.New("create: " + r.Status.Message)
		}
	}
	return nil
}

// churner is one of those who write.
type churner struct {
	entries entryv1.EntryClient
	bundles bundlev1.BundleClient
	agents  agentv1.AgentClient
	join    func(context.Context) (string, error)
	number  int
	root    []*spiretypes.X509Certificate
}

func churnEntry(id, path string) *spiretypes.Entry {
	return &spiretypes.Entry{
		Id: id, SpiffeId: wireID("spiffe://example.org" + path + "/" + id), ParentId: wireID("spiffe://example.org/parent"),
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: "gid:7"}, {Type: "unix", Value: "uid:4242"}},
	}
}

// round creates, changes and deletes names of the writer's own, and changes one
// of those that stay, without the fields that a filter looks at.
func (c churner) round(ctx context.Context, round int, entryIDs, domains []string) error {
	place := func(n, among int) int { return (c.number*7919 + n*104729) % among }
	var ids []string
	var batch []*spiretypes.Entry
	for i := range 3 {
		e := churnEntry(fmt.Sprintf("steady-%04d-%d-%d", place(round+i, len(entryIDs)), c.number, i), fmt.Sprintf("/%d/%d", c.number, round))
		e.Hint = "third"
		batch, ids = append(batch, e), append(ids, e.Id)
	}
	if err := createAll(ctx, c.entries, batch); err != nil {
		return err
	}
	updated, err := c.entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{
		Entries: []*spiretypes.Entry{
			{Id: entryIDs[place(round+3, len(entryIDs))], X509SvidTtl: int32(60 + round)},
			{Id: ids[0], X509SvidTtl: int32(60 + round)},
		}, InputMask: &spiretypes.EntryMask{X509SvidTtl: true},
	})
	if err != nil {
		return err
	}
	for _, r := range updated.Results {
		if r.Status.Code != 0 {
			return errors.New("update: " + r.Status.Message)
		}
	}
	own := fmt.Sprintf("steady-%03d-%d.test", place(round, len(domains)), c.number)
	for _, td := range []string{own, own, domains[place(round+1, len(domains))]} {
		set, err := c.bundles.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{
			Bundle: []*spiretypes.Bundle{{TrustDomain: td, RefreshHint: int64(60 + round), X509Authorities: c.root}},
		})
		if err != nil {
			return err
		}
		if st := set.Results[0].Status; st.Code != 0 {
			return errors.New("set: " + st.Message)
		}
	}
	agent, err := c.join(ctx)
	if err != nil {
		return err
	}
	id := &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: agent}
	if round%2 == 0 {
		if _, err := c.agents.BanAgent(ctx, &agentv1.BanAgentRequest{Id: id}); err != nil {
			return err
		}
	}
	if _, err := c.agents.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id}); err != nil {
		return err
	}
	if _, err := c.bundles.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{own}}); err != nil {
		return err
	}
	gone, err := c.entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids})
	if err != nil {
		return err
	}
	for _, r := range gone.Results {
		if r.Status.Code != 0 {
			return errors.New("delete: " + r.Status.Message)
		}
	}
	return nil
}
