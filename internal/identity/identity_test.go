package identity

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func idOf(size int) string {
	const prefix = "spiffe://td/"
	return prefix + strings.Repeat("a", size-len(prefix))
}

func TestParseCorpus(t *testing.T) {
	tests := []struct {
		id, in string
		ok     bool
	}{
		{"S1", "", false},
		{"S2", "spiffe://", false},
		{"S3", "spiffe:///a", false},
		{"S4", "SPIFFE://td/a", false},
		{"S5", "https://td/a", false},
		{"S6", "spiffe:td/a", false},
		{"S6 one slash", "spiffe:/td/a", false},
		{"S7", "spiffe://TD/a", false},
		{"S8", "spiffe://td:8081/a", false},
		{"S8 empty port", "spiffe://td:/a", false},
		{"S9", "spiffe://user@td/a", false},
		{"S9 empty user", "spiffe://@td/a", false},
		{"S10", "spiffe://u:p@td/a", false},
		{"S11", "spiffe://td/a?q=1", false},
		{"S12", "spiffe://td/a?", false},
		{"S12 no path", "spiffe://td?", false},
		{"S13", "spiffe://td/a#f", false},
		{"S14", "spiffe://td/a#", false},
		{"S15", "spiffe://td/a/", false},
		{"S16", "spiffe://td/", false},
		{"S17", "spiffe://td//a", false},
		{"S17 inner", "spiffe://td/a//b", false},
		{"S18", "spiffe://td/./a", false},
		{"S18 only", "spiffe://td/.", false},
		{"S19", "spiffe://td/a/../b", false},
		{"S20", "spiffe://td/a/..", false},
		{"S20 only", "spiffe://td/..", false},
		{"S21 three dots", "spiffe://td/...", true},
		{"S21 leading dot", "spiffe://td/.a", true},
		{"S21 trailing dot", "spiffe://td/a.", true},
		{"S21 inner dots", "spiffe://td/a..b", true},
		{"S22", "spiffe://td/%2e%2e/b", false},
		{"S23", "spiffe://td/a%2Fb", false},
		{"S24", "spiffe://t%64/a", false},
		{"S25", "spiffe://td/%", false},
		{"S26", "spiffe://td/\u00e9", false},
		{"S27", "spiffe://td/e\u0301", false},
		{"S28", "spiffe://t\u0430/a", false},
		{"S29", "spiffe://xn--bcher-kva/a", true},
		{"S30", "spiffe://[::1]/a", false},
		{"S31", "spiffe://1.2.3.4/a", true},
		{"S32", "spiffe://td_a-b.c/x", true},
		{"S33 space", "spiffe://td/a b", false},
		{"S33 tab", "spiffe://td/a\tb", false},
		{"S33 CR", "spiffe://td/a\rb", false},
		{"S33 LF", "spiffe://td/a\nb", false},
		{"S33 NUL", "spiffe://td/a\x00b", false},
		{"S34 leading", " spiffe://td/a", false},
		{"S34 trailing", "spiffe://td/a ", false},
		{"S34 newline", "spiffe://td/a\n", false},
		{"S37", idOf(2048), true},
		{"S38", idOf(2049), false},
		{"S39", "spiffe://" + strings.Repeat("t", 255) + "/a", true},
		{"S40", "spiffe://" + strings.Repeat("t", 256) + "/a", false},
		{"S41", strings.Repeat("a/", 512<<10), false},
		{"S41 with scheme", "spiffe://td/" + strings.Repeat("a/", 512<<10), false},
		{"S42 as a plain ID", "spiffe://td", true},
		{"ID-2-b", "spiffe://a", true},
		{"ID-2.1-a", "spiffe://u.example.org/a", true},
		{"ID-2.1-b", "spiffe://example.org/443", true},
		{"ID-2.1-c", "spiffe://example.org/X", true},
		{"ID-2.1-d", "spiffe://my_td-1.example.org/x", true},
		{"ID-2.1-e", "spiffe://ex61mple.org/x", true},
		{"ID-2.2-a", "spiffe://example.org/a2Fb", true},
		{"ID-2.2-e", "spiffe://example.org/A-z_0.9", true},
		{"ID-2.2-f", "spiffe://example.org" + strings.Repeat("/s", 50), true},
	}
	for _, c := range strings.Split(`* : @ ~ ! + , ; = \ " ' <`, " ") {
		tests = append(tests, struct {
			id, in string
			ok     bool
		}{"S35 " + c, "spiffe://td/a" + c + "b", false})
	}
	for _, test := range tests {
		t.Run(test.id, func(t *testing.T) {
			id, err := Parse(test.in)
			switch {
			case test.ok && err != nil:
				t.Errorf("Parse() = %v, want it accepted", err)
			case test.ok && id.String() != test.in:
				t.Errorf("Parse(%q) prints as %q", test.in, id)
			case !test.ok && err == nil:
				t.Errorf("Parse() accepted %.100q", test.in)
			case !test.ok && fault.KindOf(err) != fault.Invalid:
				t.Errorf("Parse() = kind %v, want %v", fault.KindOf(err), fault.Invalid)
			}
		})
	}
}

// S36: every byte, in the path and in the trust domain. This would also fail
// if the library were compiled with its wider character set.
func TestEveryByte(t *testing.T) {
	const lower, digits, marks = "abcdefghijklmnopqrstuvwxyz", "0123456789", ".-_"
	inDomain := lower + digits + marks
	inPath := inDomain + strings.ToUpper(lower) + "/"
	for b := range 256 {
		c := string([]byte{byte(b)})
		_, err := Parse("spiffe://td/a" + c + "b")
		if got, want := err == nil, strings.Contains(inPath, c); got != want {
			t.Errorf("S36 path byte %#02x: accepted %v, want %v", b, got, want)
		}
		// A slash ends the trust domain, so it is legal here and not part of it.
		_, err = Parse("spiffe://t" + c + "d/a")
		if got, want := err == nil, strings.Contains(inDomain+"/", c); got != want {
			t.Errorf("S36 trust domain byte %#02x: accepted %v, want %v", b, got, want)
		}
		_, err = ParseTrustDomain("t" + c + "d")
		if got, want := err == nil, strings.Contains(inDomain, c); got != want {
			t.Errorf("S36 bare trust domain byte %#02x: accepted %v, want %v", b, got, want)
		}
	}
}

// S41: the size is looked at before anything else, so a huge input costs no
// more than a small one.
func TestHugeInputIsNotRead(t *testing.T) {
	huge := "spiffe://td/" + strings.Repeat("a/", 512<<10)
	_, err := Parse(huge)
	if err == nil || len(err.Error()) > 200 {
		t.Fatalf("Parse() of 1 MiB: error of %d bytes, want a short refusal", len(fmt.Sprint(err)))
	}
	if n := testing.AllocsPerRun(10, func() { Parse(huge) }); n > 20 {
		t.Errorf("Parse() of 1 MiB made %v allocations", n)
	}
}

func TestParseTrustDomain(t *testing.T) {
	for name, test := range map[string]struct {
		in string
		ok bool
	}{
		"plain":            {"example.org", true},
		"S31":              {"1.2.3.4", true},
		"S39":              {strings.Repeat("t", 255), true},
		"S40":              {strings.Repeat("t", 256), false},
		"S1":               {"", false},
		"S7":               {"Example.org", false},
		"S8":               {"td:8081", false},
		"with the scheme":  {"spiffe://example.org", false},
		"with a path":      {"example.org/a", false},
		"one slash scheme": {"spiffe:/example.org", false},
		"S34":              {" td", false},
	} {
		t.Run(name, func(t *testing.T) {
			td, err := ParseTrustDomain(test.in)
			if (err == nil) != test.ok {
				t.Fatalf("ParseTrustDomain(%.50q) = %v, want ok %v", test.in, err, test.ok)
			}
			if err == nil && td.Name() != test.in {
				t.Errorf("ParseTrustDomain(%q) prints as %q", test.in, td.Name())
			}
		})
	}
}

// R16
func TestParseWorkload(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("td")
	for name, test := range map[string]struct {
		in     string
		reason string
	}{
		"plain":            {"spiffe://td/a", ""},
		"S42":              {"spiffe://td", "spiffe_id_no_path"},
		"S43":              {"spiffe://td/spire/server", "spiffe_id_reserved"},
		"S44":              {"spiffe://td/spire/agent/x", "spiffe_id_reserved"},
		"S45":              {"spiffe://td/SPIRE/agent/x", ""},
		"S46":              {"spiffe://td/spire", "spiffe_id_reserved"},
		"S46 below":        {"spiffe://td/spire/x", "spiffe_id_reserved"},
		"S46 longer word":  {"spiffe://td/spirex/x", ""},
		"S46 deeper":       {"spiffe://td/x/spire/agent", ""},
		"S47":              {"spiffe://other/a", "spiffe_id_foreign"},
		"S47 prefix":       {"spiffe://tdd/a", "spiffe_id_foreign"},
		"malformed":        {"spiffe://td/a/", "spiffe_id_invalid"},
		"S47 and reserved": {"spiffe://other/spire/server", "spiffe_id_foreign"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseWorkload(td, test.in)
			if test.reason == "" {
				if err != nil {
					t.Errorf("ParseWorkload(%q) = %v", test.in, err)
				}
				return
			}
			if err == nil || fault.ReasonOf(err) != test.reason {
				t.Errorf("ParseWorkload(%q) = %v, want reason %q", test.in, err, test.reason)
			}
		})
	}
}

func TestReservedKinds(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("td")
	if id := Server(td); id.String() != "spiffe://td/spire/server" || !Reserved(id) || IsAgent(id) {
		t.Errorf("Server() = %v, reserved %v, agent %v", id, Reserved(id), IsAgent(id))
	}
	for in, want := range map[string]bool{
		"spiffe://td/spire/agent/x":  true,
		"spiffe://td/spire/agent":    false,
		"spiffe://td/spire/agents/x": false,
		"spiffe://td/SPIRE/agent/x":  false, // S45
		"spiffe://td/spire/server":   false,
	} {
		if got := IsAgent(spiffeid.RequireFromString(in)); got != want {
			t.Errorf("IsAgent(%s) = %v, want %v", in, got, want)
		}
	}
}

// S50: what is parsed prints as it was.
func TestPrintOfParse(t *testing.T) {
	const inDomain = "abcdefghijklmnopqrstuvwxyz0123456789.-_"
	const inPath = inDomain + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	r := rand.New(rand.NewPCG(50, 1))
	word := func(b []byte, set string, most int) []byte {
		start := len(b)
		for range 1 + r.IntN(most) {
			b = append(b, set[r.IntN(len(set))])
		}
		if s := string(b[start:]); s == "." || s == ".." {
			b = append(b, 'x')
		}
		return b
	}
	n := 1_000_000
	if testing.Short() {
		n = 10_000
	}
	var b []byte
	for range n {
		b = word(append(b[:0], "spiffe://"...), inDomain, 20)
		for range r.IntN(5) {
			b = word(append(b, '/'), inPath, 8)
		}
		s := string(b)
		id, err := Parse(s)
		if err != nil || id.String() != s || "spiffe://"+id.TrustDomain().Name()+id.Path() != s {
			t.Fatalf("S50 Parse(%q) = %v, %v", s, id, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "spiffe://", "spiffe://td", "spiffe://td/a", "spiffe://td/a/../b", "spiffe://td/a?", "SPIFFE://td/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := Parse(s)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("Parse(%q) failed with kind %v", s, fault.KindOf(err))
			}
			return
		}
		if id.String() != s || "spiffe://"+id.TrustDomain().Name()+id.Path() != s {
			t.Fatalf("Parse(%q) prints as %q", s, id)
		}
		if len(s) > MaxID || len(id.TrustDomain().Name()) > MaxTrustDomain {
			t.Fatalf("Parse() accepted %d bytes", len(s))
		}
		if strings.ContainsAny(s, "%?#@ ") || strings.HasSuffix(s, "/") {
			t.Fatalf("Parse() accepted %q", s)
		}
	})
}
