package registry

import (
	"encoding/hex"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// Tx is a transaction in the making. What it reads becomes a condition of its
// commit; what it writes it sees itself. It is used only inside its closure.
//
// What is not there is fault.NotFound. A row that cannot be read, because it is
// broken or of a newer version, is fault.Precondition "row_unreadable": it may
// be deleted, not replaced.
type Tx struct {
	s      *state
	reads  map[string]uint64 // key -> revision
	writes map[string]write
	order  []string // keys of writes, as first written

	confirm bool
}

type write struct {
	value   proto.Message // the kind's message; nil: deleted
	entry   *entry.Entry  // of the key of an entry or a rule, and of that of its content
	deleted bool
}

// plan runs a closure over the state and returns the transaction that it asks
// for: without changes or conditions if there is nothing to commit or to confirm.
// With the closure's error come the conditions on which it says no. plan changes
// nothing.
func plan(s *state, caller string, f func(*Tx) error) (store.Txn, error) {
	tx := &Tx{s: s, reads: make(map[string]uint64), writes: make(map[string]write)}
	err := f(tx)
	txn := store.Txn{Caller: caller}
	if err == nil && len(tx.order) == 0 && !tx.confirm || err != nil && !byState(err) {
		return txn, err
	}
	for key, rev := range tx.reads {
		txn.Conditions = append(txn.Conditions, store.Condition{Key: key, Revision: rev})
	}
	if err != nil {
		return txn, err
	}
	for _, key := range tx.order {
		w := tx.writes[key]
		if w.deleted {
			if s.revision(key) != 0 { // else it was put and deleted in here
				txn.Deletes = append(txn.Deletes, key)
			}
			continue
		}
		format := s.format
		if key == prefixOf(kindFormat) {
			format = oldestFormat // every version has to know what it says
		}
		raw, err := seal(w.value, format)
		if err != nil {
			return store.Txn{}, fault.New(fault.Invalid, "value_invalid", "the value of %q cannot be stored", key).Because(err)
		}
		txn.Puts = append(txn.Puts, store.Put{Key: key, Value: raw})
	}
	return txn, nil
}

// byState tells whether a refusal is about what is stored, which another server
// may have changed a moment ago.
func byState(err error) bool {
	switch fault.KindOf(err) {
	case fault.NotFound, fault.Exists, fault.Conflict:
		return true
	}
	return false
}

// Confirm asks that what was read is compared with the store even if nothing is
// written: for a closure that keeps its refusals to itself.
func (tx *Tx) Confirm() { tx.confirm = true }

// Epoch returns the store's epoch.
func (tx *Tx) Epoch() store.Epoch { return tx.s.position.Epoch }

// Snapshot returns the state before the transaction, for questions about ranges.
// Its answers are advice: they do not become conditions.
func (tx *Tx) Snapshot() *Snapshot { return &Snapshot{tx.s} }

// read notes that a key was read, and returns what this transaction wrote there.
func (tx *Tx) read(key string) (w write, written bool) {
	if w, written = tx.writes[key]; written {
		return w, true
	}
	tx.reads[key] = tx.s.revision(key)
	return write{}, false
}

// readable refuses a row that cannot be read.
func (tx *Tx) readable(key string) error {
	if bad, ok := tx.s.bad[key]; ok {
		return fault.New(fault.Precondition, "row_unreadable", "the stored row %q cannot be read", key).
			Fix("delete it, or use a version that can read it").Because(bad.err)
	}
	return nil
}

func (tx *Tx) write(key string, w write) {
	if _, again := tx.writes[key]; !again {
		tx.order = append(tx.order, key)
	}
	tx.writes[key] = w
}

// get reads a key: the message that this transaction wrote, else the stored
// payload, which decode reads. Both empty: not there.
func (tx *Tx) get(k kind, name, what string) (proto.Message, []byte, error) {
	key := keyOf(k, name)
	w, written := tx.read(key)
	switch {
	case written && !w.deleted:
		return w.value, nil, nil
	case written:
		return nil, nil, notFound(what, name)
	}
	if err := tx.readable(key); err != nil {
		return nil, nil, err
	}
	payload := tx.s.payload(k, name)
	if payload == nil {
		return nil, nil, notFound(what, name)
	}
	return nil, payload, nil
}

// payload returns what is stored under a key, except for entries, or nil.
func (s *state) payload(k kind, name string) []byte {
	if k == kindNode {
		if n := s.nodeNamed(name); n != nil {
			return n.payload
		}
		return nil
	}
	return s.values[k][name].payload
}

// put writes a message over what is stored, keeping what this version does not know of it.
func (tx *Tx) put(k kind, name string, m proto.Message) error {
	key := keyOf(k, name)
	if _, written := tx.read(key); !written {
		if err := tx.readable(key); err != nil {
			return err
		}
	}
	if payload := tx.s.payload(k, name); payload != nil {
		old := m.ProtoReflect().New()
		if err := proto.Unmarshal(payload, old.Interface()); err == nil {
			carry(old, m.ProtoReflect())
		}
	}
	tx.write(key, write{value: m})
	return nil
}

func (tx *Tx) delete(k kind, name, what string) error {
	key := keyOf(k, name)
	w, written := tx.read(key)
	if w.deleted || !written && tx.reads[key] == 0 {
		return notFound(what, name)
	}
	tx.write(key, write{deleted: true})
	return nil
}

func notFound(what, name string) *fault.Error {
	return fault.New(fault.NotFound, what+"_not_found", "there is no %s %q", what, name)
}

// Entry returns the entry with an id.
func (tx *Tx) Entry(id string) (entry.Entry, error) { return tx.grant(kindEntry, id) }

// Rule returns the rule with an id.
func (tx *Tx) Rule(id string) (entry.Entry, error) { return tx.grant(kindRule, id) }

// grant returns an entry or a rule.
func (tx *Tx) grant(k kind, id string) (entry.Entry, error) {
	key := keyOf(k, id)
	w, written := tx.read(key)
	if written {
		if w.deleted {
			return entry.Entry{}, notFound(grantWord(k), id)
		}
		return *w.entry, nil
	}
	if err := tx.readable(key); err != nil {
		return entry.Entry{}, err
	}
	h := tx.s.rows.findIn(tx.s.rows.idsOf(k == kindRule), id)
	if h == 0 {
		return entry.Entry{}, notFound(grantWord(k), id)
	}
	return tx.s.rows.entry(h), nil
}

func grantWord(k kind) string {
	if k == kindRule {
		return "rule"
	}
	return "entry"
}

func grantMessage(e *entry.Entry) proto.Message {
	if e.Rule != nil {
		return ruleMessage(e)
	}
	return entryMessage(e)
}

func kindOf(e *entry.Entry) kind {
	if e.Rule != nil {
		return kindRule
	}
	return kindEntry
}

// EntryByContent returns the entry, or the rule, with a content hash.
func (tx *Tx) EntryByContent(hash [32]byte) (entry.Entry, error) {
	name := hex.EncodeToString(hash[:])
	w, written := tx.read(keyOf(kindContent, name))
	switch {
	case written && !w.deleted:
		return tx.grant(kindOf(w.entry), w.entry.ID)
	case !written:
		if h := tx.s.rows.findContent(hash); h != 0 {
			// The entry itself may have been changed in here since.
			row := tx.s.rows.entry(h)
			if e, err := tx.grant(kindOf(&row), row.ID); err == nil && entry.ContentHash(&e) == hash {
				return e, nil
			}
		}
	}
	return entry.Entry{}, fault.New(fault.NotFound, "entry_not_found", "there is no entry of this content")
}

// PutEntry creates or replaces an entry. Revision is the store's to give. An
// entry of the same content but another id, or a rule of this id, is fault.Exists.
func (tx *Tx) PutEntry(e entry.Entry) error {
	if e.Rule != nil {
		return fault.New(fault.Invalid, "entry_is_rule", "%q is a rule and not an entry", e.ID)
	}
	return tx.putGrant(kindEntry, kindRule, e)
}

// PutRule is PutEntry for a rule.
func (tx *Tx) PutRule(e entry.Entry) error {
	if e.Rule == nil {
		return fault.New(fault.Invalid, "rule_is_entry", "%q is an entry and not a rule", e.ID)
	}
	return tx.putGrant(kindRule, kindEntry, e)
}

func (tx *Tx) putGrant(k, other kind, e entry.Entry) error {
	if err := entry.Validate(tx.s.td, &e, time.Time{}); err != nil {
		return err
	}
	hash := entry.ContentHash(&e)
	if same, err := tx.EntryByContent(hash); err == nil && same.ID != e.ID {
		return fault.New(fault.Exists, grantWord(k)+"_exists", "the %s %q has the same parent, SPIFFE ID and selectors", grantWord(k), same.ID)
	}
	m := grantMessage(&e)
	old, err := tx.grant(k, e.ID)
	if err := tx.checkRights(&old, &e); err != nil {
		return err
	}
	switch {
	case err == nil:
		if was := entry.ContentHash(&old); was != hash {
			tx.dropContent(was)
		}
		if h := tx.s.rows.findIn(tx.s.rows.idsOf(k == kindRule), e.ID); h != 0 {
			m.ProtoReflect().SetUnknown(tx.s.rows.unknown(h))
		}
	case fault.KindOf(err) != fault.NotFound:
		return err
	default: // agents know both by their id alone
		switch _, err := tx.grant(other, e.ID); {
		case err == nil:
			return fault.New(fault.Exists, grantWord(k)+"_id_taken", "the id %q is that of %s", e.ID, [...]string{kindEntry: "an entry", kindRule: "a rule"}[other])
		case fault.KindOf(err) != fault.NotFound:
			return err
		}
	}
	tx.write(keyOf(k, e.ID), write{value: m, entry: &e})
	key := keyOf(kindContent, hex.EncodeToString(hash[:]))
	if w, written := tx.writes[key]; written && w.deleted || !written && !tx.s.owns(hash, e.ID) {
		tx.write(key, write{value: &statev1.EntryContent{EntryId: e.ID}, entry: &e})
	}
	return nil
}

// checkRights refuses new rights over servers for an ID that a rule can make: the
// rights follow from the ID alone. was is the entry before, or zero.
func (tx *Tx) checkRights(was, is *entry.Entry) error {
	if !is.Admin && !is.Downstream || was.SPIFFEID == is.SPIFFEID && was.Admin == is.Admin && was.Downstream == is.Downstream {
		return nil
	}
	for r := range tx.Snapshot().Rules("") {
		if r.Rule.Template.Matches(is.SPIFFEID) {
			return fault.New(fault.Invalid, "entry_under_rule", "the rule %q can give out %q as well, so the entry cannot be admin or downstream", r.ID, is.SPIFFEID).
				Fix("use an ID that no rule gives out")
		}
	}
	return nil
}

// owns reports whether the stored content key stands for this entry.
func (s *state) owns(hash [32]byte, id string) bool {
	h := s.rows.findContent(hash)
	return h != 0 && s.rows.at(h).contentRevision != 0 && s.rows.id(h) == id
}

// DeleteEntry deletes an entry.
func (tx *Tx) DeleteEntry(id string) error { return tx.deleteGrant(kindEntry, id) }

// DeleteRule deletes a rule.
func (tx *Tx) DeleteRule(id string) error { return tx.deleteGrant(kindRule, id) }

func (tx *Tx) deleteGrant(k kind, id string) error {
	old, err := tx.grant(k, id)
	if err == nil {
		tx.dropContent(entry.ContentHash(&old))
	} else if fault.ReasonOf(err) != "row_unreadable" {
		return err
	}
	tx.write(keyOf(k, id), write{deleted: true})
	return nil
}

func (tx *Tx) dropContent(hash [32]byte) {
	key := keyOf(kindContent, hex.EncodeToString(hash[:]))
	if w, written := tx.read(key); written && !w.deleted || tx.reads[key] != 0 {
		tx.write(key, write{deleted: true})
	}
}

// Node returns the node with an agent ID.
func (tx *Tx) Node(id spiffeid.ID) (Node, error) {
	name := nodeName(id.Path())
	m, payload, err := tx.get(kindNode, name, "node")
	if fault.KindOf(err) == fault.NotFound {
		return Node{}, notFound("node", id.String()) // by the name that the caller knows
	}
	if err != nil {
		return Node{}, err
	}
	if m != nil {
		payload = marshalled(m)
	}
	return readNode(tx.s.td, tx.Epoch(), name, payload)
}

// PutNode creates or replaces a node.
func (tx *Tx) PutNode(n Node) error {
	if err := checkNode(tx.s.td, &n); err != nil {
		return err
	}
	m, epoch := nodeMessage(&n), tx.Epoch()
	m.Epoch = epoch[:]
	return tx.put(kindNode, nodeName(n.ID.Path()), m)
}

// DeleteNode deletes a node; its selectors and its place in aliases go with it.
func (tx *Tx) DeleteNode(id spiffeid.ID) error {
	return tx.delete(kindNode, nodeName(id.Path()), "node")
}

// Token returns the join token with a hash.
func (tx *Tx) Token(hash []byte) (Token, error) {
	m, payload, err := tx.get(kindToken, hex.EncodeToString(hash), "token")
	if err != nil {
		return Token{}, err
	}
	if m != nil {
		payload = marshalled(m)
	}
	return readToken(hash, payload)
}

// PutToken creates or replaces a join token.
func (tx *Tx) PutToken(t Token) error {
	if len(t.Hash) == 0 {
		return fault.New(fault.Invalid, "token_invalid", "the token has no hash")
	}
	return tx.put(kindToken, hex.EncodeToString(t.Hash), tokenMessage(&t))
}

// DeleteToken deletes a join token.
func (tx *Tx) DeleteToken(hash []byte) error {
	return tx.delete(kindToken, hex.EncodeToString(hash), "token")
}

// Bundle returns the bundle of a trust domain.
func (tx *Tx) Bundle(td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	m, payload, err := tx.get(kindBundle, td.Name(), "bundle")
	if err != nil {
		return nil, err
	}
	if m != nil {
		payload = marshalled(m)
	}
	return readBundle(td.Name(), payload)
}

// PutBundle creates or replaces a bundle. Its sequence never goes back (R75).
func (tx *Tx) PutBundle(b *bundle.Bundle) error {
	name := b.TrustDomain.Name()
	if _, err := identity.ParseTrustDomain(name); err != nil {
		return err
	}
	old, err := tx.Bundle(b.TrustDomain)
	if err == nil && b.Sequence < old.Sequence {
		return fault.New(fault.Conflict, "bundle_sequence", "the bundle of %q has sequence %d, which is below the stored %d", name, b.Sequence, old.Sequence)
	}
	return tx.put(kindBundle, name, bundleMessage(b))
}

// DeleteBundle deletes the bundle of a trust domain.
func (tx *Tx) DeleteBundle(td spiffeid.TrustDomain) error {
	return tx.delete(kindBundle, td.Name(), "bundle")
}

// Authority returns the signing keys of a server, of one kind.
func (tx *Tx) Authority(server, what string) (Authority, error) {
	name := authorityName(server, what)
	m, payload, err := tx.get(kindAuthority, name, "authority")
	if err != nil {
		return Authority{}, err
	}
	if m != nil {
		payload = marshalled(m)
	}
	return readAuthority(name, payload)
}

// PutAuthority creates or replaces the signing keys of a server, of one kind.
func (tx *Tx) PutAuthority(a Authority) error {
	if a.Server == "" || a.Kind == "" {
		return fault.New(fault.Invalid, "authority_invalid", "the authority names no server or no kind")
	}
	return tx.put(kindAuthority, authorityName(a.Server, a.Kind), authorityMessage(&a))
}

// DeleteAuthority deletes the signing keys of a server, of one kind.
func (tx *Tx) DeleteAuthority(server, what string) error {
	return tx.delete(kindAuthority, authorityName(server, what), "authority")
}

// PutDownstream creates or replaces the row of an authority below ours.
func (tx *Tx) PutDownstream(d Downstream) error {
	if d.Serial == "" || d.NotAfter.IsZero() {
		return fault.New(fault.Invalid, "downstream_invalid", "the downstream authority has no serial number or no end")
	}
	return tx.put(kindDownstream, d.Serial, downstreamMessage(&d))
}

// DeleteDownstream deletes the row of an authority below ours.
func (tx *Tx) DeleteDownstream(serial string) error {
	return tx.delete(kindDownstream, serial, "downstream authority")
}

// Server returns the row of a server.
func (tx *Tx) Server(id string) (Server, error) {
	m, payload, err := tx.get(kindServer, id, "server")
	if err != nil {
		return Server{}, err
	}
	if m != nil {
		payload = marshalled(m)
	}
	return readServer(tx.s.td, payload)
}

// PutServer creates or replaces the row of a server.
func (tx *Tx) PutServer(v Server) error {
	if v.ID == "" {
		return fault.New(fault.Invalid, "server_invalid", "the server has no id")
	}
	return tx.put(kindServer, v.ID, serverMessage(tx.s.td, &v))
}

// DeleteServer deletes the row of a server that will not come back, and its roster.
func (tx *Tx) DeleteServer(id string) error {
	if err := tx.delete(kindRoster, id, "roster"); err != nil && fault.KindOf(err) != fault.NotFound {
		return err
	}
	return tx.delete(kindServer, id, "server")
}

// marshalled returns a message written in this transaction as it will be stored.
func marshalled(m proto.Message) []byte {
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil // plan refuses the same message with its key
	}
	return raw
}
