package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/publish"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
)

const (
	publishTime  = 30 * time.Second // for one attempt
	publishRetry = time.Second      // after the first failure, doubled with each
	publishMost  = time.Minute
	publishLook  = time.Minute // at the longest between two looks at what a place holds
)

// publishers opens every place that is configured, and has each told when the
// bundle changes.
func (s *Server) publishers(ctx context.Context, reg *registry.Registry, count func(place, result string)) (out []*publisher, err error) {
	td := s.cfg.Server.TrustDomain.TrustDomain
	for _, name := range slices.Sorted(maps.Keys(s.plan.notifiers)) {
		places, err := s.plan.notifiers[name].Open(ctx)
		if err != nil {
			return nil, fmt.Errorf("open notifier %q: %w", name, err)
		}
		for _, place := range places {
			out = append(out, &publisher{place: place, count: count, log: s.log, wake: make(chan struct{}, 1), edition: func() (e publish.Edition, err error) {
				reg.View(func(snap *registry.Snapshot) {
					epoch := snap.Position().Epoch
					e.Epoch = hex.EncodeToString(epoch[:])
					e.Bundle, err = snap.Bundle(td)
				})
				return e, err
			}})
		}
	}
	reg.Batches(func(b store.Batch) {
		if changesBundle(b, td) {
			for _, p := range out {
				p.changed()
			}
		}
	})
	return out, nil
}

// publisherCheck says whether every place is up to date; there is none without places.
func publisherCheck(publishers []*publisher) []monitor.Check {
	if len(publishers) == 0 {
		return nil
	}
	return []monitor.Check{{Name: "bundle_published", Degrades: true, Run: func() error {
		for _, p := range publishers {
			if f := p.failure.Load(); f != nil {
				return f
			}
		}
		return nil
	}}}
}

// publisher keeps one place up to date: when the server starts, when the bundle
// changes, and again until it succeeds. Once a minute it looks whether somebody else
// has changed what is there; that a place is away then is no trouble. It has a loop
// of its own, so that one place that is away delays no other.
type publisher struct {
	place   publish.Place
	edition func() (publish.Edition, error)
	count   func(place, result string) // may be nil
	log     *slog.Logger
	wake    chan struct{}               // room for one: the bundle may have changed
	failure atomic.Pointer[fault.Error] // nil: none
}

// changed has run look at the bundle. It does not wait.
func (p *publisher) changed() {
	select {
	case p.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// publish makes one attempt, with the bundle as it is now.
func (p *publisher) publish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	e, err := p.edition()
	if err != nil {
		return err
	}
	return fault.Contain(func() error { return p.place.Publish(ctx, e) }) // nobody's call is around it
}

// run publishes until ctx is done.
func (p *publisher) run(ctx context.Context) error {
	wait, looks := publishRetry, false
	for {
		err := p.publish(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if p.count != nil {
			p.count(p.place.Name(), resultOf(err))
		}
		if err == nil || looks && fault.KindOf(err) == fault.Unavailable {
			if p.failure.Swap(nil) != nil {
				p.log.InfoContext(ctx, "bundle is published again", "id", p.place.Name())
			}
			wait = publishRetry
			timer := time.NewTimer(publishLook/2 + rand.N(publishLook/2))
			select {
			case <-ctx.Done():
			case <-p.wake:
				looks = false
			case <-timer.C:
				looks = true
			}
			timer.Stop()
			continue
		}
		looks = false
		p.failure.Store(fault.New(fault.Unavailable, "bundle_not_published", "%s does not have the present bundle: %s", p.place.Name(), fault.MessageOf(err)).
			Fix("see to the failure named in the server's log; it is tried again by itself").Because(err))
		next := max(wait/2+rand.N(wait/2), fault.AfterOf(err))
		if fault.KindOf(err) != fault.Conflict { // another server was quicker; that is no trouble
			p.log.WarnContext(ctx, "bundle not published", "id", p.place.Name(), "err", err, "next", next.String())
		}
		wait = min(2*wait, publishMost)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(next):
		}
	}
}
