package mirror

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/reason"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Waits of the loop that follows the server.
const (
	followFloor   = 200 * time.Millisecond
	followCeiling = 4 * time.Second
	// pulse is how soon it is noticed that the machine slept: timers do not count sleep (R57).
	pulse = 2 * time.Second
	// clockStep is by how much the wall clock has to leave the other one between two
	// looks to count as set.
	clockStep = 100 * time.Millisecond
)

// Link is the way to the server.
type Link interface {
	// Follow opens the stream of changes.
	Follow(ctx context.Context) (Stream, error)
	// X509 has SVIDs signed; the results are in the order of the items.
	X509(ctx context.Context, items []serverlink.X509Item) ([]serverlink.X509Result, error)
	// JWT has one token signed.
	JWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (serverlink.JWTResult, error)
}

// Stream is one conversation of the sync protocol. One goroutine may send while
// another receives. Close makes both return.
type Stream interface {
	Send(*syncv1.AgentMessage) error
	Recv() (*syncv1.ServerMessage, error)
	Close()
}

// Config is what a mirror is made of.
type Config struct {
	TrustDomain  spiffeid.TrustDomain
	Link         Link
	CacheSize    int       // X.509-SVIDs held, unless subscribers need more; 0: DefaultCacheSize
	JWTCacheSize int       // 0: DefaultCacheSize
	KeyType      keys.Type // of workloads; empty: ec-p256
	Version      string    // of the agent, for the server's records
	// Directive is told what the server wants the agent to do about itself, OwnBundle
	// each new state of the own trust domain's bundle, StreamEnded why a
	// conversation could not be opened or broke. None may block; nil is ignored.
	Directive   func(*syncv1.Directive)
	OwnBundle   func(*bundle.Bundle)
	StreamEnded func(error)
	// Changed is told when Keep would return something else; narrowed says that some of
	// what it returned before must not be used any more. It may not block. nil: nothing
	// is kept.
	Changed func(narrowed bool)
	// Hint asks the server whether an entry that does not reach this agent fits a
	// process: a code of package reason, or nothing. nil: it is not asked.
	Hint func(ctx context.Context, selectors []entry.Selector) (string, error)
	// Boot is a clock that counts a machine's sleep and cannot be set; nil: the
	// process's own, which does not count sleep.
	Boot func() time.Duration
	Log  *slog.Logger
}

// Mirror is the agent's copy. All methods may be called concurrently.
type Mirror struct {
	cfg    Config
	kick   chan struct{} // the next time at which something is due may have changed
	batch  chan []want   // to the signer
	synced chan struct{} // closed after the first complete sync

	mu          sync.Mutex // guards everything below
	machine     *machine
	subscribers map[*group]map[*Subscription]bool
	tokens      *tokens
	hints       *hints
	recent      recent
	asking      map[string]chan struct{} // tokens being signed; closed when done
	out         *outbox                  // of the conversation under way, or nil
	last        moment                   // when the clocks were looked at
}

// New returns a mirror that holds nothing yet.
func New(cfg Config) *Mirror {
	if cfg.JWTCacheSize <= 0 {
		cfg.JWTCacheSize = DefaultCacheSize
	}
	if cfg.Boot == nil {
		start := time.Now()
		cfg.Boot = func() time.Duration { return time.Since(start) }
	}
	m := &Mirror{
		cfg: cfg, kick: make(chan struct{}, 1), batch: make(chan []want, 1), synced: make(chan struct{}),
		machine:     newMachine(cfg.TrustDomain, cfg.CacheSize, cfg.Version),
		subscribers: map[*group]map[*Subscription]bool{},
		tokens:      newTokens(cfg.JWTCacheSize),
		hints:       newHints(),
		asking:      map[string]chan struct{}{},
	}
	m.machine.keeps = cfg.Changed != nil
	if cfg.KeyType != "" {
		m.machine.keyType = cfg.KeyType
	}
	return m
}

// Keep returns what Restore takes: everything held, with workloads' keys, or nil
// before the first sync. Whoever stores it seals it (R48).
func (m *Mirror) Keep() ([]byte, error) {
	m.mu.Lock()
	if !m.machine.synced {
		m.mu.Unlock()
		return nil, nil
	}
	k, err := m.machine.keep(m.tokens)
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return json.Marshal(k)
}

// Restore takes over what an earlier life has kept, before Run and before anyone
// subscribes. trusted is the own trust domain's bundle as the agent knows it from
// elsewhere. From then on what has not expired is served, as if the server had
// gone away a moment ago.
func (m *Mirror) Restore(data []byte, trusted *bundle.Bundle) (Restored, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.machine.restore(data, trusted, m.tokens, m.moment(), random())
	if err == nil {
		close(m.synced)
	}
	return r, err
}

// changedLocked tells whoever keeps that there is something new.
func (m *Mirror) changedLocked(narrowed bool) {
	if m.cfg.Changed != nil {
		m.cfg.Changed(narrowed)
	}
}

// Synced is closed once the server has said, completely, what there is.
func (m *Mirror) Synced() <-chan struct{} { return m.synced }

// Stats says how much is held.
func (m *Mirror) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.machine.stats()
}

// Report says how the mirror is doing, and which SVIDs end first, at most n of them.
func (m *Mirror) Report(n int) Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.machine.report(n)
	r.JWTSVIDs = m.tokens.held()
	return r
}

// Run follows the server until ctx is done.
func (m *Mirror) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { m.sign(ctx) })
	wg.Go(func() { m.ticks(ctx) })
	failures := 0
	for ctx.Err() == nil {
		good, err := m.follow(ctx)
		if err != nil && ctx.Err() == nil && m.cfg.StreamEnded != nil {
			m.cfg.StreamEnded(err)
		}
		if failures++; good {
			failures = 1
		}
		pause(ctx, max(backoff(failures, followFloor, followCeiling, random(), 0), fault.AfterOf(err)))
	}
	wg.Wait()
	return ctx.Err()
}

// follow has one conversation with the server. It was good if something was
// acknowledged in it.
func (m *Mirror) follow(ctx context.Context) (good bool, err error) {
	stream, err := m.cfg.Link.Follow(ctx)
	if err != nil {
		m.step(disconnected{err})
		return false, err
	}
	out := &outbox{ready: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(ctx)
	m.mu.Lock()
	m.out = out
	m.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stream.Close()
		for {
			select {
			case <-out.ready:
			case <-ctx.Done():
				return
			}
			for _, msg := range out.take() {
				if stream.Send(msg) != nil {
					return // Recv says why
				}
			}
		}
	})
	defer func() {
		cancel()
		stream.Close()
		wg.Wait()
		m.step(disconnected{err})
	}()
	m.step(connected{})
	for {
		msg, err := stream.Recv()
		if err != nil {
			return good, err
		}
		fx := m.step(msg)
		for _, s := range fx.send {
			good = good || s.GetAck() != nil
		}
		if fx.resync == serverBehind {
			return good, fault.New(fault.Unavailable, serverBehind, "the server stands before what another has told").
				Fix("see with 'plastron server list' why it does not keep up")
		}
		if fx.resync != "" {
			return good, nil
		}
	}
}

// step feeds one event to the machine and does what follows.
func (m *Mirror) step(what any) effects {
	m.mu.Lock()
	fx := m.machine.step(event{now: m.nowLocked(), seed: random(), what: what})
	if m.out != nil {
		m.out.add(fx.send)
	}
	for _, g := range fx.wake {
		for s := range m.subscribers[g] {
			s.signal()
		}
	}
	if fx.keysGone {
		m.tokens.drop(m.machine.goodKey)
	}
	if fx.keysGone || what == any(connected{}) {
		m.tokens.retry()
	}
	if fx.changed {
		m.changedLocked(fx.narrowed)
	}
	if fx.own != nil && m.cfg.OwnBundle != nil {
		m.cfg.OwnBundle(fx.own)
	}
	if m.machine.synced {
		select {
		case <-m.synced:
		default:
			close(m.synced)
		}
	}
	m.mu.Unlock()

	for _, n := range fx.notes {
		m.cfg.Log.Warn("sync notice", "kind", n.message, "id", n.id, "reason", n.reason, "count", n.count)
	}
	for _, d := range fx.directives {
		if m.cfg.Directive != nil {
			m.cfg.Directive(d)
		}
	}
	if len(fx.sign) > 0 {
		m.batch <- fx.sign // the machine asks for one batch at a time, so there is room
	}
	if what != any(tick{}) {
		m.look()
	}
	return fx
}

// look has what is due looked for.
func (m *Mirror) look() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// ticks steps the machine, and renews tokens, when something is due.
func (m *Mirror) ticks(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.kick:
		case <-timer.C:
		}
		token := m.renewTokens(ctx, &workers)
		next, last := m.nextTick()
		if now := wallClock(); !now.Before(next) || now.Before(last) {
			m.step(tick{})
			next, _ = m.nextTick()
		}
		if token.Before(next) {
			next = token
		}
		timer.Reset(min(max(next.Sub(wallClock()), 0), pulse))
	}
}

// nextTick returns when something is due, and when the machine last looked.
func (m *Mirror) nextTick() (next, last time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next = m.machine.next
	if at := m.machine.statusDue(wallClock()); m.machine.online && m.machine.synced && at.Before(next) {
		next = at // the tokens are no part of the machine
	}
	return next, m.machine.now
}

// sign has one batch signed after the other. Each SVID has a new key, which
// exists nowhere but in memory (R48).
func (m *Mirror) sign(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case batch := <-m.batch:
			items, err := m.signBatch(ctx, batch)
			if err != nil {
				if ctx.Err() == nil {
					m.cfg.Log.Warn("batch was not signed", "count", len(batch), "reason", fault.ReasonOf(err), "err", err)
				}
				m.step(signFailed{err})
				continue
			}
			m.step(items)
		}
	}
}

func (m *Mirror) signBatch(ctx context.Context, batch []want) (signed, error) {
	made := make([]keys.Private, len(batch))
	requests := make([]serverlink.X509Item, len(batch))
	for i, w := range batch {
		key, err := keys.NewPrivate(m.machine.keyType)
		if err != nil {
			return nil, err
		}
		csr, err := svid.NewCSR(key)
		if err != nil {
			return nil, err
		}
		made[i], requests[i] = key, serverlink.X509Item{GrantID: w.grantID, Facts: w.facts, CSR: csr}
	}
	results, err := m.cfg.Link.X509(ctx, requests)
	if err != nil {
		return nil, err
	}
	if len(results) != len(batch) {
		return nil, errors.New("the server did not answer each item once")
	}
	// Verified here and not in the step, so that nobody waits for it. The step
	// only checks that the authority is still in the bundle.
	m.mu.Lock()
	var roots []*x509.Certificate
	if own := m.machine.own(); own != nil {
		roots = own.bundle.Roots()
	}
	m.mu.Unlock()
	items := make(signed, len(batch))
	for i, r := range results {
		items[i] = signedItem{grantID: batch[i].grantID, facts: batch[i].facts, err: r.Err, refused: r.Err != nil}
		if r.Err != nil {
			continue
		}
		pkcs8, err := made[i].PKCS8()
		if err == nil {
			items[i].cert, err = verify(batch[i], r.Chain, made[i], pkcs8, r.Revision, roots, m.moment())
		}
		items[i].err = err
	}
	return items, nil
}

// Subscription is one listener of whom certain selectors and facts are known.
type Subscription struct {
	mirror  *Mirror
	group   *group
	changed chan struct{}
	once    sync.Once
}

// Subscribe listens to what callers of whom this is known are given. While it is
// open, the mirror sees to it that every grant that matches has an SVID.
func (m *Mirror) Subscribe(facts entry.Facts) *Subscription {
	m.mu.Lock()
	now := m.nowLocked()
	s := &Subscription{mirror: m, group: m.machine.join(facts, now), changed: make(chan struct{}, 1)}
	if m.subscribers[s.group] == nil {
		m.subscribers[s.group] = map[*Subscription]bool{}
	}
	m.subscribers[s.group][s] = true
	pending := m.machine.view(s.group, now).Pending > 0
	m.mu.Unlock()
	if pending {
		m.step(tick{})
	}
	return s
}

// Changed receives when the view may have changed since the last call of View.
func (s *Subscription) Changed() <-chan struct{} { return s.changed }

// View returns what the caller is given now.
func (s *Subscription) View() View {
	s.mirror.mu.Lock()
	defer s.mirror.mu.Unlock()
	return s.mirror.machine.view(s.group, s.mirror.nowLocked())
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.once.Do(func() {
		m := s.mirror
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subscribers[s.group], s)
		if len(m.subscribers[s.group]) == 0 {
			delete(m.subscribers, s.group)
		}
		m.machine.leave(s.group, m.nowLocked())
		if m.machine.full {
			m.look()
		}
	})
}

func (s *Subscription) signal() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Why says what a process is given and what keeps the rest away. Where little
// speaks for any grant that is held, the server is asked whether another entry
// fits; fresh asks even if it was asked a moment ago.
func (m *Mirror) Why(ctx context.Context, facts entry.Facts, fresh bool) Why {
	facts.Selectors = normalised(facts.Selectors)
	m.mu.Lock()
	now, all := m.nowLocked(), groupKey(facts)
	held := m.recent.current(m.machine.steps, now)
	w, known := held[all]
	if fresh || !known {
		w = m.machine.why(facts, now)
		held[all] = w
	}
	if !w.faint || !w.Sync.Connected || m.cfg.Hint == nil {
		m.mu.Unlock()
		return w
	}
	key := groupKey(entry.Facts{Selectors: facts.Selectors})
	code, known := m.hints.find(key, now)
	ask := (fresh || !known) && m.hints.ask(facts.Selectors, now)
	if ask {
		m.hints.keep(key, code, now) // who comes meanwhile does not ask too
	}
	m.mu.Unlock()
	if ask {
		ctx, cancel := context.WithTimeout(ctx, hintWait)
		defer cancel()
		var err error
		if code, err = m.cfg.Hint(ctx, facts.Selectors); err != nil {
			m.cfg.Log.Debug("server gave no hint", "reason", fault.ReasonOf(err), "err", err)
		}
		m.mu.Lock()
		m.hints.keep(key, code, now)
		m.mu.Unlock()
	}
	if r := reason.Find(code); r == reason.ParentMismatch || r == reason.AliasMismatch {
		w.Reason = r
	}
	return w
}

// outbox is what waits to be sent on one conversation.
type outbox struct {
	ready   chan struct{}
	mu      sync.Mutex // guards waiting
	waiting []*syncv1.AgentMessage
}

func (o *outbox) add(msgs []*syncv1.AgentMessage) {
	if len(msgs) == 0 {
		return
	}
	o.mu.Lock()
	o.waiting = append(o.waiting, msgs...)
	o.mu.Unlock()
	select {
	case o.ready <- struct{}{}:
	default:
	}
}

func (o *outbox) take() []*syncv1.AgentMessage {
	o.mu.Lock()
	defer o.mu.Unlock()
	msgs := o.waiting
	o.waiting = nil
	return msgs
}

// wallClock is the time without its monotonic part, which stands still while
// the machine sleeps.
func wallClock() time.Time { return time.Now().Round(0) }

func (m *Mirror) moment() moment { return moment{wallClock(), m.cfg.Boot()} }

// nowLocked returns the wall clock's time. If it was set since the last look, what
// is held follows.
func (m *Mirror) nowLocked() time.Time {
	at := m.moment()
	if by := at.wall.Sub(m.last.wall) - (at.boot - m.last.boot); by.Abs() > clockStep && !m.last.wall.IsZero() {
		m.machine.follow(at)
		m.tokens.follow(at)
	}
	m.last = at
	return at.wall
}

func random() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return binary.LittleEndian.Uint64(b[:])
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// JWT is a token, ready to be handed out.
type JWT struct {
	GrantID string
	ID      spiffeid.ID
	Hint    string
	Token   string
}

var errGrantGone = fault.New(fault.Denied, "grant_gone", "no identity issued")

// JWT returns a token of a grant for an exact set of audiences. While one that
// was signed before is good, nobody waits for the server: it is renewed without
// the caller. The caller has seen the grant in its View.
func (m *Mirror) JWT(ctx context.Context, matched entry.Matched, audience []string) (JWT, error) {
	grantID, facts := matched.GrantID, matched.Facts
	key := askKey(grantID, facts, audience)
	for {
		m.mu.Lock()
		now := m.nowLocked()
		id, e, ok := m.machine.gives(grantID, facts, now)
		if !ok {
			m.mu.Unlock()
			return JWT{}, errGrantGone
		}
		out := JWT{GrantID: grantID, ID: id, Hint: e.Hint}
		single := e.JWTIncludeJTI // each such token is one of a kind
		if held := m.tokens.find(key, subject{id, e.Revision}, now); held != nil && !single {
			m.mu.Unlock()
			out.Token = held.text
			return out, nil
		}
		done := m.asking[key]
		if done == nil && !single {
			m.asking[key] = make(chan struct{})
		}
		m.mu.Unlock()

		if done != nil && !single { // someone is at it
			select {
			case <-done:
				continue
			case <-ctx.Done():
				return JWT{}, ctx.Err()
			}
		}
		sign := m.signShared
		if single {
			sign = m.signJWT
		}
		tok, err := sign(ctx, grantID, facts, audience)
		if err != nil {
			return JWT{}, err
		}
		out.Token = tok.text
		return out, nil
	}
}

// signShared has a token signed for all who wait for it. Whatever becomes of that,
// they go on (R99).
func (m *Mirror) signShared(ctx context.Context, grantID string, facts map[string]string, audience []string) (tok *token, err error) {
	key := askKey(grantID, facts, audience)
	defer func() {
		m.mu.Lock()
		close(m.asking[key])
		delete(m.asking, key)
		if tok != nil && m.machine.goodKey(tok.keyID) {
			m.tokens.keep(grantID, facts, audience, tok, m.nowLocked())
			m.changedLocked(false)
		}
		m.mu.Unlock()
		m.look()
	}()
	return m.signJWT(ctx, grantID, facts, audience)
}

// renewTokens begins the renewals that are due and returns when to look again.
func (m *Mirror) renewTokens(ctx context.Context, workers *sync.WaitGroup) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.nowLocked()
	asks, next := m.tokens.due(now, tokenWorkers, func(a *ask) (of subject, ends, ok bool) {
		id, e, ok := m.machine.gives(a.grantID, a.facts, now)
		return subject{id, e.Revision}, a.token != nil && a.token.endsWith(&e), ok && !e.JWTIncludeJTI
	})
	m.machine.first[1] = m.tokens.first
	for _, a := range asks {
		a.busy = true
		workers.Go(func() { m.renewToken(ctx, a) })
	}
	return next
}

func (m *Mirror) renewToken(ctx context.Context, a *ask) {
	tok, err := m.signJWT(ctx, a.grantID, a.facts, a.audience)
	if err != nil && ctx.Err() == nil {
		m.cfg.Log.Debug("token was not renewed", "grant", a.grantID, "reason", fault.ReasonOf(err), "err", err)
	}
	m.mu.Lock()
	a.busy = false
	switch {
	case err == nil && m.machine.goodKey(tok.keyID):
		m.tokens.renewed(a, tok)
		m.changedLocked(false)
	case err == nil: // tainted in this moment; it is tried again at once
	default:
		m.tokens.failed(a, err, m.nowLocked(), random())
	}
	m.mu.Unlock()
	m.look()
}

// signJWT has a token signed and verifies it before anyone sees it (R36).
func (m *Mirror) signJWT(ctx context.Context, grantID string, facts map[string]string, audience []string) (*token, error) {
	m.mu.Lock()
	id, e, ok := m.machine.gives(grantID, facts, m.nowLocked())
	m.mu.Unlock()
	if !ok {
		return nil, errGrantGone
	}
	r, err := m.cfg.Link.JWT(ctx, grantID, facts, audience)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	own, skew := m.machine.own(), m.machine.ledger.skew // the bundle may have changed meanwhile
	m.mu.Unlock()
	if own == nil {
		return nil, fault.New(fault.Unavailable, "not_synced", "the agent has not been told yet what there is")
	}
	at := m.moment()
	tok := &token{text: r.Token, of: subject{id, e.Revision}}
	claims, err := verifyJWT(tok, own, audience, at.wall)
	if err != nil {
		if _, then := verifyJWT(tok, own, audience, at.wall.Add(skew)); then == nil {
			return nil, reason.ClockSkew.Because(err)
		}
		return nil, fault.New(fault.Unavailable, "jwt_refused", "the server signed a token that does not verify").Because(err)
	}
	if claims.ID != id || audienceKey(claims.Audience) != audienceKey(audience) {
		return nil, fault.New(fault.Unavailable, "jwt_refused", "the server signed a token for another identity or audience")
	}
	if !own.goodKey(tok.keyID) {
		return nil, fault.New(fault.Unavailable, "jwt_refused", "the server signed a token with a key that is tainted")
	}
	tok.span = lasting(at.wall, claims.Expiry, at)
	tok.renewAt = tok.issuedAt.Add(jitter(tok.expiresAt.Sub(tok.issuedAt)/2, random(), 0))
	if tok.endsWith(&e) {
		tok.renewAt = tok.expiresAt
	}
	return tok, nil
}
