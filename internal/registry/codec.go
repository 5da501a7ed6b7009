package registry

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// seal wraps a message into the envelope in which values are stored.
func seal(m proto.Message, format int) ([]byte, error) {
	payload, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal a value: %w", err)
	}
	return proto.Marshal(&statev1.Envelope{Format: uint32(format), Reader: uint32(readerOf(format)), Payload: payload})
}

// unseal returns the payload of a stored value. Its text says why it cannot.
func unseal(value []byte) ([]byte, error) {
	var env statev1.Envelope
	if err := proto.Unmarshal(value, &env); err != nil {
		return nil, fmt.Errorf("envelope: %w", err)
	}
	if env.Format == 0 || env.Reader == 0 {
		return nil, fmt.Errorf("the value has no envelope")
	}
	if env.Reader > Format {
		return nil, fmt.Errorf("the value is of format %d, which only readers of format %d understand; this is %d", env.Format, env.Reader, Format)
	}
	return env.Payload, nil
}

// carry copies into a message what its stored predecessor held and this version
// does not know, so that a newer version finds it again. Elements of a list are
// the same if their first field is.
func carry(from, to protoreflect.Message) {
	if unknown := from.GetUnknown(); len(unknown) > 0 {
		to.SetUnknown(slices.Clone(unknown))
	}
	from.Range(func(fd protoreflect.FieldDescriptor, old protoreflect.Value) bool {
		if fd.Kind() != protoreflect.MessageKind || !to.Has(fd) {
			return true
		}
		if !fd.IsList() {
			carry(old.Message(), to.Get(fd).Message())
			return true
		}
		identity := fd.Message().Fields().ByNumber(1)
		for i := range old.List().Len() {
			was := old.List().Get(i).Message()
			for j := range to.Get(fd).List().Len() {
				if is := to.Get(fd).List().Get(j).Message(); is.Get(identity).Equal(was.Get(identity)) && len(is.GetUnknown()) == 0 {
					carry(was, is)
					break
				}
			}
		}
		return true
	})
}

func entryMessage(e *entry.Entry) *statev1.Entry {
	return &statev1.Entry{
		Id: e.ID, SpiffeId: e.SPIFFEID.String(), ParentId: e.ParentID.String(), Selectors: selectorMessages(e.Selectors),
		X509SvidTtl: int32(e.X509TTL / time.Second), JwtSvidTtl: int32(e.JWTTL / time.Second),
		FederatesWith: names(e.FederatesWith), DnsNames: e.DNSNames, Hint: e.Hint,
		Admin: e.Admin, Downstream: e.Downstream, StoreSvid: e.StoreSVID,
		DisableX509SvidPrefetch: e.DisableX509Prefetch, JwtSvidIncludeJti: e.JWTIncludeJTI,
		CreatedAt: unixOf(e.CreatedAt), ExpiresAt: unixOf(e.ExpiresAt), Owner: e.Owner,
	}
}

// readEntry returns a stored entry and the fields of it that a newer version
// wrote. Every rule is checked again: a row in the store proves nothing (R16, R79).
func readEntry(td spiffeid.TrustDomain, name string, payload []byte) (entry.Entry, []byte, error) {
	var m statev1.Entry
	if err := proto.Unmarshal(payload, &m); err != nil {
		return entry.Entry{}, nil, err
	}
	if m.Id != name {
		return entry.Entry{}, nil, fmt.Errorf("the entry says that it is %q", m.Id)
	}
	id, err := identity.Parse(m.SpiffeId)
	if err != nil {
		return entry.Entry{}, nil, err
	}
	parent, err := identity.Parse(m.ParentId)
	if err != nil {
		return entry.Entry{}, nil, err
	}
	e := entry.Entry{
		ID: m.Id, SPIFFEID: id, ParentID: parent, Selectors: selectorsOf(m.Selectors),
		X509TTL: time.Duration(m.X509SvidTtl) * time.Second, JWTTL: time.Duration(m.JwtSvidTtl) * time.Second,
		DNSNames: m.DnsNames, Hint: m.Hint, Admin: m.Admin, Downstream: m.Downstream, StoreSVID: m.StoreSvid,
		DisableX509Prefetch: m.DisableX509SvidPrefetch, JWTIncludeJTI: m.JwtSvidIncludeJti,
		CreatedAt: timeOf(m.CreatedAt), ExpiresAt: timeOf(m.ExpiresAt), Owner: m.Owner,
	}
	if e.FederatesWith, err = domainsOf(m.FederatesWith); err != nil {
		return entry.Entry{}, nil, err
	}
	return e, m.ProtoReflect().GetUnknown(), entry.Validate(td, &e, time.Time{})
}

func ruleMessage(e *entry.Entry) *statev1.Rule {
	return &statev1.Rule{
		Id: e.ID, IdTemplate: e.Rule.Template.String(), IdPrefix: e.Rule.Prefix, Trust: e.Rule.Trust(),
		ParentId: e.ParentID.String(), Selectors: selectorMessages(e.Selectors),
		X509SvidTtl: int32(e.X509TTL / time.Second), JwtSvidTtl: int32(e.JWTTL / time.Second),
		FederatesWith: names(e.FederatesWith), Hint: e.Hint, CreatedAt: unixOf(e.CreatedAt), ExpiresAt: unixOf(e.ExpiresAt),
		Owner: e.Owner,
	}
}

// readRule is readEntry for a rule.
func readRule(td spiffeid.TrustDomain, name string, payload []byte) (entry.Entry, []byte, error) {
	var m statev1.Rule
	if err := proto.Unmarshal(payload, &m); err != nil {
		return entry.Entry{}, nil, err
	}
	if m.Id != name {
		return entry.Entry{}, nil, fmt.Errorf("the rule says that it is %q", m.Id)
	}
	parent, err := identity.Parse(m.ParentId)
	if err != nil {
		return entry.Entry{}, nil, err
	}
	r, err := entry.ParseRule(td, m.IdTemplate, m.IdPrefix, m.Trust)
	if err != nil {
		return entry.Entry{}, nil, err
	}
	e := entry.Entry{
		ID: m.Id, ParentID: parent, Rule: r, Selectors: selectorsOf(m.Selectors),
		X509TTL: time.Duration(m.X509SvidTtl) * time.Second, JWTTL: time.Duration(m.JwtSvidTtl) * time.Second,
		Hint: m.Hint, CreatedAt: timeOf(m.CreatedAt), ExpiresAt: timeOf(m.ExpiresAt), Owner: m.Owner,
	}
	if e.FederatesWith, err = domainsOf(m.FederatesWith); err != nil {
		return entry.Entry{}, nil, err
	}
	return e, m.ProtoReflect().GetUnknown(), entry.Validate(td, &e, time.Time{})
}

func domainsOf(names []string) (tds []spiffeid.TrustDomain, err error) {
	for _, name := range names {
		td, err := identity.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		tds = append(tds, td)
	}
	return tds, nil
}

func nodeMessage(n *Node) *statev1.Node {
	return &statev1.Node{
		Id: n.ID.String(), AttestationType: n.AttestationType, Selectors: selectorMessages(n.Selectors),
		Current: credentialMessage(n.Current), Next: credentialMessage(n.Next), Lineage: n.Lineage,
		Banned: n.Banned, CanReattest: n.CanReattest, AgentVersion: n.AgentVersion,
		AttestedAt: unixOf(n.AttestedAt), Evidence: n.Evidence, Follows: n.Follows,
	}
}

// readNode reads a node as it is to be seen in an epoch of the store.
func readNode(td spiffeid.TrustDomain, epoch store.Epoch, name string, payload []byte) (Node, error) {
	var m statev1.Node
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Node{}, err
	}
	id, err := identity.ParseMember(td, m.Id)
	if err != nil {
		return Node{}, err
	}
	n := Node{
		ID: id, AttestationType: m.AttestationType, Selectors: selectorsOf(m.Selectors),
		Current: credentialOf(m.Current), Next: credentialOf(m.Next), Lineage: m.Lineage,
		Banned: m.Banned, CanReattest: m.CanReattest, AgentVersion: m.AgentVersion,
		AttestedAt: timeOf(m.AttestedAt), Evidence: m.Evidence, Follows: m.Follows,
	}
	n.Restored = len(m.Epoch) > 0 && !bytes.Equal(m.Epoch, epoch[:])
	if nodeName(id.Path()) != name {
		return Node{}, fmt.Errorf("the node says that it is %q", m.Id)
	}
	return n, checkNode(td, &n)
}

// checkNode brings a node into its normal form and checks it.
func checkNode(td spiffeid.TrustDomain, n *Node) error {
	if err := identity.CheckMember(td, n.ID); err != nil {
		return err
	}
	if !identity.IsAgent(n.ID) {
		return fault.New(fault.Invalid, "agent_id_invalid", "%q is not an agent's ID", n.ID)
	}
	if len(n.Selectors) == 0 {
		return nil
	}
	sels, err := entry.NormalizeSelectors(n.Selectors)
	n.Selectors = sels
	return err
}

func tokenMessage(t *Token) *statev1.Token {
	return &statev1.Token{ExpiresAt: unixOf(t.ExpiresAt), Consumer: t.Consumer, NodeId: t.NodeID, Epoch: t.Epoch[:]}
}

func readToken(hash []byte, payload []byte) (Token, error) {
	var m statev1.Token
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Token{}, err
	}
	t := Token{Hash: hash, ExpiresAt: timeOf(m.ExpiresAt), Consumer: m.Consumer, NodeID: m.NodeId}
	if len(m.Epoch) != len(t.Epoch) {
		return Token{}, fmt.Errorf("the epoch has %d bytes", len(m.Epoch))
	}
	t.Epoch = store.Epoch(m.Epoch)
	return t, nil
}

func bundleMessage(b *bundle.Bundle) *statev1.Bundle {
	m := &statev1.Bundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, a := range b.X509 {
		m.X509Authorities = append(m.X509Authorities, &statev1.X509Authority{Asn1: a.ASN1, Tainted: a.Tainted})
	}
	for _, a := range b.JWT {
		m.JwtAuthorities = append(m.JwtAuthorities, &statev1.JWTAuthority{
			KeyId: a.KeyID, PublicKey: a.PublicKey, ExpiresAt: unixOf(a.ExpiresAt), Tainted: a.Tainted})
	}
	for _, r := range b.Revoked {
		m.Revoked = append(m.Revoked, &statev1.Revocation{KeyHash: r.KeyHash[:], Until: unixOf(r.Until)})
	}
	return m
}

func readBundle(name string, payload []byte) (*bundle.Bundle, error) {
	var m statev1.Bundle
	if err := proto.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	td, err := identity.ParseTrustDomain(m.TrustDomain)
	if err != nil {
		return nil, err
	}
	if td.Name() != name {
		return nil, fmt.Errorf("the bundle says that it is of %q", td.Name())
	}
	b := &bundle.Bundle{TrustDomain: td, Sequence: m.Sequence, RefreshHint: time.Duration(m.RefreshHint) * time.Second}
	for _, a := range m.X509Authorities {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: a.Asn1, Tainted: a.Tainted})
	}
	for _, a := range m.JwtAuthorities {
		b.JWT = append(b.JWT, bundle.JWTAuthority{
			KeyID: a.KeyId, PublicKey: a.PublicKey, ExpiresAt: timeOf(a.ExpiresAt), Tainted: a.Tainted})
	}
	for _, r := range m.Revoked {
		if len(r.KeyHash) != sha256.Size {
			return nil, fmt.Errorf("a revoked key's hash has %d bytes", len(r.KeyHash))
		}
		b.Revoked = append(b.Revoked, bundle.Revocation{KeyHash: [sha256.Size]byte(r.KeyHash), Until: timeOf(r.Until)})
	}
	return b, nil
}

func authorityMessage(a *Authority) *statev1.Authority {
	m := &statev1.Authority{Kind: a.Kind}
	for _, s := range a.Slots {
		m.Slots = append(m.Slots, &statev1.Slot{
			Name: s.Name, State: statev1.Slot_State(s.State), AuthorityId: s.AuthorityID, KeyId: s.KeyID,
			NotBefore: unixOf(s.NotBefore), NotAfter: unixOf(s.NotAfter), Certificate: s.Certificate, PublicKey: s.PublicKey,
			PublishedAt: unixOf(s.PublishedAt), LastExpiry: unixOf(s.LastExpiry),
			ReadyAt: unixOf(s.ReadyAt), Unready: s.Unready, ActivatedAt: unixOf(s.ActivatedAt), RetiredAt: unixOf(s.RetiredAt),
			Upstream: s.Upstream, Chain: s.Chain, Root: s.Root, Given: s.Given,
		})
	}
	return m
}

func readAuthority(name string, payload []byte) (Authority, error) {
	var m statev1.Authority
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Authority{}, err
	}
	server := name[:max(0, len(name)-len(m.Kind)-1)]
	if authorityName(server, m.Kind) != name {
		return Authority{}, fmt.Errorf("the authority says that it is of kind %q", m.Kind)
	}
	a := Authority{Server: server, Kind: m.Kind}
	for _, s := range m.Slots {
		if s.State < 0 || s.State > statev1.Slot_STATE_OLD {
			return Authority{}, fmt.Errorf("slot %q is in the unknown state %d", s.Name, s.State)
		}
		a.Slots = append(a.Slots, Slot{
			Name: s.Name, State: SlotState(s.State), AuthorityID: s.AuthorityId, KeyID: s.KeyId,
			NotBefore: timeOf(s.NotBefore), NotAfter: timeOf(s.NotAfter), Certificate: s.Certificate, PublicKey: s.PublicKey,
			PublishedAt: timeOf(s.PublishedAt), LastExpiry: timeOf(s.LastExpiry),
			ReadyAt: timeOf(s.ReadyAt), Unready: s.Unready, ActivatedAt: timeOf(s.ActivatedAt), RetiredAt: timeOf(s.RetiredAt),
			Upstream: s.Upstream, Chain: s.Chain, Root: s.Root, Given: s.Given,
		})
	}
	return a, nil
}

func downstreamMessage(d *Downstream) *statev1.Downstream {
	return &statev1.Downstream{
		Caller: d.Caller, EntryId: d.EntryID, Server: d.Server, Issuer: d.Issuer, AuthorityId: d.AuthorityID, KeyHash: d.KeyHash, NotAfter: unixOf(d.NotAfter),
	}
}

func readDownstream(serial string, payload []byte) (Downstream, error) {
	var m statev1.Downstream
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Downstream{}, err
	}
	return Downstream{
		Serial: serial, Caller: m.Caller, EntryID: m.EntryId, Server: m.Server, Issuer: m.Issuer, AuthorityID: m.AuthorityId,
		KeyHash: m.KeyHash, NotAfter: timeOf(m.NotAfter),
	}, nil
}

func serverMessage(td spiffeid.TrustDomain, s *Server) *statev1.Server {
	m := &statev1.Server{
		Id: s.ID, Version: s.Version, StartedAt: unixOf(s.StartedAt), TrustDomain: td.Name(),
		Instance: s.Instance, Beat: s.Beat, BeatAtMs: millisOf(s.BeatAt), LeaseMs: s.Lease.Milliseconds(), Stopped: s.Stopped,
		UpMs: s.Up.Milliseconds(), Reads: uint32(s.Reads), Revision: s.Position.Revision, Addresses: s.Addresses,
		Agents: uint32(s.Agents), Acknowledged: s.Acknowledged,
		Telling: uint32(s.Ends.Telling), FirstX509: endMessage(s.Ends.X509), FirstJwt: endMessage(s.Ends.JWT), Asks: s.Asks,
	}
	if s.Position != (store.Position{}) {
		m.Epoch, m.Digest = s.Position.Epoch[:], s.Digest[:]
	}
	for _, l := range s.Laggards {
		m.Laggards = append(m.Laggards, &statev1.Laggard{AgentId: l.Agent, Acknowledged: l.Acknowledged})
	}
	if p := s.Place; p != (Place{}) {
		m.Place = &statev1.Place{Host: p.Host, DataDir: p.DataDir, BootId: p.BootID, Device: p.Device, Inode: p.Inode}
	}
	return m
}

func endMessage(e End) *statev1.End {
	if e.At.IsZero() {
		return nil
	}
	return &statev1.End{SpiffeId: e.ID, AgentId: e.Agent, AtMs: e.At.UnixMilli()}
}

func readEnd(m *statev1.End) End {
	return End{ID: m.GetSpiffeId(), Agent: m.GetAgentId(), At: timeOfMillis(m.GetAtMs())}
}

func millisOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func timeOfMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// Owner returns the trust domain that a store belongs to, if this is the row that
// says so.
func Owner(key string, value []byte) (name string, ok bool) {
	if key != prefixOf(kindTrustDomain) {
		return "", false
	}
	payload, err := unseal(value)
	if err != nil {
		return "", false
	}
	var m statev1.Server
	if err := proto.Unmarshal(payload, &m); err != nil {
		return "", false
	}
	return m.TrustDomain, true
}

// Marks are the keys of the rows that say whose a store is and who can read it.
func Marks() []string { return []string{prefixOf(kindTrustDomain), prefixOf(kindFormat)} }

// Readable refuses a store that this version does not understand, if this is the
// row that says so.
func Readable(key string, value []byte) error {
	if key != prefixOf(kindFormat) {
		return nil
	}
	payload, err := unseal(value)
	if err != nil {
		return nil // a row that cannot be read is left aside
	}
	_, reader, _ := readFormat(payload)
	return (&state{reader: reader}).newer()
}

// readServer refuses the row of a server of another trust domain.
func readServer(td spiffeid.TrustDomain, payload []byte) (Server, error) {
	var m statev1.Server
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Server{}, err
	}
	if m.TrustDomain != td.Name() {
		return Server{}, foreignStore(m.TrustDomain, td)
	}
	s := Server{
		ID: m.Id, Version: m.Version, StartedAt: timeOf(m.StartedAt),
		Instance: m.Instance, Beat: m.Beat, BeatAt: timeOfMillis(m.BeatAtMs), Lease: time.Duration(m.LeaseMs) * time.Millisecond, Stopped: m.Stopped,
		Up: time.Duration(m.UpMs) * time.Millisecond, Reads: int(m.Reads), Addresses: m.Addresses,
		Agents: int(m.Agents), Acknowledged: m.Acknowledged,
		Ends: Ends{Telling: int(m.Telling), X509: readEnd(m.FirstX509), JWT: readEnd(m.FirstJwt)}, Asks: m.Asks,
	}
	if len(m.Epoch) == len(s.Position.Epoch) && len(m.Digest) == len(s.Digest) {
		s.Position = store.Position{Epoch: store.Epoch(m.Epoch), Revision: m.Revision}
		s.Digest = [32]byte(m.Digest)
	}
	for _, l := range m.Laggards {
		s.Laggards = append(s.Laggards, Laggard{Agent: l.AgentId, Acknowledged: l.Acknowledged})
	}
	if p := m.Place; p != nil {
		s.Place = Place{Host: p.Host, DataDir: p.DataDir, BootID: p.BootId, Device: p.Device, Inode: p.Inode}
	}
	return s, nil
}

// foreignStore is the refusal of R122.
func foreignStore(stored string, td spiffeid.TrustDomain) *fault.Error {
	return fault.New(fault.Precondition, "trust_domain_changed", "the store belongs to the trust domain %q, not to %q", stored, td.Name()).
		Fix("use the trust domain that the store was made for, or another store")
}

func selectorMessages(sels []entry.Selector) []*statev1.Selector {
	ms := make([]*statev1.Selector, len(sels))
	for i, s := range sels {
		ms[i] = &statev1.Selector{Type: s.Type, Value: s.Value}
	}
	return ms
}

func selectorsOf(ms []*statev1.Selector) []entry.Selector {
	if len(ms) == 0 {
		return nil
	}
	sels := make([]entry.Selector, len(ms))
	for i, m := range ms {
		sels[i] = entry.Selector{Type: m.Type, Value: m.Value}
	}
	return sels
}

func credentialMessage(c Credential) *statev1.Credential {
	if c.IsZero() {
		return nil
	}
	return &statev1.Credential{Serial: c.Serial, ExpiresAt: unixOf(c.ExpiresAt), KeyHash: c.KeyHash}
}

func credentialOf(m *statev1.Credential) Credential {
	if m == nil {
		return Credential{}
	}
	return Credential{Serial: m.Serial, ExpiresAt: timeOf(m.ExpiresAt), KeyHash: m.KeyHash}
}
