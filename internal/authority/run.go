package authority

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/svid"
)

const (
	// MinTTL is the shortest life of a key: below it the steps of a rotation fall
	// into one second.
	MinTTL = 6 * time.Second

	maxSteps   = 64               // of one round; a rotation from nothing takes five
	maxWait    = 10 * time.Minute // so that a clock that was set is noticed
	retryFirst = time.Second
	retryMost  = time.Minute
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
	Log         *slog.Logger
}

// Authority turns the machine for each kind of this server's keys and hands out
// the signers that are active.
type Authority struct {
	Config
	lines    []*line // owned by whoever runs Start and then Run
	wake     chan struct{}
	requests chan request
	x509     atomic.Pointer[svid.X509Issuer]
	jwt      atomic.Pointer[svid.JWTIssuer]
}

// line is one kind of key on its way.
type line struct {
	kind
	keyType keys.Type
	create  func(key keys.Key, s *registry.Slot) error // fills in what is known once the key is made
	install func(key keys.Key, s registry.Slot) error  // makes it the one that signs
	clear   func()                                     // nothing signs
	made    *registry.Slot                             // made, not published yet
	replace string                                     // what Rotate wants replaced
	active  string                                     // the authority that is installed
	wait    time.Duration                              // until the next try, after a failure
}

type request struct {
	line *line
	done chan error
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
	a := &Authority{Config: c, wake: make(chan struct{}, 1), requests: make(chan request)}
	// X.509 comes first: the server itself needs it.
	a.lines = []*line{
		{kind: x509Kind(), keyType: c.KeyType, create: a.createX509, install: a.installX509, clear: func() { a.x509.Store(nil) }},
		{kind: jwtKind(), keyType: c.JWTKeyType, create: a.createJWT, install: a.installJWT, clear: func() { a.jwt.Store(nil) }},
	}
	// A bundle that others change may end the use of a key.
	c.Registry.Batches(func(b store.Batch) {
		for _, w := range b.Writes {
			if slices.ContainsFunc(w.Changes, func(c store.Change) bool { return strings.HasPrefix(c.Key, "/bundle/") }) {
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

// Start brings every kind to an active key, making what is missing. The
// registry must be running. Nothing is served before Start has returned.
func (a *Authority) Start(ctx context.Context) error {
	for _, l := range a.lines {
		if _, err := a.settle(ctx, l); err != nil {
			return fmt.Errorf("prepare %s authority: %w", l.name, err)
		}
	}
	return nil
}

// Run keeps the keys in order until ctx is done. A step that fails is tried
// again; what signs goes on signing meanwhile (R67).
func (a *Authority) Run(ctx context.Context) error {
	for {
		timer := time.NewTimer(a.round(ctx))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-a.wake:
		case r := <-a.requests:
			r.done <- a.rotate(ctx, r.line)
		}
		timer.Stop()
	}
}

// round takes every step that is due and returns how long to wait.
func (a *Authority) round(ctx context.Context) time.Duration {
	wait := maxWait
	for _, l := range a.lines {
		next, err := a.settle(ctx, l)
		if ctx.Err() != nil {
			return 0
		}
		if err != nil {
			l.wait = min(max(2*l.wait, retryFirst), retryMost)
			a.Log.ErrorContext(ctx, "authority step failed", "kind", l.name, "err", err, "next", l.wait.String())
			wait = min(wait, l.wait)
			continue
		}
		l.wait = 0
		if !next.IsZero() {
			wait = min(wait, time.Until(next))
		}
	}
	return max(wait, 0)
}

// Rotate replaces the active key of a kind now: prepares, publishes and
// activates another. It needs Run to be running.
func (a *Authority) Rotate(ctx context.Context, kind string) error {
	i := slices.IndexFunc(a.lines, func(l *line) bool { return l.name == kind })
	if i < 0 {
		return fault.New(fault.Invalid, "authority_kind_invalid", "%q is not a kind of authority", kind).Fix("use %s or %s", X509, JWT)
	}
	r := request{a.lines[i], make(chan error, 1)}
	select {
	case a.requests <- r:
		return <-r.done
	case <-ctx.Done():
		return fmt.Errorf("wait to rotate: %w", ctx.Err())
	}
}

func (a *Authority) rotate(ctx context.Context, l *line) error {
	l.replace = l.active
	defer func() { l.replace = "" }()
	if _, err := a.settle(ctx, l); err != nil {
		return fmt.Errorf("rotate %s authority: %w", l.name, err)
	}
	if l.active == l.replace {
		return fault.New(fault.Exhausted, "authorities_exhausted", "the bundle holds too many keys of kind %s to add one", l.name).
			Fix("wait until old ones have ended")
	}
	return nil
}

// settle takes steps until none is due, and returns when the next one is.
func (a *Authority) settle(ctx context.Context, l *line) (time.Time, error) {
	for range maxSteps {
		held, err := a.held(ctx, l)
		if err != nil {
			return time.Time{}, err
		}
		s, err := a.commit(ctx, l, held)
		if err != nil {
			return time.Time{}, err
		}
		if err := a.follow(l, s, held); err != nil {
			return time.Time{}, err
		}
		switch {
		case s.Make != nil:
			if err := a.makeKey(ctx, l, *s.Make); err != nil {
				return time.Time{}, err
			}
		case s.Rule == "":
			return s.Wake, nil
		default:
			log := a.Log.With("kind", l.name, "reason", s.Rule)
			if l.active != "" { // there is none before the first
				log = log.With("key_id", l.active)
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
func (a *Authority) commit(ctx context.Context, l *line, held map[string]keys.Key) (step, error) {
	e := event{Lifetime: a.TTL, Replace: l.replace, Held: map[string][]byte{}}
	for id, key := range held {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return step{}, fmt.Errorf("encode public key %q: %w", id, err)
		}
		e.Held[id] = spki
	}
	// Stored times are whole seconds.
	e.Now = time.Now().UTC().Truncate(time.Second)
	var s step
	_, err := a.Registry.Update(ctx, "authority", func(tx *registry.Tx) error {
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
		if s, err = next(l.kind, stored.Slots, e); err != nil {
			return err
		}
		if s.Rule == "" || s.Make != nil {
			s.Slots = stored.Slots
			return nil
		}
		if s.Bundle.Sequence != e.Bundle.Sequence {
			if err := tx.PutBundle(s.Bundle); err != nil {
				return err
			}
		}
		return tx.PutAuthority(registry.Authority{Server: a.ServerID, Kind: l.name, Slots: s.Slots})
	})
	return s, err
}

// follow makes the active slot the one that signs. Every step but retire leaves
// an active slot only if its key may sign.
func (a *Authority) follow(l *line, s step, held map[string]keys.Key) error {
	i := slices.IndexFunc(s.Slots, func(s registry.Slot) bool { return s.State == registry.SlotActive })
	if i < 0 {
		l.clear()
		l.active = ""
		return nil
	}
	slot := s.Slots[i]
	if slot.AuthorityID == l.active {
		return nil
	}
	if err := l.install(held[slot.KeyID], slot); err != nil {
		return err
	}
	l.active = slot.AuthorityID
	return nil
}

// makeKey has the keeper make the key of the intended slot.
func (a *Authority) makeKey(ctx context.Context, l *line, s registry.Slot) error {
	key, err := a.Keeper.Generate(ctx, s.KeyID, l.keyType)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	if s.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return fmt.Errorf("encode public key %q: %w", s.KeyID, err)
	}
	if err := l.create(key, &s); err != nil {
		return err
	}
	l.made = &s
	return nil
}

func (a *Authority) createX509(key keys.Key, s *registry.Slot) (err error) {
	if s.AuthorityID, err = svid.AuthorityID(key.Public()); err != nil {
		return err
	}
	s.Certificate, err = svid.SelfSignedCA(a.TrustDomain, key, s.NotBefore, s.NotAfter)
	return err
}

func (a *Authority) installX509(key keys.Key, s registry.Slot) error {
	i, err := svid.NewX509Issuer([][]byte{s.Certificate}, key)
	if err != nil {
		return err
	}
	a.x509.Store(i)
	return nil
}

func (a *Authority) createJWT(_ keys.Key, s *registry.Slot) error {
	s.AuthorityID = newKeyID()
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
