package registry

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"iter"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// rows holds all entries and rules without a pointer for each: one is a handle
// into arrays, its strings are interned or in the arena. Handle 0 is none.
type rows struct {
	td      spiffeid.TrustDomain
	arena   *arena
	paths   texts // SPIFFE ID paths
	words   texts // hints, owners, and sets of federated trust domains as joined names
	sets    sets
	named   []uint32 // by path symbol: head of the entries with this SPIFFE ID
	blocks  [][]row
	next    uint32
	free    uint32 // list by nextNamed
	seed    maphash.Seed
	content table // by content hash
	entries ids
	rules   ids
}

// ids finds the rows of one kind by their ids. No entry and rule have one id,
// but a broken store may say otherwise, and then neither hides the other.
type ids struct {
	table table
	order order
	n     int
}

type row struct {
	revision        uint64
	contentRevision uint64   // of the key that makes the content unique; 0: there is none
	sum             [32]byte // SHA-256 of the body that agents get
	contentHash     [32]byte // of parent, SPIFFE ID and selectors (entry.ContentHash)
	created         int64    // Unix seconds
	expires         int64    // Unix seconds; 0: never
	data            ref      // id, then a statev1.Entry or a statev1.Rule with what has no column
	restSize        uint32
	x509TTL, jwtTTL int32
	path, parent    uint32 // path symbols
	set             uint32
	federates       uint32 // word symbol; 0: none
	hint            uint32 // word symbol; 0: none
	owner           uint32 // word symbol; 0: none

	nextNamed, prevNamed   uint32 // entries with the same SPIFFE ID
	nextChild, prevChild   uint32 // entries with the same parent; kept by reach
	nextShared, prevShared uint32 // entries with the same selectors

	idSize uint8
	flags  flag
}

type flag uint8

const (
	flagAdmin flag = 1 << iota
	flagDownstream
	flagStoreSVID
	flagNoPrefetch
	flagJTI
	flagAlias
	flagRule
)

const rowBlock = 1024

func newRows(td spiffeid.TrustDomain) *rows {
	a := &arena{}
	return &rows{td: td, arena: a, paths: newTexts(a), words: newTexts(a), sets: newSets(a), seed: maphash.MakeSeed(), next: 1}
}

func (r *rows) at(h uint32) *row { return &r.blocks[h/rowBlock][h%rowBlock] }

func (r *rows) idBytes(h uint32) []byte {
	row := r.at(h)
	return r.arena.at(row.data, int(row.idSize))
}

func (r *rows) id(h uint32) string { return string(r.idBytes(h)) }

// find returns the entry with this id, or 0.
func (r *rows) find(id string) uint32 {
	return r.findIn(&r.entries, id)
}

// findRule returns the rule with this id, or 0.
func (r *rows) findRule(id string) uint32 {
	return r.findIn(&r.rules, id)
}

// findGrant returns the entry or the rule with this id, or 0.
func (r *rows) findGrant(id string) uint32 {
	if h := r.find(id); h != 0 {
		return h
	}
	return r.findRule(id)
}

func (r *rows) findIn(in *ids, id string) uint32 {
	return in.table.find(maphash.String(r.seed, id), func(h uint32) bool { return string(r.idBytes(h)) == id })
}

// idsOf returns the index that holds rules or entries.
func (r *rows) idsOf(rule bool) *ids {
	if rule {
		return &r.rules
	}
	return &r.entries
}

func (r *rows) isRule(h uint32) bool { return r.at(h).flags&flagRule != 0 }

// findContent returns an entry with this content, or 0. Should a broken store
// hold several, it is the one that the content key belongs to.
func (r *rows) findContent(hash [32]byte) uint32 {
	any := uint32(0)
	holder := r.content.find(contentKey(hash), func(h uint32) bool {
		if r.at(h).contentHash != hash {
			return false
		}
		any = h
		return r.at(h).contentRevision != 0
	})
	if holder != 0 {
		return holder
	}
	return any
}

func contentKey(hash [32]byte) uint64 { return binary.BigEndian.Uint64(hash[:]) }

// put stores an entry and returns its handle: a new one, or the one that it had.
// content is the hash of the entry's content and sum that of its body; unknown
// are fields that a newer version wrote.
func (r *rows) put(e *entry.Entry, unknown []byte, content, sum [32]byte) uint32 {
	in := r.idsOf(e.Rule != nil)
	h := r.findIn(in, e.ID)
	fresh := h == 0
	if fresh {
		h = r.allocate()
	} else {
		r.clear(h)
	}
	rest := ""
	if e.Rule == nil && (len(e.DNSNames) > 0 || len(unknown) > 0) {
		m := &statev1.Entry{DnsNames: e.DNSNames}
		m.ProtoReflect().SetUnknown(unknown)
		b, err := proto.Marshal(m)
		if err != nil {
			panic("registry: marshal what was unmarshalled: " + err.Error())
		}
		rest = string(b)
	}
	if e.Rule != nil {
		rest = ruleRest(e.Rule, unknown)
	}
	*r.at(h) = row{
		revision: e.Revision, sum: sum, created: unixOf(e.CreatedAt), expires: unixOf(e.ExpiresAt),
		data: r.arena.put(e.ID, rest), idSize: uint8(len(e.ID)), restSize: uint32(len(rest)),
		x509TTL: int32(e.X509TTL / time.Second), jwtTTL: int32(e.JWTTL / time.Second),
		path: r.paths.intern(e.SPIFFEID.Path()), parent: r.paths.intern(e.ParentID.Path()), set: r.sets.intern(e.Selectors),
		federates: r.word(joinDomains(e.FederatesWith)), hint: r.word(e.Hint), owner: r.word(e.Owner),
		contentHash: content, flags: flagsOf(e),
	}
	row := r.at(h)
	for int(row.path) >= len(r.named) {
		r.named = append(r.named, 0)
	}
	row.nextNamed = r.named[row.path]
	if row.nextNamed != 0 {
		r.at(row.nextNamed).prevNamed = h
	}
	r.named[row.path] = h
	shared := &r.sets.rows[row.set].rows
	row.nextShared = *shared
	if row.nextShared != 0 {
		r.at(row.nextShared).prevShared = h
	}
	*shared = h
	r.content.insert(contentKey(row.contentHash), h)
	if fresh {
		in.table.insert(maphash.String(r.seed, e.ID), h)
		in.order.insert(h, r.compareID(e.ID))
		in.n++
	}
	return h
}

// drop forgets an entry.
func (r *rows) drop(h uint32) {
	id, in := r.id(h), r.idsOf(r.isRule(h))
	in.table.remove(maphash.String(r.seed, id), h)
	in.order.remove(r.compareID(id))
	in.n--
	r.clear(h)
	*r.at(h) = row{nextNamed: r.free}
	r.free = h
}

// clear takes an entry out of everything but the indexes by id.
func (r *rows) clear(h uint32) {
	row := r.at(h)
	r.content.remove(contentKey(row.contentHash), h)
	if row.nextNamed != 0 {
		r.at(row.nextNamed).prevNamed = row.prevNamed
	}
	if row.prevNamed != 0 {
		r.at(row.prevNamed).nextNamed = row.nextNamed
	} else {
		r.named[row.path] = row.nextNamed
	}
	if row.nextShared != 0 {
		r.at(row.nextShared).prevShared = row.prevShared
	}
	if row.prevShared != 0 {
		r.at(row.prevShared).nextShared = row.nextShared
	} else {
		r.sets.rows[row.set].rows = row.nextShared
	}
	r.paths.release(row.path)
	r.paths.release(row.parent)
	r.sets.release(row.set)
	for _, w := range []uint32{row.federates, row.hint, row.owner} {
		if w != 0 {
			r.words.release(w)
		}
	}
	r.arena.drop(row.data, int(row.idSize)+int(row.restSize))
}

func (r *rows) allocate() uint32 {
	if h := r.free; h != 0 {
		r.free = r.at(h).nextNamed
		return h
	}
	h := r.next
	r.next++
	if int(h/rowBlock) == len(r.blocks) {
		r.blocks = append(r.blocks, make([]row, rowBlock))
	}
	return h
}

func (r *rows) word(s string) uint32 {
	if s == "" {
		return 0
	}
	return r.words.intern(s)
}

func (r *rows) wordText(sym uint32) string {
	if sym == 0 {
		return ""
	}
	return r.words.string(sym)
}

func (r *rows) compareID(id string) func(uint32) int {
	want := []byte(id)
	return func(h uint32) int { return bytes.Compare(r.idBytes(h), want) }
}

// entry builds the entry of a handle.
func (r *rows) entry(h uint32) entry.Entry {
	row := r.at(h)
	e := entry.Entry{
		ID: r.id(h), Revision: row.revision,
		ParentID: r.spiffeID(row.parent), Selectors: r.sets.selectors(row.set),
		X509TTL: time.Duration(row.x509TTL) * time.Second, JWTTL: time.Duration(row.jwtTTL) * time.Second,
		FederatesWith: r.domains(row.federates), Hint: r.wordText(row.hint),
		Admin: row.flags&flagAdmin != 0, Downstream: row.flags&flagDownstream != 0, StoreSVID: row.flags&flagStoreSVID != 0,
		DisableX509Prefetch: row.flags&flagNoPrefetch != 0, JWTIncludeJTI: row.flags&flagJTI != 0,
		CreatedAt: timeOf(row.created), ExpiresAt: timeOf(row.expires), Owner: r.wordText(row.owner),
	}
	if row.flags&flagRule != 0 {
		e.Rule = r.rule(h)
		return e
	}
	e.SPIFFEID = r.spiffeID(row.path)
	if row.restSize > 0 {
		e.DNSNames = r.rest(h).DnsNames
	}
	return e
}

// rest returns what of an entry has no column; unknown fields are in it.
func (r *rows) rest(h uint32) *statev1.Entry {
	m := &statev1.Entry{}
	r.readRest(h, m)
	return m
}

// ruleRest is what a rule has no column for.
func ruleRest(rule *entry.Rule, unknown []byte) string {
	m := &statev1.Rule{IdTemplate: rule.Template.String(), IdPrefix: rule.Prefix, Trust: rule.Trust()}
	m.ProtoReflect().SetUnknown(unknown)
	b, err := proto.Marshal(m)
	if err != nil {
		panic("registry: marshal what was unmarshalled: " + err.Error())
	}
	return string(b)
}

// rule builds what makes a row a rule.
func (r *rows) rule(h uint32) *entry.Rule {
	m := &statev1.Rule{}
	r.readRest(h, m)
	rule, err := entry.ParseRule(r.td, m.IdTemplate, m.IdPrefix, m.Trust)
	if err != nil {
		panic("registry: read a rule that was checked on its way in: " + err.Error())
	}
	return rule
}

// unknown returns the fields of a row that a newer version wrote.
func (r *rows) unknown(h uint32) []byte {
	if r.isRule(h) {
		m := &statev1.Rule{}
		r.readRest(h, m)
		return m.ProtoReflect().GetUnknown()
	}
	return r.rest(h).ProtoReflect().GetUnknown()
}

func (r *rows) readRest(h uint32, m proto.Message) {
	row := r.at(h)
	if row.restSize == 0 {
		return
	}
	if err := proto.Unmarshal(r.arena.at(row.data, int(row.idSize)+int(row.restSize))[row.idSize:], m); err != nil {
		panic("registry: unmarshal what was marshalled: " + err.Error())
	}
}

func (r *rows) spiffeID(path uint32) spiffeid.ID {
	return spiffeid.RequireFromPath(r.td, r.paths.string(path)) // it was checked on its way in
}

// domains reads a word of joined names.
func (r *rows) domains(word uint32) []spiffeid.TrustDomain {
	if word == 0 {
		return nil
	}
	var tds []spiffeid.TrustDomain
	for name := range strings.SplitSeq(r.words.string(word), ",") {
		tds = append(tds, spiffeid.RequireTrustDomainFromString(name))
	}
	return tds
}

// after yields the rows of one kind whose id is greater, in the order of ids.
func (r *rows) after(in *ids, id string) iter.Seq[uint32] {
	return in.order.from(func(h uint32) int {
		if string(r.idBytes(h)) > id {
			return 1
		}
		return -1
	})
}

// all yields the entries and rules in no order.
func (r *rows) all() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for h := uint32(1); h < r.next; h++ {
			if r.at(h).path != 0 && !yield(h) {
				return
			}
		}
	}
}

// withPath yields the entries that have a SPIFFE ID; rules have the empty path.
func (r *rows) withPath(path uint32) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if int(path) >= len(r.named) {
			return
		}
		for h := r.named[path]; h != 0; h = r.at(h).nextNamed {
			if !yield(h) {
				return
			}
		}
	}
}

// withSet yields the entries that have exactly these selectors.
func (r *rows) withSet(set uint32) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for h := r.sets.rows[set].rows; h != 0; h = r.at(h).nextShared {
			if !yield(h) {
				return
			}
		}
	}
}

func joinDomains(tds []spiffeid.TrustDomain) string {
	names := make([]string, len(tds))
	for i, td := range tds {
		names[i] = td.Name()
	}
	return strings.Join(names, ",")
}

func flagsOf(e *entry.Entry) flag {
	var f flag
	for _, bit := range []struct {
		set  bool
		flag flag
	}{{e.Admin, flagAdmin}, {e.Downstream, flagDownstream}, {e.StoreSVID, flagStoreSVID},
		{e.DisableX509Prefetch, flagNoPrefetch}, {e.JWTIncludeJTI, flagJTI}, {e.Alias(), flagAlias}, {e.Rule != nil, flagRule}} {
		if bit.set {
			f |= bit.flag
		}
	}
	return f
}

// unixOf and timeOf write a zero time as 0.
func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func timeOf(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0).UTC()
}
