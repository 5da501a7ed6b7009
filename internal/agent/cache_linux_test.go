package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/mirror/mirrortest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// kept is an agent's directories with a server, and what lives of the agent share.
type kept struct {
	t       *testing.T
	dir     string
	server  *mirrortest.Server
	own     *credential
	trusted *bundle.Bundle
}

// keptLife is one life.
type keptLife struct {
	*cache
	mirror *mirror.Mirror
}

func newKept(t *testing.T) *kept {
	k := &kept{t: t, dir: t.TempDir(), server: mirrortest.New(t)}
	k.own = &credential{id: spiffeid.RequireFromPath(k.server.TD, "/spire/agent/x")}
	k.server.Put(k.server.Grant("a", "/a", "unix:uid:1"))
	return k
}

func (k *kept) agent(dir string, log io.Writer) *Agent {
	return &Agent{log: slog.New(slog.NewTextHandler(log, nil)), cfg: Config{Agent: Settings{
		TrustDomain: config.TrustDomain{TrustDomain: k.server.TD}, DataDir: k.dir, CacheDirectory: dir}}}
}

func (k *kept) keeper() keys.Keeper {
	k.t.Helper()
	keeper, err := (&diskkeys.Config{Path: filepath.Join(k.dir, "keys.json")}).Open(k.t.Context())
	if err != nil {
		k.t.Fatal(err)
	}
	return keeper
}

// live begins a life and restores.
func (k *kept) live(change ...func(*cache)) *keptLife {
	k.t.Helper()
	c, err := k.agent(filepath.Join(k.dir, "memory"), io.Discard).openCache(k.keeper())
	if err != nil || c == nil {
		k.t.Fatal(c, err)
	}
	for _, f := range change {
		f(c)
	}
	l := &keptLife{cache: c}
	l.mirror = mirror.New(mirror.Config{TrustDomain: k.server.TD, Link: k.server, Changed: c.changed, Log: c.log,
		OwnBundle: func(b *bundle.Bundle) { k.trusted = b }})
	c.restore(k.t.Context(), l.mirror, k.own, k.trusted)
	return l
}

// follow lets a life follow the server until it has so many SVIDs, and write.
func (k *kept) follow(l *keptLife, grants int) {
	k.t.Helper()
	ctx, cancel := context.WithCancel(k.t.Context())
	done := make(chan error)
	go func() { done <- l.mirror.Run(ctx) }()
	deadline := time.Now().Add(time.Minute)
	for l.mirror.Stats().X509SVIDs != grants || l.mirror.Stats().Grants != grants {
		if time.Now().After(deadline) {
			k.t.Fatalf("the mirror holds %+v", l.mirror.Stats())
		}
		select {
		case <-l.wake:
		case <-time.After(10 * time.Millisecond):
		}
	}
	cancel()
	<-done
	if err := l.write(k.t.Context(), l.mirror, k.own); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) file() string { return k.matches("*.sealed")[0] }

func (k *kept) matches(pattern string) []string {
	m, err := filepath.Glob(filepath.Join(k.dir, "memory", pattern))
	if err != nil {
		k.t.Fatal(err)
	}
	return m
}

// What is not whole, not of this agent in this boot, or older than what was kept
// last is set aside with a reason, and the agent starts without it (R54, R55).
func TestSealedCacheOpensForItsAgentOnly(t *testing.T) {
	edit := func(f func([]byte) []byte) func(*testing.T, *kept) {
		return func(t *testing.T, k *kept) {
			data, err := os.ReadFile(k.file())
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(k.file(), f(bytes.Clone(data)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(at int) func(*testing.T, *kept) {
		return edit(func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 1; return b })
	}
	tear := func(at int) func(*testing.T, *kept) {
		return edit(func(b []byte) []byte { return b[:(at+len(b))%len(b)] })
	}
	for name, row := range map[string]struct {
		change func(*testing.T, *kept)
		next   func(*cache)
		good   bool
	}{
		"as it was":            {good: true},
		"format":               {change: flip(3)},
		"name of the key":      {change: flip(len(cacheFormat) + 3)},
		"the other key":        {change: flip(len(cacheFormat) + len(sealKeyA) - 1)},
		"boot":                 {change: flip(len(cacheFormat) + len(sealKeyA) + 5)},
		"salt":                 {change: flip(len(cacheFormat) + len(sealKeyA) + 45)},
		"middle":               {change: flip(-700)},
		"last byte":            {change: flip(-1)},
		"empty":                {change: edit(func([]byte) []byte { return nil })},
		"torn early":           {change: tear(10)},
		"torn in the head":     {change: tear(len(cacheFormat) + 20)},
		"torn late":            {change: tear(-1)},
		"longer":               {change: edit(func(b []byte) []byte { return append(b, 0) })},
		"another boot":         {next: func(c *cache) { c.boot = "00000000-0000-0000-0000-000000000000" }},
		"another trust domain": {next: func(c *cache) { c.td = spiffeid.RequireTrustDomainFromString("other.test") }},
		"another agent": {change: func(t *testing.T, k *kept) {
			k.own = &credential{id: spiffeid.RequireFromPath(k.server.TD, "/spire/agent/y")}
		}},
		"other keys": {change: func(t *testing.T, k *kept) { os.Remove(filepath.Join(k.dir, "keys.json")) }},
		"an older one": {change: func(t *testing.T, k *kept) {
			old, err := os.ReadFile(k.file())
			if err != nil {
				t.Fatal(err)
			}
			l := k.live()
			k.server.Put(k.server.Grant("b", "/b", "unix:uid:1"))
			k.follow(l, 2)
			k.server.Remove("b") // what was kept with it must not open again
			k.follow(l, 1)
			if err := os.WriteFile(k.file(), old, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		"one from before a restart": {change: func(t *testing.T, k *kept) {
			old, err := os.ReadFile(k.file())
			if err != nil {
				t.Fatal(err)
			}
			k.server.Put(k.server.Grant("b", "/b", "unix:uid:1"))
			k.follow(k.live(), 2)
			if err := os.WriteFile(k.file(), old, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.follow(k.live(), 1)
			if info, err := os.Stat(k.file()); err != nil || info.Mode().Perm() != 0o600 {
				t.Fatal(info, err)
			}
			if row.change != nil {
				row.change(t, k)
			}
			k.server.Down(true)
			l := k.live(append([]func(*cache){}, func(c *cache) {
				if row.next != nil {
					row.next(c)
				}
			})...)
			aside := len(k.matches("*.bad"))
			if got := l.mirror.Stats(); (got.X509SVIDs == 1) != row.good || got.Synced != row.good || (aside == 0) != row.good {
				t.Errorf("restored %+v, %d files set aside", got, aside)
			}
			// Whatever happened, the next life has what this one gets.
			k.server.Down(false)
			grants := 1
			if name == "one from before a restart" {
				grants = 2
			}
			k.follow(l, grants)
			if row.next == nil {
				if got := k.live().mirror.Stats(); got.X509SVIDs != grants {
					t.Errorf("the life after restored %+v", got)
				}
			}
		})
	}
}

// No workload key can be read in the file (R48).
func TestSealedCacheIsSealed(t *testing.T) {
	k := newKept(t)
	l := k.live()
	k.follow(l, 1)
	sub := l.mirror.Subscribe(entry.Facts{Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
	defer sub.Close()
	v := sub.View()
	data, err := os.ReadFile(k.file())
	if err != nil || len(v.Identities) != 1 {
		t.Fatal(err, len(v.Identities))
	}
	for _, secret := range [][]byte{v.Identities[0].Key[30:60], v.Identities[0].Chain[:40], []byte("spiffe://")} {
		if bytes.Contains(data, secret) {
			t.Error("the file shows what it holds")
		}
	}
}

// An agent that the server has put out keeps nothing, not even for one who has
// copied the file before, until it is let in again.
func TestSealedCacheForgets(t *testing.T) {
	for name, put := range map[string]func(*life, *cache){
		"banned": func(l *life, _ *cache) { l.streamEnded(fault.New(fault.Denied, "agent_banned", "banned")) },
		"evicted": func(l *life, _ *cache) {
			l.streamEnded(fault.New(fault.Unauthenticated, "agent_not_attested", "evicted"))
		},
		"refused": func(_ *life, c *cache) { c.heed(fault.New(fault.Denied, "agent_must_reattest", "prove again")) },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			l := k.live()
			k.follow(l, 1)
			copied, err := os.ReadFile(k.file())
			if err != nil {
				t.Fatal(err)
			}
			path := k.file()
			c := l.cache
			put(&life{agent: k.agent("", io.Discard), cache: c}, c)
			if left := k.matches("*"); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			c.changed(true)
			if err := c.write(t.Context(), l.mirror, k.own); err != nil || len(k.matches("*")) != 0 {
				t.Errorf("it was written again, %v", err)
			}
			if err := os.WriteFile(path, copied, 0o600); err != nil {
				t.Fatal(err)
			}
			if got := k.live().mirror.Stats(); got.Synced {
				t.Errorf("a copy was restored: %+v", got)
			}
			c.accepted()
			if err := c.write(t.Context(), l.mirror, k.own); err != nil {
				t.Fatal(err)
			}
			if got := k.live().mirror.Stats(); got.X509SVIDs != 1 {
				t.Errorf("after the agent was let in again: %+v", got)
			}
		})
	}
	// The agent's own expiry, or a server that cannot be reached, says nothing about what it was given.
	k := newKept(t)
	l := k.live()
	k.follow(l, 1)
	for _, reason := range []string{"agent_expired", "server_unavailable"} {
		l.heed(fault.New(fault.Denied, reason, "no"))
	}
	k.file()
}

// If what must not be used any more cannot be replaced, it goes; if something
// only came, the file stays as it is. Both are made good as soon as it is possible.
func TestSealedCacheThatCannotBeWritten(t *testing.T) {
	for name, row := range map[string]struct {
		breaks   string
		narrowed bool
		left     int
	}{
		"something came, no place":   {"memory", false, 0},
		"something went, no new key": {".", true, 0},
		"something came, no new key": {".", false, 1}, // none is needed
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			l := k.live()
			k.follow(l, 1)
			path := k.file()
			if row.breaks == "." {
				l.keeper = broken{l.keeper}
			} else if err := os.Rename(filepath.Dir(path), filepath.Dir(path)+".away"); err != nil {
				t.Fatal(err)
			}
			l.changed(row.narrowed)
			err := l.write(t.Context(), l.mirror, k.own)
			if (err == nil) != (row.left == 1) || len(k.matches("*.sealed")) != row.left {
				t.Errorf("write = %v, left %v", err, k.matches("*"))
			}
			if b, is := l.keeper.(broken); is {
				l.keeper = b.Keeper
			} else if err := os.Rename(filepath.Dir(path)+".away", filepath.Dir(path)); err != nil {
				t.Fatal(err)
			}
			if err := l.write(t.Context(), l.mirror, k.own); err != nil || len(k.matches("*.sealed")) != 1 {
				t.Errorf("write after the repair = %v, left %v", err, k.matches("*"))
			}
		})
	}
}

// broken is a keeper that cannot store.
type broken struct{ keys.Keeper }

func (broken) Generate(context.Context, string, keys.Type) (keys.Key, error) {
	return keys.Key{}, fault.New(fault.Unavailable, "key_file_unwritable", "the disk is full")
}

// Where nothing can be kept safely nothing is kept, and one sentence says so.
func TestNoSealedCache(t *testing.T) {
	k := newKept(t)
	for _, name := range []string{"RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"} {
		t.Setenv(name, "")
	}
	memory, err := new(memkeys.Config).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(k.dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RUNTIME_DIRECTORY", filepath.Join(k.dir, "disk"))
	onDisk, err := prepareCacheDir(filepath.Join(k.dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		dir    string
		keeper keys.Keeper
		err    bool
		says   string
	}{
		"switched off":           {dir: "none", keeper: k.keeper()},
		"no key":                 {dir: filepath.Join(k.dir, "m"), keeper: memory, says: "KeyManager"},
		"others may write to it": {dir: open, keeper: k.keeper(), err: true},
		"default not in memory":  {keeper: k.keeper(), says: "is not in memory"},
	} {
		if name == "default not in memory" && onDisk {
			continue // the test's directory is in memory
		}
		var log bytes.Buffer
		c, err := k.agent(row.dir, &log).openCache(row.keeper)
		if c != nil || (err != nil) != row.err || !strings.Contains(log.String(), row.says) || strings.Count(log.String(), "\n") > 1 {
			t.Errorf("%s: %v, %v, log %s", name, c, err, log.String())
		}
	}
	// Agents that share a directory have a file each.
	one, err := k.agent(filepath.Join(k.dir, "m"), io.Discard).openCache(k.keeper())
	if err != nil {
		t.Fatal(err)
	}
	other := k.agent(filepath.Join(k.dir, "m"), io.Discard)
	other.cfg.Agent.DataDir = filepath.Join(k.dir, "other")
	two, err := other.openCache(k.keeper())
	if err != nil || one.path == two.path {
		t.Errorf("%v, %v", one.path, err)
	}
	var none *cache
	none.forget()
	none.accepted()
	none.heed(fault.New(fault.Denied, "agent_banned", "banned"))
	none.restore(t.Context(), nil, k.own, nil)
}
