package x509pop

import (
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"net/url"
	"strings"
	"unicode"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxName bounds a subject's common name and each half of a SAN pair, in bytes.
const maxName = 255

// pair is one fact that a URI x509pop://TRUST-DOMAIN/KEY/VALUE states.
type pair struct{ key, value string }

// selectors are the facts about the node. Only the last part of each may hold
// any text; what stands before it has no colon (R43).
func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, pairs []pair) ([]entry.Selector, error) {
	var out []entry.Selector
	add := func(value string) { out = append(out, entry.Selector{Type: Name, Value: value}) }
	if cn := leaf.Subject.CommonName; cn != "" {
		if !plain(cn) { // A15
			return nil, fault.New(fault.Denied, "x509pop_subject_invalid", "the common name of the node's certificate is too long or holds characters that cannot be printed")
		}
		add("subject:cn:" + cn)
	}
	for _, chain := range chains {
		for _, c := range chain[1:] {
			add("ca:fingerprint:" + fingerprint(c))
		}
	}
	add("serialnumber:" + serial(leaf))
	for _, p := range pairs {
		add("san:" + p.key + ":" + p.value)
	}
	return entry.NormalizeSelectors(out)
}

// sanPairs reads the leaf's x509pop URIs of this trust domain. One that is not a
// pair is refused: skipping it would leave the operator guessing.
func sanPairs(leaf *x509.Certificate, td spiffeid.TrustDomain) ([]pair, error) {
	var out []pair
	for _, u := range leaf.URIs {
		if u.Scheme != Name || u.Host != td.Name() {
			continue
		}
		p, ok := readPair(u)
		if !ok { // A17
			return nil, fault.New(fault.Denied, "x509pop_san_invalid", "the node's certificate has an x509pop URI that is not one key and one value").
				Fix("write it as x509pop://%s/KEY/VALUE, the key without ':' and '/', both of at most %d printable bytes", td.Name(), maxName)
		}
		out = append(out, p)
	}
	return out, nil
}

// readPair splits before it decodes, so that an escaped slash separates nothing.
func readPair(u *url.URL) (pair, bool) {
	if u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" {
		return pair{}, false
	}
	rawKey, rawValue, ok := strings.Cut(strings.TrimPrefix(u.EscapedPath(), "/"), "/")
	if !ok {
		return pair{}, false
	}
	key, keyErr := url.PathUnescape(rawKey)
	value, valueErr := url.PathUnescape(rawValue)
	if keyErr != nil || valueErr != nil || !plain(key) || !plain(value) || strings.ContainsAny(key, ":/") {
		return pair{}, false
	}
	return pair{key, value}, true
}

// plain reports whether s is a bounded, printable text that is not empty.
func plain(s string) bool {
	return s != "" && len(s) <= maxName && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) < 0
}

// fingerprint names a certificate as SPIRE does. It is a name and proves nothing.
func fingerprint(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw)
	return hex.EncodeToString(sum[:])
}

func serial(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }
