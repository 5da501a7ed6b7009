package entry

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func rule(t testing.TB, name, template string, texts ...string) Entry {
	t.Helper()
	r, err := ParseRule(td, template, "", TrustAgent)
	if err != nil {
		t.Fatal(err)
	}
	return Entry{ID: name, ParentID: id("/spire/agent/x"), Rule: r, Selectors: sels(texts...), CreatedAt: now}
}

func TestParseTemplate(t *testing.T) {
	for text, want := range map[string]struct{ fixed, facts string }{
		"spiffe://td/user/{unix.user}/{unix.program}": {"spiffe://td/user/", "unix.program unix.user"},
		"spiffe://td/user/{unix.user}":                {"spiffe://td/user/", "unix.user"},
		"spiffe://td/a/b/svc-{k8s.ns}.x/{k8s.ns}":     {"spiffe://td/a/b/", "k8s.ns"},
		"spiffe://td/{unix.user}":                     {"spiffe://td/", "unix.user"},
		"spiffe://td/.{unix.user}":                    {"spiffe://td/", "unix.user"},
		"spiffe://td/a{b.c}":                          {"spiffe://td/", "b.c"},
	} {
		got, err := ParseTemplate(td, text)
		if err != nil || got.String() != text || got.fixed() != want.fixed || strings.Join(got.Facts(), " ") != want.facts {
			t.Errorf("ParseTemplate(%q) = %q, %q, %q, %v", text, got, got.fixed(), got.Facts(), err)
		}
	}
	for _, text := range []string{
		"", "{a.b}", "spiffe://td", "spiffe://td/", "spiffe://td/a", "spiffe://other/{a.b}", "spiffe://{a.b}/x", "SPIFFE://td/{a.b}",
		"spiffe://td/{a.b", "spiffe://td/a.b}", "spiffe://td/{a.b}}", "spiffe://td/{{a.b}}", "spiffe://td/{a.b}/", "spiffe://td//{a.b}",
		"spiffe://td/{}", "spiffe://td/{a}", "spiffe://td/{a.}", "spiffe://td/{.b}", "spiffe://td/{a.b.c}", "spiffe://td/{A.b}", "spiffe://td/{a.b }",
		"spiffe://td/{a/b}", "spiffe://td/{a.b}{c.d}", "spiffe://td/{a.b}-{c.d}", "spiffe://td/../{a.b}", "spiffe://td/./{a.b}", "spiffe://td/ü/{a.b}",
		"spiffe://td/x y{a.b}", "spiffe://td/{a.b}?", "spiffe://td/{a.b}#x", "spiffe://td/%7B{a.b}", "spiffe://td:1/{a.b}", "spiffe://u@td/{a.b}",
		"spiffe://td/{" + strings.Repeat("a", MaxFactName) + ".b}", "spiffe://td/" + strings.Repeat("a", MaxTemplate) + "{a.b}",
		"spiffe://td/x" + strings.Join(numbered(MaxFacts+1, func(i int) string { return fmt.Sprintf("/{a.f%d}", i) }), ""),
	} {
		if got, err := ParseTemplate(td, text); fault.ReasonOf(err) != "rule_template_invalid" {
			t.Errorf("ParseTemplate(%.80q) = %v, %v, want it refused", text, got, err)
		}
	}
}

func TestParseRule(t *testing.T) {
	const template = "spiffe://td/a/b/{unix.user}"
	for _, c := range []struct{ template, prefix, trust, want, reason string }{
		{template, "", "agent", "spiffe://td/a/b/", ""},
		{template, "spiffe://td/a/b", "agent", "spiffe://td/a/b/", ""},
		{template, "spiffe://td/a/b/", "agent", "spiffe://td/a/b/", ""},
		{template, "spiffe://td/a", "agent", "spiffe://td/a/", ""},
		{template, "spiffe://td/a/bb", "agent", "", "rule_prefix_mismatch"},
		{template, "spiffe://td/a/b/c", "agent", "", "rule_prefix_mismatch"},
		{"spiffe://td/a/bc-{unix.user}", "spiffe://td/a/bc-", "agent", "", "rule_prefix_mismatch"},
		{template, "/a", "agent", "", "rule_prefix_invalid"},
		{template, "spiffe://other/a", "agent", "", "rule_prefix_invalid"},
		{template, strings.Repeat("x", 1<<20), "agent", "", "rule_prefix_invalid"},
		{template, "spiffe://td", "agent", "", "rule_prefix_too_wide"},
		{"spiffe://td/{unix.user}", "", "agent", "", "rule_prefix_too_wide"},
		{"spiffe://td/spire{unix.user}", "", "agent", "", "rule_prefix_too_wide"}, // E12 S44
		{"spiffe://td/spire/{unix.user}", "", "agent", "", "rule_prefix_reserved"},
		{"spiffe://td/spire/agent/x/{unix.user}", "", "agent", "", "rule_prefix_reserved"},
		{"spiffe://td/spire/server/{unix.user}", "", "agent", "", "rule_prefix_reserved"},
		{"spiffe://td/spires/{unix.user}", "", "agent", "spiffe://td/spires/", ""},
		{template, "", "", "", "rule_trust_missing"},
		{template, "", "server", "", "rule_trust_invalid"},
	} {
		r, err := ParseRule(td, c.template, c.prefix, c.trust)
		if err == nil {
			e := Entry{ID: "r", ParentID: id("/spire/agent/x"), Selectors: sels("unix:uid:1"), Rule: r}
			err = Validate(td, &e, now)
		}
		if fault.ReasonOf(err) != c.reason && (c.reason != "" || err != nil) || err == nil && r.Prefix != c.want {
			t.Errorf("%+.60v: %+v, %v", c, r, err)
		}
		if f, ok := err.(*fault.Error); ok && f.Remedy == "" {
			t.Errorf("%+.60v: no fix in %v", c, err)
		}
	}
}

// A rule never carries more than a name (design section 6).
func TestValidateRule(t *testing.T) {
	for reason, change := range map[string]func(*Entry){
		"":                    func(e *Entry) {},
		"selectors_missing":   func(e *Entry) { e.Selectors = nil },
		"rule_spiffe_id":      func(e *Entry) { e.SPIFFEID = id("/web") },
		"rule_parent_server":  func(e *Entry) { e.ParentID = id("/spire/server") },
		"parent_id_missing":   func(e *Entry) { e.ParentID = spiffeid.ID{} },
		"parent_id_reserved":  func(e *Entry) { e.ParentID = id("/spire/x") },
		"rule_privileged":     func(e *Entry) { e.Admin = true },
		"rule_privileged ":    func(e *Entry) { e.Downstream = true },
		"rule_privileged  ":   func(e *Entry) { e.StoreSVID = true },
		"rule_dns_names":      func(e *Entry) { e.DNSNames = []string{"a.test"} },
		"rule_option":         func(e *Entry) { e.JWTIncludeJTI = true },
		"ttl_invalid":         func(e *Entry) { e.X509TTL = -1 },
		"hint_invalid":        func(e *Entry) { e.Hint = "\x00" },
		"expires_at_past":     func(e *Entry) { e.ExpiresAt = now },
		"rule_trust_missing":  func(e *Entry) { e.Rule.TrustAgent = false },
		"rule_prefix_invalid": func(e *Entry) { e.Rule.Prefix = "spiffe://td/user" },
		"rule_template_invalid": func(e *Entry) {
			e.Rule.Template, _ = ParseTemplate(spiffeid.RequireTrustDomainFromString("other"), "spiffe://other/user/{a.b}")
		},
	} {
		e := rule(t, "r", "spiffe://td/user/{unix.user}", "unix:uid:1")
		change(&e)
		if err := Validate(td, &e, now); fault.ReasonOf(err) != strings.TrimSpace(reason) && (reason != "" || err != nil) {
			t.Errorf("%s: %v", reason, err)
		}
	}
}

func TestGrants(t *testing.T) {
	e := rule(t, "r", "spiffe://td/user/{unix.user}/{unix.program}", "unix:uid:1")
	long := strings.Repeat("x", 1500)
	for _, c := range []struct{ user, program, want, fact, reason string }{
		{"ann", "web", "spiffe://td/user/ann/web", "", ""},
		{"Ann_1", "web.v2-x", "spiffe://td/user/Ann_1/web.v2-x", "", ""},
		{"..x", "...", "spiffe://td/user/..x/...", "", ""},
		{"-", "web", "", "unix.user", FactMissing},
		{"ann", "-", "", "unix.program", FactMissing},
		{"", "web", "", "unix.user", FactInvalid},
		{".", "web", "", "unix.user", FactInvalid},
		{"..", "web", "", "unix.user", FactInvalid},
		{"ann", "a b", "", "unix.program", FactInvalid},
		{"ann/web", "x", "", "unix.user", FactInvalid},
		{"ann", "../bob", "", "unix.program", FactInvalid},
		{"ann%2f", "x", "", "unix.user", FactInvalid},
		{"ann", "wéb", "", "unix.program", FactInvalid},
		{"ann", "w\xff", "", "unix.program", FactInvalid},
		{"ann", "w\x00", "", "unix.program", FactInvalid},
		{"DOM\\ann", "web", "", "unix.user", FactInvalid},
		{"ann@dom", "web", "", "unix.user", FactInvalid},
		{"ann", "{unix.user}", "", "unix.program", FactInvalid},
		{long, long + "y", "", "unix.program", FactInvalid},
	} {
		facts := map[string]string{"unix.uid": "1", "unix.user": c.user, "unix.program": c.program}
		maps.DeleteFunc(facts, func(_, v string) bool { return v == "-" })
		got, named, bad := e.Grants(facts)
		if bad != nil {
			if bad.GrantID != "r" || bad.Fact != c.fact || bad.Reason != c.reason || bad.Value != facts[c.fact] ||
				bad.Fault().Reason != c.reason || bad.Fault().Remedy == "" || len(bad.Fault().Error()) > 3000 {
				t.Errorf("%.40q: %+v, %v", c, bad, bad.Fault())
			}
			continue
		}
		if got.String() != c.want || len(named) != 2 || named["unix.user"] != c.user || named["unix.program"] != c.program {
			t.Errorf("%.40q: %v, %v", c, got, named)
		}
	}
	// Text around a fact counts too.
	e = rule(t, "r", "spiffe://td/user/.{unix.user}", "unix:uid:1")
	if _, _, bad := e.Grants(map[string]string{"unix.user": "."}); bad == nil {
		t.Error("the segment .. was accepted")
	}
}

func TestMatchRules(t *testing.T) {
	good := rule(t, "good", "spiffe://td/user/{unix.user}", "unix:uid:1")
	missing := rule(t, "missing", "spiffe://td/pod/{k8s.pod}", "unix:uid:1")
	invalid := rule(t, "invalid", "spiffe://td/prog/{unix.program}", "unix:uid:1")
	near := rule(t, "near", "spiffe://td/near/{unix.user}", "unix:uid:2")
	ended := rule(t, "ended", "spiffe://td/ended/{unix.user}", "unix:uid:1")
	ended.ExpiresAt = now
	shadow := rule(t, "shadow", "spiffe://td/shadow/{unix.user}", "unix:uid:1")
	good.Hint, shadow.Hint = "h", "h"
	shadow.CreatedAt = now.Add(time.Second)
	facts := Facts{Selectors: sels("unix:uid:1"), Values: map[string]string{"unix.user": "ann", "unix.program": "a b", "unix.uid": "1"}}
	matched, trace := Match([]Entry{good, missing, invalid, near, ended, shadow}, facts, now)
	if len(matched) != 1 || matched[0].GrantID != "good" || matched[0].ID != id("/user/ann") || !maps.Equal(matched[0].Facts, map[string]string{"unix.user": "ann"}) {
		t.Errorf("matched %+v", matched)
	}
	if len(trace.Facts) != 2 || trace.Facts[0].GrantID != "invalid" || trace.Facts[0].Reason != FactInvalid || trace.Facts[0].Value != "a b" ||
		trace.Facts[1].GrantID != "missing" || trace.Facts[1].Reason != FactMissing || trace.Facts[1].Fact != "k8s.pod" {
		t.Errorf("facts %+v", trace.Facts)
	}
	if len(trace.Near) != 1 || trace.Near[0].Template != near.Rule.Template.String() || len(trace.Expired) != 1 ||
		len(trace.Shadowed) != 1 || trace.Shadowed[0].ID != id("/user/ann") && trace.Shadowed[0].ID != id("/shadow/ann") {
		t.Errorf("trace %+v", trace)
	}
}

// Over random templates and facts: what is given lies under the prefix and
// outside the reserved space; callers who differ in a named fact get different
// IDs (R43); fewer facts never give more (R47); facts that are not named do not
// count (R2).
func TestGrantsProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 43))
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	value := func() string {
		return pick("a", "b", "-", ".", "..", "spire", "agent", "a-b", "b.", "", "a/b", "é", "x y", "A")
	}
	given := 0
	for round := range 20000 {
		var b strings.Builder
		b.WriteString("spiffe://td/" + pick("a", "user", "spires"))
		for range 1 + r.IntN(3) {
			b.WriteString("/" + pick("", "", "x-", "."))
			switch r.IntN(3) {
			case 0:
				b.WriteString("lit")
			default:
				b.WriteString("{t." + pick("f", "g", "h") + "}" + pick("", "", "-y"))
			}
		}
		rl, err := ParseRule(td, b.String(), "", TrustAgent)
		if err != nil {
			continue
		}
		e := Entry{ID: "r", ParentID: id("/p"), Rule: rl, Selectors: sels("a:1")}
		if err := Validate(td, &e, now); err != nil {
			t.Fatalf("round %d: %s: %v", round, b.String(), err)
		}
		facts := map[string]string{"t.f": value(), "t.g": value(), "t.h": value()}
		got, named, bad := e.Grants(facts)
		if bad != nil {
			if v, ok := facts[bad.Fact]; !ok || v != bad.Value || bad.Reason != FactInvalid {
				t.Fatalf("round %d: %s with %q: %+v", round, b.String(), facts, bad)
			}
			continue
		}
		given++
		if !rl.Template.Matches(got) {
			t.Fatalf("round %d: %s does not know its own %s", round, b.String(), got)
		}
		if foreign := id("/" + pick("a", "user", "spires") + "/" + pick("a", "x-b", "lit") + "/" + pick("a-y", "lit", ".b")); rl.Template.Matches(foreign) {
			again := false
			for _, f := range []string{"a", "b", "a-", "lit", ".b", "x-b", "a-y", "li", "."} {
				for _, g := range []string{"a", "b", "a-", "lit", ".b", "x-b", "a-y", "li", "."} {
					for _, h := range []string{"a", "b", "a-", "lit", ".b", "x-b", "a-y", "li", "."} {
						made, _, bad := e.Grants(map[string]string{"t.f": f, "t.g": g, "t.h": h})
						again = again || bad == nil && made == foreign
					}
				}
			}
			if !again {
				t.Fatalf("round %d: %s claims %s", round, b.String(), foreign)
			}
		}
		if !strings.HasPrefix(got.String(), rl.Prefix) || identity.CheckWorkload(td, got) != nil {
			t.Fatalf("round %d: %s gives %s", round, b.String(), got)
		}
		if keys := slices.Sorted(maps.Keys(named)); !slices.Equal(keys, rl.Template.Facts()) {
			t.Fatalf("round %d: %s names %v", round, b.String(), keys)
		}
		if again, _, _ := e.Grants(named); again != got {
			t.Fatalf("round %d: facts that are not named count: %s, %s", round, got, again)
		}
		for _, name := range rl.Template.Facts() {
			other := maps.Clone(facts)
			other[name] = value()
			if id2, _, bad := e.Grants(other); bad == nil && (id2 == got) != (other[name] == facts[name]) {
				t.Fatalf("R43 round %d: %s: %q and %q give %s and %s", round, b.String(), facts, other, got, id2)
			}
			delete(other, name)
			if _, _, bad := e.Grants(other); bad == nil || bad.Reason != FactMissing || bad.Fact != name {
				t.Fatalf("R47 round %d: %s without %s: %+v", round, b.String(), name, bad)
			}
		}
	}
	if given < 1000 {
		t.Errorf("only %d rounds gave an ID", given)
	}
}

// What the parser takes it prints again, and what it expands is a workload's ID
// that differs from that of any other value.
func FuzzTemplate(f *testing.F) {
	for _, s := range []string{"spiffe://td/user/{unix.user}/{unix.program}", "spiffe://td/{a.b}", "spiffe://td/a/x{a.b}y", "spiffe://td/a/{a.b}{c.d}",
		"spiffe://td/spire/{a.b}", "spiffe://td/a/{a.b", "spiffe://td/a/{}", "spiffe://td/./{a.b}"} {
		f.Add(s, "ann", "web")
	}
	f.Add("spiffe://td/a/.{a.b}", ".", "")
	f.Add("spiffe://td/a/{a.b}", "..", "a/b")
	f.Fuzz(func(t *testing.T, text, one, two string) {
		r, err := ParseRule(td, text, "", TrustAgent)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("ParseRule(%q) failed with kind %v", text, fault.KindOf(err))
			}
			return
		}
		if r.Template.String() != text {
			t.Fatalf("%q prints as %q", text, r.Template)
		}
		e := Entry{ID: "r", ParentID: id("/p"), Rule: r, Selectors: sels("a:1")}
		if Validate(td, &e, now) != nil {
			return
		}
		expand := func(value string) (spiffeid.ID, bool) {
			facts := map[string]string{}
			for _, name := range r.Template.Facts() {
				facts[name] = value
			}
			got, _, bad := e.Grants(facts)
			if bad != nil {
				return got, false
			}
			if _, err := identity.ParseWorkload(td, got.String()); err != nil || !strings.HasPrefix(got.String(), r.Prefix) {
				t.Fatalf("%q with %q gives %s: %v", text, value, got, err)
			}
			return got, true
		}
		a, okA := expand(one)
		b, okB := expand(two)
		if okA && okB && (a == b) != (one == two) {
			t.Fatalf("%q with %q and %q gives %s and %s", text, one, two, a, b)
		}
	})
}

// Facts of pods that a server can verify need no trust. The agent states with them
// which pod it is, and all that it states is fit for a name.
func TestVerifiableFacts(t *testing.T) {
	parse := func(template string) (Entry, error) {
		r, err := ParseRule(td, "spiffe://td"+template, "", "")
		if err != nil {
			return Entry{}, err
		}
		e := Entry{ID: "r", ParentID: id("/spire/agent/x"), Selectors: sels("k8s:ns:shop"), Rule: r}
		return e, Validate(td, &e, now)
	}
	for template, reason := range map[string]string{
		"/ns/{k8s.ns}/sa/{k8s.sa}": "", "/n/{k8s.node}/{k8s.pod}/{k8s.pod_uid}": "",
		"/c/{k8s.container}": "rule_trust_missing", "/ns/{k8s.ns}/{unix.user}": "rule_trust_missing", "/x/{k8sx.ns}": "rule_trust_missing",
	} {
		if _, err := parse(template); fault.ReasonOf(err) != reason && (reason != "" || err != nil) {
			t.Errorf("%s: %v", template, err)
		}
	}
	e, err := parse("/ns/{k8s.ns}/sa/{k8s.sa}")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pod, uid, fact, reason string }{
		{"web-1", "u1", "", ""}, {"", "u1", FactPod, FactInvalid}, {"web-1", "-", FactPodUID, FactMissing},
		{"a/b", "u1", FactPod, FactInvalid}, {"..", "u1", FactPod, FactInvalid}, {"web-1", "u?x", FactPodUID, FactInvalid},
		{strings.Repeat("x", 253), "u1", "", ""}, {strings.Repeat("x", 254), "u1", FactPod, FactInvalid},
	} {
		facts := map[string]string{"k8s.ns": "shop", "k8s.sa": "web", "k8s.pod": c.pod, "k8s.pod_uid": c.uid, "k8s.node": "n"}
		if c.uid == "-" {
			delete(facts, FactPodUID)
		}
		got, named, bad := e.Grants(facts)
		switch {
		case c.reason == "" && (bad != nil || got.Path() != "/ns/shop/sa/web" || len(named) != 4 || named[FactPodUID] != "u1" || named[FactPod] != c.pod):
			t.Errorf("%+.40v: %v, %v, %v", c, got, named, bad)
		case c.reason != "" && (bad == nil || bad.Fact != c.fact || bad.Reason != c.reason || bad.Fault().Remedy == ""):
			t.Errorf("%+.40v: %v, %v", c, got, bad)
		}
	}
	for text, verifiable := range map[string]bool{
		"k8s:ns:shop": true, "k8s:pod-label:a:b": true, "k8s:pod-owner:ReplicaSet:web": true, "k8s:node-name:n": true, "k8s:sa:x": true,
		"k8s:pod-image:a@sha256:0": false, "k8s:container-name:c": false, "k8s:pod-image-count:1": false, "unix:uid:0": false, "k8s_psat:ns:shop": false,
	} {
		if s := sels(text)[0]; s.Verifiable() != verifiable {
			t.Errorf("%s: %v", s, !verifiable)
		}
	}
}
