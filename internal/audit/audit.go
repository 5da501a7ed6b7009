// Package audit says who did what to which identity: typed events, one line of
// JSON each, in a file that only grows.
//
// It decides the form of an event, its order and its proof: each record carries
// its number and the SHA-256 of the record before it, so that a changed, lost
// or reordered line shows (Verify). What is an event, and what happens to a
// request when the file cannot be written, is decided by the caller and by
// Writer's strict option. No event ever holds a token, a CSR, a JWT or a key:
// the types have room for hashes only (R14, R104).
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// MaxRecord is the longest line that Verify and Open accept. Fields made by
// outsiders are cut by Text, so no event comes near it.
const MaxRecord = 256 << 10

// Hash is a SHA-256 in an event; it marshals as lower-case hex, empty if it is zero.
type Hash [sha256.Size]byte

// MarshalText returns lower-case hex, or nothing for the zero hash.
func (h Hash) MarshalText() ([]byte, error) {
	if h == (Hash{}) {
		return nil, nil
	}
	return hex.AppendEncode(nil, h[:]), nil
}

// UnmarshalText reads what MarshalText wrote.
func (h *Hash) UnmarshalText(b []byte) error {
	*h = Hash{}
	if len(b) == 0 {
		return nil
	}
	if n, err := hex.Decode(h[:], b); err != nil || n != len(h) || len(b) != 2*len(h) {
		return fmt.Errorf("hash is not %d hex digits", 2*len(h))
	}
	return nil
}

// Text cuts a string that an outsider chose to what an event may hold.
func Text(s string) string {
	const limit = 2048
	if len(s) > limit {
		s = s[:limit]
	}
	return s
}

// Event is one of the types below.
type Event interface{ kind() string }

// Admission is a node that was let in or renewed.
type Admission struct {
	Act      string    `json:"act"` // "attest", "retry", "reattest" or "renew"
	Node     string    `json:"node"`
	Type     string    `json:"type"` // attestation type
	Address  string    `json:"address"`
	Serial   string    `json:"serial"`
	KeyHash  Hash      `json:"key_hash"`
	Lineage  string    `json:"lineage"`
	Evidence Hash      `json:"evidence"` // hash of the one-time secret, if there was one
	Position string    `json:"position"` // of the commit that admitted or renewed it
	Expiry   time.Time `json:"expiry"`
	Limit    string    `json:"limit,omitempty"` // what limited the lifetime; see lifetime.Limit
}

// Refusal is a request that was turned down for who asked or for what was asked.
type Refusal struct {
	Caller  string `json:"caller"`
	Address string `json:"address"`
	Call    string `json:"call"`    // full method name
	Subject string `json:"subject"` // node, grant or ID it was about; may be empty
	Kind    string `json:"kind"`    // fault kind
	Reason  string `json:"reason"`  // fault reason

	Detail string            `json:"detail,omitempty"` // of a grant: what the caller was told
	Facts  map[string]string `json:"facts,omitempty"`  // of a rule: what the caller stated
}

// Change is one key that a committed transaction changed: a grant, a node, a
// token, a bundle or an authority. It comes from the log itself, so nothing that
// was committed can be missing from the trail.
type Change struct {
	Caller   string `json:"caller"`
	Position string `json:"position"`
	Key      string `json:"key"`
	Deleted  bool   `json:"deleted"`
	Value    Hash   `json:"value"` // hash of the stored value
}

// AuthorityAct is a Change of an authority or of a bundle.
type AuthorityAct Change

// Issuance is a credential about to be signed.
type Issuance struct {
	Caller   string    `json:"caller"`
	Kind     string    `json:"kind"` // "x509", "jwt", or "x509-ca" for an authority of a downstream server
	ID       string    `json:"id"`
	Grant    string    `json:"grant"`    // entry or rule id; empty for a mint
	Revision uint64    `json:"revision"` // of the grant
	Position string    `json:"position"` // at which the caller was found entitled
	Serial   string    `json:"serial"`   // X.509, decimal
	JTI      string    `json:"jti"`      // JWT, if it has one
	Issuer   string    `json:"issuer"`   // authority or key id
	KeyHash  Hash      `json:"key_hash"`
	Audience Hash      `json:"audience"` // hash of the audience list
	Expiry   time.Time `json:"expiry"`
	Limit    string    `json:"limit,omitempty"` // what limited the lifetime; see lifetime.Limit

	Facts map[string]string `json:"facts,omitempty"` // of a rule: what the ID was made of, and of which pod it is true
	Trust string            `json:"trust,omitempty"` // of a rule: "agent" if that is the caller's word, "server" if it was found out
}

// Alarm is something that an operator must look at, such as a cloned agent (R31).
type Alarm struct {
	Subject string `json:"subject"`
	Reason  string `json:"reason"`
	Detail  string `json:"detail"`
}

// Widening is an act of an operator that gives trust beyond what entries grant. It
// is on record before it is done; the Change that it makes follows.
type Widening struct {
	Act     string `json:"act"` // "unban"
	Caller  string `json:"caller"`
	Subject string `json:"subject"`
}

// Cutoff is an act of an operator that takes trust away. The Changes that it made
// come before it.
type Cutoff struct {
	Act     string `json:"act"` // "revoke", "panic" or "expel"
	Caller  string `json:"caller"`
	Subject string `json:"subject"` // as the operator named it
}

// Start opens each run of a server's trail.
type Start struct {
	Version string `json:"version"`
	Strict  bool   `json:"strict"`
	Aside   int64  `json:"aside"` // bytes of a torn last line that were set aside
}

// Gap says that events before it could not be written.
type Gap struct {
	Lost uint64 `json:"lost"`
}

func (Admission) kind() string    { return "admission" }
func (Refusal) kind() string      { return "refusal" }
func (Change) kind() string       { return "change" }
func (AuthorityAct) kind() string { return "authority" }
func (Issuance) kind() string     { return "issuance" }
func (Alarm) kind() string        { return "alarm" }
func (Widening) kind() string     { return "widening" }
func (Cutoff) kind() string       { return "cutoff" }
func (Start) kind() string        { return "start" }
func (Gap) kind() string          { return "gap" }

// Record is one line of the file. Its canonical bytes are the line without the
// newline: what Canonical returns, what the next record hashes, and what a
// later Merkle log takes as a leaf.
type Record = record[json.RawMessage]

// record is written with the event itself, so that it is encoded once.
type record[E any] struct {
	Sequence uint64    `json:"seq"` // from 1, per server
	Previous Hash      `json:"prev"`
	Server   string    `json:"server"`
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`
	Event    E         `json:"event"`
}

// Canonical returns the record's one form: members in the order of the struct,
// no white space, no HTML escapes, times in UTC.
func (r record[E]) Canonical() ([]byte, error) {
	r.Time = r.Time.UTC()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(r); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// parse reads one line and checks that it is in the canonical form.
func parse(line []byte) (Record, error) {
	var r Record
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return Record{}, err
	}
	again, err := r.Canonical()
	if err != nil {
		return Record{}, err
	}
	if !bytes.Equal(again, line) {
		return Record{}, fmt.Errorf("record %d is not in canonical form", r.Sequence)
	}
	return r, nil
}
