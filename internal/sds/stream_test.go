package sds

import (
	"bytes"
	"slices"
	"testing"
	"unicode/utf8"

	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
)

// FuzzRequests drives one stream with requests of a client that may send anything,
// each taken as an answer to the last response by every second bit of steer, while
// what the caller may have changes by the others.
func FuzzRequests(f *testing.F) {
	for _, req := range []*discoveryv3.DiscoveryRequest{
		{}, {ResourceNames: []string{"default", "ROOTCA", "ALL", "", "x"}, TypeUrl: typeURL},
		{ResourceNames: []string{"spiffe://example.org/a"}, ErrorDetail: &status.Status{Message: "no"}},
	} {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b, uint8(0xff))
		f.Add([]byte{}, b, uint8(1))
	}
	domain := spiffeid.RequireTrustDomainFromString("example.org")
	id := spiffeid.RequireFromString("spiffe://example.org/a")
	views := []mirror.View{
		{},
		{Matched: []entry.Matched{{GrantID: "a", ID: id}}, Bundle: mirror.Bundle{TrustDomain: domain, X509: []byte{0x30, 0}}},
		{Matched: []entry.Matched{{GrantID: "a", ID: id}}, Bundle: mirror.Bundle{TrustDomain: domain, X509: []byte{0x30, 0}},
			Identities: []mirror.Identity{{ID: id, Chain: []byte{0x30, 0}, Key: []byte("k"), Hint: "x"}}},
	}
	f.Fuzz(func(t *testing.T, first, second []byte, steer uint8) {
		st := newStream(&Config{Names: Names{DefaultSVIDName, DefaultBundleName, DefaultAllBundlesName}})
		for i, raw := range [][]byte{first, second, first} {
			req := new(discoveryv3.DiscoveryRequest)
			if proto.Unmarshal(raw, req) != nil {
				return
			}
			answers := steer>>(2*i)&1 == 1
			if answers {
				req.ResponseNonce = st.nonce
			}
			was := slices.Clone(st.names)
			h, err := st.hear(req)
			if err != nil {
				continue
			}
			switch {
			case i > 0 && st.begun && req.GetResponseNonce() != st.nonce && (h != heard{} || !slices.Equal(was, st.names)):
				t.Fatal("an answer to something else was heard")
			case h.accepted && h.rejected != "", (h.accepted || h.rejected != "") && st.nonce == "":
				t.Fatal("an answer to nothing, or two to one")
			case len(st.names) > maxNames || !utf8.ValidString(h.rejected) || len(h.rejected) > maxText || slices.Contains(st.names, ""):
				t.Fatal("too much, or what cannot be shown, is kept")
			}
			view := views[int(steer>>(2*i+1)&1)+i%2]
			nonce, version, due := st.nonce, st.version, st.due
			resp, _, err := st.answer(view)
			if err != nil {
				continue
			}
			if resp == nil {
				if due || st.nonce != nonce || st.version != version {
					t.Fatal("what is due was not sent")
				}
				continue
			}
			if !due && resp.GetVersionInfo() == version || resp.GetNonce() == nonce || len(resp.GetResources())+len(resp.GetResourceErrors()) < len(st.names) {
				t.Fatal("the same again, or not all")
			}
			for _, r := range resp.GetResources() {
				if len(view.Identities) == 0 && bytes.Contains(r.GetValue(), []byte("PRIVATE KEY")) {
					t.Fatal("a key that the caller may not have")
				}
			}
			if again, _, err := st.answer(view); again != nil || err != nil {
				t.Fatal("the same was sent twice", err)
			}
		}
	})
}
