// Package unix proves a local process by what the kernel says of it: user,
// group, supplementary groups, and on request the program it runs. Selectors
// have the type "unix" and the values uid:N, user:NAME, gid:N, group:NAME,
// supplementary_gid:N, supplementary_group:NAME, path:PATH and sha256:HEX.
//
// The facts for rules are unix.uid, unix.user, unix.gid, unix.group and
// unix.program, the base name of the program's file. Programs of one interpreter
// share that name, and whoever may run a program may give it any name: it tells
// the programs of a user apart, but does not protect them from each other.
//
// A fact that cannot be had is left out and named in Attested.Omitted; it never
// turns into another fact. Path and hash do not separate programs of one user:
// whoever may ptrace a process owns its identity.
package unix

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/process"
	"github.com/plastron/plastron/internal/workload"
)

const selectorType = "unix"

// Deadlines for what may hang: the user and group database (W25), and the file
// system that the program lies on (W22).
const (
	nameDeadline    = 2 * time.Second
	programDeadline = 5 * time.Second
	maxLookups      = 16 // look-ups of names under way at once
	nameLife        = 5 * time.Second
	maxNames        = 4096 // remembered at once
)

// Config is the plugin's configuration. Its zero value works.
type Config struct {
	// DiscoverWorkloadPath adds the selectors path and sha256. The agent then needs
	// the right to look at other users' processes (CAP_SYS_PTRACE). Default false.
	DiscoverWorkloadPath bool `hcl:"discover_workload_path"`
	// WorkloadSizeLimit is the size in bytes past which a program is not hashed:
	// 0 means no limit, a negative value that nothing is hashed. Default 0.
	WorkloadSizeLimit int64 `hcl:"workload_size_limit"`
}

// ReadsPrograms reports whether the attestor looks at the programs of processes.
func (c *Config) ReadsPrograms() bool { return c.DiscoverWorkloadPath }

// Open returns an attestor. It acquires nothing.
func (c *Config) Open(context.Context) (workload.Attestor, error) {
	return &Attestor{
		Config:  *c,
		users:   newNames(func(id string) (string, error) { u, err := user.LookupId(id); return name(u, err) }),
		groups:  newNames(func(id string) (string, error) { g, err := user.LookupGroupId(id); return groupName(g, err) }),
		lookups: make(chan struct{}, maxLookups),
	}, nil
}

func name(u *user.User, err error) (string, error) {
	if err != nil {
		return "", err
	}
	return u.Username, nil
}

func groupName(g *user.Group, err error) (string, error) {
	if err != nil {
		return "", err
	}
	return g.Name, nil
}

// Attestor is made by Config.Open.
type Attestor struct {
	Config
	users, groups *names
	lookups       chan struct{}
	programs      process.Programs
}

// Attest returns what the kernel says of process pid.
func (a *Attestor) Attest(ctx context.Context, pid int) (workload.Attested, error) {
	st, err := process.ReadStatus(pid)
	if err != nil {
		return workload.Attested{}, err
	}
	r := result{workload.Collector{Type: selectorType}}
	deadline := time.Now().Add(nameDeadline)

	uid, gid := strconv.FormatUint(uint64(st.UID), 10), strconv.FormatUint(uint64(st.GID), 10)
	r.fact("uid", uid)
	r.named("user", uid, func() (string, error) { return a.lookup(ctx, deadline, a.users, uid) })
	r.fact("gid", gid)
	r.named("group", gid, func() (string, error) { return a.lookup(ctx, deadline, a.groups, gid) })
	for _, g := range st.Groups {
		id := strconv.FormatUint(uint64(g), 10)
		r.Omit("supplementary_gid", r.Add("supplementary_gid", id))
		if n, err := a.lookup(ctx, deadline, a.groups, id); err != nil {
			r.Omit("supplementary_group", err)
		} else {
			r.Omit("supplementary_group", r.Add("supplementary_group", n))
		}
	}
	if st.More {
		r.Omit("supplementary_gid", fmt.Errorf("only the first %d groups are looked at", len(st.Groups)))
	}
	name, err := process.ProgramName(pid)
	if err == nil {
		err = r.Fact("program", name)
	}
	r.Omit("program", err)
	if a.DiscoverWorkloadPath {
		a.program(ctx, pid, &r)
	}
	return r.Attested(), ctx.Err() // two numbers may have one name
}

func (a *Attestor) program(ctx context.Context, pid int, r *result) {
	ctx, cancel := context.WithTimeout(ctx, programDeadline)
	defer cancel()
	path, err := a.programs.Path(ctx, pid)
	if err == nil {
		err = r.fact("path", path)
	}
	r.Omit("path", err)
	if a.WorkloadSizeLimit < 0 {
		return
	}
	sum, err := a.programs.SHA256(ctx, pid, a.WorkloadSizeLimit)
	if err != nil {
		r.Omit("sha256", err)
		return
	}
	r.fact("sha256", sum)
}

// names is the system's user or group database. What it said is believed for a
// few seconds, so that it is not asked for each call of each process (R62).
type names struct {
	ask func(id string) (string, error)

	mu    sync.Mutex // guards everything below
	known map[string]known
}

type known struct {
	name  string
	until time.Time
}

func newNames(ask func(string) (string, error)) *names {
	return &names{ask: ask, known: map[string]known{}}
}

func (n *names) remembered(id string, now time.Time) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	k, ok := n.known[id]
	return k.name, ok && now.Before(k.until)
}

func (n *names) remember(id, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.known) >= maxNames {
		clear(n.known)
	}
	n.known[id] = known{name, time.Now().Add(nameLife)}
}

var errNoName = errors.New("the database of names did not answer in time")

// lookup asks the system's user or group database, which may be remote and
// slow. It stops waiting at the deadline; the look-up itself cannot be stopped,
// so their number is bounded.
func (a *Attestor) lookup(ctx context.Context, deadline time.Time, n *names, id string) (string, error) {
	if name, ok := n.remembered(id, time.Now()); ok {
		return name, nil
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case a.lookups <- struct{}{}:
	case <-ctx.Done():
		return "", errNoName
	}
	type answer struct {
		name string
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		defer func() { <-a.lookups }()
		name, err := n.ask(id)
		if err == nil {
			n.remember(id, name)
		}
		done <- answer{name, err}
	}()
	select {
	case r := <-done:
		return r.name, r.err
	case <-ctx.Done():
		return "", errNoName
	}
}

// result collects what is known.
type result struct{ workload.Collector }

// fact adds a selector and the fact of the same name.
func (r *result) fact(key, value string) error {
	if err := r.Add(key, value); err != nil {
		return err
	}
	return r.Fact(key, value)
}

// named adds the name of id. Without one only the name is lost.
func (r *result) named(key, id string, lookup func() (string, error)) {
	n, err := lookup()
	if err == nil {
		err = r.fact(key, n)
	}
	if err != nil {
		r.Omit(key, fmt.Errorf("%s: %w", id, err))
	}
}
