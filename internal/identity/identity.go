// Package identity reads SPIFFE IDs and trust domain names as strictly as the
// standard asks (SPIFFE-ID sections 2.1 to 2.4), which is stricter than the
// library whose type it returns: sizes are bounded and nothing is normalised.
// It also knows which part of a trust domain is reserved for servers and agents.
package identity

import (
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Sizes in bytes (SPIFFE-ID section 2.3).
const (
	MaxID          = 2048
	MaxTrustDomain = 255
)

// Parse reads a SPIFFE ID: at most 2048 bytes, trust domain at most 255 bytes,
// no normalisation. A trust domain's own ID (no path) is accepted.
func Parse(s string) (spiffeid.ID, error) {
	if len(s) > MaxID { // before it is read
		return spiffeid.ID{}, tooLong(len(s))
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fault.New(fault.Invalid, "spiffe_id_invalid", "%q is not a SPIFFE ID: %v", s, err).
			Fix("write it as spiffe://TRUST-DOMAIN/PATH")
	}
	return orZero(id, checkSize(id))
}

// checkSize checks what the library does not: everything else about an ID of
// its type was checked when that was made.
func checkSize(id spiffeid.ID) error {
	if n := len(id.String()); n > MaxID {
		return tooLong(n)
	}
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomain {
		return fault.New(fault.Invalid, "spiffe_id_invalid",
			"the trust domain of the SPIFFE ID is %d bytes long, the limit is %d", n, MaxTrustDomain)
	}
	return nil
}

func tooLong(n int) error {
	return fault.New(fault.Invalid, "spiffe_id_invalid", "the SPIFFE ID is %d bytes long, the limit is %d", n, MaxID)
}

// ParseTrustDomain reads a bare trust domain name such as "example.org".
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if len(s) > MaxTrustDomain {
		return spiffeid.TrustDomain{}, fault.New(fault.Invalid, "trust_domain_invalid",
			"the trust domain is %d bytes long, the limit is %d", len(s), MaxTrustDomain)
	}
	if strings.Contains(s, "/") {
		return spiffeid.TrustDomain{}, fault.New(fault.Invalid, "trust_domain_invalid", "%q is not a trust domain name", s).
			Fix("give the bare name, such as example.org, without spiffe://")
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, fault.New(fault.Invalid, "trust_domain_invalid", "%q is not a trust domain name: %v", s, err)
	}
	return td, nil
}

// ParseWorkload reads the ID of a workload of trust domain td: own trust
// domain, a path, and outside the reserved space (R16).
func ParseWorkload(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	id, err := Parse(s)
	if err == nil {
		err = CheckWorkload(td, id)
	}
	return orZero(id, err)
}

// ParseMember reads an ID of trust domain td that has a path; it may be reserved.
func ParseMember(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	id, err := Parse(s)
	if err == nil {
		err = CheckMember(td, id)
	}
	return orZero(id, err)
}

func orZero(id spiffeid.ID, err error) (spiffeid.ID, error) {
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, nil
}

// CheckWorkload is ParseWorkload for an ID that was read elsewhere.
func CheckWorkload(td spiffeid.TrustDomain, id spiffeid.ID) error {
	if err := CheckMember(td, id); err != nil {
		return err
	}
	if Reserved(id) {
		return fault.New(fault.Invalid, "spiffe_id_reserved",
			"%q lies under /spire, which is reserved for servers and agents", id)
	}
	return nil
}

// CheckMember is ParseMember for an ID that was read elsewhere.
func CheckMember(td spiffeid.TrustDomain, id spiffeid.ID) error {
	if id.IsZero() {
		return fault.New(fault.Invalid, "spiffe_id_invalid", "there is no SPIFFE ID").Fix("write it as spiffe://TRUST-DOMAIN/PATH")
	}
	if err := checkSize(id); err != nil {
		return err
	}
	switch {
	case !id.MemberOf(td):
		return fault.New(fault.Invalid, "spiffe_id_foreign", "%q is not in the trust domain %q", id, td.Name())
	case id.Path() == "":
		return fault.New(fault.Invalid, "spiffe_id_no_path", "%q has no path", id)
	}
	return nil
}

// Reserved reports whether id lies in the space of servers and agents:
// "/spire" itself or anything below it. Comparison is byte-exact.
func Reserved(id spiffeid.ID) bool {
	return id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/")
}

// Server returns the ID that every server of td holds.
func Server(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, "/spire/server")
}

// IsAgent reports whether id is in the agents' space.
func IsAgent(id spiffeid.ID) bool { return strings.HasPrefix(id.Path(), "/spire/agent/") }
