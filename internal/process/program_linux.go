package process

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"golang.org/x/sys/unix"
)

const (
	maxHashes  = 1024 // programs whose hash is remembered
	maxReading = 4    // programs looked at on disk at one time
	// A file younger than this is hashed but not remembered: within one tick of
	// the kernel's clock it could change once more and look the same.
	settled = 100 * time.Millisecond
)

// Programs reads which program a process runs. It remembers hashes by what the
// file is, so a program is read once however often it calls (R62). Work that
// touches a disk is done by at most four goroutines, so that a file system that
// hangs costs a bounded number of them (W22). The zero value is ready to use;
// all methods may be called concurrently.
type Programs struct {
	once  sync.Once
	slots chan struct{}
	reads atomic.Uint64

	mu     sync.Mutex // guards everything below
	hashes map[fileID]*sum
	order  []fileID // oldest first
}

// fileID is one state of one file. The change time cannot be set back by its owner.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// sum is a hash, there once done is closed.
type sum struct {
	done chan struct{}
	hex  string
	err  error
}

// Hashed returns how many files were read and hashed so far.
func (p *Programs) Hashed() uint64 { return p.reads.Load() }

// Path returns the path of the program of process pid. It is an error if that
// path does not lead the agent to the very file that runs: deleted, replaced,
// or named in a mount namespace of the workload's own making (R45, W23).
func (p *Programs) Path(ctx context.Context, pid int) (string, error) {
	return await(ctx, p, func() (string, error) {
		path, err := os.Readlink(exePath(pid))
		if err != nil {
			return "", fmt.Errorf("read the program's path: %w", err)
		}
		var runs, named unix.Stat_t
		if err := unix.Stat(exePath(pid), &runs); err != nil {
			return "", fmt.Errorf("look at the program: %w", err)
		}
		if err := unix.Stat(path, &named); err != nil || named.Dev != runs.Dev || named.Ino != runs.Ino {
			return "", fault.New(fault.Precondition, "program_path_unproven",
				"%q is not the program that runs: it was deleted, replaced, or is in another mount namespace", path)
		}
		return path, nil
	})
}

// ProgramName returns the last part of the path of the program of process pid,
// as the kernel has it: of the file itself, not of a link to it, and the same
// after the file was deleted or replaced. It does not touch the disk.
//
// Whoever starts a program chooses where it lies, and so its name.
func ProgramName(pid int) (string, error) {
	path, err := os.Readlink(exePath(pid))
	if err != nil {
		return "", fmt.Errorf("read the program's path: %w", err)
	}
	return filepath.Base(strings.TrimSuffix(path, " (deleted)")), nil
}

// SHA256 returns the hash of the program of process pid, in lower-case hex,
// read through the process itself. A file larger than limit bytes is refused;
// limit 0 means none.
func (p *Programs) SHA256(ctx context.Context, pid int, limit int64) (string, error) {
	s, err := await(ctx, p, func() (*sum, error) { return p.sum(pid, limit) })
	if err != nil {
		return "", err
	}
	select {
	case <-s.done:
		return s.hex, s.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// sum returns the hash of the program of pid. Who comes first reads the file
// now, on this goroutine; the others are given the same sum to wait for.
func (p *Programs) sum(pid int, limit int64) (*sum, error) {
	f, err := os.Open(exePath(pid))
	if err != nil {
		return nil, fmt.Errorf("open the program: %w", err)
	}
	defer f.Close()
	id, err := identify(f)
	if err != nil {
		return nil, err
	}
	if limit > 0 && id.size > limit {
		return nil, fault.New(fault.Precondition, "program_too_large",
			"the program has %d bytes, workload_size_limit is %d", id.size, limit)
	}
	p.mu.Lock()
	s, ok := p.hashes[id]
	if ok {
		p.mu.Unlock()
		return s, nil
	}
	s = &sum{done: make(chan struct{})}
	p.rememberLocked(id, s)
	p.mu.Unlock()

	s.hex, s.err = p.hash(f, id)
	if s.err != nil || time.Since(time.Unix(id.ctime.Unix())) < settled {
		p.forget(id, s)
	}
	close(s.done)
	return s, nil
}

func (p *Programs) hash(f *os.File, id fileID) (string, error) {
	p.reads.Add(1)
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(f, id.size)); err != nil {
		return "", fmt.Errorf("read the program: %w", err)
	}
	after, err := identify(f)
	if err != nil {
		return "", err
	}
	if after != id {
		return "", errors.New("the program's file changed while it was read")
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func identify(f *os.File) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileID{}, fmt.Errorf("look at the program: %w", err)
	}
	return fileID{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
}

func (p *Programs) rememberLocked(id fileID, s *sum) {
	if p.hashes == nil {
		p.hashes = make(map[fileID]*sum)
	}
	if len(p.order) == maxHashes {
		delete(p.hashes, p.order[0])
		p.order = p.order[1:]
	}
	p.hashes[id] = s
	p.order = append(p.order, id)
}

func (p *Programs) forget(id fileID, s *sum) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hashes[id] != s {
		return
	}
	delete(p.hashes, id)
	for i, o := range p.order {
		if o == id {
			p.order = append(p.order[:i], p.order[i+1:]...)
			return
		}
	}
}

// await runs f on a goroutine of its own, at most maxReading at once, and
// stops waiting when ctx is done. A file system that hangs holds its slot.
func await[T any](ctx context.Context, p *Programs, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	p.once.Do(func() { p.slots = make(chan struct{}, maxReading) })
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return none, ctx.Err()
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-p.slots }()
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}
