package workloadapi_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/workloadapi"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// R131, WEP-6-c, WEP-6-e: each seeded mistake has its own reason, the same in
// the status that the workload gets and in what it hears about itself. The
// status keeps the code that the standard asks for, and neither names what is
// granted to others.
func TestRefusals(t *testing.T) {
	grant := func(selectors ...string) func(*rig) {
		return func(r *rig) { r.server.Put(r.server.Grant("secret-grant", "/secret", selectors...)) }
	}
	for name, row := range map[string]struct {
		seed func(*rig)
		want string
		code codes.Code
	}{
		"no grant":       {func(*rig) {}, "no_grant", codes.PermissionDenied},
		"selector":       {grant("unix:uid:1", "secret:x:y"), "selector_mismatch", codes.PermissionDenied},
		"parent":         {func(r *rig) { r.server.SetHint("parent_mismatch") }, "parent_mismatch", codes.PermissionDenied},
		"alias":          {func(r *rig) { r.server.SetHint("alias_mismatch") }, "alias_mismatch", codes.PermissionDenied},
		"signing":        {func(r *rig) { r.server.Refuse("secret-grant", "secret_reason"); grant("unix:uid:1")(r) }, "signing_refused", codes.Unavailable},
		"not signed yet": {func(r *rig) { r.server.RotateUnpublished(); grant("unix:uid:1")(r) }, "not_signed_yet", codes.Unavailable},
		"clock":          {func(r *rig) { r.server.SetSkew(time.Hour); grant("unix:uid:1")(r) }, "clock_skew", codes.Unavailable},
		"attestor":       {func(r *rig) { r.facts.set(errors.New("secret")) }, "attestor_failed", codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			row.seed(r)
			conn := r.dial()
			var err error
			until(t, func() bool { // the grant is on its way
				err = calls(conn)["FetchX509SVID"](r.ctx())
				return reasonOf(err) == row.want
			})
			wants(t, err, row.code, row.want)
			about, askErr := whyv1.NewSelfClient(conn).Ask(r.ctx(), &whyv1.AskSelfRequest{})
			if askErr != nil || about.Reason.GetCode() != row.want || about.Identities != 0 {
				t.Errorf("Ask() = %v, %v", about, askErr)
			}
			text := status.Convert(err).Message()
			if code, fix := "("+row.want+")", reason.Find(row.want).Remedy; !strings.Contains(text, code) || !strings.HasSuffix(text, fix) {
				t.Errorf("%q lacks the code or the fix", text)
			}
			if strings.Contains(text+about.String(), "secret") {
				t.Errorf("what is not the caller's: %s %s", text, about)
			}
		})
	}
}

// A process asks about itself.
func TestSelf(t *testing.T) {
	r := newRig(t)
	api := whyv1.NewSelfClient(r.dial())
	if _, err := api.Ask(t.Context(), &whyv1.AskSelfRequest{}); status.Code(err) != codes.InvalidArgument { // R51
		t.Errorf("without the security header: %v", err)
	}
	r.grant("a", "/a")
	r.server.Put(r.server.Grant("b", "/b", "unix:uid:1"), r.server.Grant("c", "/c", "unix:uid:2"))
	until(t, func() bool {
		about, err := api.Ask(r.ctx(), &whyv1.AskSelfRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return about.Pid > 0 && len(about.Selectors) == 1 && about.Selectors[0].Value == "uid:1" && about.Identities == 2 && about.Reason == nil
	})
	// Identities that are there, with something missing.
	g := r.server.Grant("a", "/a", "unix:uid:1")
	g.FederatesWith = []string{"foreign.test"}
	r.server.Put(g)
	until(t, func() bool {
		about, err := api.Ask(r.ctx(), &whyv1.AskSelfRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return about.Identities == 2 && about.Reason.GetCode() == "federated_bundle_missing"
	})
	// WAPI-6.2.3: a token of that trust domain, which nobody can verify.
	_, err := workload.NewSpiffeWorkloadAPIClient(r.dial()).ValidateJWTSVID(r.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: foreignToken(t)})
	wants(t, err, codes.InvalidArgument, "federated_bundle_missing")
}

// RG43: an attestor that failed may have had the selector that is missing, so
// nobody is told that there is no identity.
func TestOneAttestorFails(t *testing.T) {
	second := &facts{}
	second.set(errors.New("broken"))
	r := newRig(t, func(c *workloadapi.Config) {
		c.Attestors = append(c.Attestors, workloadapi.Attestor{Name: "second", Attestor: second})
	})
	r.facts.set(nil, "unix:uid:7")
	call := calls(r.dial())["FetchX509SVID"]
	wants(t, call(r.ctx()), codes.Unavailable, "attestor_failed")
	second.set(nil)
	wants(t, call(r.ctx()), codes.PermissionDenied, "no_grant")
}

// logged is a log that a test reads.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) lines(with ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
lines:
	for line := range strings.Lines(l.b.String()) {
		for _, part := range with {
			if !strings.Contains(line, part) {
				continue lines
			}
		}
		n++
	}
	return n
}

// R104: each distinct refusal is logged once, whatever a caller does.
func TestRefusalsAreLoggedOnce(t *testing.T) {
	out := &logged{}
	r := newRig(t, func(c *workloadapi.Config) { c.Log = slog.New(slog.NewTextHandler(out, nil)) })
	for range 50 {
		if err := calls(r.dial())["FetchX509SVID"](r.ctx()); err == nil {
			t.Fatal("it has an identity")
		}
	}
	r.server.Put(r.server.Grant("a", "/a", "unix:uid:1", "secret:x:y"))
	until(t, func() bool { return reasonOf(calls(r.dial())["FetchJWTSVID"](r.ctx())) == "selector_mismatch" })
	for _, reason := range []string{"no_grant", "selector_mismatch"} {
		if n := out.lines(`msg="workload refused"`, "reason="+reason, "count=1", "pid=", "uid="); n != 1 {
			t.Errorf("%s was logged %d times:\n%s", reason, n, out.b.String())
		}
	}
	if out.lines("secret") != 0 || out.lines("workload refused") != 2 {
		t.Errorf("the log says:\n%s", out.b.String())
	}
}

// A connection over the limit is closed before anything can be said on it; the
// log has the reason.
func TestConnectionOverLimitIsLogged(t *testing.T) {
	out := &logged{}
	r := newRig(t, func(c *workloadapi.Config) {
		c.Limits = workloadapi.Limits{ConnectionsPerUser: 1}
		c.Log = slog.New(slog.NewTextHandler(out, nil))
	})
	first, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	until(t, func() bool { return out.lines("reason=rate_limited") == 1 })
}

func foreignToken(t *testing.T) string { return tokenOf(t, mirrortest.New(t), "foreign.test") }

// tokenOf has a server sign a token as if it were of a trust domain.
func tokenOf(t *testing.T, s *mirrortest.Server, td string) string {
	t.Helper()
	s.TD = spiffeid.RequireTrustDomainFromString(td)
	s.Put(s.Grant("f", "/f", "unix:uid:1"))
	got, err := s.JWT(t.Context(), "f", nil, []string{"x"})
	if err != nil {
		t.Fatal(err)
	}
	return got.Token
}

// R91: the keys of a trust domain verify its own tokens and nobody else's, though
// the caller may know them all.
func TestKeysOfOtherTrustDomains(t *testing.T) {
	r := newRig(t)
	const own, foreign, third = "example.org", "foreign.test", "third.test"
	g := r.server.Grant("a", "/a", "unix:uid:1")
	g.FederatesWith = []string{foreign, third}
	r.server.Put(g)
	keys := map[string]*mirrortest.Server{foreign: mirrortest.New(t), third: mirrortest.New(t)}
	for td, s := range keys {
		b := s.Bundle()
		b.TrustDomain = td
		r.server.PutBundle(td, b)
	}
	c := r.client()
	validate := func(token string) error {
		_, err := c.ValidateJWTSVID(r.ctx(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: token})
		return err
	}
	for by, s := range keys {
		until(t, func() bool { return validate(tokenOf(t, s, by)) == nil })
	}
	for by, s := range keys {
		for _, as := range []string{own, foreign, third} {
			if as != by {
				wants(t, validate(tokenOf(t, s, as)), codes.InvalidArgument, "jwt_key_unknown")
			}
		}
	}
}
