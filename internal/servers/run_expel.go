package servers

import (
	"context"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
)

const expelCaller = "plastron expel"

// Expel puts another server out for good: its row goes, its authorities are tainted,
// and after a time, by whichever server is there then, revoked. Again, it can only
// make that sooner. All of it is one transaction.
func (s *Servers) Expel(ctx context.Context, caller, id string, after time.Duration) (x registry.Expulsion, err error) {
	if id == s.cfg.ID {
		return x, fault.New(fault.Precondition, "server_is_self", "a server does not expel itself").
			Fix("ask another server of the trust domain; if there is none, start one with a data_dir of its own first")
	}
	_, err = s.cfg.Registry.Update(ctx, caller, func(tx *registry.Tx) error {
		now := time.Now().UTC().Truncate(time.Second)
		x, err = tx.Expelled(id)
		switch sooner := now.Add(after); {
		case fault.KindOf(err) == fault.NotFound:
			x = registry.Expulsion{Server: id, Caller: caller, At: now, RevokeAt: sooner}
		case err != nil:
			return err
		case sooner.Before(x.RevokeAt):
			x.RevokeAt = sooner
		}
		if err := tx.Expel(x); err != nil {
			return err
		}
		_, err = s.banish(tx, x, now)
		return err
	})
	return x, err
}

// banish removes what an expelled server has, as far as it is due, and returns
// whether it had a row.
func (s *Servers) banish(tx *registry.Tx, x registry.Expulsion, now time.Time) (row bool, err error) {
	e, err := s.estateOf(tx, x.Server)
	if fault.ReasonOf(err) == "row_unreadable" && e.bundle == nil { // its own row, which it may have spoilt
		if err := tx.DeleteServer(x.Server); err != nil {
			return true, err
		}
		e, err = s.estateOf(tx, x.Server)
		row = true
	}
	if err != nil {
		return row, err
	}
	row = row || e.row != nil
	left, changed := banish(x, e, now)
	if !changed {
		return row, nil
	}
	for _, kind := range left.kinds {
		if err := tx.DeleteAuthority(x.Server, kind); err != nil {
			return row, err
		}
	}
	if left.row {
		if err := tx.DeleteServer(x.Server); err != nil {
			return row, err
		}
	}
	return row, tx.PutBundle(left.bundle)
}

// learn takes note of who is expelled.
func (s *Servers) learn() {
	var all []registry.Expulsion
	s.cfg.Registry.View(func(snap *registry.Snapshot) { all = snap.Expelled() })
	s.mu.Lock()
	s.machine.expel(all, s.cfg.Boot())
	s.mu.Unlock()
	s.stir()
}

// wrote takes note of a row of an authority, which no outcast may write.
func (s *Servers) wrote(name string) {
	server, _, _ := strings.Cut(name, "/")
	s.mu.Lock()
	outcast := s.machine.outcast(server)
	if outcast {
		s.machine.evictAt = s.cfg.Boot()
	}
	s.mu.Unlock()
	if outcast {
		s.stir()
	}
}

// evict does what is due about servers that are expelled. Every server does, so that
// it needs none in particular.
func (s *Servers) evict(ctx context.Context) {
	now := time.Now()
	s.mu.Lock()
	s.machine.evictAt = 0 // what comes from here on asks for another look
	s.mu.Unlock()
	var due, left []registry.Expulsion
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		own, err := snap.Bundle(s.cfg.TrustDomain)
		if err != nil {
			return // there are no authorities
		}
		for _, x := range snap.Expelled() {
			e := estate{bundle: own, authorities: snap.Authorities(x.Server)}
			if row, err := snap.Server(x.Server); err == nil {
				e.row = &row
			}
			if _, changes := banish(x, e, now); changes && x.Server != s.cfg.ID {
				due = append(due, x)
			}
			if len(e.authorities) > 0 {
				left = append(left, x)
			}
		}
	})
	may := s.MayPrune(now) // by a wrong clock nothing is revoked (R70)
	for _, x := range due {
		var again bool
		err := may
		if err == nil {
			_, err = s.cfg.Registry.Update(ctx, expelCaller, func(tx *registry.Tx) error {
				again, err = s.banish(tx, x, now)
				return err
			})
		}
		switch {
		case err != nil && ctx.Err() == nil:
			left = append(left, x)
			s.cfg.Log.WarnContext(ctx, "an expelled server is not out yet", "id", x.Server, "err", err)
		case again: // somebody has its identity, and the store's password
			s.cfg.Log.ErrorContext(ctx, "an expelled server still writes into the store", "id", x.Server)
			if s.cfg.Intruder != nil {
				s.cfg.Intruder(x.Server)
			}
		default:
			s.cfg.Log.InfoContext(ctx, "expelled server's authorities changed", "id", x.Server)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if next := nextEviction(left, now, s.cfg.Boot()); next != 0 && s.machine.evictAt == 0 {
		s.machine.evictAt = next
	}
}

// estateOf reads, as conditions of a transaction, what a server has.
func (s *Servers) estateOf(tx *registry.Tx, id string) (e estate, err error) {
	if e.row, err = optional(tx.Server(id)); err != nil {
		return e, err
	}
	if e.bundle, err = tx.Bundle(s.cfg.TrustDomain); err != nil {
		return e, err
	}
	for _, known := range tx.Snapshot().Authorities(id) {
		a, err := tx.Authority(id, known.Kind)
		if err != nil {
			return e, err
		}
		e.authorities = append(e.authorities, a)
	}
	return e, nil
}
