package agentid

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	pulse        = 2 * time.Second // timers do not count a machine's sleep, nor see a clock that is set
	sleepAtLeast = 5 * time.Second
)

// Role is the agent, which does what was decided.
type Role interface {
	// Do does a job. Of Attest and Renew it returns the new SVID, which is verified,
	// stored (unless the job is volatile and it cannot be) and in use.
	Do(ctx context.Context, job Job) (*Own, error)
	// Redial opens a new connection, to address unless that is empty.
	Redial(address string) error
	// Forget removes the stored SVID.
	Forget() error
}

// Config is what an identity stands on.
type Config struct {
	Settings
	Own     *Own // from an earlier life; nil: none
	Trusted bool // so are roots
	Role    Role
	// Boot is a clock that counts a machine's sleep and cannot be set.
	Boot func() time.Duration
	Log  *slog.Logger
}

// Identity turns the machine. Post may be called concurrently.
type Identity struct {
	Config
	machine *Machine
	done    chan Done

	mu      sync.Mutex // guards posted
	posted  []any
	arrived chan struct{}
}

// New returns an identity that does nothing before Run.
func New(c Config) *Identity {
	return &Identity{Config: c, machine: NewMachine(c.Settings, c.Own, c.Trusted), done: make(chan Done, 1), arrived: make(chan struct{}, 1)}
}

// Post tells what happened. It does not block: what has not been looked at yet
// gives way to a later event of the same type.
func (i *Identity) Post(what any) {
	i.mu.Lock()
	at := slices.IndexFunc(i.posted, func(p any) bool { return reflect.TypeOf(p) == reflect.TypeOf(what) })
	if at >= 0 {
		i.posted = slices.Delete(i.posted, at, at+1)
	}
	i.posted = append(i.posted, what)
	i.mu.Unlock()
	select {
	case i.arrived <- struct{}{}:
	default:
	}
}

func (i *Identity) take() []any {
	i.mu.Lock()
	defer i.mu.Unlock()
	taken := i.posted
	i.posted = nil
	return taken
}

// Run keeps the identity until ctx is done or only an operator can help.
func (i *Identity) Run(ctx context.Context) error {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	wait, err := i.step(ctx, &jobs, Tick{})
	for last, boot := time.Now(), i.Boot(); err == nil; {
		timer := time.NewTimer(min(wait, pulse))
		var events []any
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case d := <-i.done:
			events = []any{d}
		case <-i.arrived:
			events = i.take()
		case <-timer.C:
		}
		timer.Stop()
		woke, wokeBoot := time.Now(), i.Boot()
		if wokeBoot-boot-woke.Sub(last) > sleepAtLeast {
			events = append([]any{Slept{}}, events...)
		}
		last, boot = woke, wokeBoot
		if len(events) == 0 {
			events = []any{Tick{}}
		}
		for _, what := range events {
			if wait, err = i.step(ctx, &jobs, what); err != nil {
				break
			}
		}
	}
	return err
}

// step feeds one event to the machine and does what follows.
func (i *Identity) step(ctx context.Context, jobs *sync.WaitGroup, what any) (time.Duration, error) {
	fx := i.machine.Step(Event{Now: time.Now().Round(0), Boot: i.Boot(), Seed: rand.Uint64(), What: what})
	for _, n := range fx.Notes {
		i.note(ctx, n)
	}
	if fx.Stop != nil {
		if fx.Forget {
			if err := i.Role.Forget(); err != nil {
				i.Log.ErrorContext(ctx, "the SVID could not be removed", "err", err)
			}
		}
		return 0, fx.Stop
	}
	if fx.Redial {
		if err := i.Role.Redial(fx.Address); err != nil {
			i.Log.WarnContext(ctx, "connection could not be moved", "err", err)
		}
	}
	if job := fx.Job; job.Kind != None {
		jobs.Go(func() {
			own, err := i.Role.Do(ctx, job)
			i.done <- Done{Kind: job.Kind, Own: own, Err: err} // one job at a time, so there is room
		})
	}
	return fx.Wait, nil
}

func (i *Identity) note(ctx context.Context, n Note) {
	var args []any
	if n.Err != nil {
		args = append(args, "reason", fault.ReasonOf(n.Err), "err", n.Err)
	}
	if n.Next > 0 {
		args = append(args, "next", n.Next)
	}
	level := slog.LevelInfo
	if n.Warn {
		level = slog.LevelWarn
	}
	i.Log.Log(ctx, level, n.Message, args...)
}
