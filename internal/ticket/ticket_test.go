package ticket_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/ticket"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const secret = "JBSWY3DPEHPK3PXPJBSWY3DPEH"

func sample(change ...func(*ticket.Ticket)) ticket.Ticket {
	t := ticket.Ticket{
		Addresses:   []string{"plastron.example.org:8081", "192.0.2.1:8081", "[2001:db8::1]:443"},
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Roots:       [][sha256.Size]byte{{1}, {2}},
		Token:       secret,
		Expires:     time.Unix(1_800_000_000, 0).UTC(),
	}
	for _, c := range change {
		c(&t)
	}
	return t
}

func reveal(t testing.TB, from ticket.Ticket) string {
	t.Helper()
	text, err := from.Reveal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// encode makes a text with a good checksum of any fields.
func encode(fields []byte) string {
	size := 2 + len(fields) + 8
	body := append([]byte{byte(size >> 8), byte(size)}, fields...)
	sum := sha256.Sum256(append([]byte("plastron ticket 1"), body...))
	return "plastron1." + base64.RawURLEncoding.EncodeToString(append(body, sum[:8]...))
}

func fields(t testing.TB, text string) []byte {
	t.Helper()
	body, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, "plastron1."))
	if err != nil {
		t.Fatal(err)
	}
	return body[2 : len(body)-8]
}

func TestRoundTrip(t *testing.T) {
	for name, want := range map[string]ticket.Ticket{
		"usual": sample(),
		"most": sample(func(t *ticket.Ticket) {
			t.Addresses, t.Roots = nil, nil
			for i := range ticket.MaxAddresses {
				t.Addresses = append(t.Addresses, fmt.Sprintf("%d.%s.example.org:65535", i, strings.Repeat("x", 63)))
			}
			for i := range ticket.MaxRoots {
				t.Roots = append(t.Roots, [sha256.Size]byte{byte(i)})
			}
			t.Token = strings.Repeat("~", 255)
		}),
	} {
		text := reveal(t, want)
		got, err := ticket.Parse(text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if again := reveal(t, got); again != text || len(text) > ticket.MaxText {
			t.Errorf("%s: another text, or one of %d bytes", name, len(text))
		}
	}
	// The order in which a bundle has its roots does not matter.
	turned := sample(func(t *ticket.Ticket) { slices.Reverse(t.Roots) })
	if reveal(t, turned) != reveal(t, sample()) {
		t.Error("the order of the roots changes the text")
	}
	if turned.Roots[0] != (sample().Roots[1]) {
		t.Error("Reveal changed the ticket")
	}
}

// TestParse: each way in which a ticket can be wrong has its own reason.
func TestParse(t *testing.T) {
	good := reveal(t, sample())
	body := fields(t, good)
	swapped := bytes.Replace(body, append(make([]byte, 0), append([]byte{1}, make([]byte, 31)...)...), append([]byte{3}, make([]byte, 31)...), 1)
	for name, c := range map[string]struct{ text, reason string }{
		"empty":            {"", "ticket_malformed"},
		"another text":     {"3f0c8b39-5a55-4e5b-a0b6-6f7f1a1d9f3c", "ticket_malformed"},
		"a line":           {"plastron agent run -ticket " + good, "ticket_malformed"},
		"no version":       {"plastron.AAAA", "ticket_malformed"},
		"version 0":        {"plastron0" + good[9:], "ticket_malformed"},
		"version 01":       {"plastron01" + good[9:], "ticket_malformed"},
		"upper case":       {strings.ToUpper(good), "ticket_malformed"},
		"a line end":       {good + "\n", "ticket_malformed"},
		"a line break":     {good[:80] + "\n" + good[80:], "ticket_malformed"},
		"a space before":   {" " + good, "ticket_malformed"},
		"padded":           {good + "=", "ticket_malformed"},
		"beyond ASCII":     {good[:80] + "é" + good[80:], "ticket_malformed"},
		"far too long":     {good + strings.Repeat("A", ticket.MaxText), "ticket_malformed"},
		"newer":            {"plastron2.whatever it is then", "ticket_newer"},
		"far newer":        {"plastron99999999999999999999." + good, "ticket_newer"},
		"twice":            {good + good[10:], "ticket_changed"},
		"one character":    {good[:90] + flip(good[90]) + good[91:], "ticket_changed"},
		"two swapped":      {swap(good), "ticket_changed"},
		"one more":         {good + "AAAA", "ticket_changed"},
		"no fields":        {encode(nil), "ticket_malformed"},
		"a field too many": {encode(append(slices.Clone(body), 0)), "ticket_malformed"},
		"roots not sorted": {encode(swapped), "ticket_malformed"},
		"expiry":           {encode(append([]byte{0xff}, body[1:]...)), "ticket_malformed"},
		"no expiry":        {encode(append(make([]byte, 8), body[8:]...)), "ticket_malformed"},
		"no token":         {encode(bytes.Replace(body, append([]byte{byte(len(secret))}, secret...), []byte{0}, 1)), "ticket_malformed"},
		"space in a token": {encode(bytes.Replace(body, []byte("JBSWY"), []byte("JBS Y"), 1)), "ticket_malformed"},
		"trust domain":     {encode(bytes.Replace(body, []byte("\x0bexample.org"), []byte("\x0bExample.org"), 1)), "ticket_malformed"},
		"a URL for it":     {encode(bytes.Replace(body, []byte("\x0bexample.org"), []byte("\x0cspiffe://a.b"), 1)), "ticket_malformed"},
		"an address":       {encode(bytes.Replace(body, []byte("192.0.2.1:8081"), []byte("192.0.2.1:0081"), 1)), "ticket_address_invalid"},
		"address twice":    {encode(bytes.Replace(body, []byte("\x00\x0e192.0.2.1:8081"), []byte("\x00\x19plastron.example.org:8081"), 1)), "ticket_malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ticket.Parse(c.text)
			if fault.ReasonOf(err) != c.reason {
				t.Errorf("Parse() = %v, want reason %s", err, c.reason)
			}
			if err != nil && strings.Contains(err.Error(), secret) { // R112
				t.Errorf("%v holds the token", err)
			}
		})
	}
	for n := 1; n < len(good); n++ {
		if _, err := ticket.Parse(good[:n]); fault.ReasonOf(err) != "ticket_truncated" {
			t.Fatalf("cut off after %d of %d: %v", n, len(good), err)
		}
	}
	// No other text is the same ticket: not one bit of it is without meaning.
	for i := range good {
		for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_." {
			if good[i] == byte(c) {
				continue
			}
			if _, err := ticket.Parse(good[:i] + string(c) + good[i+1:]); err == nil {
				t.Fatalf("%c at %d makes no difference", c, i)
			}
		}
	}
}

func flip(c byte) string {
	if c == 'A' {
		return "B"
	}
	return "A"
}

// swap exchanges the first two neighbours in the middle that differ.
func swap(s string) string {
	for i := 60; ; i++ {
		if s[i] != s[i+1] {
			return s[:i] + string(s[i+1]) + string(s[i]) + s[i+2:]
		}
	}
}

func TestRevealRefuses(t *testing.T) {
	for name, change := range map[string]func(*ticket.Ticket){
		"no address":     func(t *ticket.Ticket) { t.Addresses = nil },
		"nine addresses": func(t *ticket.Ticket) { t.Addresses = slices.Repeat([]string{"a:1"}, 9) },
		"the same twice": func(t *ticket.Ticket) { t.Addresses = []string{"a:1", "a:1"} },
		"no root":        func(t *ticket.Ticket) { t.Roots = nil },
		"a root twice":   func(t *ticket.Ticket) { t.Roots = [][sha256.Size]byte{{1}, {1}} },
		"17 roots":       func(t *ticket.Ticket) { t.Roots = make([][sha256.Size]byte, 17) },
		"no token":       func(t *ticket.Ticket) { t.Token = "" },
		"long token":     func(t *ticket.Ticket) { t.Token = strings.Repeat("x", 256) },
		"no expiry":      func(t *ticket.Ticket) { t.Expires = time.Time{} },
		"no domain":      func(t *ticket.Ticket) { t.TrustDomain = spiffeid.TrustDomain{} },
		"too long": func(t *ticket.Ticket) {
			t.Addresses = nil
			for i := range 8 {
				label := strings.Repeat("x", 62)
				t.Addresses = append(t.Addresses, fmt.Sprintf("%d%s.%s.%s.%s:65535", i, label[:61], label, label, label))
			}
			t.Roots = nil
			for i := range 16 {
				t.Roots = append(t.Roots, [sha256.Size]byte{byte(i)})
			}
			t.Token = strings.Repeat("x", 255)
			t.TrustDomain = spiffeid.RequireTrustDomainFromString(strings.Repeat("x", 255))
		},
	} {
		if text, err := sample(change).Reveal(); err == nil {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func TestCheckAddress(t *testing.T) {
	for _, good := range []string{"a:1", "localhost:65535", "my_host-1.example.org:8081", "10.0.0.1:8081", "[::1]:8081"} {
		if err := ticket.CheckAddress(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "a", ":1", "a:", "a:0", "a:01", "a:65536", "a:+1", "a:http", "A:1", "a..b:1", "a.:1", "-a:1", "a-:1", "a b:1", "a/b:1", "é:1",
		"a:1:2", "[a]:1", "::1:8081", "[::01]:1", "[fe80::1%eth0]:1", "0.0.0.0:1", "[::]:1", "256.1.1.1:1", "1.2.3:1", "10.0.0.01:1",
		strings.Repeat("a", 64) + ":1", strings.Repeat("a.", 127) + "a:1", "dns:///a:1"} {
		if err := ticket.CheckAddress(bad); fault.ReasonOf(err) != "ticket_address_invalid" {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestCheck(t *testing.T) {
	end := sample().Expires
	if err := sample().Check(end.Add(-time.Second)); err != nil {
		t.Error(err)
	}
	for _, now := range []time.Time{end, end.Add(time.Hour)} {
		if err := sample().Check(now); fault.ReasonOf(err) != "ticket_expired" {
			t.Errorf("at %v: %v", now, err)
		}
	}
}

// R112: the token is in no print of a ticket.
func TestTokenIsNotPrinted(t *testing.T) {
	one := sample()
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "ticket", one, "pointer", &one, "inside", struct{ T ticket.Ticket }{one})
	}
	coded, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	printed := []string{log.String(), string(coded)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		printed = append(printed, fmt.Sprintf(verb, one), fmt.Sprintf(verb, &one), fmt.Sprintf(verb, []ticket.Ticket{one}))
	}
	for _, text := range printed {
		if strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) || text == "" {
			t.Errorf("the token is in %s", text)
		}
	}
}

// FuzzParse: what is accepted is the one text of what it says; what is refused is a fault of ours.
func FuzzParse(f *testing.F) {
	good := reveal(f, sample())
	f.Add(good, false)
	f.Add(string(fields(f, good)), true)
	f.Fuzz(func(t *testing.T, text string, inside bool) {
		if inside && len(text) < 4<<10 { // past the checksum, which guessing does not find
			text = encode([]byte(text))
		}
		got, err := ticket.Parse(text)
		if err != nil {
			if !strings.HasPrefix(fault.ReasonOf(err), "ticket_") || strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
				t.Fatalf("Parse() = %q", err)
			}
			return
		}
		if len(got.Addresses) == 0 || len(got.Addresses) > ticket.MaxAddresses || len(got.Roots) == 0 || len(got.Roots) > ticket.MaxRoots || got.Token == "" {
			t.Fatal("a ticket without what it needs")
		}
		if again := reveal(t, got); again != text {
			t.Fatalf("%q is also %q", text, again)
		}
	})
}
