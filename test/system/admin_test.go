package system_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The rows of corpus E about lists and filters, over the admin socket of a real
// server. Page tokens of other lists and servers: TestPageTokens of serverapi.
func TestCorpusELists(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.startServer()
	conn := dialUnix(t, d.adminSocket())
	entries, agents, bundles := entryv1.NewEntryClient(conn), agentv1.NewAgentClient(conn), bundlev1.NewBundleClient(conn)
	var batch []*spiretypes.Entry
	for i := range 25 {
		batch = append(batch, churnEntry(fmt.Sprintf("e-%02d", i), "/e"))
	}
	if err := createAll(t.Context(), entries, batch); err != nil {
		t.Fatal(err)
	}
	agent := d.join()
	// What is refused is refused by listing and by counting alike.
	entryCalls := func(t *testing.T, list *entryv1.ListEntriesRequest_Filter, count *entryv1.CountEntriesRequest_Filter) {
		t.Helper()
		_, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: list})
		denied(t, "ListEntries", err)
		_, err = entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: count})
		denied(t, "CountEntries", err)
	}
	agentCalls := func(t *testing.T, list *agentv1.ListAgentsRequest_Filter, count *agentv1.CountAgentsRequest_Filter) {
		t.Helper()
		_, err := agents.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: list})
		denied(t, "ListAgents", err)
		_, err = agents.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: count})
		denied(t, "CountAgents", err)
	}
	one := []*spiretypes.Selector{{Type: "unix", Value: "uid:1"}}
	for name, m := range map[string]*spiretypes.SelectorMatch{
		"E30 unknown enum": {Match: 17, Selectors: one}, "E30 negative enum": {Match: -1, Selectors: one},
		"E37 10,000 selectors": {Selectors: slices.Repeat(one, 10_000)}, "E37 no selector": {},
		"E2 selector without a value": {Selectors: []*spiretypes.Selector{{Type: "unix"}}}, "E4 NUL": {Selectors: []*spiretypes.Selector{{Type: "unix", Value: "\x00"}}},
	} {
		t.Run(name, func(t *testing.T) {
			entryCalls(t, &entryv1.ListEntriesRequest_Filter{BySelectors: m}, &entryv1.CountEntriesRequest_Filter{BySelectors: m})
			agentCalls(t, &agentv1.ListAgentsRequest_Filter{BySelectorMatch: m}, &agentv1.CountAgentsRequest_Filter{BySelectorMatch: m})
		})
	}
	for name, m := range map[string]*spiretypes.FederatesWithMatch{
		"E30 unknown enum, trust domains": {Match: 17, TrustDomains: []string{"a.org"}},
		"E37 10,000 trust domains":        {TrustDomains: slices.Repeat([]string{"a.org"}, 10_000)},
		"E12 not a trust domain":          {TrustDomains: []string{"a.org/x"}},
	} {
		t.Run(name, func(t *testing.T) {
			entryCalls(t, &entryv1.ListEntriesRequest_Filter{ByFederatesWith: m}, &entryv1.CountEntriesRequest_Filter{ByFederatesWith: m})
		})
	}
	for _, text := range []string{"yesterday", "2026-01-02", "2026-01-02T15:04:05Z", "1700000000", "2026-13-02 15:04:05 +0000 +00", "' OR 1=1 --", "\n", strings.Repeat("9", 1<<20)} {
		t.Run(fmt.Sprintf("E38 %.30q", text), func(t *testing.T) {
			agentCalls(t, &agentv1.ListAgentsRequest_Filter{ByExpiresBefore: text}, &agentv1.CountAgentsRequest_Filter{ByExpiresBefore: text})
			if len(text) < 100_000 {
				if said := refusedCommand(t, nil, "server", "agent", "list", "-socketPath", d.adminSocket(), "-expiresBefore", text); !strings.Contains(said, "-expiresBefore") {
					t.Errorf("the command says %q", said)
				}
			}
		})
	}
	t.Run("E30 unknown mode of deleting", func(t *testing.T) {
		resp, err := bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"a.org"}, Mode: 17})
		if err == nil {
			err = itemError(resp.Results[0].Status, nil)
		}
		denied(t, "BatchDeleteFederatedBundle", err)
	})
	for size, want := range map[int32]int{-1: 25, -1 << 31: 25, 0: 25, 1<<31 - 1: 25, 24: 24, 25: 25, 26: 25} {
		t.Run(fmt.Sprint("E35 page size ", size), func(t *testing.T) {
			page, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: size})
			if err != nil || len(page.Entries) != want || (page.NextPageToken != "") != (want < 25) {
				t.Errorf("%d entries, next %q, %v", len(page.GetEntries()), page.GetNextPageToken(), err)
			}
			if got, err := agents.ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: size}); err != nil || len(got.Agents) != 1 || got.NextPageToken != "" {
				t.Errorf("%v, %v, want the one agent %s", got, err, agent.id)
			}
			if _, err := bundles.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: size}); err != nil {
				t.Error(err)
			}
		})
	}
	for _, token := range []string{"garbage", "17", "e-10", "' OR 1=1 --", "%", "\x00", "../../x", strings.Repeat("A", 1<<20)} {
		t.Run(fmt.Sprintf("E36 page token %.30q", token), func(t *testing.T) {
			_, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 5, PageToken: token})
			denied(t, "ListEntries", err)
			_, err = agents.ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageSize: 5, PageToken: token})
			denied(t, "ListAgents", err)
			_, err = bundles.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: 5, PageToken: token})
			denied(t, "ListFederatedBundles", err)
		})
	}
	t.Run("E36 page token after a restart", func(t *testing.T) { // the same server: it goes on
		first, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 20})
		if err != nil {
			t.Fatal(err)
		}
		d.server.stop(syscall.SIGTERM)
		d.startServer()
		rest, err := d.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 20, PageToken: first.NextPageToken})
		if err != nil || len(rest.Entries) != 5 || rest.Entries[0].Id != "e-20" {
			t.Errorf("%v, %v", rest, err)
		}
	})
}

// E45: entries that do not fit into memory twice over are listed by pages, and
// refused to who asks for all at once; the server does not grow meanwhile.
func TestCorpusEMany(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.startServer()
	const entries, size, batch = 1200, 60 << 10, 50 // 72 MB
	client := d.entries()
	for i := 0; i < entries; i += batch {
		var some []*spiretypes.Entry
		for j := i; j < i+batch; j++ {
			e := churnEntry(fmt.Sprintf("e-%04d", j), "/e")
			e.Selectors = []*spiretypes.Selector{{Type: "unix", Value: fmt.Sprintf("path:/%d/%s", j, strings.Repeat("x", size))}}
			some = append(some, e)
		}
		if err := createAll(t.Context(), client, some); err != nil {
			t.Fatal(err)
		}
	}
	before := residentMiB(t, d.server.cmd.Process.Pid)
	for range 3 {
		_, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}, grpc.MaxCallRecvMsgSize(256<<20))
		if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "page_size") {
			t.Errorf("all at once: %v", err)
		}
	}
	seen, token := 0, ""
	for {
		page, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		seen += len(page.Entries)
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if seen != entries {
		t.Errorf("%d entries by pages, want %d", seen, entries)
	}
	after := residentMiB(t, d.server.cmd.Process.Pid)
	t.Logf("the server has %d MiB, before %d", after, before)
	if after > before+400 {
		t.Errorf("the server has %d MiB, before %d", after, before)
	}
}

func residentMiB(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize() >> 20
}

// The rows of corpus E that a workload notices, on one open stream of a real agent.
func TestCorpusEInUse(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/first", nil, mine())
	messages := d.watchX509(t.Context())
	// shows waits for a message that has all of these IDs and none of those after "not".
	shows := func(t *testing.T, paths ...string) received {
		t.Helper()
		return next(t, messages, fmt.Sprint(paths), func(r received) bool {
			want := true
			for _, path := range paths {
				if path == "not" {
					want = false
				} else if slices.Contains(r.ids, "spiffe://example.org"+path) != want {
					return false
				}
			}
			return true
		})
	}
	shows(t, "/first")
	t.Run("E20 an unknown federated domain", func(t *testing.T) { // RG60: it waits for the bundle, nothing else does
		d.createEntry(agent, "/federating", func(e *spiretypes.Entry) { e.FederatesWith = []string{"unknown.org"} }, mine())
		shows(t, "/first", "/federating")
		d.createEntry(agent, "/after", nil, mine())
		shows(t, "/first", "/federating", "/after")
	})
	t.Run("E14 TTL beyond the authority", func(t *testing.T) {
		made := d.createEntry(agent, "/long", func(e *spiretypes.Entry) { e.X509SvidTtl = 1<<31 - 1 }, mine())
		if made.X509SvidTtl != 1<<31-1 {
			t.Errorf("stored as %d", made.X509SvidTtl)
		}
		authority := time.Now().Add(24*time.Hour + time.Minute) // the default
		if leaf := shows(t, "/long").leaves["spiffe://example.org/long"]; leaf.NotAfter.After(authority) {
			t.Errorf("an SVID until %v", leaf.NotAfter)
		}
		key := newKey(t)
		minted, err := svidv1.NewSVIDClient(dialUnix(t, d.adminSocket())).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{
			Csr: csrForURI(t, key, "spiffe://example.org/minted"), Ttl: 1<<31 - 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(minted.Svid.CertChain[0])
		if err != nil || leaf.NotAfter.Unix() != minted.Svid.ExpiresAt || leaf.NotAfter.After(authority) {
			t.Errorf("the answer says %d, the certificate %v, %v", minted.Svid.ExpiresAt, leaf.NotAfter, err)
		}
	})
	t.Run("E22 one hint twice", func(t *testing.T) {
		hint := func(id string) func(*spiretypes.Entry) {
			return func(e *spiretypes.Entry) { e.Id, e.Hint = id, "same" }
		}
		d.createEntry(agent, "/older", hint("a"), mine())
		d.createEntry(agent, "/younger", hint("b"), mine()) // in the same second or later
		d.createEntry(agent, "/mark", nil, mine())
		shows(t, "/older", "/mark", "not", "/younger")
		if _, err := d.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"a"}}); err != nil {
			t.Fatal(err)
		}
		shows(t, "/younger", "not", "/older")
	})
	t.Run("E10 parents in a circle", func(t *testing.T) {
		d.createEntry("spiffe://example.org/c", "/a", nil, mine())
		d.createEntry("spiffe://example.org/a", "/b", nil, mine())
		d.createEntry("spiffe://example.org/b", "/c", nil, mine())
		d.createEntry(agent, "/outside", nil, mine())
		shows(t, "/outside", "not", "/a", "/b", "/c") // nothing leads in
		d.createEntry(agent, "/b", nil, mine())
		shows(t, "/a", "/b", "/c")
	})
	t.Run("E11 a chain of 1,000", func(t *testing.T) {
		var chain []*spiretypes.Entry
		for i := range 1000 {
			e := churnEntry(fmt.Sprint("deep-", i), "/deep")
			if e.ParentId = wireID(fmt.Sprintf("spiffe://example.org/deep/deep-%d", i-1)); i == 0 {
				e.ParentId = wireID(agent)
			}
			if i == 999 {
				e.Selectors = []*spiretypes.Selector{{Type: "unix", Value: strings.TrimPrefix(mine(), "unix:")}}
			}
			chain = append(chain, e)
		}
		if err := createAll(t.Context(), d.entries(), chain); err != nil {
			t.Fatal(err)
		}
		shows(t, "/first", "/deep/deep-999")
	})
}

// E26, E46, Q5, Q6: over TCP, whoever is not an operator may neither list nor
// change anything, least of all make itself one.
func TestCorpusEStrangers(t *testing.T) {
	t.Parallel()
	other := newDeployment(t)
	other.trustDomain = "other.org"
	other.startServer()
	d := newDeployment(t)
	d.serverOptions = `admin_ids = ["spiffe://example.org/operator", "spiffe://other.org/operator"]`
	d.startServer()
	agent := d.join()
	d.createEntry(agent.id, "/plain", nil, mine())
	d.createEntry(agent.id, "/by-entry", func(e *spiretypes.Entry) { e.Admin = true }, mine())
	d.createEntry(agent.id, "/downstream", func(e *spiretypes.Entry) { e.Downstream = true }, mine())

	banned := d.join()
	if _, err := agentv1.NewAgentClient(dialUnix(t, d.adminSocket())).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(banned.id)}); err != nil {
		t.Fatal(err)
	}
	ended := mintTLS(t, d, "/operator", 1)
	calls := map[string]func(ctx context.Context, conn *grpc.ClientConn) error{
		"ListEntries": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := entryv1.NewEntryClient(conn).ListEntries(ctx, &entryv1.ListEntriesRequest{})
			return err
		},
		"CountAgents": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := agentv1.NewAgentClient(conn).CountAgents(ctx, &agentv1.CountAgentsRequest{})
			return err
		},
		"BatchCreateEntry": func(ctx context.Context, conn *grpc.ClientConn) error {
			e := churnEntry("own", "/own")
			e.Admin, e.Downstream = true, true
			resp, err := entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{e}})
			if err != nil {
				return err
			}
			if st := resp.Results[0].Status; codes.Code(st.Code) != codes.AlreadyExists {
				return itemError(st, nil)
			}
			return nil
		},
		"BanAgent": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := agentv1.NewAgentClient(conn).BanAgent(ctx, &agentv1.BanAgentRequest{Id: wireID(banned.id)})
			return err
		},
		"BatchSetFederatedBundle": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := bundlev1.NewBundleClient(conn).BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{})
			return err
		},
		"MintJWTSVID": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := svidv1.NewSVIDClient(conn).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: wireID("spiffe://example.org/any"), Audience: []string{"a"}})
			return err
		},
		"CreateJoinToken": func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
			return err
		},
	}
	all := func(t *testing.T, conn *grpc.ClientConn, want codes.Code) {
		t.Helper()
		for name, call := range calls {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if err := call(ctx, conn); status.Code(err) != want {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
			cancel()
		}
	}
	before := d.countEntries()
	for name, conn := range map[string]*grpc.ClientConn{
		"no certificate": d.dialServer(nil), "an agent": agent.conn, "a banned agent": banned.conn,
		"a workload": d.dialServer(mintTLS(t, d, "/nothing", 600)), "a workload with an entry": d.dialServer(mintTLS(t, d, "/plain", 600)),
		"a downstream server": d.dialServer(mintTLS(t, d, "/downstream", 600)),
		"like an operator":    d.dialServer(mintTLS(t, d, "/operator/x", 600)),
	} {
		t.Run("E46 "+name, func(t *testing.T) { all(t, conn, codes.PermissionDenied) })
	}
	t.Run("E46 an expired operator", func(t *testing.T) {
		eventually(t, "the certificate has ended", func() bool { return time.Now().After(ended.Leaf.NotAfter) })
		all(t, d.dialServer(ended), codes.PermissionDenied)
	})
	if after := d.countEntries(); after != before {
		t.Errorf("%d entries were %d before", after, before)
	}
	foreign := mintTLS(t, other, "/operator", 600)
	t.Run("E46 an operator of an unknown domain", func(t *testing.T) { all(t, d.dialServer(foreign), codes.Unavailable) }) // no handshake
	t.Run("an operator of a known domain", func(t *testing.T) {
		d.write("other.pem", other.run("server", "bundle", "show", "-socketPath", other.adminSocket()))
		d.run("server", "bundle", "set", "-socketPath", d.adminSocket(), "-id", "other.org", "-path", d.path("other.pem"))
		all(t, d.dialServer(foreign), codes.OK)
		all(t, d.dialServer(mintTLS(t, other, "/somebody", 600)), codes.Unavailable) // the domain is known for its operator's sake only
	})
	t.Run("E46 an operator of a domain that is no longer known", func(t *testing.T) {
		known := d.dialServer(foreign)
		all(t, known, codes.OK)
		d.run("server", "bundle", "delete", "-socketPath", d.adminSocket(), "-id", "other.org")
		for name, call := range calls { // the open connection is of no use either
			if err := call(t.Context(), known); err == nil {
				t.Errorf("%s goes on", name)
			}
		}
		all(t, d.dialServer(foreign), codes.Unavailable)
	})
	t.Run("operators", func(t *testing.T) {
		all(t, d.dialServer(mintTLS(t, d, "/operator", 600)), codes.OK)
		all(t, d.dialServer(mintTLS(t, d, "/by-entry", 600)), codes.OK)
	})
}

// mintTLS has a server sign an SVID for some seconds.
func mintTLS(t *testing.T, d *deployment, path string, ttl int32) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	resp, err := svidv1.NewSVIDClient(dialUnix(t, d.adminSocket())).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{
		Csr: csrForURI(t, key, "spiffe://"+d.trustDomain+path), Ttl: ttl,
	})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.Svid.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: resp.Svid.CertChain, PrivateKey: key, Leaf: leaf}
}
