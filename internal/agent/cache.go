package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Names of the keys that seal. They alternate: what was sealed before something
// was taken from this agent does not open any more (R55).
const (
	sealKeyA = "agent-cache-A"
	sealKeyB = "agent-cache-B"
)

const (
	noCache     = "none" // as cache_directory
	cacheFormat = "plastron sealed cache 1\n"
	maxCache    = 64 << 20 // bytes
	cachePause  = time.Second
	cacheRetry  = 15 * time.Second
)

// cache keeps what the mirror holds for the next life of this agent: sealed, in
// memory, of this boot. Without one an agent that starts while no server is there
// has nothing to serve. A nil cache keeps nothing.
type cache struct {
	path   string
	boot   string
	td     spiffeid.TrustDomain
	keeper keys.Keeper
	sealer keys.Sealer
	log    *slog.Logger
	wake   chan struct{}

	mu       sync.Mutex // guards everything below
	dirty    bool
	narrowed bool // what was written before must not open again

	file  sync.Mutex // guards the file and everything below
	key   string     // that sealed the file; empty: none of this life
	ended bool       // the server has put this agent out: nothing is kept
}

// openCache finds a place in memory, or says why nothing is kept.
func (a *Agent) openCache(keeper keys.Keeper) (*cache, error) {
	if a.cfg.Agent.CacheDirectory == noCache {
		return nil, nil
	}
	none := func(why string) (*cache, error) {
		a.log.Info("nothing is kept for a restart while no server is there", "err", why)
		return nil, nil
	}
	sealer, ok := keeper.(keys.Sealer)
	if !ok {
		return none("the KeyManager has no key that outlives the process")
	}
	boot, err := bootID()
	if err != nil {
		return none("this system does not tell one boot from another")
	}
	dir, named := a.cfg.Agent.CacheDirectory, true
	if dir == "" {
		if dir, named = memoryDir(), false; dir == "" {
			return none("there is no directory in memory; set cache_directory")
		}
	}
	inMemory, err := prepareCacheDir(dir)
	switch {
	case err != nil && named:
		return nil, fault.New(fault.Precondition, "cache_unusable", "cache_directory: %v", err).
			Fix("name a directory that belongs to the agent's user and that nobody else can write to, or %q", noCache).Because(err)
	case err != nil:
		return none(err.Error())
	case !inMemory && !named:
		return none(dir + " is not in memory; set cache_directory")
	case !inMemory:
		a.log.Warn("cache_directory is not in memory: whoever gets this disk and the agent's keys gets workloads' keys", "dir", dir)
	}
	data, err := filepath.Abs(a.cfg.Agent.DataDir)
	if err != nil {
		return nil, err
	}
	name := sha256.Sum256([]byte(data)) // the lock on it is the lock on the cache
	return &cache{
		path: filepath.Join(dir, hex.EncodeToString(name[:8])+".sealed"), boot: boot, td: a.cfg.Agent.TrustDomain.TrustDomain,
		keeper: keeper, sealer: sealer, log: a.log, wake: make(chan struct{}, 1), narrowed: true,
	}, nil
}

// memoryDir returns where a cache goes by default, or nothing.
func memoryDir() string {
	if dir, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); filepath.IsAbs(dir) {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/run/plastron/agent"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "plastron")
	}
	return ""
}

// prepareCacheDir makes the directory, and reports whether it is in memory.
func prepareCacheDir(dir string) (inMemory bool, err error) {
	// A directory below /run may be shared with others of ours, the last is the agent's.
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return false, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false, err
	}
	if err := checkDir(dir); err != nil {
		return false, err
	}
	return isMemory(dir)
}

// changed is the hook of mirror.Config.
func (c *cache) changed(narrowed bool) {
	c.mu.Lock()
	c.dirty, c.narrowed = true, c.narrowed || narrowed
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// restore hands over to the mirror what the last life has kept for this agent.
// What cannot be used is set aside, and the agent starts without (R54).
func (c *cache) restore(ctx context.Context, m *mirror.Mirror, own *credential, trusted *bundle.Bundle) {
	if c == nil || own == nil || trusted == nil {
		return
	}
	plain, err := c.load(ctx, own.id)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var r mirror.Restored
	if err == nil {
		r, err = m.Restore(plain, trusted)
	}
	if err != nil {
		aside := c.path + ".bad"
		c.log.Warn("what was kept for this start is not usable and was set aside", "dir", aside, "reason", fault.ReasonOf(err),
			"err", errors.Join(err, os.Rename(c.path, aside)))
		return
	}
	c.log.Info("identities of the agent's last run are served", "count", r.X509SVIDs+r.JWTSVIDs)
	if r.Left > 0 {
		c.log.Info("kept identities were left out, because they have ended or are not trusted any more", "count", r.Left)
	}
}

// load reads the file. own is whose it has to be.
func (c *cache) load(ctx context.Context, own spiffeid.ID) ([]byte, error) {
	f, err := os.Open(c.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCache+1))
	if err != nil {
		return nil, err
	}
	bad := func(what string) error { return fault.New(fault.Precondition, "cache_foreign", "%s", what) }
	rest, ok := bytes.CutPrefix(data, []byte(cacheFormat))
	key, rest, cut := bytes.Cut(rest, []byte("\n"))
	boot, sealed, cut2 := bytes.Cut(rest, []byte("\n"))
	switch {
	case len(data) > maxCache:
		return nil, bad("it is too large")
	case !ok || !cut || !cut2:
		return nil, bad("it is torn, or of another format")
	case string(key) != sealKeyA && string(key) != sealKeyB:
		return nil, bad("it names a key that seals nothing")
	case string(boot) != c.boot:
		return nil, bad("it is of another boot")
	}
	plain, err := c.sealer.Unseal(ctx, string(key), sealed, c.bound(string(key), own))
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return nil, fault.New(fault.Precondition, "cache_superseded", "it is older than the last that was kept, or of another agent")
	case err != nil:
		return nil, fault.New(fault.Precondition, "cache_broken", "it is of another agent or trust domain, torn, or was changed").Because(err)
	}
	c.file.Lock()
	c.key = string(key)
	c.file.Unlock()
	return plain, nil
}

// header is what can be read of the file.
func (c *cache) header(key string) []byte { return []byte(cacheFormat + key + "\n" + c.boot + "\n") }

// bound is what a seal is good for: this format, this key, this boot, this trust
// domain and this agent.
func (c *cache) bound(key string, own spiffeid.ID) []byte {
	var b []byte
	for _, part := range []string{string(c.header(key)), c.td.Name(), own.String()} {
		b = binary.AppendUvarint(b, uint64(len(part)))
		b = append(b, part...)
	}
	return b
}

// run writes what has changed, once a second at most, and once more at the end.
func (c *cache) run(ctx context.Context, m *mirror.Mirror, own func() *credential) {
	var retry <-chan time.Time // nil: the last write was good
	for ctx.Err() == nil {
		select {
		case <-c.wake:
		case <-retry:
		case <-ctx.Done():
			continue
		}
		err := c.write(ctx, m, own())
		switch {
		case err == nil:
			retry = nil
		case retry == nil && ctx.Err() == nil: // it is said once
			c.log.Warn("what is served cannot be kept for a restart", "reason", fault.ReasonOf(err), "err", err)
			fallthrough
		default:
			retry = time.After(cacheRetry)
		}
		select {
		case <-time.After(cachePause):
		case <-ctx.Done():
		}
	}
	if err := c.write(context.WithoutCancel(ctx), m, own()); err != nil && retry == nil {
		c.log.Warn("what is served could not be kept for a restart", "reason", fault.ReasonOf(err), "err", err)
	}
}

// write replaces the file. If something of the one before must not be used any
// more, it is sealed with a new key and the one before is deleted; if that cannot
// be done, the file goes.
func (c *cache) write(ctx context.Context, m *mirror.Mirror, own *credential) (err error) {
	c.file.Lock()
	defer c.file.Unlock()
	c.mu.Lock()
	dirty, narrowed := c.dirty, c.narrowed
	c.dirty, c.narrowed = false, false
	c.mu.Unlock()
	if !dirty || c.ended || own == nil {
		c.again(dirty, narrowed)
		return nil
	}
	defer func() {
		if err == nil {
			return
		}
		c.again(true, narrowed)
		if narrowed {
			err = errors.Join(err, remove(c.path))
		}
	}()
	plain, err := m.Keep()
	if err != nil || plain == nil {
		return err
	}
	key, other := sealKeyA, sealKeyB
	if c.key == sealKeyB {
		key, other = other, key
	}
	if narrowed || c.key == "" {
		key, other = other, key
		if _, err := c.keeper.Generate(ctx, key, keys.ECP256); err != nil {
			return err
		}
	}
	sealed, err := c.sealer.Seal(ctx, key, plain, c.bound(key, own.id))
	if err != nil {
		return err
	}
	if data := append(c.header(key), sealed...); len(data) > maxCache {
		return fault.New(fault.Exhausted, "cache_too_large", "it is larger than %d MiB", maxCache>>20)
	} else if err := writeFile(c.path, data); err != nil {
		return err
	}
	c.key = key
	if _, err := c.keeper.Key(ctx, other); fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return c.keeper.Delete(ctx, other) // copies of what was kept before do not open any more
}

// again puts back what a write has taken on.
func (c *cache) again(dirty, narrowed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirty, c.narrowed = c.dirty || dirty, c.narrowed || narrowed
}

// heed looks at what the server says to this agent: when it has put it out,
// nothing that it was given comes back with the next start.
func (c *cache) heed(err error) {
	if agentid.Lost(err) && fault.ReasonOf(err) != agentid.ReasonExpired {
		c.forget()
	}
}

// forget removes what is kept, and the keys that open copies of it. Nothing is
// kept until the server accepts the agent again.
func (c *cache) forget() {
	if c == nil {
		return
	}
	c.file.Lock()
	defer c.file.Unlock()
	if c.ended {
		return
	}
	c.ended, c.key = true, ""
	err := remove(c.path)
	for _, key := range []string{sealKeyA, sealKeyB} {
		err = errors.Join(err, c.keeper.Delete(context.Background(), key))
	}
	if err != nil {
		c.log.Warn("what was kept for a restart could not be removed", "err", err)
	}
}

// accepted ends what forget has begun.
func (c *cache) accepted() {
	if c == nil {
		return
	}
	c.file.Lock()
	ended := c.ended
	c.ended = false
	c.file.Unlock()
	if ended {
		c.changed(true)
	}
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove what was kept: %w", err)
	}
	return nil
}
