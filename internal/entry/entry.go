// Package entry holds the words of authorisation: selectors, registration
// entries and rules (grants), node aliases, and the pure functions that say who
// is entitled to what and why. It reads no clock and no store.
package entry

import (
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits on what an entry may hold. Sizes are in bytes.
const (
	MaxID            = 255
	MaxSelectors     = 1000
	MaxSelectorType  = 255
	MaxSelectorValue = 64 << 10
	MaxSelectorsSize = 512 << 10 // all of one entry; the store takes values of at most 1 MiB
	MaxDNSNames      = 100
	MaxDNSName       = 253
	MaxHint          = 1024
	MaxFederatesWith = 200
	MaxTTL           = (1<<31 - 1) * time.Second
	MaxOwner         = 64
)

// Selector is one attested fact: "unix" "uid:1000".
type Selector struct {
	Type  string
	Value string
}

// String returns "type:value". The type holds no colon, so the form is unambiguous.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Entry is a grant: workloads under ParentID that show all Selectors get
// SPIFFEID. An entry whose parent is the server's ID is a node alias: agents
// whose node selectors are a superset of Selectors are also known by SPIFFEID. An
// entry with a Rule gives an ID that follows from facts about the workload.
type Entry struct {
	ID        string
	Revision  uint64      // the store revision that last wrote it; grows over delete and re-creation
	SPIFFEID  spiffeid.ID // zero for a rule
	ParentID  spiffeid.ID
	Selectors []Selector // sorted, without duplicates, at least one
	Rule      *Rule      // nil: an exact entry

	X509TTL time.Duration // whole seconds; 0: the server's default
	JWTTL   time.Duration // whole seconds; 0: the server's default

	FederatesWith []spiffeid.TrustDomain // sorted, without duplicates
	DNSNames      []string               // in the order given; the first becomes the subject's CN
	Hint          string
	Admin         bool
	Downstream    bool
	StoreSVID     bool

	DisableX509Prefetch bool
	JWTIncludeJTI       bool

	Owner string // whose declarations it is part of; empty: nobody's. Agents are not told

	CreatedAt time.Time // whole seconds, UTC
	ExpiresAt time.Time // whole seconds, UTC; zero: never
}

// Alias reports whether e names nodes instead of granting to workloads.
func (e *Entry) Alias() bool { return e.ParentID.Path() == "/spire/server" }

// Expired reports whether e ended at or before now.
func (e *Entry) Expired(now time.Time) bool { return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt) }

// NewID makes the id of an entry or rule that was given none: a UUID of version 7
// (RFC 9562 section 5.7), since these grow, so that what was created within one
// second is still listed in the order of its creation.
func NewID() string { return uuid.Must(uuid.NewV7()).String() }

// Oldest orders entries as the Workload API lists identities: the oldest grant
// first, ties by id (conformance G10). It returns -1, 0 or 1.
func Oldest(a, b *Entry) int {
	if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
		return c
	}
	switch {
	case a.ID < b.ID:
		return -1
	case a.ID > b.ID:
		return 1
	}
	return 0
}
