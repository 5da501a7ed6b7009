package sds_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/fakes/envoy"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/sds"
	"github.com/plastron/plastron/internal/workloadapi"
)

// Two Envoys with secrets from SDS alone connect to each other all the time, while
// their certificates are replaced ten times, three times by those of a new
// authority, and the old ones are revoked. No handshake fails. The same with plain
// roots.
func TestMTLS(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			r := newRig(t, func(c *sds.Config, _ *workloadapi.Config) { c.Plain = plain })
			r.grant("a", "/a")
			r.grant("b", "/b")
			peers := [2]*envoy.Peer{r.proxy().Peer(td+"/a", "ROOTCA"), r.proxy().Peer(td+"/b", "ROOTCA")}
			traffic := envoy.Connect(t, peers[0], peers[1])
			for i := range 10 {
				before := [2]string{peers[0].SVID.Now().Version, peers[1].SVID.Now().Version}
				if i%3 == 0 {
					was := peers[0].Trust.Now().Version
					r.server.Rotate()
					for _, p := range peers { // an authority signs only when those who verify have it
						p.Trust.Until(func(m *envoy.Material) bool { return m.Version != was })
					}
				}
				for n, path := range []string{"a", "b"} {
					r.grant(path, "/"+path, func(g *syncv1.Grant) { g.DnsNames = []string{fmt.Sprintf("n%d.test", i)} })
					peers[n].SVID.Until(func(m *envoy.Material) bool { return m.Version != before[n] })
				}
				traffic.Round()
			}
			authority := func(p *envoy.Peer) string { return string(p.SVID.Now().Certificate.Leaf.AuthorityKeyId) }
			if authority(peers[0]) != authority(peers[1]) {
				t.Error("two authorities sign")
			}
			was := peers[0].Trust.Now().Version
			r.server.Revoke()
			for _, p := range peers {
				p.Trust.Until(func(m *envoy.Material) bool { return m.Version != was })
			}
			traffic.Round()
			for err := range slices.Values(traffic.Failures()) {
				t.Error(err)
			}
			for _, s := range []*envoy.Secret{peers[0].SVID, peers[1].SVID} {
				if n := len(slices.Compact(slices.Clone(s.Versions()))); n < 11 || len(s.Refused()) > 0 {
					t.Errorf("%s: %d versions taken, %v refused", s.Name, n, s.Refused())
				}
			}
			t.Logf("%d handshakes", traffic.Handshakes())
		})
	}
}

// Only those who are in the list get in, and only by the roots of their own trust
// domain, however many others are trusted.
func TestMTLSRefuses(t *testing.T) {
	r, foreign := newRig(t), newRig(t)
	r.grant("a", "/a", func(g *syncv1.Grant) { g.FederatesWith = []string{"foreign.test"} })
	r.grant("b", "/b")
	foreign.grant("b", "/b")
	r.federate("foreign.test", foreign)
	r.until(func(v mirror.View) bool { return len(v.Federated) == 1 })
	a, b := r.proxy().Peer(td+"/a", "ALL"), r.proxy().Peer(td+"/b", "ALL")
	if err := envoy.Handshake(b, a); err != nil {
		t.Fatal(err)
	}
	stranger := *a
	stranger.ID = td + "/nobody"
	if err := envoy.Handshake(&stranger, b); err == nil {
		t.Error("a name that is not in the list got in")
	}
	// b's name, signed by an authority that is trusted for other names.
	forger := &envoy.Peer{ID: b.ID, SVID: foreign.proxy().Secret(td + "/b"), Trust: b.Trust}
	forger.SVID.Until(func(m *envoy.Material) bool { return m.Certificate != nil })
	for _, err := range []error{envoy.Handshake(forger, a), envoy.Handshake(a, forger)} {
		if err == nil || !strings.Contains(err.Error(), "signed by unknown authority") {
			t.Errorf("the forger: %v", err)
		}
	}
}
