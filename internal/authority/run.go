package authority

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
	"github.com/plastron/plastron/internal/upstream"
)

const (
	// MinTTL is the shortest life of a key: below it the steps of a rotation fall
	// into one second.
	MinTTL = 6 * time.Second

	maxSteps   = 64               // of one round; a rotation from nothing takes seven
	maxSleep   = 10 * time.Minute // so that a clock that was set is noticed
	retryFirst = time.Second
	retryMost  = time.Minute
	aboveWait  = 30 * time.Second // for an answer of the authority above
)

// Config is what an Authority works with.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	ServerID    string // this server's, which keys of others are not touched by
	Keeper      keys.Keeper
	Registry    *registry.Registry
	TTL         time.Duration // life of a key, whole seconds; ca_ttl
	KeyType     keys.Type     // of X.509 authorities; default ec-p256
	JWTKeyType  keys.Type     // default: as KeyType
	MaxWait     time.Duration // of a prepared key, for who is silent; default DefaultMaxWait
	// Peers says who is not known to have what is committed up to a position: Known, if
	// servers and agents report. Nil: everyone has it at once.
	Peers func(s *registry.Snapshot, self string, at store.Position, now time.Time) Peers
	// Revoked is what this server remembers as revoked, whatever the store was
	// restored to; Remember, which may be nil, keeps it.
	Revoked  []bundle.Revocation
	Remember func([]bundle.Revocation) error
	// May says why this server may neither sign nor change what is shared, if so (R68,
	// R70), MayPrune why it may not remove what time has ended. Nil: it always may.
	May, MayPrune func(now time.Time) error
	// Upstream signs our X.509 authorities. Nil: they sign themselves.
	Upstream upstream.Authority
	// Alarm, which may be nil, is told of an authority that nears its end and could
	// not be replaced.
	Alarm func(authorityID, reason, detail string)
	Log   *slog.Logger
}

// Authority turns the machine for each kind of this server's keys and hands out
// the signers that are active.
type Authority struct {
	Config
	// lines and revoked are owned by whoever runs Start and then Run.
	lines    []*line
	revoked  []bundle.Revocation
	wake     chan struct{}
	requests chan request
	stopped  chan struct{} // closed when Run has ended
	running  atomic.Bool   // Start has ended: agents are served
	waits    atomic.Bool   // some prepared key waits for acknowledgements
	changed  moment
	x509     atomic.Pointer[svid.X509Issuer]
	jwt      atomic.Pointer[svid.JWTIssuer]
	above    above
	group    sync.WaitGroup // of what Run has going on beside it
}

// line is one kind of key on its way.
type line struct {
	kind
	keyType   keys.Type
	create    func(ctx context.Context, key keys.Key, s *registry.Slot) error // fills in what is known once the key is made
	install   func(key keys.Key, s registry.Slot) error                       // makes it the one that signs
	clear     func()                                                          // nothing signs
	made      *registry.Slot                                                  // made, not published yet
	ask       *ask                                                            // what an operator wants
	caller    string                                                          // who that is
	published atomic.Pointer[publication]                                     // of the prepared key, if it was in this life
	done      answer                                                          // to ask
	waits     bool                                                            // the prepared key waits for acknowledgements
	active    string                                                          // the authority that is installed
	wait      time.Duration                                                   // until the next try, after a failure
	job       *job                                                            // under way with the authority above
	retry     time.Time                                                       // not before then is the authority above asked again
	alarmed   int                                                             // percent of life left that was alarmed last; 0: none
}

// publication is where the log first holds a key.
type publication struct {
	authority string
	at        store.Position
}

// job is a key that is being signed or published above. done guards the rest.
type job struct {
	done chan struct{}
	slot registry.Slot
	err  error
}

type request struct {
	line   *line
	ask    *ask
	caller string
	done   chan answer
}

// answer is what became of a request.
type answer struct {
	slot   registry.Slot // the key that it was about
	passed []Missing     // who a key that was activated did not wait for
	err    error
}

// moment is something that happens again and again.
type moment struct {
	mu   sync.Mutex
	next chan struct{}
}

// wait returns what is closed when it happens next.
func (m *moment) wait() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.next == nil {
		m.next = make(chan struct{})
	}
	return m.next
}

func (m *moment) happen() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.next != nil {
		close(m.next)
		m.next = nil
	}
}

// New checks the configuration. Nothing is made before Start.
func New(c Config) (*Authority, error) {
	if c.TTL < MinTTL || c.TTL%time.Second != 0 {
		return nil, fault.New(fault.Invalid, "ca_ttl_invalid", "ca_ttl: %v is less than %v or not whole seconds", c.TTL, MinTTL)
	}
	if c.ServerID == "" || strings.Contains(c.ServerID, "/") {
		return nil, fault.New(fault.Invalid, "server_id_invalid", "%q is not a server id", c.ServerID)
	}
	if c.KeyType == "" {
		c.KeyType = keys.ECP256
	}
	if c.JWTKeyType == "" {
		c.JWTKeyType = c.KeyType
	}
	if c.MaxWait == 0 {
		c.MaxWait = DefaultMaxWait
	}
	a := &Authority{Config: c, revoked: c.Revoked, wake: make(chan struct{}, 1), requests: make(chan request), stopped: make(chan struct{})}
	// X.509 comes first: the server itself needs it.
	a.above.publisher, _ = c.Upstream.(upstream.Publisher)
	a.lines = []*line{
		{kind: x509Kind(), keyType: c.KeyType, create: a.createX509, install: a.installX509, clear: func() { a.x509.Store(nil) }},
		{kind: jwtKind(), keyType: c.JWTKeyType, create: a.createJWT, install: a.installJWT, clear: func() { a.jwt.Store(nil) }},
	}
	// A bundle that others change may end the use of a key; what servers say of
	// themselves and their agents may be what a prepared key waits for.
	c.Registry.Batches(func(b store.Batch) {
		for _, w := range b.Writes {
			if slices.ContainsFunc(w.Changes, func(c store.Change) bool {
				return strings.HasPrefix(c.Key, "/bundle/") ||
					a.waits.Load() && (strings.HasPrefix(c.Key, "/server/") || strings.HasPrefix(c.Key, "/roster/"))
			}) {
				a.poke()
				return
			}
		}
		if len(b.Writes) == 0 { // loaded afresh
			a.poke()
		}
	})
	return a, nil
}

// poke lets Run look at once.
func (a *Authority) poke() {
	select {
	case a.wake <- struct{}{}:
	default: // it will look anyway
	}
	a.changed.happen()
}

// X509 returns the active X.509 authority.
func (a *Authority) X509(now time.Time) (*svid.X509Issuer, error) {
	if err := checkClock(now); err != nil {
		return nil, err
	}
	i := a.x509.Load()
	if i == nil || !now.Before(i.NotAfter()) {
		return nil, a.unavailable("X.509 authority")
	}
	return i, nil
}

// JWT returns the active JWT key.
func (a *Authority) JWT(now time.Time) (*svid.JWTIssuer, error) {
	if err := checkClock(now); err != nil {
		return nil, err
	}
	i := a.jwt.Load()
	if i == nil || !now.Before(i.NotAfter()) {
		return nil, a.unavailable("JWT key")
	}
	return i, nil
}

func (a *Authority) unavailable(what string) error {
	a.poke()
	return fault.New(fault.Unavailable, "authority_unavailable", "this server has no active %s at the moment", what).
		Fix("retry; if it lasts, see the server's log and clock")
}

// Run keeps the keys in order until ctx is done. A step that fails is tried
// again; what signs goes on signing meanwhile (R67).
func (a *Authority) Run(ctx context.Context) error {
	defer a.group.Wait()
	if a.Upstream != nil {
		a.group.Go(func() { a.watchAbove(ctx) })
	}
	a.running.Store(true)
	defer close(a.stopped)
	for {
		timer := time.NewTimer(a.round(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-a.wake:
		case r := <-a.requests:
			r.done <- a.answer(ctx, r)
		}
		timer.Stop()
	}
}

// round takes every step that is due and returns how long to wait.
func (a *Authority) round(ctx context.Context) time.Duration {
	wait := maxSleep
	for _, l := range a.lines {
		next, err := a.settle(ctx, l)
		if ctx.Err() != nil {
			return 0
		}
		if err != nil {
			l.wait = a.failed(ctx, l, err)
			l.retry = time.Now().Add(l.wait)
			wait = min(wait, l.wait)
			continue
		}
		if l.job == nil && !time.Now().Before(l.retry) {
			l.wait, l.alarmed = 0, 0
		}
		if !next.IsZero() {
			wait = min(wait, time.Until(next))
		}
	}
	return max(wait, 0)
}

// request has Run do what an operator asks for.
func (a *Authority) request(ctx context.Context, caller, kind string, q *ask) (answer, error) {
	i := slices.IndexFunc(a.lines, func(l *line) bool { return l.name == kind })
	if i < 0 {
		return answer{}, fault.New(fault.Invalid, "authority_kind_invalid", "%q is not a kind of authority", kind).Fix("use %s or %s", X509, JWT)
	}
	r := request{a.lines[i], q, caller, make(chan answer, 1)}
	select {
	case a.requests <- r:
		done := <-r.done
		return done, done.err
	case <-a.stopped:
		return answer{}, fault.New(fault.Unavailable, "server_stopping", "the server is shutting down")
	case <-ctx.Done():
		return answer{}, fmt.Errorf("wait for the authority: %w", ctx.Err())
	}
}

// Prepare makes and publishes another key of a kind, in place of one that was
// prepared before. Like all that follows it needs Run to be running, and is on
// record as the caller's.
func (a *Authority) Prepare(ctx context.Context, caller, kind string) (registry.Slot, error) {
	q := &ask{do: askPrepare}
	if s, ok := a.prepared(kind); ok {
		q.id = s.AuthorityID
	}
	done, err := a.request(ctx, caller, kind, q)
	return done.slot, err
}

// Prepared returns the prepared key of a kind, and prepares one if there is none.
func (a *Authority) Prepared(ctx context.Context, caller, kind string) (registry.Slot, error) {
	if s, ok := a.prepared(kind); ok {
		return s, nil
	}
	return a.Prepare(ctx, caller, kind)
}

// Activate lets a prepared key sign, once all who could meet its documents have
// acknowledged it: it waits for them until ctx is done, and then says who is
// missing. With force it does not wait, and returns whom it passed over.
func (a *Authority) Activate(ctx context.Context, caller, kind, id string, force bool) (registry.Slot, []Missing, error) {
	for {
		changed := a.changed.wait()
		done, err := a.request(context.WithoutCancel(ctx), caller, kind, &ask{do: askActivate, id: id, force: force})
		if err == nil || fault.ReasonOf(err) != "authority_not_acknowledged" || ctx.Err() != nil {
			return done.slot, done.passed, err
		}
		timer := time.NewTimer(fault.AfterOf(err))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// Taint marks an old key, so that everything under it is replaced.
func (a *Authority) Taint(ctx context.Context, caller, kind, id string) (registry.Slot, error) {
	done, err := a.request(ctx, caller, kind, &ask{do: askTaint, id: id})
	return done.slot, err
}

// Revoke takes a tainted old key out of the bundle for ever.
func (a *Authority) Revoke(ctx context.Context, caller, kind, id string) (registry.Slot, error) {
	done, err := a.request(ctx, caller, kind, &ask{do: askRevoke, id: id})
	return done.slot, err
}

// TaintUpstream marks a root of the authority above, by its subject key
// identifier, so that everything under it is replaced.
func (a *Authority) TaintUpstream(ctx context.Context, caller, id string) error {
	_, err := a.request(ctx, caller, X509, &ask{do: askTaintAbove, id: id})
	return err
}

// RevokeUpstream takes a tainted root of the authority above out of the bundle for ever.
func (a *Authority) RevokeUpstream(ctx context.Context, caller, id string) error {
	_, err := a.request(ctx, caller, X509, &ask{do: askRevokeAbove, id: id})
	return err
}

// Slots returns this server's keys of a kind, as committed.
func (a *Authority) Slots(kind string) (slots []registry.Slot) {
	a.Registry.View(func(s *registry.Snapshot) {
		for _, stored := range s.Authorities(a.ServerID) {
			if stored.Kind == kind {
				slots = stored.Slots
			}
		}
	})
	return slots
}

// Status says of each server and kind of key what state its keys are in and what
// happens next.
func (a *Authority) Status(now time.Time) (out []Status) {
	now = now.UTC().Truncate(time.Second)
	a.Registry.View(func(snap *registry.Snapshot) {
		b, err := snap.Bundle(a.TrustDomain)
		if err != nil {
			return // there are no keys either
		}
		for _, stored := range snap.Authorities("") {
			for _, l := range a.lines {
				if l.name == stored.Kind {
					e := event{Now: now, Lifetime: a.TTL, MaxWait: a.MaxWait, Bundle: b, Peers: a.peers(snap, l, stored.Server, stored.Slots, now),
						Above: a.aboveNow(), Others: others(snap, stored.Server, l.name)}
					st := status(l.kind, stored, e)
					if st.Err == nil && stored.Server == a.ServerID && (l.name == X509 || e.Above != nil && e.Above.Publishes) {
						st.Err = a.UpstreamHealth() // what signs goes on
					}
					out = append(out, st)
				}
			}
		}
	})
	return out
}

func (a *Authority) prepared(kind string) (registry.Slot, bool) {
	return find(a.Slots(kind), func(s registry.Slot) bool { return s.State == registry.SlotPrepared })
}

func find(slots []registry.Slot, is func(registry.Slot) bool) (registry.Slot, bool) {
	if i := slices.IndexFunc(slots, is); i >= 0 {
		return slots[i], true
	}
	return registry.Slot{}, false
}

// answer does what an operator asks for.
func (a *Authority) answer(ctx context.Context, r request) answer {
	l := r.line
	l.ask, l.caller, l.done = r.ask, r.caller, answer{}
	_, err := a.settle(ctx, l)
	l.ask = nil
	switch {
	case l.done.slot.AuthorityID != "":
		if err != nil { // what failed comes after it
			err = nil
			a.poke()
		}
	case err == nil: // it was so before
		l.done.slot, _ = find(a.Slots(l.name), func(s registry.Slot) bool { return s.AuthorityID == r.ask.id })
	}
	l.done.err = err
	return l.done
}

// settle takes steps until none is due, and returns when the next one is.
func (a *Authority) settle(ctx context.Context, l *line) (time.Time, error) {
	for range maxSteps {
		var may error
		if a.May != nil {
			may = a.May(time.Now())
		}
		if may != nil {
			// What others decide about the key meanwhile is looked at before it signs again.
			l.clear()
			l.active = ""
			if !l.ask.withdraws() { // that is always allowed
				return time.Time{}, may
			}
		}
		held, err := a.held(ctx, l)
		if err != nil {
			return time.Time{}, err
		}
		s, err := a.commit(ctx, l, held, may != nil)
		if err != nil {
			return time.Time{}, err
		}
		if may != nil {
			if s.Rule != "" {
				a.Log.InfoContext(ctx, "authority changed", "kind", l.name, "reason", s.Rule)
			}
			return time.Time{}, a.remember(s.Bundle)
		}
		if err := a.follow(l, s, held); err != nil {
			return time.Time{}, err
		}
		switch {
		case s.Make != nil:
			if s.Make.Upstream && l.job == nil && l.ask == nil && time.Now().Before(l.retry) {
				return l.retry, nil
			}
			if err := a.makeKey(ctx, l, *s.Make); err != nil {
				return time.Time{}, err
			}
			if l.job != nil {
				return time.Time{}, nil // its end is told
			}
		case s.Rule == "":
			a.await(ctx, l, s.Missing)
			return s.At, a.remember(s.Bundle)
		default:
			log := a.Log.With("kind", l.name, "reason", s.Rule)
			if l.active != "" { // there is none before the first
				log = log.With("key_id", l.active)
			}
			if len(s.Missing) > 0 {
				log.WarnContext(ctx, "authority goes on without some who have not acknowledged it", "count", len(s.Missing), "agent", names(s.Missing))
				break
			}
			log.InfoContext(ctx, "authority changed")
		}
	}
	return time.Time{}, fault.New(fault.Internal, "authority_unsettled", "the %s authority took %d steps without coming to rest", l.name, maxSteps)
}

// held reads the line's keys from the keeper.
func (a *Authority) held(ctx context.Context, l *line) (map[string]keys.Key, error) {
	held := map[string]keys.Key{}
	for _, name := range slotNames() {
		key, err := a.Keeper.Key(ctx, l.key+"-"+name)
		if fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read key: %w", err)
		}
		held[key.ID] = key
	}
	return held, nil
}

// commit decides on the next step and stores it, with the change of the bundle,
// in the transaction in which it was decided. A step that cannot be written is
// not taken (R66).
func (a *Authority) commit(ctx context.Context, l *line, held map[string]keys.Key, hold bool) (step, error) {
	e := event{Lifetime: a.TTL, MaxWait: a.MaxWait, Ask: l.ask, Hold: hold, Held: map[string][]byte{}, Revoked: a.revoked, Above: a.aboveNow()}
	for id, key := range held {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return step{}, fmt.Errorf("encode public key %q: %w", id, err)
		}
		e.Held[id] = spki
	}
	now := time.Now()
	e.Keep = a.MayPrune != nil && a.MayPrune(now) != nil
	e.Now = now.UTC().Truncate(time.Second) // as stored times are
	var s step
	caller := "authority"
	if l.ask != nil {
		caller = l.caller
	}
	at, err := a.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		if err := tx.StillIn(a.ServerID); err != nil {
			return err
		}
		stored, err := tx.Authority(a.ServerID, l.name)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
		e.Bundle, err = tx.Bundle(a.TrustDomain)
		if fault.KindOf(err) == fault.NotFound {
			e.Bundle = &bundle.Bundle{TrustDomain: a.TrustDomain, RefreshHint: DefaultRefreshHint}
		} else if err != nil {
			return err
		}
		l.made = still(l.made, stored.Slots)
		e.Made = l.made
		e.Peers = a.peers(tx.Snapshot(), l, a.ServerID, stored.Slots, e.Now)
		e.Others = others(tx.Snapshot(), a.ServerID, l.name)
		if s, err = next(l.kind, stored.Slots, e); err != nil {
			return err
		}
		if s.Rule == "" || s.Make != nil {
			s.Slots = stored.Slots
			return nil
		}
		if s.Bundle.Sequence != e.Bundle.Sequence || !slices.Equal(s.Bundle.Revoked, e.Bundle.Revoked) {
			if err := tx.PutBundle(s.Bundle); err != nil {
				return err
			}
		}
		return tx.PutAuthority(registry.Authority{Server: a.ServerID, Kind: l.name, Slots: s.Slots})
	})
	if err != nil {
		return step{}, err
	}
	if s.Bundle == nil {
		s.Bundle = e.Bundle
	}
	if s.Rule == "publish" {
		l.published.Store(&publication{s.About.AuthorityID, at})
	}
	if l.ask != nil && l.ask.rule() == s.Rule {
		l.ask, l.done = nil, answer{slot: s.About, passed: s.Missing}
	}
	return s, nil
}

// peers asks who is missing, if a prepared key waits to know: of the bundle in which
// it was published, or, if that was in an earlier life of this process, of the
// bundle as it is.
func (a *Authority) peers(snap *registry.Snapshot, l *line, server string, slots []registry.Slot, now time.Time) Peers {
	at, known := snap.BundleVersion(a.TrustDomain)
	prepared, waits := find(slots, waiting)
	if a.Peers == nil || !known || !waits {
		return Peers{}
	}
	if own := l.published.Load(); own != nil && own.authority == prepared.AuthorityID && own.at.Epoch == at.Epoch {
		at = own.at
	}
	p := a.Peers(snap, server, at, now)
	if server == a.ServerID && !a.running.Load() { // whoever was attached here in an earlier life is not now
		for i := range p.Missing {
			if p.Missing[i].Server == server {
				p.Missing[i].Server = ""
			}
		}
	}
	return p
}

// remember keeps what was revoked, besides the store.
func (a *Authority) remember(b *bundle.Bundle) error {
	fresh := slices.DeleteFunc(slices.Clone(b.Revoked), func(r bundle.Revocation) bool { return slices.Contains(a.revoked, r) })
	if len(fresh) == 0 || a.Remember == nil {
		return nil
	}
	all := b.WithRevoked(a.revoked...).Forgotten(time.Now()).Revoked
	if err := a.Remember(all); err != nil {
		return fmt.Errorf("remember what was revoked: %w", err)
	}
	a.revoked = all
	return nil
}

// await notes whether the prepared key of a line waits for others.
func (a *Authority) await(ctx context.Context, l *line, missing []Missing) {
	if len(missing) > 0 && !l.waits {
		a.Log.InfoContext(ctx, "prepared key waits for acknowledgements", "kind", l.name, "count", len(missing), "agent", names(missing))
	}
	l.waits = len(missing) > 0
	a.waits.Store(slices.ContainsFunc(a.lines, func(l *line) bool { return l.waits }))
}

// follow makes the key that may sign after a step the one that does.
func (a *Authority) follow(l *line, s step, held map[string]keys.Key) error {
	slot := s.Signs
	switch slot.AuthorityID {
	case "":
		l.clear()
		l.active = ""
		return nil
	case l.active:
		return nil
	}
	if err := l.install(held[slot.KeyID], slot); err != nil {
		return err
	}
	l.active = slot.AuthorityID
	return nil
}

// makeKey has the keeper make the key of the intended slot. What the authority
// above does with it goes on beside, in l.job; only who cannot go on without
// waits for it: an operator, or a server that starts without a key.
func (a *Authority) makeKey(ctx context.Context, l *line, s registry.Slot) error {
	if l.job == nil {
		key, err := a.Keeper.Generate(ctx, s.KeyID, l.keyType)
		if err != nil {
			return fmt.Errorf("make key: %w", err)
		}
		if s.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
			return fmt.Errorf("encode public key %q: %w", s.KeyID, err)
		}
		l.job = &job{done: make(chan struct{}), slot: s}
		a.group.Add(1)
		work := func(j *job) {
			defer a.group.Done()
			j.err = fault.Contain(func() error { return l.create(ctx, key, &j.slot) }) // what is above answers as it likes
			close(j.done)
		}
		if s.Upstream {
			go func(j *job) { work(j); a.poke() }(l.job)
		} else {
			work(l.job)
		}
	}
	if l.ask == nil && (a.running.Load() || l.active != "") {
		select {
		case <-l.job.done:
		default:
			return nil
		}
	}
	select {
	case <-l.job.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	j := l.job
	l.job = nil
	if j.err != nil {
		return j.err
	}
	l.made = &j.slot
	return nil
}

// failed logs a step that failed, raises alarms when the key that signs nears its
// end, and returns how long to wait before the next try (R67, R110).
func (a *Authority) failed(ctx context.Context, l *line, err error) time.Duration {
	most := retryMost
	if s, ok := find(a.Slots(l.name), func(s registry.Slot) bool { return s.State == registry.SlotActive }); ok {
		left := time.Until(s.NotAfter)
		most = min(most, max(retryFirst, left/8))
		if level := alarmLevel(left, life(s)); level != 0 && l.wait > 0 && (l.alarmed == 0 || level < l.alarmed) { // not after a first failure
			l.alarmed = level
			a.Log.ErrorContext(ctx, "authority nears its end and could not be replaced", "kind", l.name, "key_id", s.AuthorityID,
				"reason", fault.ReasonOf(err), "next", s.NotAfter.UTC().Format(time.RFC3339))
			if a.Alarm != nil {
				a.Alarm(s.AuthorityID, fmt.Sprintf("authority_%d_percent_left", level), l.name+": "+fault.ReasonOf(err))
			}
		}
	}
	wait := min(max(2*l.wait, retryFirst), most)
	wait -= jitter(wait / 4)
	a.Log.ErrorContext(ctx, "authority step failed", "kind", l.name, "err", err, "next", wait.String())
	return wait
}

func (a *Authority) createX509(ctx context.Context, key keys.Key, s *registry.Slot) (err error) {
	if s.Upstream {
		return a.mint(ctx, key, s)
	}
	if s.AuthorityID, err = svid.AuthorityID(key.Public()); err != nil {
		return err
	}
	s.Certificate, err = svid.SelfSignedCA(a.TrustDomain, key, s.NotBefore, s.NotAfter)
	return err
}

func (a *Authority) installX509(key keys.Key, s registry.Slot) error {
	chain := append([][]byte{s.Certificate}, s.Chain...)
	if s.Upstream {
		chain = append(chain, s.Root)
	}
	i, err := svid.NewX509Issuer(chain, key)
	if err != nil {
		return err
	}
	a.x509.Store(i)
	return nil
}

func (a *Authority) createJWT(ctx context.Context, _ keys.Key, s *registry.Slot) error {
	s.AuthorityID = newKeyID()
	if s.Upstream {
		_, err := a.PublishJWT(ctx, bundle.JWTAuthority{KeyID: s.AuthorityID, PublicKey: s.PublicKey, ExpiresAt: s.NotAfter})
		return err
	}
	return nil
}

func (a *Authority) installJWT(key keys.Key, s registry.Slot) error {
	i, err := svid.NewJWTIssuer(s.AuthorityID, key, s.NotAfter)
	if err != nil {
		return err
	}
	a.jwt.Store(i)
	return nil
}

// newKeyID draws 32 characters, 190 bits.
func newKeyID() string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	id := make([]byte, 0, 32)
	var b [1]byte
	for len(id) < cap(id) {
		rand.Read(b[:]) // never fails (crypto/rand)
		if i := int(b[0] & 63); i < len(alphabet) {
			id = append(id, alphabet[i])
		}
	}
	return string(id)
}
