package entry

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("td")
	now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func sels(texts ...string) []Selector {
	var out []Selector
	for _, text := range texts {
		typ, value, _ := strings.Cut(text, ":")
		out = append(out, Selector{typ, value})
	}
	slices.SortFunc(out, Selector.Compare)
	return out
}

func valid() Entry {
	return Entry{
		ID:        "e1",
		SPIFFEID:  id("/web"),
		ParentID:  id("/spire/agent/join_token/x"),
		Selectors: sels("unix:uid:1000"),
		CreatedAt: now,
	}
}

func numbered(n int, f func(i int) string) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = f(i)
	}
	return out
}

func TestValidateCorpus(t *testing.T) {
	dns := func(names ...string) func(*Entry) { return func(e *Entry) { e.DNSNames = names } }
	tests := []struct {
		id     string
		change func(*Entry)
		reason string // empty: accepted
	}{
		{"control", func(e *Entry) {}, ""},
		{"E1", func(e *Entry) { e.Selectors = nil }, "selectors_missing"},
		{"E2 type", func(e *Entry) { e.Selectors = sels(":x") }, "selector_invalid"},
		{"E2 value", func(e *Entry) { e.Selectors = sels("unix:") }, "selector_invalid"},
		{"E3 colon", func(e *Entry) { e.Selectors = []Selector{{"a:b", "c"}} }, "selector_invalid"},
		{"E3 upper", func(e *Entry) { e.Selectors = sels("Unix:uid:1") }, "selector_invalid"},
		{"E3 300 bytes", func(e *Entry) { e.Selectors = sels(strings.Repeat("t", 300) + ":v") }, "selector_invalid"},
		{"E3 255 bytes", func(e *Entry) { e.Selectors = sels(strings.Repeat("t", 255) + ":v") }, ""},
		{"E4 NUL", func(e *Entry) { e.Selectors = sels("unix:a\x00b") }, "selector_invalid"},
		{"E4 UTF-8", func(e *Entry) { e.Selectors = sels("unix:a\xff") }, "selector_invalid"},
		{"E5", func(e *Entry) { e.Selectors = sels("unix:" + strings.Repeat("v", 64<<10+1)) }, "selector_invalid"},
		{"E5 at the limit", func(e *Entry) { e.Selectors = sels("unix:" + strings.Repeat("v", 64<<10)) }, ""},
		{"E5 together", func(e *Entry) {
			e.Selectors = sels(numbered(9, func(i int) string { return fmt.Sprint("unix:", i, strings.Repeat("v", 60<<10)) })...)
		}, "selectors_too_large"},
		{"E6", func(e *Entry) {
			e.Selectors = sels(numbered(1001, func(i int) string { return fmt.Sprint("unix:uid:", i) })...)
		}, "selectors_too_many"},
		{"E6 at the limit", func(e *Entry) {
			e.Selectors = sels(numbered(1000, func(i int) string { return fmt.Sprint("unix:uid:", i) })...)
		}, ""},
		{"E8 missing", func(e *Entry) { e.ParentID = spiffeid.ID{} }, "parent_id_missing"},
		{"E8 foreign", func(e *Entry) { e.ParentID = spiffeid.RequireFromString("spiffe://other/a") }, "spiffe_id_foreign"},
		{"E8 no path", func(e *Entry) { e.ParentID = td.ID() }, "spiffe_id_no_path"},
		{"E8 reserved", func(e *Entry) { e.ParentID = id("/spire/x") }, "parent_id_reserved"},
		{"E8 no agent", func(e *Entry) { e.ParentID = id("/spire/agent") }, "parent_id_reserved"},
		{"E8 server", func(e *Entry) { e.ParentID = id("/spire/server") }, ""},
		{"E8 workload", func(e *Entry) { e.ParentID = id("/other") }, ""},
		{"E9", func(e *Entry) { e.ParentID = e.SPIFFEID }, "parent_id_self"},
		{"E12 S42", func(e *Entry) { e.SPIFFEID = td.ID() }, "spiffe_id_no_path"},
		{"E12 S43", func(e *Entry) { e.SPIFFEID = id("/spire/server") }, "spiffe_id_reserved"},
		{"E12 S44", func(e *Entry) { e.SPIFFEID = id("/spire/agent/x") }, "spiffe_id_reserved"},
		{"E12 S45", func(e *Entry) { e.SPIFFEID = id("/SPIRE/agent/x") }, ""},
		{"E12 S47", func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://other/a") }, "spiffe_id_foreign"},
		{"E12 S37", func(e *Entry) { e.SPIFFEID = id("/" + strings.Repeat("a", 2048-len("spiffe://td/"))) }, ""},
		{"E12 S38", func(e *Entry) { e.SPIFFEID = id("/" + strings.Repeat("a", 2049-len("spiffe://td/"))) }, "spiffe_id_invalid"},
		{"E12 zero", func(e *Entry) { e.SPIFFEID = spiffeid.ID{} }, "spiffe_id_invalid"},
		{"E13 -1", func(e *Entry) { e.X509TTL = -time.Second }, "ttl_invalid"},
		{"E13 2^31", func(e *Entry) { e.JWTTL = 1 << 31 * time.Second }, "ttl_invalid"},
		{"E13 2^63-1", func(e *Entry) { e.X509TTL = 1<<63 - 1 }, "ttl_invalid"},
		{"E13 fraction", func(e *Entry) { e.X509TTL = 1500 * time.Millisecond }, "ttl_invalid"},
		{"E14", func(e *Entry) { e.X509TTL = MaxTTL }, ""},
		{"E15 past", func(e *Entry) { e.ExpiresAt = now.Add(-time.Second) }, "expires_at_past"},
		{"E15 now", func(e *Entry) { e.ExpiresAt = now }, "expires_at_past"},
		{"E15 soon", func(e *Entry) { e.ExpiresAt = now.Add(time.Second) }, ""},
		{"E15 year 9999", func(e *Entry) { e.ExpiresAt = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }, ""},
		{"E15 year 10000", func(e *Entry) { e.ExpiresAt = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, "time_invalid"},
		{"E16 star", dns("*"), "dns_name_invalid"},
		{"E16 two stars", dns("*.*.x"), "dns_name_invalid"},
		{"E16 inner star", dns("a.*.x"), "dns_name_invalid"},
		{"E16 part star", dns("a*.x"), "dns_name_invalid"},
		{"E16 only star dot", dns("*."), "dns_name_invalid"},
		{"E16 empty", dns(""), "dns_name_invalid"},
		{"E16 empty label", dns("a..b"), "dns_name_invalid"},
		{"E16 leading dot", dns(".a"), "dns_name_invalid"},
		{"E16 64-byte label", dns(strings.Repeat("a", 64) + ".org"), "dns_name_invalid"},
		{"E16 63-byte label", dns(strings.Repeat("a", 63) + ".org"), ""},
		{"E16 254 bytes", dns(strings.Repeat(strings.Repeat("a", 49)+".", 5) + "abcd"), "dns_name_invalid"},
		{"E16 253 bytes", dns(strings.Repeat(strings.Repeat("a", 49)+".", 5) + "abc"), ""},
		{"E16 trailing dot", dns("example.org."), "dns_name_invalid"},
		{"E16 IPv4", dns("10.0.0.1"), "dns_name_invalid"},
		{"E16 short IPv4", dns("127.1"), "dns_name_invalid"},
		{"E16 number", dns("2130706433"), "dns_name_invalid"},
		{"E16 IPv6", dns("::1"), "dns_name_invalid"},
		{"E16 underscore", dns("a_b.org"), "dns_name_invalid"},
		{"E16 space", dns("a b.org"), "dns_name_invalid"},
		{"E16 NUL", dns("a.org\x00.evil"), "dns_name_invalid"},
		{"E16 hyphen first", dns("-a.org"), "dns_name_invalid"},
		{"E16 hyphen last", dns("a-.org"), "dns_name_invalid"},
		{"E16 not ASCII", dns("bücher.org"), "dns_name_invalid"},
		{"E16 punycode", dns("xn--bcher-kva.org"), ""},
		{"E16 bad punycode", dns("xn--a.org"), "dns_name_invalid"},
		{"E16 empty punycode", dns("xn--.org"), "dns_name_invalid"},
		{"E16 fake prefix", dns("ab--cd.org"), "dns_name_invalid"},
		{"E16 wildcard", dns("*.example.org"), ""},
		{"E16 one label", dns("localhost"), ""},
		{"E16 upper", dns("Example.org"), ""},
		{"E17", dns("*.example.org", "a.example.org"), "dns_name_covered"},
		{"E17 case", dns("a.EXAMPLE.org", "*.example.ORG"), "dns_name_covered"},
		{"E17 deeper", dns("*.example.org", "a.b.example.org", "example.org"), ""},
		{"E18", dns(numbered(101, func(i int) string { return fmt.Sprintf("h%d.org", i) })...), "dns_names_too_many"},
		{"E18 at the limit", dns(numbered(100, func(i int) string { return fmt.Sprintf("h%d.org", i) })...), ""},
		{"E19", func(e *Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} }, "federates_with_self"},
		{"E20", func(e *Entry) {
			e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("unknown")}
		}, ""}, // RG60
		{"too many federated", func(e *Entry) {
			for i := range 201 {
				e.FederatesWith = append(e.FederatesWith, spiffeid.RequireTrustDomainFromString(fmt.Sprint("f", i)))
			}
		}, "federates_with_too_many"},
		{"E21 1,025 bytes", func(e *Entry) { e.Hint = strings.Repeat("h", 1025) }, "hint_invalid"},
		{"E21 1,024 bytes", func(e *Entry) { e.Hint = strings.Repeat("h", 1024) }, ""},
		{"E21 newline", func(e *Entry) { e.Hint = "a\nb" }, "hint_invalid"},
		{"E21 UTF-8", func(e *Entry) { e.Hint = "\xff" }, "hint_invalid"},
		{"owner", func(e *Entry) { e.Owner = "team/Shop_1.0-x" }, ""},
		{"owner of 64 bytes", func(e *Entry) { e.Owner = strings.Repeat("o", 64) }, ""},
		{"owner of 65 bytes", func(e *Entry) { e.Owner = strings.Repeat("o", 65) }, "owner_invalid"},
		{"owner with a space", func(e *Entry) { e.Owner = "a b" }, "owner_invalid"},
		{"E23 256 bytes", func(e *Entry) { e.ID = strings.Repeat("i", 256) }, "entry_id_invalid"},
		{"E23 255 bytes", func(e *Entry) { e.ID = strings.Repeat("i", 255) }, ""},
		{"E23 slash", func(e *Entry) { e.ID = "a/b" }, "entry_id_invalid"},
		{"E23 space", func(e *Entry) { e.ID = "a b" }, "entry_id_invalid"},
		{"E23 empty", func(e *Entry) { e.ID = "" }, "entry_id_invalid"},
		{"E23 reserved prefix", func(e *Entry) { e.ID = "plastron.x" }, "entry_id_reserved"},
		{"E23 all characters", func(e *Entry) { e.ID = "aZ0_.-" }, ""},
		{"E27 prefetch", func(e *Entry) { e.StoreSVID, e.DisableX509Prefetch = true, true }, "store_svid_prefetch"},
		{"E27 two types", func(e *Entry) { e.StoreSVID = true; e.Selectors = sels("a:x", "b:x") }, "store_svid_selectors"},
		{"E27 one type", func(e *Entry) { e.StoreSVID = true; e.Selectors = sels("a:x", "a:y") }, ""},
		{"alias admin", func(e *Entry) { e.ParentID = id("/spire/server"); e.Admin = true }, "alias_privileged"},
		{"alias downstream", func(e *Entry) { e.ParentID = id("/spire/server"); e.Downstream = true }, "alias_privileged"},
		{"E44", func(e *Entry) { e.Selectors = sels("unix:user:a:b", "unix:group:a\nb") }, ""},
	}
	for _, test := range tests {
		t.Run(test.id, func(t *testing.T) {
			e := valid()
			test.change(&e)
			err := Validate(td, &e, now)
			if test.reason == "" {
				if err != nil {
					t.Errorf("Validate() = %v, want it accepted", err)
				}
				return
			}
			if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != test.reason {
				t.Errorf("Validate() = %v (kind %v, reason %q), want reason %q", err, fault.KindOf(err), fault.ReasonOf(err), test.reason)
			}
			if err != nil && len(err.Error()) > 4000 {
				t.Errorf("the refusal is %d bytes long", len(err.Error()))
			}
		})
	}
}

// E7 and the other normal forms.
func TestValidateNormalizes(t *testing.T) {
	a, b := spiffeid.RequireTrustDomainFromString("a"), spiffeid.RequireTrustDomainFromString("b")
	e := valid()
	e.Selectors = []Selector{{"b", "1"}, {"a", "2"}, {"b", "1"}, {"a", "1"}}
	e.FederatesWith = []spiffeid.TrustDomain{b, a, b}
	e.DNSNames = []string{"z.org", "a.org", "Z.org"}
	given := slices.Clone(e.Selectors)
	callers := e.Selectors
	if err := Validate(td, &e, now); err != nil {
		t.Fatal(err)
	}
	if want := []Selector{{"a", "1"}, {"a", "2"}, {"b", "1"}}; !slices.Equal(e.Selectors, want) {
		t.Errorf("E7 selectors %v, want %v", e.Selectors, want)
	}
	if want := []spiffeid.TrustDomain{a, b}; !slices.Equal(e.FederatesWith, want) {
		t.Errorf("federates with %v, want %v", e.FederatesWith, want)
	}
	if want := []string{"z.org", "a.org"}; !slices.Equal(e.DNSNames, want) {
		t.Errorf("DNS names %v, want %v", e.DNSNames, want)
	}
	if !slices.Equal(callers, given) {
		t.Errorf("the caller's slice was changed to %v", callers)
	}
}

func TestValidateWithoutAClock(t *testing.T) {
	e := valid()
	e.ExpiresAt = now.Add(-time.Hour)
	if err := Validate(td, &e, time.Time{}); err != nil {
		t.Errorf("Validate() with no time = %v, want the expiry left alone", err)
	}
}

func TestLint(t *testing.T) {
	for name, test := range map[string]struct {
		sels []string
		want int
	}{
		"E42 path":               {[]string{"unix:path:/bin/x"}, 1},
		"E42 hash":               {[]string{"unix:sha256:00", "unix:gid:7"}, 1},
		"E42 path with uid":      {[]string{"unix:path:/bin/x", "unix:uid:7"}, 0},
		"E42 path with user":     {[]string{"unix:path:/bin/x", "unix:user:u"}, 0},
		"E42 path with unit":     {[]string{"unix:path:/bin/x", "systemd:id:x.service"}, 0},
		"E42 path with image":    {[]string{"unix:path:/bin/x", "docker:image_id:x"}, 0},
		"E43":                    {[]string{"unix:uid:0"}, 1},
		"E43 by name":            {[]string{"unix:user:root"}, 1},
		"E43 with path":          {[]string{"unix:uid:0", "unix:path:/bin/x"}, 0},
		"plain":                  {[]string{"unix:uid:1000"}, 0},
		"other type, same words": {[]string{"x:path:/bin/x", "x:uid:0"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			e := valid()
			e.Selectors = sels(test.sels...)
			if got := Lint(&e); len(got) != test.want {
				t.Errorf("Lint() = %q, want %d notes", got, test.want)
			}
			if err := Validate(td, &e, now); err != nil {
				t.Errorf("Validate() = %v, want it accepted", err)
			}
		})
	}
}

func TestParseSelector(t *testing.T) {
	for in, want := range map[string]Selector{
		"unix:uid:1000": {"unix", "uid:1000"},
		"a::":           {"a", ":"},
		"a:b c\n":       {"a", "b c\n"},
	} {
		got, err := ParseSelector(in)
		if err != nil || got != want {
			t.Errorf("ParseSelector(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "unix", ":", "unix:", ":uid", "Unix:x", "u nix:x", "unix:\x00", strings.Repeat("a", 1<<20), "a:" + strings.Repeat("b", 1<<20)} {
		if got, err := ParseSelector(in); fault.KindOf(err) != fault.Invalid {
			t.Errorf("ParseSelector(%.20q) = %.20v, %v, want it refused", in, got, err)
		}
	}
}

// R43: two selectors never share a text.
func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"unix:uid:1000", "unix:", ":", "a:b:c", "A:b", "a:\x00", "a:\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := ParseSelector(s)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("ParseSelector(%q) failed with kind %v", s, fault.KindOf(err))
			}
			return
		}
		if sel.String() != s {
			t.Fatalf("ParseSelector(%q) prints as %q", s, sel)
		}
		if again, err := NormalizeSelectors([]Selector{sel, sel}); err != nil || !slices.Equal(again, []Selector{sel}) {
			t.Fatalf("NormalizeSelectors(%q twice) = %v, %v", s, again, err)
		}
	})
}

// Contents that a concatenation would confuse have different hashes.
func TestContentHashIsInjective(t *testing.T) {
	with := func(change func(*Entry)) Entry {
		e := valid()
		change(&e)
		return e
	}
	contents := []Entry{
		valid(),
		with(func(e *Entry) { e.SPIFFEID = id("/we") }),
		with(func(e *Entry) { e.ParentID, e.SPIFFEID = e.SPIFFEID, e.ParentID }),
		with(func(e *Entry) { e.Selectors = sels("unix:uid:100", "unix:uid:0") }),
		with(func(e *Entry) { e.Selectors = sels("a:b", "c:d") }),
		with(func(e *Entry) { e.Selectors = []Selector{{"a", "bc:d"}} }),
		with(func(e *Entry) { e.Selectors = []Selector{{"ab", "c"}, {"d", "e"}} }),
		with(func(e *Entry) { e.Selectors = []Selector{{"a", "bc"}, {"d", "e"}} }),
		with(func(e *Entry) { e.Selectors = []Selector{{"a", "bcde"}} }),
	}
	seen := make(map[[32]byte]int)
	for i := range contents {
		h := ContentHash(&contents[i])
		if j, dup := seen[h]; dup {
			t.Errorf("contents %d and %d have one hash", i, j)
		}
		seen[h] = i
	}
	// What is not content does not count.
	other := with(func(e *Entry) { e.ID, e.Hint, e.X509TTL = "e2", "h", time.Hour })
	if first := valid(); ContentHash(&other) != ContentHash(&first) {
		t.Error("the id, hint or TTL changed the content hash")
	}
}

func TestSum(t *testing.T) {
	a, b := ContentHash(&Entry{ID: "a"}), ContentHash(&Entry{SPIFFEID: id("/b")})
	var x, y Sum
	x.Add(a)
	x.Add(b)
	y.Add(b)
	y.Add(a)
	if x != y {
		t.Error("the order of members changed the sum")
	}
	x.Sub(a)
	if got := x.Bytes(); got != b {
		t.Errorf("a sum of one member prints as %x, want the member %x", got, b)
	}
	x.AddSum(y)
	x.Sub(b)
	if x != y {
		t.Error("AddSum is not the sum of the members")
	}
	y.Sub(a)
	y.Sub(b)
	if diff := cmp.Diff(Sum{}, y); diff != "" {
		t.Errorf("what is added and taken away leaves a rest: %s", diff)
	}
}
