package registry

import (
	"crypto/sha256"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Node is an agent that proved itself.
type Node struct {
	ID              spiffeid.ID
	AttestationType string
	Selectors       []entry.Selector // sorted, without duplicates; may be empty
	Current         Credential
	Next            Credential // issued, not used yet; zero: none
	Lineage         []byte     // drawn at attestation, kept by renewals (R31)
	Banned          bool       // only unbanning clears it (R29)
	CanReattest     bool
	AgentVersion    string
	AttestedAt      time.Time
	Evidence        []byte // hash of the one-time evidence that admitted it
	Follows         bool   // it is told what changes; SPIRE's agents do not follow, they ask
	// Restored says that the row was written before the store was restored: what
	// happened to the node after that may be lost. Writing a node clears it.
	Restored bool
}

// Credential is one agent certificate that is accepted.
type Credential struct {
	Serial    string // decimal
	ExpiresAt time.Time
	KeyHash   []byte // SHA-256 of the SubjectPublicKeyInfo
}

// IsZero reports whether there is no credential.
func (c Credential) IsZero() bool { return c.Serial == "" }

// Token is a join token. The token itself is never stored, only its hash.
type Token struct {
	Hash      []byte // SHA-256
	ExpiresAt time.Time
	Consumer  []byte // key hash of the node that used it; empty: unused
	NodeID    string // the agent ID that it admits
	Epoch     store.Epoch
}

// Authority is the signing keys of one kind that one server has.
type Authority struct {
	Server string
	Kind   string
	Slots  []Slot
}

// Slot is one signing key of an authority.
type Slot struct {
	Name        string // "A" or "B"
	State       SlotState
	AuthorityID string
	KeyID       string // in the keeper
	NotBefore   time.Time
	NotAfter    time.Time
	Certificate []byte // X.509: DER
	PublicKey   []byte // PKIX DER
	PublishedAt time.Time
	LastExpiry  time.Time // of anything signed under it, as promised
	ReadyAt     time.Time // when nobody was waited for any longer; zero: not yet
	Unready     uint32    // how many had not acknowledged it when it went on
	ActivatedAt time.Time
	RetiredAt   time.Time // when it became old

	Upstream bool     // an authority above signed it, or has published it
	Chain    [][]byte // X.509: the certificates above, without the root, DER
	Root     []byte   // X.509: the upstream's root that it leads to, DER
	Given    [][]byte // what else of the upstream is in the bundle because of this key: roots, DER, or JWT key ids
}

// Downstream is an authority below ours, for as long as it may sign.
type Downstream struct {
	Serial      string // of its certificate, decimal
	Caller      string // SPIFFE ID of the server that has it
	EntryID     string // that allows it
	Server      string // that signed
	Issuer      string // authority id
	AuthorityID string
	KeyHash     []byte // SHA-256 of the SubjectPublicKeyInfo
	NotAfter    time.Time
}

// Expulsion says that a server is in wrong hands: it signs no more, and what it says
// does not count.
type Expulsion struct {
	Server   string
	Caller   string // who expelled it
	At       time.Time
	RevokeAt time.Time // from then on its authorities are in no bundle
}

// SlotState is where a key is in its life.
type SlotState uint8

// The states of a slot, in the order of a key's life.
const (
	SlotUnspecified SlotState = iota
	SlotIntended              // the key is being made
	SlotPrepared              // in the bundle, not signing
	SlotActive
	SlotOld
)

// Server is what a server says of itself. Only it writes its row.
type Server struct {
	ID        string
	Version   string
	StartedAt time.Time // of the instance

	Instance []byte        // random: one life of the process; empty: never said
	Beat     uint64        // counts writes of the row, over all instances
	BeatAt   time.Time     // the writer's clock, in milliseconds
	Lease    time.Duration // for how long after this beat the instance may sign
	Stopped  bool          // signs no more: it ended in order
	Up       time.Duration // for how long it has run, by a clock that cannot be set
	Place    Place
	Reads    int // newest envelope format that it reads

	Position store.Position // before this beat
	Digest   [32]byte       // at that position

	Addresses    []string // HOST:PORT
	Agents       int      // that follow it
	Acknowledged uint64   // what they all hold but the laggards, in the epoch of Position
	Laggards     []Laggard
	Ends         Ends
	Asks         uint64 // how often it has asked the others for a beat
}

// Ends is what agents that follow a server said ends first there, if nothing is
// renewed from now on.
type Ends struct {
	Telling   int // agents that said it
	X509, JWT End
}

// End is what an agent hands out until a moment. Zero: there is nothing.
type End struct {
	ID, Agent string // SPIFFE IDs
	At        time.Time
}

// First takes the earlier one.
func (e *End) First(other End) {
	if !other.At.IsZero() && (e.At.IsZero() || other.At.Before(e.At)) {
		*e = other
	}
}

// MaxLaggards is how many a server names in its row.
const MaxLaggards = 100

// Laggard is an agent that holds less than the others of its server.
type Laggard struct {
	Agent        string // SPIFFE ID
	Acknowledged uint64 // revision
}

// Place is where a server keeps its identity: a directory of a running kernel.
type Place struct {
	Host, DataDir string // for people
	BootID        string // of the running kernel; empty: not known
	Device, Inode uint64 // of the directory
}

// Same reports whether both are one directory of one running kernel.
func (p Place) Same(o Place) bool {
	return p.BootID != "" && p.Inode != 0 && p.BootID == o.BootID && p.Device == o.Device && p.Inode == o.Inode
}

// sumOf is what a body adds to a state hash.
func sumOf(body []byte) [32]byte { return sha256.Sum256(body) }
