package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
)

// perAgent is how many entries are made below one agent.
const perAgent = 50

// benchRestart starts -server, a command that serves at -socketPath on data of
// its own, fills it up to -entries entries, and starts it -n times again. One
// operation is a start: from the command to the right answer to how many entries
// there are. The CPU time is the process's until then. The entries stay, so that
// a second run need not make them.
func benchRestart(ctx context.Context, o options) (result, error) {
	entries, _, err := populate(ctx, o)
	if err != nil {
		return result{}, err
	}
	r := result{Operations: o.count}
	times := make([]time.Duration, o.count)
	for i := range times {
		c, err := startServer(ctx, o, entries)
		if err != nil {
			return result{}, err
		}
		cpu, err := cpuTime(c.pid())
		if err = errors.Join(err, c.end()); err != nil {
			return result{}, err
		}
		times[i] = c.took
		r.WallNS += c.took.Nanoseconds() / int64(o.count)
		r.CPUNS += cpu.Nanoseconds() / int64(o.count)
	}
	r.P50NS, r.P99NS = percentiles(times)
	return r, nil
}

// benchMemory fills a server like benchRestart, starts it again and lets it be
// idle for the time -for. One operation is an entry. The memory before is that of
// the server when it was found with fewer than -batch entries.
func benchMemory(ctx context.Context, o options) (result, error) {
	entries, before, err := populate(ctx, o)
	if err != nil {
		return result{}, err
	}
	c, err := startServer(ctx, o, entries)
	if err != nil {
		return result{}, err
	}
	select {
	case <-time.After(o.period):
	case <-ctx.Done():
	}
	memory, err := anonymous(c.pid())
	return result{Operations: entries, WallNS: o.period.Nanoseconds(), Streams: entries, Memory: memory, Before: before},
		errors.Join(err, ctx.Err(), c.end())
}

// populate starts the server, makes the entries that are missing, and ends it. It
// returns how many there are, and the memory of the server before, if it was
// nearly empty.
func populate(ctx context.Context, o options) (entries int, before int64, err error) {
	c, err := startServer(ctx, o, -1)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, c.end()) }()
	if c.entries < o.batch {
		if before, err = anonymous(c.pid()); err != nil {
			return 0, 0, err
		}
	}
	if c.entries < o.entries {
		err = fill(ctx, o, c.entries)
	}
	return max(c.entries, o.entries), before, err
}

// child is a server that was started.
type child struct {
	cmd     *exec.Cmd
	took    time.Duration // until it served
	entries int           // that it served then
	ended   chan struct{} // closed when the process has ended, with err
	err     error
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) end() error {
	err := c.cmd.Process.Signal(syscall.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-c.ended
	return errors.Join(err, c.err)
}

// startServer returns when the server counts as many entries as wanted, or any
// number if that is negative.
func startServer(ctx context.Context, o options, want int) (*child, error) {
	command := strings.Fields(o.server)
	if len(command) == 0 {
		return nil, errors.New("-server is empty; it is a command that starts a server with data of its own")
	}
	c := &child{cmd: exec.Command(command[0], command[1:]...), ended: make(chan struct{})}
	c.cmd.Stderr = os.Stderr
	began := time.Now()
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.ended)
	}()
	ctx, stop := context.WithTimeout(ctx, 5*time.Minute)
	defer stop()
	for {
		n, err := countEntries(ctx, o)
		if err == nil && (n == want || want < 0) {
			c.took, c.entries = time.Since(began), n
			return c, nil
		}
		if err == nil {
			err = fmt.Errorf("the server counts %d entries, not %d", n, want)
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-c.ended:
			return nil, errors.Join(errors.New("the server ended"), c.err)
		case <-ctx.Done():
			return nil, errors.Join(err, c.end())
		}
	}
}

func countEntries(ctx context.Context, o options) (int, error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	reply, err := entryv1.NewEntryClient(s.admin).CountEntries(ctx, &entryv1.CountEntriesRequest{})
	return int(reply.GetCount()), err
}

// fill makes entries until there are -entries.
func fill(ctx context.Context, o options, have int) error {
	s, err := dialServer(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	base := time.Now().UnixNano()
	many := options{count: o.entries - have, parallel: o.parallel}
	_, err = measure(ctx, many, perAgent, func(ctx context.Context, _, call int) error {
		n := min(perAgent, o.entries-have-call*perAgent)
		parent := &spiretypes.SPIFFEID{TrustDomain: s.trustDomain, Path: fmt.Sprintf("/spire/agent/join_token/bench-%d-%d", base, call)}
		_, err := s.create(ctx, parent, have+call*perAgent, n)
		return err
	})
	return err
}
