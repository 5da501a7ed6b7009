package serverlink_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverlink"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// aPoll is how long it takes at most until a change is seen: one interval of 5 s
// ± 10 %, the signature, and the answers on the way.
const aPoll = 7 * time.Second

// bubble runs a test against a SPIRE server with its own clock.
func bubble(t *testing.T, prepare func(s *spire), f func(t *testing.T, s *spire, d *desk)) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpire(t)
		if prepare != nil {
			prepare(s)
		}
		d, stop := newDesk(t, s)
		defer stop()
		f(t, s, d)
	})
}

// Everything that an agent does with a server of ours, it does with a SPIRE
// server, only later.
func TestPolling(t *testing.T) {
	bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
		<-d.Synced() // an empty list is an answer
		s.put("a", "/a", 0)
		s.put("b", "/b", 0, func(e *spiretypes.Entry) { e.FederatesWith = []string{"other.test", "example.org", "gone.test"} })
		s.change(func() {
			s.federated["other.test"] = &spiretypes.Bundle{TrustDomain: "other.test", X509Authorities: bundleOf(s.ca).X509Authorities}
		})
		d.has(aPoll, "/a", "/b")
		if v := d.sub.View(); len(v.Federated) != 1 || v.Federated[0].TrustDomain.Name() != "other.test" || len(v.Bundle.X509) == 0 {
			t.Errorf("bundles of %v and %v", v.Federated, v.Bundle.TrustDomain)
		}
		if got, err := d.link.JWT(t.Context(), "a", nil, []string{"x"}); err != nil || got.Token != "token for a and x" {
			t.Errorf("JWT() = %v, %v", got, err)
		}
		if results, err := d.link.X509(t.Context(), []serverlink.X509Item{{GrantID: "unknown"}}); err != nil || fault.ReasonOf(results[0].Err) != "not_found" {
			t.Errorf("X509() = %v, %v", results, err)
		}

		s.put("a", "/a", 1, func(e *spiretypes.Entry) { e.DnsNames = []string{"a.test"} })
		before := slices.Clone(d.sub.View().Identities[0].Chain)
		d.within(aPoll, "an update is signed", func() bool { return !slices.Equal(d.sub.View().Identities[0].Chain, before) })
		s.change(func() { delete(s.entries, "b") })
		d.has(aPoll, "/a")
		if n := len(d.sub.View().Federated); n != 0 {
			t.Errorf("%d federated bundles are left", n)
		}

		// An idle agent asks every five seconds, spread, and nothing but what it must.
		s.change(func() { clear(s.calls); s.polled, s.signed = nil, nil })
		time.Sleep(100 * time.Second)
		s.change(func() {
			if n := s.calls["SyncAuthorizedEntries"]; n < 17 || n > 23 || s.calls["GetBundle"] != n || len(s.calls) != 2 || len(s.signed) != 0 {
				t.Errorf("in 100 s: %v, %d signatures", s.calls, len(s.signed))
			}
			for i := 1; i < len(s.polled); i++ {
				if gap := s.polled[i].Sub(s.polled[i-1]); gap < 4500*time.Millisecond || gap > 5600*time.Millisecond {
					t.Errorf("%v between two polls", gap) // R110
				}
			}
		})
		if s.change(func() { clear(s.calls) }); d.link.Redial("") != nil {
			t.Error("Redial")
		}
		time.Sleep(time.Second)
		s.change(func() {
			if s.calls["SyncAuthorizedEntries"] != 1 || s.calls["PostStatus"] != 0 {
				t.Errorf("after a new connection: %v, want one poll at once", s.calls) // R57
			}
		})
	})
}

// A long list comes as numbers, and of the entries only what is new.
func TestPollingInPages(t *testing.T) {
	paged := func(s *spire) {
		s.pageSize = 3
		for i := range 10 {
			s.put(fmt.Sprint("e", i), fmt.Sprint("/", i), 7)
		}
	}
	bubble(t, paged, func(t *testing.T, s *spire, d *desk) {
		all := []string{"/0", "/1", "/2", "/3", "/4", "/5", "/6", "/7", "/8", "/9"}
		d.has(aPoll, all...)
		asked := func(want ...string) {
			t.Helper()
			time.Sleep(3 * aPoll)
			s.change(func() {
				if !slices.Equal(s.asked, want) || len(s.signed) != len(want) {
					t.Errorf("asked for %v, signed %v, want %v", s.asked, s.signed, want)
				}
				s.asked, s.signed = nil, nil
			})
		}
		asked("e0", "e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8", "e9")
		asked()
		s.put("e4", "/4", 8)
		asked("e4")
		// Deleted and created again with its id: the numbers begin anew, the rest is new.
		s.put("e5", "/5", 0, func(e *spiretypes.Entry) { e.CreatedAt = 2000 })
		asked("e5")
		s.put("e5", "/5", 0, func(e *spiretypes.Entry) { e.CreatedAt = 3000 })
		asked("e5")
		s.put("e5", "/5", 1, func(e *spiretypes.Entry) { e.CreatedAt = 3000 })
		asked("e5")

		// An entry that is listed and not sent is gone; what was not asked for is not taken.
		s.put("e6", "/6", 9)
		s.change(func() {
			s.odd = func(r *entryv1.SyncAuthorizedEntriesResponse) {
				for _, rev := range r.EntryRevisions {
					if rev.Id == "e9" { // unknown ids, one twice, one without
						r.EntryRevisions = append(r.EntryRevisions, &entryv1.EntryRevision{Id: "unknown"}, &entryv1.EntryRevision{Id: "unknown"}, &entryv1.EntryRevision{})
						break
					}
				}
				for i := range r.Entries {
					stray := &spiretypes.Entry{Id: "stray", SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "example.org", Path: "/stray"}, Selectors: r.Entries[i].Selectors}
					r.Entries[i] = stray
				}
			}
		})
		d.has(aPoll, "/0", "/1", "/2", "/3", "/4", "/5", "/7", "/8", "/9")
		if n := len(d.sub.View().Matched); n != 9 {
			t.Errorf("%d grants, want 9", n)
		}
		// Without numbers for an entry it is not granted any more, though it could be had.
		s.change(func() { s.odd = nil; delete(s.entries, "e0") })
		d.has(aPoll, "/1", "/2", "/3", "/4", "/5", "/6", "/7", "/8", "/9")
		if notes := len(d.ended); notes > 1 {
			t.Errorf("%d conversations ended: %v", notes, <-d.ended)
		}

		// Now and then everything is fetched: the database behind the numbers may be another.
		s.change(func() { s.asked = nil })
		time.Sleep(13 * time.Minute)
		s.change(func() {
			if len(s.asked) != 9 {
				t.Errorf("in 13 minutes asked for %v, want each entry once", s.asked)
			}
		})
	})
}

// An answer that is not whole or makes no sense changes nothing, and what is wrong
// with one entry or one foreign bundle concerns that alone (R59).
func TestPollingTakesNothingByHalves(t *testing.T) {
	for name, spoil := range map[string]func(s *spire){
		"entries and numbers mixed": func(s *spire) {
			s.odd = func(r *entryv1.SyncAuthorizedEntriesResponse) {
				r.EntryRevisions = append(r.EntryRevisions, &entryv1.EntryRevision{Id: "x"})
			}
		},
		"no end": func(s *spire) {
			s.odd = func(r *entryv1.SyncAuthorizedEntriesResponse) { r.Entries, r.More = r.Entries[:1], true }
		},
		"a bundle of another":           func(s *spire) { s.bundle.TrustDomain = "other.test" },
		"a bundle without an authority": func(s *spire) { s.bundle.X509Authorities = nil },
		"an authority that cannot be read": func(s *spire) {
			s.bundle.X509Authorities = []*spiretypes.X509Certificate{{Asn1: []byte("x")}}
		},
		"denied without a reason": func(s *spire) { s.deny = status.Error(codes.PermissionDenied, "no") },
		"unavailable":             func(s *spire) { s.deny = status.Error(codes.Unavailable, "no") },
		"exhausted":               func(s *spire) { s.deny = status.Error(codes.ResourceExhausted, "no") },
		"broken":                  func(s *spire) { s.deny = status.Error(codes.Internal, "no") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(s *spire) { s.put("a", "/a", 0); s.put("b", "/b", 0) }, func(t *testing.T, s *spire, d *desk) {
				d.has(aPoll, "/a", "/b")
				s.change(func() { spoil(s); delete(s.entries, "b"); s.polled = nil })
				time.Sleep(2 * time.Minute)
				d.has(0, "/a", "/b")
				// The waits grow and stay bounded, so that a server is not pestered and
				// its return is soon noticed (R56, R110).
				s.change(func() {
					if n := len(s.polled); name != "no end" && (n < 8 || n > 30) {
						t.Errorf("%d polls in two minutes of failures", n)
					}
					s.odd, s.deny, s.bundle = nil, nil, bundleOf(s.ca)
					s.putLocked("c", "/c", 0)
				})
				limit := 16 * time.Second
				if name == "no end" {
					limit += 30 * time.Second // for the call under way
				}
				d.has(limit, "/a", "/c")
			})
		})
	}
	bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
		s.put("good", "/good", 0, func(e *spiretypes.Entry) { e.FederatesWith = []string{"broken.test", "other.test"} })
		s.put("bad-id", "/../x", 0)
		s.put("bad-td", "/x", 0, func(e *spiretypes.Entry) { e.SpiffeId.TrustDomain = "other.test" })
		s.put("bad-none", "/none", 0, func(e *spiretypes.Entry) { e.Selectors = nil })
		s.put("bad-fed", "/fed", 0, func(e *spiretypes.Entry) { e.FederatesWith = []string{"spiffe://x y"} })
		s.put("no-parent", "/p", 0, func(e *spiretypes.Entry) { e.ParentId = nil })
		s.put("", "/unnamed", 0)
		foreign := &spiretypes.Bundle{TrustDomain: "other.test", X509Authorities: bundleOf(s.ca).X509Authorities}
		s.change(func() { s.federated["broken.test"], s.federated["other.test"] = foreign, foreign })
		d.has(aPoll, "/good", "/p")
		if n := len(d.sub.View().Federated); n != 1 {
			t.Errorf("%d federated bundles, want that which is for its own trust domain", n)
		}
		s.change(func() { s.federated["other.test"] = nil }) // fails, and what is held stays
		time.Sleep(aPoll)
		if n := len(d.sub.View().Federated); n != 1 {
			t.Errorf("%d federated bundles after a failure, want the one held", n)
		}
		s.change(func() { delete(s.federated, "other.test") })
		d.within(aPoll, "a bundle that is gone goes", func() bool { return len(d.sub.View().Federated) == 0 })
		d.has(0, "/good", "/p")
	})
	bubble(t, func(s *spire) { s.before = true; s.put("a", "/a", 0) }, func(t *testing.T, s *spire, d *desk) {
		d.has(aPoll, "/a") // from before SyncAuthorizedEntries
	})
}

// What a replica still remembers of the bundle does not replace what is known:
// it may hold a revoked key (R69, R75).
func TestPolledBundleGrows(t *testing.T) {
	bubble(t, func(s *spire) { s.put("a", "/a", 0) }, func(t *testing.T, s *spire, d *desk) {
		revoked := newAuthority(t, "example.org")
		with := bundleOf(s.ca, revoked)
		s.change(func() { s.bundle = with })
		d.has(aPoll, "/a")
		held := func() int { return len(d.sub.View().Bundle.Keys.X509) }
		s.change(func() { s.bundle = bundleOf(s.ca); s.bundle.SequenceNumber = with.SequenceNumber + 1 })
		d.within(aPoll, "the key is revoked", func() bool { return held() == 1 })
		s.change(func() { s.bundle = with })
		time.Sleep(5 * time.Minute)
		if held() != 1 {
			t.Error("a revoked key came back by an older bundle")
		}
		// What the server says for long enough is its word: it was restored.
		d.within(6*time.Minute, "the restored bundle is taken", func() bool { return held() == 2 })
	})
	bubble(t, func(s *spire) { s.put("a", "/a", 0); s.bundle.SequenceNumber = 0 }, func(t *testing.T, s *spire, d *desk) {
		d.has(aPoll, "/a") // a server that does not number its bundles
		s.change(func() { s.bundle = bundleOf(s.ca, newAuthority(t, "example.org")); s.bundle.SequenceNumber = 0 })
		d.within(aPoll, "a change is taken", func() bool { return len(d.sub.View().Bundle.Keys.X509) == 2 })
	})
}

// When the authority above the agent's own SVID is tainted, the agent renews, once.
func TestPolledTaintRenews(t *testing.T) {
	bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
		<-d.Synced()
		next := newAuthority(t, "example.org")
		s.change(func() {
			s.bundle = bundleOf(s.ca, next)
			s.bundle.SequenceNumber = 4
			s.bundle.X509Authorities[1].Tainted = true
		})
		time.Sleep(aPoll)
		if len(d.told) != 0 {
			t.Error("told to renew although another's authority is tainted")
		}
		s.change(func() {
			s.bundle = bundleOf(s.ca, next)
			s.bundle.SequenceNumber = 5
			s.bundle.X509Authorities[0].Tainted = true
		})
		time.Sleep(time.Minute)
		if len(d.told) != 1 {
			t.Fatalf("told %d times", len(d.told))
		}
		if m := <-d.told; m.GetRenew() == nil || m.GetRenew().GetWithinMs() > 30_000 {
			t.Errorf("told %v", m) // R69: in a minute with the signing
		}
	})
}

// SPIRE's server says why it denies in its own way; the agent hears the reasons of ours.
func TestDenials(t *testing.T) {
	for reason, want := range map[spiretypes.PermissionDeniedDetails_Reason]string{
		spiretypes.PermissionDeniedDetails_AGENT_EXPIRED: "agent_expired", spiretypes.PermissionDeniedDetails_AGENT_NOT_ATTESTED: "agent_not_attested",
		spiretypes.PermissionDeniedDetails_AGENT_NOT_ACTIVE: "agent_not_active", spiretypes.PermissionDeniedDetails_AGENT_BANNED: "agent_banned",
		spiretypes.PermissionDeniedDetails_AGENT_MUST_REATTEST: "agent_must_reattest", spiretypes.PermissionDeniedDetails_UNKNOWN: "server_denied", 99: "server_denied",
	} {
		bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
			<-d.Synced()
			check(t, "at first", <-d.ended, "sync_unsupported")
			s.change(func() { s.deny = denied(t, reason) })
			time.Sleep(aPoll)
			err := <-d.ended
			check(t, want, err, want)
			if fault.KindOf(err) != fault.Denied {
				t.Errorf("%v is %v", err, fault.KindOf(err))
			}
		})
	}
}

// A server that says when to come again is not asked before, neither for changes
// nor for SVIDs, and soon after; with a server that pushes it is the same loop.
func TestRetryHints(t *testing.T) { // R110
	for _, call := range []string{"SyncAuthorizedEntries", "BatchNewX509SVID"} {
		for hint, most := range map[time.Duration]time.Duration{3 * time.Minute: 4 * time.Minute, 24 * time.Hour: 11 * time.Minute} {
			busy, err := status.New(codes.ResourceExhausted, "busy").WithDetails(protoadapt.MessageV1Of(&errdetails.RetryInfo{RetryDelay: durationpb.New(hint)}))
			if err != nil {
				t.Fatal(err)
			}
			bubble(t, func(s *spire) { s.deny, s.denyOnly = busy.Err(), call; s.put("a", "/a", 0) }, func(t *testing.T, s *spire, d *desk) {
				time.Sleep(min(hint, 10*time.Minute) - time.Second)
				s.change(func() {
					if s.calls[call] != 1 {
						t.Errorf("%s is called %d times within the hint of %v", call, s.calls[call], hint)
					}
					s.deny = nil
				})
				time.Sleep(most - min(hint, 10*time.Minute))
				d.has(0, "/a")
			})
		}
	}
}

// The sync protocol is tried first, again when the connection was lost, and now
// and then; and a server that pushes is not polled.
func TestPollingGivesWay(t *testing.T) {
	bubble(t, func(s *spire) { s.put("a", "/a", 0) }, func(t *testing.T, s *spire, d *desk) {
		d.has(aPoll, "/a")
		push := &pushing{hellos: make(chan *syncv1.Hello, 10)}
		d.wire.serve(t, s, push) // upgraded in its place
		time.Sleep(20 * time.Second)
		if len(push.hellos) != 1 {
			t.Fatalf("%d greetings after the server was upgraded", len(push.hellos))
		}
		if h := <-push.hellos; len(h.GetHash()) != 32 || h.GetAgentVersion() != "9.9" {
			t.Errorf("greeted with %v", h)
		}
		s.change(func() { clear(s.calls) })
		time.Sleep(time.Minute)
		s.change(func() {
			if len(s.calls) != 0 {
				t.Errorf("a server that pushes is asked %v", s.calls)
			}
		})
		d.wire.serve(t, s, nil) // and back
		s.put("b", "/b", 0)
		d.has(20*time.Second, "/a", "/b")
		s.change(func() {
			if len(s.signed) != 2 {
				t.Errorf("signed %v; the change of server is no reason to sign anew", s.signed)
			}
		})
	})
	// Nothing but a new connection makes another server of it; a SPIRE server makes one every three minutes.
	bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
		<-d.Synced()
		check(t, "at first", <-d.ended, "sync_unsupported")
		time.Sleep(time.Hour / 2)
		if len(d.ended) != 0 {
			t.Errorf("ended: %v", <-d.ended)
		}
		if heard := time.Since(d.Why(t.Context(), entry.Facts{}, false).Sync.Heard); heard > 6*time.Minute {
			t.Errorf("nothing was heard of the server for %v, which is there", heard)
		}
		s.put("a", "/a", 0)
		d.link.Redial("")
		d.has(time.Second, "/a")
		for len(d.ended) > 0 {
			check(t, "with a new connection", <-d.ended, "sync_unsupported")
		}
	})
}

// Ending a conversation ends a poll that hangs.
func TestPollingEnds(t *testing.T) {
	bubble(t, nil, func(t *testing.T, s *spire, d *desk) {
		<-d.Synced()
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := d.link.Follow(ctx)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := stream.Recv(); fault.ReasonOf(err) != "call_ended" {
			t.Errorf("Recv() = %v", err)
		}
		for i := 0; err == nil; i++ { // nobody takes it any more
			if i > 10 {
				t.Fatal("Send() goes on after the end")
			}
			err = stream.Send(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: &syncv1.Hello{}}})
		}
		stream.Close()
	})
}
