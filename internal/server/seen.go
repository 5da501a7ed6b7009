package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/store"
)

// openStore opens the store, and has a shared one remembered: what it held last
// is told to the next Open, so that one that was restored from a backup while no
// server ran is noticed. A store that is not shared remembers by itself.
func (s *Server) openStore(ctx context.Context, existing bool) (builtin.OpenStore, error) {
	dir := s.cfg.Server.DataDir
	if !s.plan.store.Where(dir).Shared {
		return s.plan.store.Open(ctx, builtin.StoreEnv{Dir: dir, Existing: existing, Log: s.log})
	}
	memory, err := openSeen(filepath.Join(dir, seenName))
	if err != nil {
		return builtin.OpenStore{}, err
	}
	opened, err := s.plan.store.Open(ctx, builtin.StoreEnv{Dir: dir, Seen: memory.position, Existing: existing, Log: s.log})
	if err != nil {
		return builtin.OpenStore{}, errors.Join(err, memory.file.Close())
	}
	opened.Store = &remembered{Store: opened.Store, seen: memory, log: s.log}
	return opened, nil
}

// seenName is a file of data_dir that holds one line: the epoch and revision of
// the shared store that this server applied last, and a checksum. It is written
// before a batch is applied and not synced: a power cut may take it back in
// time, which only makes it say less.
const seenName = "store-position"

type seen struct {
	mu       sync.Mutex // guards all below
	file     *os.File
	position store.Position
}

// openSeen reads the file, and makes it if it is missing. One that makes no
// sense remembers nothing.
func openSeen(path string) (*seen, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open what the store held last: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(f, 256))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read what the store held last: %w", err), f.Close())
	}
	return &seen{file: f, position: parseSeen(string(text))}, nil
}

func seenLine(p store.Position) string {
	line := fmt.Sprintf("%x %020d", p.Epoch[:], p.Revision)
	return fmt.Sprintf("%s %08x\n", line, crc32.ChecksumIEEE([]byte(line)))
}

// parseSeen returns the zero position for anything that seenLine did not make.
func parseSeen(line string) (p store.Position) {
	var epoch, sum string
	if _, err := fmt.Sscanf(line, "%32s %d %s", &epoch, &p.Revision, &sum); err != nil {
		return store.Position{}
	}
	if n, err := hex.Decode(p.Epoch[:], []byte(epoch)); err != nil || n != len(p.Epoch) || seenLine(p) != line {
		return store.Position{}
	}
	return p
}

// note remembers a position.
func (s *seen) note(p store.Position) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Epoch == s.position.Epoch && p.Revision <= s.position.Revision {
		return nil
	}
	if _, err := s.file.WriteAt([]byte(seenLine(p)), 0); err != nil {
		return err
	}
	s.position = p
	return nil
}

// remembered is a store whose position is remembered.
type remembered struct {
	store.Store
	seen *seen
	log  *slog.Logger
}

func (r *remembered) note(ctx context.Context, p store.Position) {
	if err := r.seen.note(p); err != nil {
		r.log.WarnContext(ctx, "store position not remembered", "position", p.String(), "err", err)
	}
}

// Load implements store.Store.
func (r *remembered) Load(ctx context.Context, f func(key string, rev uint64, value []byte) error) (store.Position, error) {
	p, err := r.Store.Load(ctx, f)
	if err == nil {
		r.note(ctx, p)
	}
	return p, err
}

// Watch implements store.Store. What is yielded is remembered first: so it is
// before anybody is told that it is committed.
func (r *remembered) Watch(ctx context.Context, after store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		for b, err := range r.Store.Watch(ctx, after) {
			if err == nil {
				r.note(ctx, b.Position)
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// Close implements store.Store.
func (r *remembered) Close() error { return errors.Join(r.Store.Close(), r.seen.file.Close()) }
