// Package mirrortest is a server for tests of what stands on a mirror: it keeps
// the sync protocol strictly, signs with real authorities, and fails on demand.
package mirrortest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

// Server implements mirror.Link. All methods may be called concurrently.
type Server struct {
	TB testing.TB
	TD spiffeid.TrustDomain

	mu       sync.Mutex // guards everything below
	epoch    [16]byte
	revision uint64
	bodies   map[string][]byte // by kind and name: what every agent is sent
	grants   map[string]*syncv1.Grant
	streams  map[*stream]bool
	ttl      time.Duration
	skew     time.Duration
	hint     string
	down     bool
	refuse   map[string]string
	spoil    func(serverlink.X509Result) serverlink.X509Result

	ca, unpublished *authority
	jwtKeys         []*jwtKey
	sequence        uint64
	calls           Calls
}

// Calls counts what was asked of the server.
type Calls struct{ Follow, Messages, X509, Signed, JWT int }

type authority struct {
	key     crypto.Signer
	der     []byte
	tainted bool
	old     *authority // still in the bundle
}

type jwtKey struct {
	id      string
	key     crypto.Signer
	tainted bool
}

// New returns a server of example.org with a bundle and no grant.
func New(tb testing.TB) *Server {
	s := &Server{TB: tb, TD: spiffeid.RequireTrustDomainFromString("example.org"), ttl: time.Hour, revision: 1,
		bodies: map[string][]byte{}, grants: map[string]*syncv1.Grant{}, streams: map[*stream]bool{}, refuse: map[string]string{}}
	rand.Read(s.epoch[:])
	s.ca = s.newAuthority(nil)
	s.jwtKeys = []*jwtKey{s.newJWTKey()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.publishLocked()
	return s
}

func (s *Server) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.TB.Fatal(err)
	}
	return key
}

func (s *Server) newAuthority(old *authority) *authority {
	key := s.newKey()
	der, err := svid.SelfSignedCA(s.TD, key, time.Now().Add(-48*time.Hour), time.Now().Add(20*365*24*time.Hour))
	if err != nil {
		s.TB.Fatal(err)
	}
	return &authority{key: key, der: der, old: old}
}

func (s *Server) newJWTKey() *jwtKey { return &jwtKey{id: rand.Text(), key: s.newKey()} }

// Grant makes a grant with these selectors, in the form "unix:uid:1".
func (s *Server) Grant(id, path string, selectors ...string) *syncv1.Grant {
	g := &syncv1.Grant{Id: id, SpiffeId: "spiffe://" + s.TD.Name() + path, ParentId: "spiffe://" + s.TD.Name() + "/spire/agent/x",
		CreatedAt: time.Now().Unix()}
	for _, text := range selectors {
		sel, err := entry.ParseSelector(text)
		if err != nil {
			s.TB.Fatal(err)
		}
		g.Selectors = append(g.Selectors, &syncv1.Selector{Type: sel.Type, Value: sel.Value})
	}
	return g
}

// Rule makes a rule with these selectors, which takes the facts on the agent's word.
func (s *Server) Rule(id, path string, selectors ...string) *syncv1.Grant {
	g := s.Grant(id, "", selectors...)
	g.SpiffeId, g.IdTemplate, g.Trust = "", "spiffe://"+s.TD.Name()+path, entry.TrustAgent
	rule, err := entry.ParseRule(s.TD, g.GetIdTemplate(), "", g.GetTrust())
	if err != nil {
		s.TB.Fatal(err)
	}
	g.IdPrefix = rule.Prefix
	return g
}

// Put creates or changes grants, in one delta.
func (s *Server) Put(grants ...*syncv1.Grant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	var keys []string
	for _, g := range grants {
		g = proto.CloneOf(g)
		g.Revision = s.revision
		s.grants[g.GetId()] = g
		keys = append(keys, s.setLocked("g/"+g.GetId(), &syncv1.Body{Body: &syncv1.Body_Grant{Grant: g}}))
	}
	s.pushLocked(s.revision-1, keys)
}

// Remove deletes grants, in one delta.
func (s *Server) Remove(ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	var keys []string
	for _, id := range ids {
		delete(s.grants, id)
		delete(s.bodies, "g/"+id)
		keys = append(keys, "g/"+id)
	}
	s.pushLocked(s.revision-1, keys)
}

// PutBundle sets the bundle of another trust domain; nil removes it.
func (s *Server) PutBundle(td string, b *syncv1.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	if b == nil {
		delete(s.bodies, "b/"+td)
	} else {
		s.setLocked("b/"+td, &syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: b}})
	}
	s.pushLocked(s.revision-1, []string{"b/" + td})
}

// Raw sets a body byte for byte.
func (s *Server) Raw(key string, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	s.bodies[key] = body
	s.pushLocked(s.revision-1, []string{key})
}

// Rotate makes a new X.509 authority and signs with it; the old one stays in the bundle.
func (s *Server) Rotate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca = s.newAuthority(s.ca)
	s.publishLocked()
}

// RotateUnpublished signs with an authority that the bundle does not hold yet.
func (s *Server) RotateUnpublished() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpublished = s.newAuthority(s.ca)
}

// Publish puts the authority of RotateUnpublished into the bundle.
func (s *Server) Publish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca, s.unpublished = s.unpublished, nil
	s.publishLocked()
}

// Taint marks all but the newest authorities, X.509 and JWT, as tainted; Revoke removes them.
func (s *Server) Taint() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := s.ca.old; a != nil; a = a.old {
		a.tainted = true
	}
	for _, k := range s.jwtKeys[1:] {
		k.tainted = true
	}
	s.publishLocked()
}

// Revoke removes all but the newest authorities.
func (s *Server) Revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca.old = nil
	s.jwtKeys = s.jwtKeys[:1]
	s.publishLocked()
}

// RotateJWT makes a new JWT key and signs with it; the old one stays in the bundle.
func (s *Server) RotateJWT() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jwtKeys = append([]*jwtKey{s.newJWTKey()}, s.jwtKeys...)
	s.publishLocked()
}

// Set changes the TTL of what is signed from now on.
func (s *Server) SetTTL(ttl time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ttl = ttl
}

// SetSkew puts the server's clock before that of the agents. They hear of it when
// they connect anew, which they do at once.
func (s *Server) SetSkew(skew time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.skew = skew
	for st := range s.streams {
		st.end()
	}
}

// SetHint is what the server says of every process for which little speaks.
func (s *Server) SetHint(code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hint = code
}

// Hint is for mirror.Config.
func (s *Server) Hint(context.Context, []entry.Selector) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hint, nil
}

// nowLocked is the server's time.
func (s *Server) nowLocked() time.Time { return time.Now().Add(s.skew) }

// Refuse makes signing for a grant fail with a reason; empty: not any more.
func (s *Server) Refuse(grantID, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reason == "" {
		delete(s.refuse, grantID)
	} else {
		s.refuse[grantID] = reason
	}
}

// Spoil changes what signing returns.
func (s *Server) Spoil(f func(serverlink.X509Result) serverlink.X509Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil = f
}

// Down makes the server unreachable, or reachable again.
func (s *Server) Down(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
	if down {
		for st := range s.streams {
			st.end()
		}
	}
}

// Cut ends all streams.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.end()
	}
}

// Restore gives the store a new epoch, as a restore from a backup does.
func (s *Server) Restore() {
	s.mu.Lock()
	defer s.mu.Unlock()
	rand.Read(s.epoch[:])
	s.revision = 1
	for st := range s.streams {
		st.end()
	}
}

// Rollback returns a function that puts the server back to where it stands now,
// in the same epoch: a server that does not keep up with another.
func (s *Server) Rollback() func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	revision, bodies, grants := s.revision, maps.Clone(s.bodies), maps.Clone(s.grants)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.revision, s.bodies, s.grants = revision, maps.Clone(bodies), maps.Clone(grants)
		for st := range s.streams {
			st.end()
		}
	}
}

// Send sends a message to every agent, whatever it is.
func (s *Server) Send(m *syncv1.ServerMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.send(m)
	}
}

// Calls returns what was asked so far.
func (s *Server) Calls() Calls {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// Position returns where the server's log stands.
func (s *Server) Position() *syncv1.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.positionLocked(s.revision)
}

func (s *Server) positionLocked(revision uint64) *syncv1.Position {
	return &syncv1.Position{Epoch: bytes.Clone(s.epoch[:]), Revision: revision}
}

func (s *Server) setLocked(key string, b *syncv1.Body) string {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(b)
	if err != nil {
		s.TB.Fatal(err)
	}
	s.bodies[key] = raw
	return key
}

// publishLocked writes the own bundle.
func (s *Server) publishLocked() {
	s.sequence++
	s.revision++
	s.pushLocked(s.revision-1, []string{s.setLocked("b/"+s.TD.Name(), &syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: s.bundleLocked()}})})
}

// Bundle returns the bundle that it publishes.
func (s *Server) Bundle() *syncv1.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundleLocked()
}

func (s *Server) bundleLocked() *syncv1.Bundle {
	b := &syncv1.Bundle{TrustDomain: s.TD.Name(), Sequence: s.sequence}
	for a := s.ca; a != nil; a = a.old {
		b.X509Authorities = append(b.X509Authorities, &syncv1.X509Authority{Asn1: a.der, Tainted: a.tainted})
	}
	for _, k := range s.jwtKeys {
		spki, err := x509.MarshalPKIXPublicKey(k.key.Public())
		if err != nil {
			s.TB.Fatal(err)
		}
		b.JwtAuthorities = append(b.JwtAuthorities, &syncv1.JWTAuthority{KeyId: k.id, PublicKey: spki, Tainted: k.tainted})
	}
	return b
}

func (s *Server) hashLocked() []byte {
	var sum entry.Sum
	for _, b := range s.bodies {
		sum.Add(sha256.Sum256(b))
	}
	h := sum.Bytes()
	return h[:]
}

// pushLocked sends what changed to every agent that is up to date, a body a part.
func (s *Server) pushLocked(previous uint64, keys []string) {
	var bodies [][]byte
	for _, key := range keys {
		bodies = append(bodies, s.bodyLocked(key))
	}
	for st := range s.streams {
		if !st.following {
			continue
		}
		for i, b := range bodies {
			st.send(&syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: &syncv1.Delta{
				Previous: s.positionLocked(previous), Position: s.positionLocked(s.revision), Hash: s.hashLocked(),
				Bodies: [][]byte{b}, More: i < len(bodies)-1}}})
		}
	}
}

func (s *Server) bodyLocked(key string) []byte {
	if b := s.bodies[key]; b != nil {
		return b
	}
	removed := &syncv1.Body{Body: &syncv1.Body_GrantRemoved{GrantRemoved: key[2:]}}
	if key[0] == 'b' {
		removed = &syncv1.Body{Body: &syncv1.Body_BundleRemoved{BundleRemoved: key[2:]}}
	}
	raw, err := proto.Marshal(removed)
	if err != nil {
		s.TB.Fatal(err)
	}
	return raw
}

// Follow implements mirror.Link.
func (s *Server) Follow(ctx context.Context) (mirror.Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls.Follow++
	if s.down {
		return nil, errDown()
	}
	st := &stream{server: s, toAgent: make(chan *syncv1.ServerMessage, 4096), ended: make(chan struct{})}
	s.streams[st] = true
	context.AfterFunc(ctx, st.end)
	return st, nil
}

func errDown() error {
	return fault.New(fault.Unavailable, "server_unavailable", "the server is down")
}

// stream is one agent's conversation.
type stream struct {
	server    *Server
	toAgent   chan *syncv1.ServerMessage
	ended     chan struct{}
	once      sync.Once
	greeted   bool
	following bool // gets deltas; guarded by the server's mu
}

func (st *stream) end() { st.once.Do(func() { close(st.ended) }) }

func (st *stream) send(m *syncv1.ServerMessage) {
	select {
	case st.toAgent <- m:
	default:
		st.end() // a real server would cut it as well
	}
}

// Close implements mirror.Stream.
func (st *stream) Close() {
	st.end()
	st.server.mu.Lock()
	defer st.server.mu.Unlock()
	delete(st.server.streams, st)
}

// Recv implements mirror.Stream.
func (st *stream) Recv() (*syncv1.ServerMessage, error) {
	select {
	case <-st.ended:
		return nil, io.EOF
	default:
	}
	select {
	case m := <-st.toAgent:
		return m, nil
	case <-st.ended:
		return nil, io.EOF
	}
}

// Send implements mirror.Stream: it is the server's side of the protocol.
func (st *stream) Send(m *syncv1.AgentMessage) error {
	s := st.server
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-st.ended:
		return io.EOF
	default:
	}
	s.calls.Messages++
	switch m := m.GetMessage().(type) {
	case *syncv1.AgentMessage_Hello:
		if st.greeted || m.Hello.GetVersion() != 1 {
			s.TB.Errorf("mirrortest: a second or wrong greeting: %v", m.Hello)
		}
		if !slices.Contains(m.Hello.GetCapabilities(), "rules") {
			s.TB.Error("mirrortest: the agent does not say that it knows rules")
		}
		st.greeted = true
		if string(m.Hello.GetHash()) == string(s.hashLocked()) {
			st.following = true
			st.send(&syncv1.ServerMessage{Message: &syncv1.ServerMessage_Current{Current: &syncv1.Current{
				Position: s.positionLocked(s.revision), Hash: s.hashLocked(), Clock: s.nowLocked().UnixMilli()}}})
			return nil
		}
		keys := slices.Sorted(maps.Keys(s.bodies))
		for i, key := range keys {
			h := sha256.Sum256(s.bodies[key])
			kind := syncv1.Item_KIND_GRANT
			if key[0] == 'b' {
				kind = syncv1.Item_KIND_BUNDLE
			}
			st.send(&syncv1.ServerMessage{Message: &syncv1.ServerMessage_Inventory{Inventory: &syncv1.Inventory{
				Position: s.positionLocked(s.revision), Hash: s.hashLocked(), More: i < len(keys)-1, Clock: s.nowLocked().UnixMilli(),
				Items: []*syncv1.Item{{Kind: kind, Id: key[2:], Fingerprint: binary.BigEndian.Uint64(h[:])}}}}})
		}
	case *syncv1.AgentMessage_Want:
		if !st.greeted {
			s.TB.Error("mirrortest: a want before the greeting")
		}
		d := &syncv1.Delta{Previous: s.positionLocked(s.revision), Position: s.positionLocked(s.revision), Hash: s.hashLocked()}
		for _, id := range m.Want.GetGrantIds() {
			d.Bodies = append(d.Bodies, s.bodyLocked("g/"+id))
		}
		for _, td := range m.Want.GetTrustDomains() {
			d.Bodies = append(d.Bodies, s.bodyLocked("b/"+td))
		}
		st.following = true
		st.send(&syncv1.ServerMessage{Message: &syncv1.ServerMessage_Delta{Delta: d}})
	case *syncv1.AgentMessage_Ack:
		if m.Ack.GetPosition().GetRevision() == s.revision && string(m.Ack.GetHash()) != string(s.hashLocked()) {
			s.TB.Errorf("mirrortest: acknowledged %v with another hash", m.Ack.GetPosition())
		}
	}
	return nil
}

// X509 implements mirror.Link.
func (s *Server) X509(_ context.Context, items []serverlink.X509Item) ([]serverlink.X509Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls.X509++
	if s.down {
		return nil, errDown()
	}
	if len(items) > serverlink.MaxBatch {
		s.TB.Errorf("mirrortest: %d items in one call", len(items))
	}
	results := make([]serverlink.X509Result, len(items))
	for i, item := range items {
		s.calls.Signed++
		results[i] = s.signLocked(item)
		if s.spoil != nil {
			results[i] = s.spoil(results[i])
		}
	}
	return results, nil
}

func (s *Server) signLocked(item serverlink.X509Item) serverlink.X509Result {
	g := s.grants[item.GrantID]
	switch {
	case g == nil:
		return serverlink.X509Result{Err: fault.New(fault.Denied, "grant_unknown", "no such grant")}
	case s.refuse[item.GrantID] != "":
		return serverlink.X509Result{Err: fault.New(fault.Denied, s.refuse[item.GrantID], "refused")}
	}
	ca := s.ca
	if s.unpublished != nil {
		ca = s.unpublished
	}
	chain, err := s.issue(ca, g, item.Facts, item.CSR)
	if err != nil {
		return serverlink.X509Result{Err: err}
	}
	return serverlink.X509Result{Chain: chain, Revision: g.GetRevision()}
}

// idOf returns the ID that a grant gives for facts, which are exactly those that
// a rule names.
func (s *Server) idOf(g *syncv1.Grant, facts map[string]string) (spiffeid.ID, error) {
	if g.GetIdTemplate() == "" {
		if len(facts) > 0 {
			s.TB.Errorf("mirrortest: facts %v for the entry %s", facts, g.GetId())
		}
		return spiffeid.FromString(g.GetSpiffeId())
	}
	rule, err := entry.ParseRule(s.TD, g.GetIdTemplate(), g.GetIdPrefix(), g.GetTrust())
	if err != nil {
		return spiffeid.ID{}, err
	}
	e := entry.Entry{ID: g.GetId(), Rule: rule}
	id, named, bad := e.Grants(facts)
	if bad != nil || len(named) != len(facts) {
		s.TB.Errorf("mirrortest: facts %v for the rule %s", facts, g.GetIdTemplate())
		return spiffeid.ID{}, fault.New(fault.Invalid, "facts_unexpected", "these are not the facts of the rule")
	}
	return id, nil
}

func (s *Server) issue(ca *authority, g *syncv1.Grant, facts map[string]string, csr []byte) ([][]byte, error) {
	key, err := svid.ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	id, err := s.idOf(g, facts)
	if err != nil {
		return nil, err
	}
	issuer, err := svid.NewX509Issuer([][]byte{ca.der}, ca.key)
	if err != nil {
		return nil, err
	}
	ttl := s.ttl
	if g.GetX509SvidTtl() > 0 {
		ttl = time.Duration(g.GetX509SvidTtl()) * time.Second
	}
	now := s.nowLocked()
	prepared, err := issuer.Prepare(svid.Leaf{ID: id, Key: key,
		DNSNames: g.GetDnsNames(), NotBefore: now.Add(-30 * time.Second), NotAfter: now.Add(ttl).Truncate(time.Second)})
	if err != nil {
		return nil, err
	}
	x, err := prepared.Issue()
	return x.Chain, err
}

// JWT implements mirror.Link.
func (s *Server) JWT(_ context.Context, grantID string, facts map[string]string, audience []string) (serverlink.JWTResult, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls.JWT++
	g := s.grants[grantID]
	switch {
	case s.down:
		return serverlink.JWTResult{}, errDown()
	case g == nil:
		return serverlink.JWTResult{}, fault.New(fault.Denied, "grant_unknown", "no such grant")
	}
	now := s.nowLocked()
	issuer, err := svid.NewJWTIssuer(s.jwtKeys[0].id, s.jwtKeys[0].key, now.Add(24*time.Hour))
	if err != nil {
		return serverlink.JWTResult{}, err
	}
	id, err := s.idOf(g, facts)
	if err != nil {
		return serverlink.JWTResult{}, err
	}
	j := svid.JWT{ID: id, Audience: audience, IssuedAt: now, ExpiresAt: now.Add(s.ttl)}
	if g.GetJwtSvidIncludeJti() {
		j.JTI = rand.Text()
	}
	prepared, err := issuer.Prepare(j)
	if err != nil {
		return serverlink.JWTResult{}, err
	}
	token, err := prepared.Issue()
	return serverlink.JWTResult{Token: token, Revision: g.GetRevision()}, err
}

// Until waits until f is true, looking at it after each change of sub and every
// few milliseconds; it fails the test if that never happens.
func Until(tb testing.TB, sub *mirror.Subscription, f func(mirror.View) bool) mirror.View {
	tb.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		v := sub.View()
		if f(v) {
			return v
		}
		select {
		case <-sub.Changed():
		case <-deadline.C:
			tb.Fatalf("it never came to pass; last seen: %s", Describe(v))
		}
	}
}

// Describe says in a line what a view holds.
func Describe(v mirror.View) string {
	s := fmt.Sprintf("synced %v, %d matched, %d pending:", v.Synced, len(v.Matched), v.Pending)
	for _, id := range v.Identities {
		s += " " + id.ID.String()
	}
	for _, b := range v.Federated {
		s += " +" + b.TrustDomain.Name()
	}
	return s
}

// Verify fails the test unless each identity's chain verifies against the
// bundle of the same view at that time (R58) and its key fits.
func Verify(tb testing.TB, v mirror.View, now time.Time) {
	tb.Helper()
	for _, id := range v.Identities {
		certificates, err := x509.ParseCertificates(id.Chain)
		if err != nil {
			tb.Fatal(err)
		}
		chain := make([][]byte, len(certificates))
		for i, c := range certificates {
			chain[i] = c.Raw
		}
		got, err := svid.VerifyX509(chain, v.Bundle.Keys.Roots(), id.ID.TrustDomain(), now)
		if err != nil || got != id.ID {
			tb.Errorf("identity %s: chain is for %s, %v", id.ID, got, err)
		}
		key, err := x509.ParsePKCS8PrivateKey(id.Key)
		if err != nil {
			tb.Fatal(err)
		}
		if signer, ok := key.(*ecdsa.PrivateKey); !ok || !signer.PublicKey.Equal(certificates[0].PublicKey) {
			tb.Error(errors.New("the key is not the certificate's"))
		}
	}
}
