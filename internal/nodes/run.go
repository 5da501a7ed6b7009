package nodes

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	pruneEvery  = 5 * time.Minute
	pruneBatch  = 500
	maxPruned   = 50_000 // entries in one round; the rest waits for the next
	maxTokenTTL = 366 * 24 * time.Hour
	maxVersion  = 255
	maxAlarms   = 10_000
	aliasType   = "spiffe_id" // selector type of the alias that a token may carry
	pruner      = "plastron expiry"
)

// Config is what the engine works with.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Registry    *registry.Registry
	Audit       *audit.Writer
	Verifiers   map[string]nodeattest.Verifier // by attestor name
	// Issuer signs agents' certificates.
	Issuer func(now time.Time) (*svid.X509Issuer, error)
	// Lifetimes says how long they live.
	Lifetimes lifetime.Set
	// ReattestPeriod bounds the life of a certificate whose agent has to attest again
	// for the next; 0: it does not.
	ReattestPeriod time.Duration
	// Stale says why nothing new is to be granted, MayPrune why nothing is to be
	// removed because of the time, if so (R77, R70). Nil: never.
	Stale    func() error
	MayPrune func(now time.Time) error
	Log      *slog.Logger
}

// Engine admits, renews, bans and forgets nodes. All methods may be called concurrently.
type Engine struct {
	cfg Config

	// mu guards everything below.
	mu     sync.Mutex
	keys   map[[32]byte]keyOwner // live agent keys, so that no two identities share one (C37)
	alarms map[string]bool       // what was alarmed already
	// authorities are the keys of our bundle, of servers, and of authorities below
	// ours; nil: not known.
	authorities map[[32]byte]bool
}

type keyOwner struct {
	id    spiffeid.ID
	until time.Time
}

// New returns an engine over the nodes that the registry holds.
func New(cfg Config) *Engine {
	e := &Engine{cfg: cfg, keys: map[[32]byte]keyOwner{}, alarms: map[string]bool{}}
	cfg.Registry.Batches(e.forgetAuthorities)
	cfg.Registry.View(func(s *registry.Snapshot) {
		for n := range s.Nodes("") {
			for _, c := range []registry.Credential{n.Current, n.Next} {
				if len(c.KeyHash) == 32 {
					e.keys[[32]byte(c.KeyHash)] = keyOwner{n.ID, c.ExpiresAt}
				}
			}
		}
	})
	return e
}

// Attestation is what a node sends to be admitted.
type Attestation struct {
	Type    string
	Payload []byte
	CSR     []byte
	Address string // of the peer, for the audit trail
}

// Admitted is the result of an attestation or a renewal.
type Admitted struct {
	SVID        svid.X509
	CanReattest bool
}

// Attest verifies a node's evidence and admits it. Everything that can be wrong
// with the request itself is judged before the evidence is, and the evidence is
// consumed by the commit that writes the node's row, so a mistake never burns a
// one-time secret (K18) and a crash leaves all or nothing (R19).
func (e *Engine) Attest(ctx context.Context, a Attestation, ask nodeattest.Challenger) (Admitted, error) {
	if e.cfg.Stale != nil {
		if err := e.cfg.Stale(); err != nil {
			return Admitted{}, err
		}
	}
	// 1. Sizes, then the key.
	verifier, known := e.cfg.Verifiers[a.Type]
	switch {
	case len(a.Type) > nodeattest.MaxType || !known:
		return Admitted{}, fault.New(fault.Invalid, "attestor_unknown", "the attestation type is not offered here").
			Fix("configure the same NodeAttestor at server and agent")
	case len(a.Payload) == 0 || len(a.Payload) > nodeattest.MaxPayload:
		return Admitted{}, fault.New(fault.Invalid, "payload_invalid", "the attestation payload is empty or larger than %d bytes", nodeattest.MaxPayload)
	}
	key, err := svid.ParseCSR(a.CSR)
	if err != nil {
		return Admitted{}, err
	}

	// 2. The conversation.
	evidence, err := verifier.Verify(ctx, a.Payload, ask)
	if err != nil {
		return Admitted{}, err
	}
	id, selectors, err := e.identify(a.Type, evidence)
	if err != nil {
		return Admitted{}, err
	}

	// 3. The certificate, unsigned.
	now := time.Now()
	prepared, release, err := e.prepare(id, key, evidence.CanReattest, now)
	if err != nil {
		return Admitted{}, err
	}

	// 4. The decision and its commit.
	c := Candidate{
		Now: now, ID: id, Type: a.Type, Selectors: selectors, CanReattest: evidence.CanReattest,
		FirstUse: evidence.FirstUse, OneTime: evidence.OneTime, Holder: evidence.Holder, Lineage: make([]byte, 16),
		Credential: registry.Credential{Serial: prepared.Serial(), ExpiresAt: prepared.NotAfter(), KeyHash: key.Hash[:]},
	}
	rand.Read(c.Lineage)
	var row *registry.Node
	var changed bool
	var refusal error
	act := "attest"
	position, err := e.cfg.Registry.Update(ctx, id.String(), func(tx *registry.Tx) error {
		tx.Confirm() // a token may have been made at another server a moment ago
		c.Epoch = tx.Epoch()
		node, err := optional(tx.Node(id))
		if err != nil {
			return err
		}
		changed = Changed(node, c)
		switch act = "attest"; {
		case node != nil && len(c.OneTime) > 0:
			act = "retry"
		case node != nil:
			act = "reattest"
		}
		var token *registry.Token
		if len(c.OneTime) > 0 {
			if token, err = optional(tx.Token(c.OneTime)); err != nil {
				return err
			}
		}
		var used *registry.Token
		if row, used, refusal = Admit(node, token, c); refusal != nil {
			return nil
		}
		if used != nil {
			if err := tx.PutToken(*used); err != nil {
				return err
			}
		}
		return tx.PutNode(*row)
	})
	if err == nil {
		err = refusal
	}
	if err != nil {
		release()
		return Admitted{}, err
	}

	// 5. On record, then signed.
	if changed {
		e.cfg.Log.WarnContext(ctx, "another key has proved to be this node", "agent", id.String(), "peer", a.Address)
		e.recordAlarm(audit.Alarm{Subject: id.String(), Reason: "node_changed",
			Detail: "attested from " + a.Address + " as " + hex.EncodeToString(c.Holder) + ", while another was admitted before"})
	}
	issued, err := e.issue(prepared, position, act, *row, a.Address, key)
	return Admitted{issued, row.CanReattest}, err
}

// Presented is the certificate with which an agent authenticated.
type Presented struct {
	ID      spiffeid.ID
	Serial  string
	Expiry  time.Time
	KeyHash []byte // SHA-256 of its SubjectPublicKeyInfo
	Address string
}

// Renew gives an authenticated agent its next certificate (R33).
func (e *Engine) Renew(ctx context.Context, p Presented, csr []byte) (Admitted, error) {
	key, err := svid.ParseCSR(csr)
	if err != nil {
		return Admitted{}, err
	}
	now := time.Now()
	prepared, release, err := e.prepare(p.ID, key, false, now)
	if err != nil {
		return Admitted{}, err
	}
	next := registry.Credential{Serial: prepared.Serial(), ExpiresAt: prepared.NotAfter(), KeyHash: key.Hash[:]}
	var row *registry.Node
	position, err := e.cfg.Registry.Update(ctx, p.ID.String(), func(tx *registry.Tx) error {
		node, err := optional(tx.Node(p.ID))
		if err != nil {
			return err
		}
		if row, err = Renew(node, p.Serial, p.Expiry, now, next); err != nil {
			return err
		}
		return tx.PutNode(*row)
	})
	if err != nil {
		release()
		return Admitted{}, err
	}
	issued, err := e.issue(prepared, position, "renew", *row, p.Address, key)
	return Admitted{issued, row.CanReattest}, err
}

// Authenticate says whether an agent's certificate counts: yes from memory, no
// only if the store says so too, because the agent may have attested or renewed
// at another server a moment ago. Only the first use of a renewed certificate
// writes: from then on the old one is void.
func (e *Engine) Authenticate(ctx context.Context, p Presented) error {
	now := time.Now()
	var node *registry.Node
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		node, _ = optional(s.Node(p.ID))
	})
	promote, refusal := Authenticate(node, p.Serial, p.Expiry, now)
	if refusal == nil && !promote || fault.ReasonOf(refusal) == ReasonExpired {
		return refusal
	}
	_, err := e.cfg.Registry.Update(ctx, p.ID.String(), func(tx *registry.Tx) (err error) {
		tx.Confirm()
		if node, err = optional(tx.Node(p.ID)); err != nil {
			return err
		}
		if promote, refusal = Authenticate(node, p.Serial, p.Expiry, now); refusal != nil || !promote {
			return nil
		}
		return tx.PutNode(Promote(*node, registry.Credential{Serial: p.Serial, ExpiresAt: p.Expiry, KeyHash: p.KeyHash}))
	})
	switch {
	case fault.KindOf(err) == fault.Unavailable && fault.ReasonOf(refusal) == ReasonBanned:
		return refusal // what this server knew when it last saw the store
	case fault.KindOf(err) == fault.Unavailable && refusal == nil:
		// The store is away. Refusing would cut off an agent that did all that was
		// asked of it; both certificates count a little longer instead.
		e.cfg.Log.WarnContext(ctx, "agent certificate not promoted", "agent", p.ID.String(), "err", err)
		return nil
	case err != nil:
		return err
	case fault.ReasonOf(refusal) == ReasonNotActive:
		e.alarm(p, node)
	case refusal == nil && promote && renewedSince(node, p.Expiry):
		e.cfg.Log.WarnContext(ctx, "agent renewed in the time that a restored store has lost", "agent", p.ID.String(), "serial", p.Serial)
		e.recordAlarm(audit.Alarm{Subject: p.ID.String(), Reason: "node_restored",
			Detail: "from " + p.Address + ", with the certificate " + p.Serial + ", which the restored store does not know"})
	}
	return refusal
}

// Standing is the decision of the same name on the row as it is now. It writes
// nothing and alarms nothing: an agent that has renewed may still have its old
// stream open (R124).
func (e *Engine) Standing(p Presented) (reconnect bool, err error) {
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		node, _ := optional(s.Node(p.ID))
		reconnect, err = Standing(node, p.Serial, p.Expiry, time.Now())
	})
	return reconnect, err
}

// Ban keeps a node out until it is unbanned or evicted.
func (e *Engine) Ban(ctx context.Context, caller string, id spiffeid.ID) error {
	_, err := e.cfg.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		n, err := tx.Node(id)
		if err != nil {
			return err
		}
		n.Banned = true
		return tx.PutNode(n)
	})
	return err
}

// Unban forgets a banned node, so that it may attest again (R29). What widens
// trust is on record of its own, before it is done (R129).
func (e *Engine) Unban(ctx context.Context, caller string, id spiffeid.ID) error {
	var err error
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		var n registry.Node
		if n, err = s.Node(id); err == nil {
			err = Unban(&n)
		}
	})
	if err != nil {
		return err
	}
	if err := e.cfg.Audit.Append(audit.Widening{Act: "unban", Caller: caller, Subject: id.String()}); err != nil {
		return err
	}
	return e.drop(ctx, caller, id, Unban)
}

// Evict forgets a node, its ban included, with the alias that its token carried (R32).
func (e *Engine) Evict(ctx context.Context, caller string, id spiffeid.ID) error {
	return e.drop(ctx, caller, id, func(*registry.Node) error { return nil })
}

func (e *Engine) drop(ctx context.Context, caller string, id spiffeid.ID, check func(*registry.Node) error) error {
	_, err := e.cfg.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		n, err := tx.Node(id)
		if err == nil {
			err = check(&n)
		}
		if err != nil {
			return err
		}
		if err := deleteAliases(tx, id); err != nil {
			return err
		}
		return tx.DeleteNode(id)
	})
	return err
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	TTL   time.Duration
	Value string      // empty: one is made
	Alias spiffeid.ID // zero: none; else one more ID for the agent
}

// CreateToken makes a join token. The store gets its hash only: this is the one
// time that its text is seen (R22).
func (e *Engine) CreateToken(ctx context.Context, caller string, r TokenRequest) (jointoken.Token, time.Time, error) {
	if r.TTL < time.Second || r.TTL > maxTokenTTL {
		return jointoken.Token{}, time.Time{}, fault.New(fault.Invalid, "ttl_invalid", "the token's TTL must be between 1 s and %d days", maxTokenTTL/(24*time.Hour))
	}
	token := jointoken.Generate()
	if r.Value != "" {
		var err error
		if token, err = jointoken.Choose(r.Value); err != nil {
			return jointoken.Token{}, time.Time{}, err
		}
	}
	now := time.Now().UTC().Truncate(time.Second)
	expiry := now.Add(r.TTL)
	id, err := spiffeid.FromPath(e.cfg.TrustDomain, "/spire/agent/"+jointoken.Name+token.Path())
	if err != nil {
		return jointoken.Token{}, time.Time{}, err
	}
	_, err = e.cfg.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		switch node, err := optional(tx.Node(id)); {
		case err != nil:
			return err
		case node != nil:
			return fault.New(fault.Exists, "agent_exists", "an agent was admitted by this token before") // K15
		}
		switch old, err := optional(tx.Token(token.Hash())); {
		case err != nil:
			return err
		case old != nil:
			return fault.New(fault.Exists, "join_token_exists", "this join token exists already")
		}
		if err := tx.PutToken(registry.Token{Hash: token.Hash(), ExpiresAt: expiry, NodeID: id.String(), Epoch: tx.Epoch()}); err != nil {
			return err
		}
		if r.Alias.IsZero() {
			return nil
		}
		return e.putAlias(tx, id, r.Alias, now)
	})
	if err != nil {
		return jointoken.Token{}, time.Time{}, err
	}
	return token, expiry, nil
}

// Report keeps the version that an agent says it runs, and whether it follows.
func (e *Engine) Report(ctx context.Context, id spiffeid.ID, version string, follows bool) error {
	if len(version) > maxVersion || strings.ContainsFunc(version, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fault.New(fault.Invalid, "agent_version_invalid", "the agent's version is not printable text of at most %d bytes", maxVersion)
	}
	same := false
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		n, err := s.Node(id)
		same = err == nil && n.AgentVersion == version && n.Follows == follows
	})
	if same {
		return nil
	}
	_, err := e.cfg.Registry.Update(ctx, id.String(), func(tx *registry.Tx) error {
		n, err := tx.Node(id)
		if err != nil {
			return err
		}
		n.AgentVersion, n.Follows = version, follows
		return tx.PutNode(n)
	})
	return err
}

// CheckKey refuses a key that is an authority's (C36) or the live key of an
// agent other than owner (C37).
func (e *Engine) CheckKey(key svid.PublicKey, owner spiffeid.ID, now time.Time) error {
	if err := e.checkAuthorities(key); err != nil {
		return err
	}
	e.mu.Lock()
	holder, taken := e.otherHolderLocked(key, owner, now)
	e.mu.Unlock()
	if taken {
		return e.keyTaken(holder, owner, key)
	}
	return nil
}

// otherHolderLocked returns the agent whose live key this is, if that is not owner.
func (e *Engine) otherHolderLocked(key svid.PublicKey, owner spiffeid.ID, now time.Time) (holder spiffeid.ID, taken bool) {
	o, held := e.keys[key.Hash]
	return o.id, held && o.id != owner && now.Before(o.until)
}

// keyTaken puts on record that somebody who is not its agent holds a live agent
// key, as the request's signature has proven, and refuses.
func (e *Engine) keyTaken(holder, claimant spiffeid.ID, key svid.PublicKey) error {
	const reason = "key_taken"
	if e.firstAlarm(reason + " " + holder.String() + " " + claimant.String()) {
		e.cfg.Log.Error("agent key in other hands", "agent", holder.String(), "id", claimant.String())
		e.recordAlarm(audit.Alarm{
			Subject: holder.String(), Reason: reason, Detail: "key " + hex.EncodeToString(key.Hash[:]) + " was shown for " + claimant.String(),
		})
	}
	return fault.New(fault.Invalid, reason, "the key is in use by another identity").Fix("make a new key")
}

// Prune drops what has expired: join tokens with the aliases of those that were
// never used, entries, rules, and what is known of authorities below ours. It is
// one round of Run.
func (e *Engine) Prune(ctx context.Context) error {
	now := time.Now()
	if e.cfg.MayPrune != nil {
		if err := e.cfg.MayPrune(now); err != nil {
			return err
		}
	}
	e.mu.Lock()
	maps.DeleteFunc(e.keys, func(_ [32]byte, o keyOwner) bool { return !now.Before(o.until) })
	clear(e.alarms)
	e.mu.Unlock()
	var tokens [][]byte
	var entries, rules, downstream, published []string
	e.cfg.Registry.View(func(s *registry.Snapshot) {
		for t := range s.Tokens() {
			if !now.Before(t.ExpiresAt) {
				tokens = append(tokens, t.Hash)
			}
		}
		// By the filter, which builds no entry that stays: everybody waits meanwhile.
		for _, en := range s.List(registry.Filter{EndedBy: &now}, "", maxPruned) {
			entries = append(entries, en.ID)
		}
		rules = s.EndedRules(now)
		downstream, published = endedDownstream(s, now), endedPublished(s, e.cfg.TrustDomain, now)
	})
	return errors.Join(
		inBatches(tokens, func(part [][]byte) error { return e.pruneTokens(ctx, part, now) }),
		inBatches(entries, func(part []string) error {
			return e.pruneGrants(ctx, part, now, (*registry.Tx).Entry, (*registry.Tx).DeleteEntry)
		}),
		inBatches(rules, func(part []string) error {
			return e.pruneGrants(ctx, part, now, (*registry.Tx).Rule, (*registry.Tx).DeleteRule)
		}),
		inBatches(downstream, func(part []string) error { return e.pruneDownstream(ctx, part) }),
		inBatches(published, func(part []string) error { return e.prunePublished(ctx, part) }),
	)
}

// Run prunes every five minutes until ctx is done. A failed round is logged and
// tried again at the next.
func (e *Engine) Run(ctx context.Context) error {
	for {
		wait := time.NewTimer(pruneEvery - pruneEvery/10 + jitter(pruneEvery/5)) // R110
		select {
		case <-ctx.Done():
			wait.Stop()
			return nil
		case <-wait.C:
			if err := e.Prune(ctx); err != nil && ctx.Err() == nil {
				e.cfg.Log.WarnContext(ctx, "expired rows not pruned", "err", err)
			}
		}
	}
}

// jitter draws a time below limit.
func jitter(limit time.Duration) time.Duration {
	var b [8]byte
	rand.Read(b[:])
	return time.Duration(binary.LittleEndian.Uint64(b[:]) % uint64(limit))
}

// identify turns evidence into the agent's ID and selectors, or refuses what an
// attestor may not yield (R24, A43, A44).
func (e *Engine) identify(kind string, ev nodeattest.Evidence) (spiffeid.ID, []entry.Selector, error) {
	unsound := func(what string) (spiffeid.ID, []entry.Selector, error) {
		return spiffeid.ID{}, nil, fault.New(fault.Denied, "evidence_invalid", "the attestor %q yields %s", kind, what)
	}
	path := ev.Path
	if !ev.Outside {
		path = "/" + kind + path
	} else if e.ofAnother(kind, path) {
		return unsound("a path of another attestor")
	}
	id, err := spiffeid.FromPath(e.cfg.TrustDomain, "/spire/agent"+path)
	if err != nil || !strings.HasPrefix(ev.Path, "/") {
		return unsound("a path that is not one")
	}
	if _, err := identity.ParseMember(e.cfg.TrustDomain, id.String()); err != nil {
		return unsound("a path that is too long")
	}
	if len(ev.Selectors) == 0 {
		return id, nil, nil
	}
	for _, s := range ev.Selectors {
		if s.Type != kind {
			return unsound("a selector of another's type")
		}
	}
	selectors, err := entry.NormalizeSelectors(ev.Selectors)
	if err != nil {
		return unsound("selectors that are none")
	}
	return id, selectors, nil
}

// ofAnother reports whether the path lies below another attestor's name. A join
// token names its agent before there is one, so its name is kept free always.
func (e *Engine) ofAnother(kind, path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return first != kind && (e.cfg.Verifiers[first] != nil || first == jointoken.Name)
}

// Lives says what limits the certificate of an agent that is signed now, the first how
// long it lives. again: the agent proves its node again for the next one.
func (e *Engine) Lives(issuer *svid.X509Issuer, again bool, now time.Time) []lifetime.Limit {
	asked := lifetime.Asked{}
	if again {
		asked.Reattest = e.cfg.ReattestPeriod
	}
	asked.Authority, asked.Upstream = issuer.Ends()
	return e.cfg.Lifetimes.Decide(lifetime.Agent, asked, now)
}

// prepared is an agent's certificate that can be signed, and what limits its life.
type prepared struct {
	*svid.PreparedX509
	limit string
}

// prepare lints an agent's certificate and reserves its key for the agent.
// release gives the key back if the certificate is not issued after all.
func (e *Engine) prepare(id spiffeid.ID, key svid.PublicKey, again bool, now time.Time) (p prepared, release func(), err error) {
	if err := e.checkAuthorities(key); err != nil {
		return prepared{}, nil, err
	}
	issuer, err := e.cfg.Issuer(now)
	if err != nil {
		return prepared{}, nil, err
	}
	limits := e.Lives(issuer, again, now)
	p.limit = limits[0].Name
	p.PreparedX509, err = issuer.Prepare(svid.Leaf{ID: id, Key: key, NotBefore: now.Add(-svid.Backdate), NotAfter: limits[0].End})
	if err != nil {
		return prepared{}, nil, err
	}
	e.mu.Lock()
	holder, taken := e.otherHolderLocked(key, id, now)
	before, had := e.keys[key.Hash]
	if !taken {
		e.keys[key.Hash] = keyOwner{id, p.NotAfter()}
	}
	e.mu.Unlock()
	if taken {
		return prepared{}, nil, e.keyTaken(holder, id, key)
	}
	return p, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if had {
			e.keys[key.Hash] = before
		} else {
			delete(e.keys, key.Hash)
		}
	}, nil
}

// issue puts the admission on record and signs (R14).
func (e *Engine) issue(p prepared, at store.Position, act string, n registry.Node, address string, key svid.PublicKey) (svid.X509, error) {
	a := audit.Admission{
		Act: act, Node: n.ID.String(), Type: n.AttestationType, Address: address, Position: at.String(),
		Serial: p.Serial(), KeyHash: key.Hash, Lineage: hex.EncodeToString(n.Lineage), Expiry: p.NotAfter(), Limit: p.limit,
	}
	copy(a.Evidence[:], n.Evidence)
	if err := e.cfg.Audit.Append(a); err != nil {
		return svid.X509{}, err
	}
	return p.Issue()
}

// alarm reports the use of a certificate that a newer one replaced, once for each.
func (e *Engine) alarm(p Presented, n *registry.Node) {
	if !e.firstAlarm(p.ID.String() + " " + p.Serial) {
		return
	}
	e.cfg.Log.Error("replaced agent certificate used", "agent", p.ID.String(), "serial", p.Serial, "peer", p.Address)
	e.recordAlarm(audit.Alarm{
		Subject: p.ID.String(), Reason: ReasonNotActive,
		Detail: "serial " + p.Serial + " used from " + p.Address + " while lineage " + hex.EncodeToString(n.Lineage) + " is live",
	})
}

// firstAlarm reports whether what was not alarmed before; it is remembered.
func (e *Engine) firstAlarm(what string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	known := e.alarms[what]
	if len(e.alarms) >= maxAlarms {
		clear(e.alarms)
	}
	e.alarms[what] = true
	return !known
}

func (e *Engine) recordAlarm(a audit.Alarm) {
	if err := e.cfg.Audit.Append(a); err != nil {
		e.cfg.Log.Error("alarm not on record", "err", err)
	}
}

// putAlias writes the entry that gives the agent a second ID.
func (e *Engine) putAlias(tx *registry.Tx, agent, alias spiffeid.ID, now time.Time) error {
	id := make([]byte, 16)
	rand.Read(id)
	en := entry.Entry{
		ID: hex.EncodeToString(id), SPIFFEID: alias, ParentID: agent, CreatedAt: now,
		Selectors: []entry.Selector{{Type: aliasType, Value: agent.String()}},
	}
	if err := entry.Validate(e.cfg.TrustDomain, &en, now); err != nil {
		return err
	}
	return tx.PutEntry(en)
}

// deleteAliases drops the entries that putAlias made for the agent.
func deleteAliases(tx *registry.Tx, agent spiffeid.ID) error {
	alias := &registry.SelectorFilter{Match: registry.MatchExact, Selectors: []entry.Selector{{Type: aliasType, Value: agent.String()}}}
	for _, en := range tx.Snapshot().List(registry.Filter{ParentID: &agent, Selectors: alias}, "", 0) {
		if err := tx.DeleteEntry(en.ID); err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
	}
	return nil
}

func (e *Engine) pruneTokens(ctx context.Context, hashes [][]byte, now time.Time) error {
	_, err := e.cfg.Registry.Update(ctx, pruner, func(tx *registry.Tx) error {
		for _, hash := range hashes {
			token, err := optional(tx.Token(hash))
			if err != nil {
				return err
			}
			if token == nil || now.Before(token.ExpiresAt) {
				continue
			}
			if id, err := spiffeid.FromString(token.NodeID); err == nil && len(token.Consumer) == 0 {
				if err := deleteAliases(tx, id); err != nil {
					return err
				}
			}
			if err := tx.DeleteToken(hash); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func (e *Engine) pruneGrants(ctx context.Context, ids []string, now time.Time,
	read func(*registry.Tx, string) (entry.Entry, error), drop func(*registry.Tx, string) error) error {
	_, err := e.cfg.Registry.Update(ctx, pruner, func(tx *registry.Tx) error {
		for _, id := range ids {
			en, err := optional(read(tx, id))
			if err != nil {
				return err
			}
			if en == nil || !en.Expired(now) {
				continue
			}
			if err := drop(tx, id); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func (e *Engine) pruneDownstream(ctx context.Context, serials []string) error {
	_, err := e.cfg.Registry.Update(ctx, pruner, func(tx *registry.Tx) error {
		for _, serial := range serials {
			if err := tx.DeleteDownstream(serial); err != nil && fault.KindOf(err) != fault.NotFound {
				return err
			}
		}
		return nil
	})
	return err
}

// prunePublished takes JWT keys of downstream servers out of the bundle.
func (e *Engine) prunePublished(ctx context.Context, ids []string) error {
	_, err := e.cfg.Registry.Update(ctx, pruner, func(tx *registry.Tx) error {
		b, err := tx.Bundle(e.cfg.TrustDomain)
		if err != nil {
			return err
		}
		changed := b.Clone()
		changed.JWT = slices.DeleteFunc(changed.JWT, func(k bundle.JWTAuthority) bool { return slices.Contains(ids, k.KeyID) })
		if changed.Equal(b) {
			return nil
		}
		changed.Sequence = b.Sequence + 1
		return tx.PutBundle(changed)
	})
	return err
}

// inBatches keeps one transaction small.
func inBatches[T any](all []T, f func([]T) error) error {
	for len(all) > 0 {
		n := min(len(all), pruneBatch)
		if err := f(all[:n]); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// optional turns "not found" into nil.
func optional[T any](row T, err error) (*T, error) {
	switch {
	case err == nil:
		return &row, nil
	case fault.KindOf(err) == fault.NotFound:
		return nil, nil
	}
	return nil, err
}
