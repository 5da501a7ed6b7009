// Package ticket is the text form of a joining ticket: one line that holds all
// that a node needs to join: where the server is, its trust domain, by which
// roots it is recognised, a token that works once, and until when.
//
// A ticket is a secret for as long as its token is good. It gives its holder no
// more than one new agent; it is not signed, so whoever hands out tickets decides
// which server a node trusts. The checksum is against accidents only.
//
// What must always hold: one ticket has one text and one text is one ticket; the
// size is checked before anything else; no error and no print holds the token.
package ticket

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
)

// Limits. The longest text is well below what one argument of a command may have.
const (
	MaxText      = 4 << 10
	MaxAddresses = 8
	MaxRoots     = 16

	maxToken = 255
	maxHost  = 253
)

// Of the text: plastron, the version, a dot, and the body in URL-safe base64. Of
// the body: its length, the fields, and a checksum of all that comes before it.
const (
	name       = "plastron"
	head       = name + "1."
	lengthSize = 2
	checkSize  = 8
	shortest   = lengthSize + checkSize
)

// Ticket is what a ticket says. It prints as its name; Reveal is the one way to its text.
type Ticket struct {
	Addresses   []string // host:port, in the order in which they are tried
	TrustDomain spiffeid.TrustDomain
	Roots       [][sha256.Size]byte // SHA-256 of the DER of each root
	Token       string              `json:"-"`
	Expires     time.Time           // whole seconds, UTC
}

// Format keeps the secret out of messages.
func (Ticket) Format(s fmt.State, _ rune) { io.WriteString(s, "ticket.Ticket") }

// LogValue keeps the secret out of logs.
func (Ticket) LogValue() slog.Value { return slog.StringValue("ticket.Ticket") }

// Reveal returns the ticket's text, to be shown once to who asked for it. The
// order of the roots does not matter.
func (t Ticket) Reveal() (string, error) {
	t.Roots = slices.Clone(t.Roots)
	slices.SortFunc(t.Roots, func(a, b [sha256.Size]byte) int { return bytes.Compare(a[:], b[:]) })
	if err := t.check(); err != nil {
		return "", err
	}
	var b cryptobyte.Builder
	b.AddUint64(uint64(t.Expires.Unix()))
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(t.Token)) })
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(t.TrustDomain.Name())) })
	b.AddUint8(uint8(len(t.Roots)))
	for _, root := range t.Roots {
		b.AddBytes(root[:])
	}
	b.AddUint8(uint8(len(t.Addresses)))
	for _, address := range t.Addresses {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(address)) })
	}
	fields, err := b.Bytes()
	if err != nil {
		return "", err
	}
	size := lengthSize + len(fields) + checkSize
	body := append([]byte{byte(size >> 8), byte(size)}, fields...)
	body = append(body, checksum(body)...)
	text := head + base64.RawURLEncoding.EncodeToString(body)
	if len(text) > MaxText {
		return "", tooLong()
	}
	return text, nil
}

// Parse reads a ticket. Nothing is trimmed. Whether it has expired is not looked
// at: a node that has joined still finds its server by it.
func Parse(text string) (Ticket, error) {
	if len(text) > MaxText {
		return Ticket{}, tooLong()
	}
	rest, ours := strings.CutPrefix(text, name)
	version, encoded, dot := strings.Cut(rest, ".")
	switch {
	case text != "" && strings.HasPrefix(name, text):
		return Ticket{}, truncated()
	case !ours || strings.Trim(version, "0123456789") != "" || dot && version == "" || strings.HasPrefix(version, "0"):
		return Ticket{}, malformed("a ticket begins with " + head)
	case !dot:
		return Ticket{}, truncated()
	case version != "1":
		return Ticket{}, fault.New(fault.Unsupported, "ticket_newer", "the ticket is of version %.6s, this agent reads version 1", version).
			Fix("install the version of plastron that the server has, or one newer")
	}
	if at := strings.IndexFunc(encoded, func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r == '-' || r == '_')
	}); at >= 0 {
		return Ticket{}, malformed("after " + strconv.Itoa(len(head)+at) + " characters it holds one that no ticket has, perhaps a space or the end of a line")
	}
	whole := len(encoded) / 4 * 4 // what is before is good even if the end is missing
	if start, err := base64.RawURLEncoding.DecodeString(encoded[:whole]); err != nil || len(start) < lengthSize {
		return Ticket{}, truncated()
	} else if size := int(start[0])<<8 | int(start[1]); len(encoded) < base64.RawURLEncoding.EncodedLen(size) {
		return Ticket{}, truncated()
	}
	body, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(body) < shortest || len(body) != int(body[0])<<8|int(body[1]) ||
		!bytes.Equal(checksum(body[:len(body)-checkSize]), body[len(body)-checkSize:]) {
		return Ticket{}, fault.New(fault.Invalid, "ticket_changed", "the ticket was changed on its way: its checksum is wrong").Fix("%s", again)
	}
	t, ok := read(cryptobyte.String(body[lengthSize : len(body)-checkSize]))
	if !ok {
		return Ticket{}, malformed("its fields cannot be read")
	}
	return t, t.check()
}

// Check says whether the ticket can still be used to join at that time.
func (t Ticket) Check(now time.Time) error {
	if now.Before(t.Expires) {
		return nil
	}
	return fault.New(fault.Precondition, "ticket_expired", "the ticket has expired at %s, by this machine's clock it is %s",
		t.Expires.Format(time.RFC3339), now.UTC().Format(time.RFC3339)).
		Fix("make another with 'plastron server token generate', -ttl makes it good for longer; or set the clock right")
}

// read reads the fields; what they hold is judged by check.
func read(s cryptobyte.String) (t Ticket, ok bool) {
	var expires uint64
	var token, td cryptobyte.String
	var roots, addresses uint8
	if !s.ReadUint64(&expires) || expires > math.MaxInt64 || !s.ReadUint8LengthPrefixed(&token) || !s.ReadUint8LengthPrefixed(&td) || !s.ReadUint8(&roots) {
		return Ticket{}, false
	}
	name, err := identity.ParseTrustDomain(string(td))
	if err != nil || name.Name() != string(td) {
		return Ticket{}, false
	}
	t = Ticket{TrustDomain: name, Token: string(token), Expires: time.Unix(int64(expires), 0).UTC()}
	for range roots {
		var root [sha256.Size]byte
		if !s.CopyBytes(root[:]) {
			return Ticket{}, false
		}
		t.Roots = append(t.Roots, root)
	}
	if !s.ReadUint8(&addresses) {
		return Ticket{}, false
	}
	for range addresses {
		var address cryptobyte.String
		if !s.ReadUint16LengthPrefixed(&address) {
			return Ticket{}, false
		}
		t.Addresses = append(t.Addresses, string(address))
	}
	return t, s.Empty()
}

// lastExpiry is the end of the year 9999, past which times have no usual text.
const lastExpiry = 253402300799

// check says what a ticket may hold, whether it is written or read.
func (t Ticket) check() error {
	switch {
	case len(t.Addresses) < 1 || len(t.Addresses) > MaxAddresses:
		return malformed(fmt.Sprintf("it has %d server addresses, from 1 to %d are possible", len(t.Addresses), MaxAddresses))
	case len(t.Roots) < 1 || len(t.Roots) > MaxRoots:
		return malformed(fmt.Sprintf("it has %d roots, from 1 to %d are possible", len(t.Roots), MaxRoots))
	case t.TrustDomain.IsZero():
		return malformed("it has no trust domain")
	case t.Expires.Unix() <= 0 || t.Expires.Unix() > lastExpiry:
		return malformed("its expiry is no usual time")
	case t.Token == "" || len(t.Token) > maxToken || strings.ContainsFunc(t.Token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return malformed("its token is not printable text of 1 to " + strconv.Itoa(maxToken) + " bytes")
	}
	for i, address := range t.Addresses {
		if err := CheckAddress(address); err != nil {
			return err
		}
		if slices.Contains(t.Addresses[:i], address) {
			return malformed("it has the server address " + address + " twice")
		}
	}
	for i := 1; i < len(t.Roots); i++ {
		if bytes.Compare(t.Roots[i-1][:], t.Roots[i][:]) >= 0 {
			return malformed("its roots are not in order, or one is there twice")
		}
	}
	return nil
}

// CheckAddress says whether a server's address is in the one form that a ticket
// holds: an IP address or a name in lower case, a colon, and a port.
func CheckAddress(address string) error {
	bad := fault.New(fault.Invalid, "ticket_address_invalid", "%.300q is not the address of a server", address).
		Fix("write it as HOST:PORT, with a name in lower case or an IP address, such as plastron.example.org:8081 or [2001:db8::1]:8081")
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return bad
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return bad
	}
	if net.JoinHostPort(host, port) != address {
		return bad
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.String() != host || ip.Zone() != "" || ip.IsUnspecified() {
			return bad
		}
		return nil
	}
	if host == "" || len(host) > maxHost || strings.Trim(host, "0123456789.") == "" {
		return bad
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return bad
		}
	}
	return nil
}

func checksum(b []byte) []byte {
	sum := sha256.Sum256(append([]byte("plastron ticket 1"), b...))
	return sum[:checkSize]
}

const again = "copy the whole line again, or make another ticket with 'plastron server token generate'"

func truncated() error {
	return fault.New(fault.Invalid, "ticket_truncated", "the ticket is cut off: its end is missing").Fix("%s", again)
}

func tooLong() error {
	return fault.New(fault.Invalid, "ticket_malformed", "the ticket is longer than %d characters", MaxText).Fix("%s", again)
}

func malformed(what string) error {
	return fault.New(fault.Invalid, "ticket_malformed", "this is not a ticket: %s", what).Fix("%s", again)
}
