package entry

import (
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// reservedIDPrefix begins the ids of entries that Plastron makes for itself.
const reservedIDPrefix = "plastron."

// year10000 is the first moment that a certificate cannot name.
const year10000 = 253402300800 // Unix seconds

// Validate brings e into its normal form (selectors and federated trust domains
// sorted, nothing named twice) and reports the first rule that it breaks. An
// expiry is compared with now, unless now is zero.
func Validate(td spiffeid.TrustDomain, e *Entry, now time.Time) error {
	if err := CheckID(e.ID); err != nil {
		return err
	}
	if err := checkIDs(td, e); err != nil {
		return err
	}
	sels, err := NormalizeSelectors(e.Selectors)
	if err != nil {
		return err
	}
	e.Selectors = sels
	if err := checkTTL("x509_svid_ttl", e.X509TTL); err != nil {
		return err
	}
	if err := checkTTL("jwt_svid_ttl", e.JWTTL); err != nil {
		return err
	}
	if err := checkFederation(td, e); err != nil {
		return err
	}
	if err := checkDNSNames(e.DNSNames); err != nil {
		return err
	}
	e.DNSNames = withoutRepeats(e.DNSNames)
	if err := checkHint(e.Hint); err != nil {
		return err
	}
	if err := checkTimes(e, now); err != nil {
		return err
	}
	if e.Owner != "" {
		if err := CheckOwner(e.Owner); err != nil {
			return err
		}
	}
	if e.Rule != nil {
		return checkRule(td, e)
	}
	return checkFlags(e)
}

// CheckID checks the id of an entry: at most 255 letters, digits, '_', '.' and '-'.
func CheckID(id string) error {
	switch {
	case id == "":
		return fault.New(fault.Invalid, "entry_id_invalid", "the entry has no id")
	case len(id) > MaxID:
		return fault.New(fault.Invalid, "entry_id_invalid", "the entry id is %d bytes long, the limit is %d", len(id), MaxID)
	case strings.ContainsFunc(id, func(r rune) bool { return notLabelRune(r) && r != '_' && r != '.' }):
		return fault.New(fault.Invalid, "entry_id_invalid", "the entry id %q holds a character that an id cannot hold", id).
			Fix("use letters, digits, '_', '.' and '-'")
	case strings.HasPrefix(id, reservedIDPrefix):
		return fault.New(fault.Invalid, "entry_id_reserved", "entry ids that begin with %q are reserved", reservedIDPrefix)
	}
	return nil
}

// CheckOwner checks the name of an owner: 1 to 64 letters, digits, '.', '_', '-' and '/'.
func CheckOwner(owner string) error {
	if owner == "" || len(owner) > MaxOwner || strings.ContainsFunc(owner, func(r rune) bool { return notLabelRune(r) && !strings.ContainsRune("._/", r) }) {
		return fault.New(fault.Invalid, "owner_invalid", "%q is not the name of an owner", owner[:min(len(owner), MaxOwner)]).
			Fix("use 1 to %d letters, digits, '.', '_', '-' and '/'", MaxOwner)
	}
	return nil
}

func checkIDs(td spiffeid.TrustDomain, e *Entry) error {
	if e.Rule == nil {
		if err := identity.CheckWorkload(td, e.SPIFFEID); err != nil {
			return err
		}
	}
	if e.ParentID.IsZero() {
		return fault.New(fault.Invalid, "parent_id_missing", "the entry has no parent ID").
			Fix("name an agent, another entry's SPIFFE ID, or %s for a node alias", identity.Server(td))
	}
	if err := identity.CheckMember(td, e.ParentID); err != nil {
		return err
	}
	if identity.Reserved(e.ParentID) && !identity.IsAgent(e.ParentID) && !e.Alias() {
		return fault.New(fault.Invalid, "parent_id_reserved", "%q is neither an agent nor the server, so it cannot be a parent", e.ParentID)
	}
	if e.SPIFFEID == e.ParentID {
		return fault.New(fault.Invalid, "parent_id_self", "the entry is its own parent")
	}
	return nil
}

func checkTTL(field string, ttl time.Duration) error {
	if ttl < 0 || ttl > MaxTTL || ttl%time.Second != 0 {
		return fault.New(fault.Invalid, "ttl_invalid", "%s is %v; it must be whole seconds from 0 to %d", field, ttl, MaxTTL/time.Second)
	}
	return nil
}

func checkFederation(td spiffeid.TrustDomain, e *Entry) error {
	if len(e.FederatesWith) > MaxFederatesWith {
		return fault.New(fault.Invalid, "federates_with_too_many",
			"the entry federates with %d trust domains, the limit is %d", len(e.FederatesWith), MaxFederatesWith)
	}
	for _, other := range e.FederatesWith {
		if _, err := identity.ParseTrustDomain(other.Name()); err != nil {
			return err
		}
		if other == td {
			return fault.New(fault.Invalid, "federates_with_self", "the entry federates with its own trust domain %q", td.Name())
		}
	}
	tds := slices.Clone(e.FederatesWith)
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	e.FederatesWith = slices.Compact(tds)
	return nil
}

func checkHint(hint string) error {
	switch {
	case len(hint) > MaxHint:
		return fault.New(fault.Invalid, "hint_invalid", "the hint is %d bytes long, the limit is %d", len(hint), MaxHint)
	case !utf8.ValidString(hint) || strings.ContainsFunc(hint, unicode.IsControl):
		return fault.New(fault.Invalid, "hint_invalid", "the hint %q is not printable text", hint)
	}
	return nil
}

func checkTimes(e *Entry, now time.Time) error {
	for _, t := range []time.Time{e.CreatedAt, e.ExpiresAt} {
		if !t.IsZero() && (t.Nanosecond() != 0 || t.Unix() <= 0 || t.Unix() >= year10000) {
			return fault.New(fault.Invalid, "time_invalid", "%v is not whole seconds between the years 1970 and 9999", t)
		}
	}
	if !now.IsZero() && e.Expired(now) {
		return fault.New(fault.Invalid, "expires_at_past", "the entry would expire at %v, which has passed", e.ExpiresAt)
	}
	return nil
}

func checkFlags(e *Entry) error {
	if e.Alias() && (e.Admin || e.Downstream || e.StoreSVID) {
		return fault.New(fault.Invalid, "alias_privileged", "a node alias is never issued to anyone, so it cannot be admin, downstream or store_svid").
			Fix("put the flag on an entry whose parent is the alias")
	}
	if !e.StoreSVID {
		return nil
	}
	if e.DisableX509Prefetch {
		return fault.New(fault.Invalid, "store_svid_prefetch", "store_svid and disable_x509_svid_prefetch exclude each other")
	}
	if first, last := e.Selectors[0], e.Selectors[len(e.Selectors)-1]; first.Type != last.Type {
		return fault.New(fault.Invalid, "store_svid_selectors", "store_svid asks that all selectors are of one type, the store's; there are %q and %q", first.Type, last.Type)
	}
	return nil
}

// Lint returns what is allowed but probably not meant, in a sentence each.
func Lint(e *Entry) []string {
	var notes []string
	var path, bound, root bool
	for _, s := range e.Selectors {
		key, _, _ := strings.Cut(s.Value, ":")
		switch {
		case s.Type == "unix" && (key == "path" || key == "sha256"):
			path = true
		case s.Type == "unix" && (key == "uid" || key == "user"), s.Type == "systemd", s.Type == "docker", s.Type == "k8s":
			bound = true
		}
		root = root || s == Selector{Type: "unix", Value: "uid:0"} || s == Selector{Type: "unix", Value: "user:root"}
	}
	if path && !bound { // R40, E42
		notes = append(notes, "a path or hash selector stands without a uid, unit or container: any user who can run the program gets this identity")
	}
	if root && !path { // E43
		notes = append(notes, "the entry selects root, and every process of root gets this identity")
	}
	return notes
}
