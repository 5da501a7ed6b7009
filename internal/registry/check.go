package registry

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// Defect is what a Check found: one thing that is wrong in a store, or odd.
type Defect struct {
	Code   string // stable
	Key    string // the row it is about, or empty
	Found  string
	Fix    string
	Remark bool // odd, but may be as it should
	Repair bool // RepairContents mends it, and nothing has to be decided for that
}

// Check proves what must hold between the rows of a store, and between them and
// the log (R126). It does not use the state that servers serve from: what both
// get wrong alike would not be seen. Call After once, then Row for every row of
// one snapshot, then Batch for the log up to it, then Defects.
//
// Of an entry it keeps its id and the hash of its content, of what the log wrote
// a hash, and of other rows no more than 64 bits of their key's.
type Check struct {
	td      spiffeid.TrustDomain
	digest  entry.Sum
	defects []Defect
	owner   *fault.Error // the store is another trust domain's
	claimed bool

	contents map[[32]byte]*content
	grants   map[string]kind // ids of entries and rules
	parents  map[spiffeid.ID]uses
	domains  map[spiffeid.TrustDomain]uses // that entries and rules federate with
	given    []uint64                      // hashes of the IDs of entries
	rules    []*entry.Rule
	aliases  []checkedAlias
	nodes    []Node
	bundles  map[string]*bundle.Bundle
	slots    []slotOf
	newest   uint64 // revision of any row

	log       bool // it is compared
	after     uint64
	seed      maphash.Seed
	seen      []uint64                  // hashes of all keys
	young     map[string]stamp          // rows that the log must hold
	told      map[string]stamp          // what the log says last of a key
	published map[string]*bundle.Bundle // as the log says last
	at        store.Position            // of the last batch
}

// content is what is known of one (parent, ID, selectors).
type content struct {
	row   string // the entry that the content row names
	there bool   // the row is
	entry string // that has it
}

// uses counts who refers to something, and names one.
type uses struct {
	count int
	by    string
}

type checkedAlias struct {
	id        string
	selectors []entry.Selector
}

type slotOf struct {
	key string // of the authority's row
	Slot
}

// stamp is a value as it was written; a deletion has no sum.
type stamp struct {
	revision uint64
	sum      [32]byte
}

// NewCheck begins a check of the store of a trust domain.
func NewCheck(td spiffeid.TrustDomain) *Check {
	return &Check{
		td: td, contents: map[[32]byte]*content{}, grants: map[string]kind{}, parents: map[spiffeid.ID]uses{},
		domains: map[spiffeid.TrustDomain]uses{}, bundles: map[string]*bundle.Bundle{},
		seed: maphash.MakeSeed(), young: map[string]stamp{}, told: map[string]stamp{}, published: map[string]*bundle.Bundle{},
	}
}

// After says where in the log Batch will begin.
func (c *Check) After(begin store.Position) { c.log, c.after, c.at = true, begin.Revision, begin }

// WithoutLog takes After back: the log could not be read to its end.
func (c *Check) WithoutLog() { c.log = false }

// Digest is the Snapshot.Digest of the rows.
func (c *Check) Digest() [32]byte { return c.digest.Bytes() }

func (c *Check) fault(code, key, fix, format string, args ...any) {
	c.defects = append(c.defects, Defect{Code: code, Key: key, Found: fmt.Sprintf(format, args...), Fix: fix})
}

func (c *Check) remark(code, key, fix, format string, args ...any) {
	c.fault(code, key, fix, format, args...)
	c.defects[len(c.defects)-1].Remark = true
}

func (c *Check) repairable(code string, hash [32]byte, format string, args ...any) {
	c.fault(code, keyOf(kindContent, hex.EncodeToString(hash[:])), "plastron server db check -repair", format, args...)
	c.defects[len(c.defects)-1].Repair = true
}

const (
	tampered   = "nothing of Plastron's writes this: see in the audit logs who did, and restore a backup from before"
	unreadable = "use the version that wrote it; if none can read it, delete the entry, rule, agent or bundle by its name, or restore a backup"
)

// Row takes in one row of the snapshot.
func (c *Check) Row(key string, rev uint64, value []byte) {
	c.digest.Add(keyHash(key, rev))
	c.seen = append(c.seen, maphash.String(c.seed, key))
	c.newest = max(c.newest, rev)
	if rev > c.after {
		c.young[key] = stamp{rev, sha256.Sum256(value)}
	}
	if rev == 0 {
		c.fault("revision_wrong", key, tampered, "the row has no revision")
	}
	r := readStored(c.td, key, rev, value)
	if r.err != nil {
		if f, ok := errors.AsType[*fault.Error](r.err); ok && f.Reason == "trust_domain_changed" && r.kind == kindTrustDomain {
			c.owner = f
		}
		c.fault("row_unreadable", key, unreadable, "the row cannot be read, servers leave it aside: %v", r.err)
		return
	}
	switch r.kind {
	case kindEntry, kindRule:
		c.grant(&r)
	case kindContent:
		var m statev1.EntryContent
		if err := proto.Unmarshal(r.payload, &m); err != nil {
			c.fault("row_unreadable", key, unreadable, "the row cannot be read: %v", err)
			return
		}
		of := c.content(r.content)
		of.row, of.there = m.EntryId, true
	case kindNode:
		c.nodes = append(c.nodes, r.node)
	case kindBundle:
		if b, err := readBundle(r.name, r.payload); err == nil { // it was read once
			c.bundles[r.name] = b
		}
	case kindAuthority:
		if a, err := readAuthority(r.name, r.payload); err == nil {
			for _, s := range a.Slots {
				c.slots = append(c.slots, slotOf{key, s})
			}
		}
	case kindToken:
		c.token(&r)
	case kindTrustDomain:
		c.claimed = true
	case kindCopy:
		mark, _ := readCopy(r.payload)
		if key == CopyingHere {
			c.fault("copy_incomplete", key, "run the same 'plastron server db copy' again", "the store is being filled with what is in %s, and that has not been finished", mark.Place)
		} else {
			c.remark("store_copied", key, "use the configuration of the copy", "the store was copied to %s", mark.Place)
		}
	case kindFormat:
		if _, reader, err := readFormat(r.payload); err == nil && reader > Format {
			c.fault(newerFormat, key, "use the newer version that wrote it", "the store is written in format %d, and this version reads up to %d", reader, Format)
		}
	case kindOther:
		c.remark("row_unknown", key, "", "this version does not know rows of this name; a newer one may have written it")
	}
}

func (c *Check) content(hash [32]byte) *content {
	of := c.contents[hash]
	if of == nil {
		of = &content{}
		c.contents[hash] = of
	}
	return of
}

func (c *Check) grant(r *storedRow) {
	e := &r.entry
	if was, twice := c.grants[e.ID]; twice {
		c.fault("id_twice", r.key, "delete one of them", "an entry and a rule have the same id (%s)", grantWord(was))
	}
	c.grants[e.ID] = r.kind
	of := c.content(r.content)
	switch {
	case of.entry != "":
		c.fault("content_twice", r.key, "delete one of them", "%s has the same parent, ID and selectors", of.entry)
	case of.row == e.ID:
		of.entry = of.row // one string is enough
	default:
		of.entry = e.ID
	}
	parent := c.parents[e.ParentID]
	c.parents[e.ParentID] = uses{parent.count + 1, e.ID}
	for _, td := range e.FederatesWith {
		c.domains[td] = uses{c.domains[td].count + 1, e.ID}
	}
	if e.Rule != nil {
		c.rules = append(c.rules, e.Rule)
		return
	}
	c.given = append(c.given, maphash.String(c.seed, e.SPIFFEID.String()))
	if e.ParentID == identity.Server(c.td) {
		c.aliases = append(c.aliases, checkedAlias{e.ID, e.Selectors})
	}
}

func (c *Check) token(r *storedRow) {
	t, err := readToken(nil, r.payload)
	if err != nil {
		return
	}
	if id, err := identity.ParseMember(c.td, t.NodeID); err != nil || !identity.IsAgent(id) {
		c.fault("token_wrong", r.key, tampered, "the join token admits %q, which is no agent's ID", t.NodeID)
	}
}

// Batch takes in the next batch of the log.
func (c *Check) Batch(b store.Batch) {
	if b.Prev != c.at || b.Position.Epoch != c.at.Epoch || b.Position.Revision <= c.at.Revision {
		c.fault("log_broken", "", "restore a backup", "the log goes on at %v after %v, but %v was the last", b.Position, b.Prev, c.at)
	}
	c.at = b.Position
	for _, w := range b.Writes {
		for _, change := range w.Changes {
			key := change.Key
			if _, twice := c.told[key]; twice && c.told[key].revision == b.Position.Revision {
				c.fault("log_broken", key, "restore a backup", "revision %d changes the row twice", b.Position.Revision)
			}
			if change.Deleted {
				c.told[key] = stamp{revision: b.Position.Revision}
			} else {
				c.told[key] = stamp{b.Position.Revision, sha256.Sum256(change.Value)}
			}
			if k, name := split(key); k == kindBundle {
				c.history(key, name, change, b.Position.Revision)
			}
		}
	}
}

// history follows a bundle through the log (R75).
func (c *Check) history(key, name string, change store.Change, rev uint64) {
	if change.Deleted {
		delete(c.published, name)
		return
	}
	payload, err := unseal(change.Value)
	if err != nil {
		return
	}
	is, err := readBundle(name, payload)
	if err != nil {
		return
	}
	was := c.published[name]
	c.published[name] = is
	switch {
	case was == nil:
	case is.Sequence < was.Sequence:
		c.fault("bundle_sequence", key, tampered, "at revision %d the bundle's sequence went back from %d to %d", rev, was.Sequence, is.Sequence)
	case is.Sequence == was.Sequence && name == c.td.Name() && !is.Equal(was): // others number theirs as they like
		c.fault("bundle_sequence", key, tampered, "at revision %d the bundle's content changed and its sequence stayed at %d", rev, is.Sequence)
	}
}

// Defects says what is wrong with the snapshot at a position, in the order of
// keys within each kind of defect.
func (c *Check) Defects(at store.Position) []Defect {
	if c.owner != nil {
		return []Defect{{Code: "trust_domain_changed", Key: prefixOf(kindTrustDomain), Found: c.owner.Message, Fix: c.owner.Remedy}}
	}
	if !c.claimed && len(c.seen) > 0 {
		c.fault("owner_missing", prefixOf(kindTrustDomain), "start a server on it, which writes it if the bundles are its own", "the store does not say which trust domain it belongs to")
	}
	if c.newest > at.Revision {
		c.fault("revision_wrong", "", "restore a backup", "a row was written at revision %d, and the store is at %d", c.newest, at.Revision)
	}
	c.checkContents()
	c.checkAuthorities()
	c.checkReferences()
	if c.log {
		c.checkLog(at)
	}
	slices.SortStableFunc(c.defects, func(a, b Defect) int {
		if a.Remark != b.Remark {
			if a.Remark {
				return 1
			}
			return -1
		}
		return cmp.Or(strings.Compare(a.Code, b.Code), strings.Compare(a.Key, b.Key), strings.Compare(a.Found, b.Found))
	})
	return c.defects
}

func (c *Check) checkContents() {
	for hash, of := range c.contents {
		switch {
		case of.entry == "":
			c.repairable("content_orphan", hash, "no entry or rule has this content; it names %q", of.row)
		case !of.there:
			c.repairable("content_missing", hash, "nothing keeps a second entry like %q from being made", of.entry)
		case of.row != of.entry:
			c.repairable("content_wrong", hash, "it names %q, and the content is that of %q", of.row, of.entry)
		}
	}
}

// checkAuthorities compares what signs with what is published (R63).
func (c *Check) checkAuthorities() {
	own := c.bundles[c.td.Name()]
	if own == nil {
		if len(c.slots) > 0 {
			c.fault("bundle_missing", keyOf(kindBundle, c.td.Name()), "restore a backup", "servers have signing keys, and the trust domain has no bundle")
		}
		return
	}
	active := map[string]int{}
	var owned []slotOf
	for _, s := range c.slots {
		if s.PublicKey == nil {
			continue // intended: there is no key yet
		}
		owned = append(owned, s)
		if s.State == SlotActive {
			if active[s.key]++; active[s.key] == 2 {
				c.fault("authority_states", s.key, "restart that server; if it stays, restore a backup", "two of its keys are active")
			}
		}
		if s.State != SlotPrepared && s.State != SlotActive {
			continue
		}
		there, tainted := s.in(own)
		switch {
		case !there:
			c.fault("authority_unpublished", s.key, "restart that server: it publishes another key",
				"key %s may sign, and the bundle does not hold it: what it signs is not accepted", s.AuthorityID)
		case tainted:
			c.remark("authority_tainted", s.key, "rotate it, and revoke it when nothing signed by it is in use", "key %s may sign, and is tainted", s.AuthorityID)
		}
	}
	key := keyOf(kindBundle, c.td.Name())
	if own.Sequence == 0 && len(own.X509)+len(own.JWT) > 0 {
		c.fault("bundle_sequence", key, tampered, "the bundle has no sequence number")
	}
	for _, a := range own.X509 {
		if !slices.ContainsFunc(owned, func(s slotOf) bool { return s.explains(a.ASN1) }) {
			sum := sha256.Sum256(a.ASN1)
			c.fault("bundle_key_unowned", key, "if you did not put it there, take the trust domain for compromised: see in the audit logs who wrote the row",
				"no server's row has, or was given by its upstream, the root with SHA-256 %x", sum)
		}
	}
	for _, root := range own.Roots() {
		if own.IsRevoked(sha256.Sum256(root.RawSubjectPublicKeyInfo)) {
			c.fault("bundle_key_revoked", key, tampered, "the bundle holds the X.509 authority %x, which was revoked", root.SubjectKeyId)
		}
	}
	for _, a := range own.JWT {
		if own.IsRevoked(sha256.Sum256(a.PublicKey)) {
			c.fault("bundle_key_revoked", key, tampered, "the bundle holds the JWT key %q, which was revoked", a.KeyID)
		}
		if !slices.ContainsFunc(owned, func(s slotOf) bool { return s.isJWT(a) || s.gave([]byte(a.KeyID)) }) {
			c.remark("bundle_key_unowned", key, "if no server below this one published it, take the trust domain for compromised",
				"no server's row has the JWT key %q", a.KeyID)
		}
	}
}

// root is what the bundle holds for an X.509 key: its certificate, or the root of
// the upstream that signed it.
func (s *slotOf) root() []byte {
	if len(s.Root) > 0 {
		return s.Root
	}
	return s.Certificate
}

// explains tells whether an X.509 authority is in the bundle for this key.
func (s *slotOf) explains(root []byte) bool {
	return bytes.Equal(s.root(), root) || s.gave(root)
}

// gave tells whether a root or a JWT key id came with this key from the upstream.
func (s *slotOf) gave(what []byte) bool {
	return slices.ContainsFunc(s.Given, func(g []byte) bool { return bytes.Equal(g, what) })
}

func (s *slotOf) isJWT(a bundle.JWTAuthority) bool {
	return s.AuthorityID == a.KeyID && bytes.Equal(s.PublicKey, a.PublicKey)
}

// in tells whether a bundle holds the slot's key, and tainted.
func (s *slotOf) in(b *bundle.Bundle) (there, tainted bool) {
	if s.Certificate == nil {
		i := slices.IndexFunc(b.JWT, s.isJWT)
		return i >= 0, i >= 0 && b.JWT[i].Tainted
	}
	i := slices.IndexFunc(b.X509, func(a bundle.X509Authority) bool { return bytes.Equal(a.ASN1, s.root()) })
	return i >= 0, i >= 0 && b.X509[i].Tainted
}

// checkReferences remarks on what leads nowhere.
func (c *Check) checkReferences() {
	nodes := map[string]bool{}
	having := map[entry.Selector][]int{}
	for i, n := range c.nodes {
		nodes[n.ID.Path()] = true
		for _, s := range n.Selectors {
			having[s] = append(having[s], i)
		}
	}
	slices.Sort(c.given)
	for parent, by := range c.parents {
		_, given := slices.BinarySearch(c.given, maphash.String(c.seed, parent.String()))
		if parent == identity.Server(c.td) || nodes[parent.Path()] || given ||
			slices.ContainsFunc(c.rules, func(r *entry.Rule) bool { return r.Template.Matches(parent) }) {
			continue
		}
		c.remark("parent_missing", "", "delete them, or let the agent attest", "%d entries and rules, such as %s, are for %s, which is no agent and which no entry gives out", by.count, by.by, parent)
	}
	for _, a := range c.aliases {
		matches := len(a.selectors) > 0 && slices.ContainsFunc(having[a.selectors[0]], func(i int) bool {
			return entry.Subset(a.selectors, c.nodes[i].Selectors)
		})
		if !matches {
			c.remark("alias_unmatched", keyOf(kindEntry, a.id), "delete it if its agents will not come back", "no agent has the selectors of this alias")
		}
	}
	for td, by := range c.domains {
		if c.bundles[td.Name()] == nil {
			c.remark("federated_missing", keyOf(kindBundle, td.Name()), "plastron server bundle set, or change the entries",
				"%d entries and rules, such as %s, name the trust domain, and its bundle is not there", by.count, by.by)
		}
	}
}

// checkLog compares the rows with the fold of the log.
func (c *Check) checkLog(at store.Position) {
	const fix = "restore a backup: the engine has lost or changed a row"
	if c.at != at {
		c.fault("log_broken", "", fix, "the log ends at %v, and the rows are of %v", c.at, at)
	}
	slices.Sort(c.seen)
	for key, row := range c.young {
		switch told, ok := c.told[key]; {
		case !ok || told.sum == [32]byte{}:
			c.fault("row_not_in_log", key, fix, "the row is of revision %d, and the log does not put it", row.revision)
		case told != row:
			c.fault("row_not_as_log", key, fix, "the row is of revision %d, and the log has it otherwise, last at %d", row.revision, told.revision)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(c.told)) {
		if _, young := c.young[key]; young {
			continue
		}
		told := c.told[key]
		_, there := slices.BinarySearch(c.seen, maphash.String(c.seed, key))
		switch deleted := told.sum == [32]byte{}; {
		case deleted && there:
			c.fault("row_not_as_log", key, fix, "the row is there, and revision %d deletes it", told.revision)
		case !deleted && there:
			c.fault("row_not_as_log", key, fix, "the row is older than revision %d, which puts it", told.revision)
		case !deleted:
			c.fault("row_lost", key, fix, "the row is not there, and revision %d puts it", told.revision)
		}
	}
}

// KindOf names the kind of a row, for counting.
func KindOf(key string) string {
	k, _ := split(key)
	if k == kindOther {
		return "unknown"
	}
	return strings.Trim(prefixOf(k), "/")
}
