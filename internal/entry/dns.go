package entry

import (
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"golang.org/x/net/idna"
)

// checkDNSNames checks names as they go into a certificate: ASCII, letters,
// digits and hyphens, at most one leading "*." label, no address.
func checkDNSNames(names []string) error {
	if len(names) > MaxDNSNames {
		return fault.New(fault.Invalid, "dns_names_too_many", "there are %d DNS names, the limit is %d", len(names), MaxDNSNames)
	}
	wild := make(map[string]string) // what follows "*." -> the wildcard as given
	for _, name := range names {
		if err := checkDNSName(name); err != nil {
			return err
		}
		if rest, ok := strings.CutPrefix(strings.ToLower(name), "*."); ok {
			wild[rest] = name
		}
	}
	// A wildcard beside a name that it covers hides which of the two is meant.
	for _, name := range names {
		label, rest, _ := strings.Cut(strings.ToLower(name), ".")
		if w, ok := wild[rest]; ok && label != "*" {
			return fault.New(fault.Invalid, "dns_name_covered", "the DNS name %q is covered by %q", name, w).
				Fix("keep one of the two")
		}
	}
	return nil
}

func checkDNSName(name string) error {
	invalid := func(why, remedy string) error {
		return fault.New(fault.Invalid, "dns_name_invalid", "%.260q is not a DNS name: %s", name, why).Fix("%s", remedy)
	}
	if len(name) > MaxDNSName {
		return fault.New(fault.Invalid, "dns_name_invalid", "the DNS name is %d bytes long, the limit is %d", len(name), MaxDNSName)
	}
	labels := strings.Split(strings.TrimPrefix(name, "*."), ".")
	for _, label := range labels {
		switch {
		case label == "":
			return invalid("it has an empty label", "write it without leading, trailing or doubled dots")
		case len(label) > 63:
			return invalid("a label is longer than 63 bytes", "shorten the label")
		case label == "*":
			return invalid("a wildcard may only be the whole first label of a longer name", "write it as *.example.org")
		case strings.ContainsFunc(label, func(r rune) bool { return r > 0x7f }):
			return invalid("it is not ASCII", "write international names in their xn-- form")
		case strings.ContainsFunc(label, notLabelRune):
			return invalid("a label may hold letters, digits and hyphens only", "remove the other characters")
		case label[0] == '-' || label[len(label)-1] == '-':
			return invalid("a label begins or ends with a hyphen", "remove the hyphen")
		case len(label) >= 4 && label[2:4] == "--" && !validALabel(label):
			return invalid("a label has hyphens in its third and fourth place and is no valid xn-- label", "correct the label")
		}
	}
	// No top-level domain is all digits; a name that ends so is an IPv4 address
	// or would be read as one.
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return invalid("it reads as an IP address", "name a host, not an address")
	}
	return nil
}

// withoutRepeats keeps the first of each name; the order matters, since the
// first name becomes the subject's CN.
func withoutRepeats(names []string) []string {
	seen := make(map[string]bool, len(names))
	var out []string
	for _, name := range names {
		if folded := strings.ToLower(name); !seen[folded] {
			seen[folded] = true
			out = append(out, name)
		}
	}
	return out
}

func notLabelRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
}

// validALabel reports whether label is the one ASCII form of an international label (RFC 5891).
func validALabel(label string) bool {
	label = strings.ToLower(label)
	u, err := idna.Registration.ToUnicode(label)
	if err != nil || u == label {
		return false
	}
	a, err := idna.Registration.ToASCII(u)
	return err == nil && a == label
}
