package workloadapi_test

import (
	"testing"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

// A rule's SVID is signed at the first call, and follows the facts. An attestor
// states facts of its own kind only.
func TestRule(t *testing.T) {
	r := newRig(t)
	r.facts.state(map[string]string{"facts.user": "ann", "unix.user": "root"})
	r.server.Put(r.server.Rule("r", "/user/{facts.user}", "unix:uid:1"), r.server.Rule("s", "/unix/{unix.user}", "unix:uid:1"))
	sub := r.mirror.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, Values: map[string]string{"facts.user": "eve", "unix.user": "eve"}})
	defer sub.Close()
	mirrortest.Until(t, sub, func(v mirror.View) bool { return len(v.Matched) == 2 }) // they are there
	s, err := r.client().FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil || len(resp.GetSvids()) != 1 || resp.GetSvids()[0].GetSpiffeId() != "spiffe://example.org/user/ann" {
		t.Fatalf("%v, %v", resp, err)
	}
	tokens, err := r.client().FetchJWTSVID(r.ctx(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
	if err != nil || len(tokens.GetSvids()) != 1 || tokens.GetSvids()[0].GetSpiffeId() != "spiffe://example.org/user/ann" {
		t.Fatalf("%v, %v", tokens, err)
	}
	// The caller is looked at again with the next push (R42).
	r.facts.state(map[string]string{"facts.user": "bob"})
	r.server.Put(r.server.Rule("t", "/again/{facts.user}", "unix:uid:1"))
	for len(resp.GetSvids()) != 2 {
		if resp, err = s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"spiffe://example.org/user/bob", "spiffe://example.org/again/bob"} {
		if resp.GetSvids()[i].GetSpiffeId() != want {
			t.Errorf("%v, want %s", resp.GetSvids()[i].GetSpiffeId(), want)
		}
	}
	r.facts.state(map[string]string{"facts.user": "a b"})
	r.server.Remove("t")
	for err == nil {
		_, err = s.Recv()
	}
	wants(t, err, codes.PermissionDenied, "rule_fact_invalid")
}
