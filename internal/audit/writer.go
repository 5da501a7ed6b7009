package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	syncEvery   = time.Second
	reopenEvery = time.Second
)

// Config says where a trail is written and how careful to be.
type Config struct {
	Path    string
	Server  string // id of this server
	Version string
	// Strict: Append returns only when its events are durable, and fails when
	// they cannot be. Otherwise events are written before Append returns (they
	// survive the process, not the machine), made durable each second, and a
	// failing file is counted and alarmed but refuses nothing.
	Strict bool
	// Seen, if not nil, is told each event that Append and Note let pass, for those
	// who count. It must be quick.
	Seen func(Event)
	Log  *slog.Logger
}

// Writer appends events to one file. All methods may be called concurrently.
type Writer struct {
	cfg Config

	// syncMu is held during fsync, so that those who wait meanwhile share the next one.
	syncMu sync.Mutex
	// written holds one when something may have to be made durable.
	written chan struct{}

	// mu guards everything below.
	mu       sync.Mutex
	file     *os.File // nil after a failure, until reopened
	size     int64    // of the complete records
	last     Record   // only Sequence and Server are kept up
	previous Hash
	synced   uint64 // highest sequence known durable
	lost     uint64 // events since the last gap record
	dropped  uint64 // events lost since Open
	life     uint64 // counts the times the file was given up
	retryAt  time.Time
	closed   bool
}

// Open opens or creates the trail, sets a torn last line aside and continues
// the chain. The file is made 0600; a file that others may write is refused.
func Open(cfg Config) (*Writer, error) {
	w := &Writer{cfg: cfg, written: make(chan struct{}, 1)}
	aside, err := w.openLocked()
	if err != nil {
		return nil, fmt.Errorf("open audit trail: %w", err)
	}
	if err := w.writeLocked(time.Now(), Start{Version: cfg.Version, Strict: cfg.Strict, Aside: aside}); err != nil {
		w.file.Close()
		return nil, fmt.Errorf("write audit trail: %w", err)
	}
	return w, nil
}

// Append writes events in order. In strict mode it returns when they are
// durable, and its error means that what they announce must not happen. In the
// default mode the only errors are those of a programmer.
func (w *Writer) Append(events ...Event) error {
	sequence, life, err := w.write(events)
	if err == nil && w.cfg.Strict {
		err = w.sync(sequence, life)
	}
	if err != nil && w.cfg.Strict {
		return unavailable(err)
	}
	if err != nil {
		w.cfg.Log.Error("audit event lost", "err", err, "count", len(events))
	}
	w.tell(events)
	return nil
}

func (w *Writer) tell(events []Event) {
	if w.cfg.Seen != nil {
		for _, e := range events {
			w.cfg.Seen(e)
		}
	}
}

// Note appends what has happened already, so that there is nothing left to
// refuse: it waits for no disk. Events that come later and are made durable
// make these durable too.
func (w *Writer) Note(events ...Event) {
	if _, _, err := w.write(events); err != nil {
		w.cfg.Log.Error("audit event lost", "err", err, "count", len(events))
	}
	w.tell(events)
}

func unavailable(err error) error {
	return fault.New(fault.Unavailable, "audit_unavailable", "the audit trail cannot be written").
		Fix("free space on its disk or repair it; the server goes on by itself then").Because(err)
}

func (w *Writer) write(events []Event) (sequence, life uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		w.dropped += uint64(len(events))
		return 0, 0, errors.New("the trail is closed")
	}
	now := time.Now()
	if w.file == nil && !now.Before(w.retryAt) {
		w.reopenLocked(now)
	}
	if err = w.writeLocked(now, events...); err != nil {
		w.lost += uint64(len(events))
		w.dropped += uint64(len(events))
	}
	return w.last.Sequence, w.life, err
}

// Run makes events durable, a second after the first of them, until ctx is done.
func (w *Writer) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.written:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(syncEvery):
			if err := w.flush(); err != nil {
				w.cfg.Log.Error("audit trail not durable", "err", err)
			}
		}
	}
}

// Healthy says why events are being lost now, if they are.
func (w *Writer) Healthy() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return unavailable(errors.New("the file is not open"))
	}
	return nil
}

// Dropped returns how many events were lost since Open: any number but zero
// means that the trail has a gap.
func (w *Writer) Dropped() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped
}

// Close makes what was written durable and releases the file.
func (w *Writer) Close() error {
	err := w.flush()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.file == nil {
		return err
	}
	err = errors.Join(err, w.file.Close())
	w.file = nil
	return err
}

func (w *Writer) flush() error {
	w.mu.Lock()
	sequence, life, open := w.last.Sequence, w.life, w.file != nil
	w.mu.Unlock()
	if !open {
		return nil
	}
	return w.sync(sequence, life)
}

// sync returns when record sequence, written in that life of the file, is
// durable. Callers that come while an fsync runs wait for it and then share the next one.
func (w *Writer) sync(sequence, life uint64) error {
	w.syncMu.Lock()
	defer w.syncMu.Unlock()
	w.mu.Lock()
	file, written, done, same := w.file, w.last.Sequence, w.synced >= sequence, w.life == life
	w.mu.Unlock()
	if !same || file == nil {
		return errors.New("the file was given up before the record was durable")
	}
	if done {
		return nil
	}
	err := file.Sync()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		// After a failed fsync the kernel may have dropped the pages: this file
		// handle proves nothing any more (R81).
		w.abandonLocked()
		return err
	}
	w.synced = max(w.synced, written)
	return nil
}

func (w *Writer) writeLocked(now time.Time, events ...Event) error {
	if w.file == nil {
		return errors.New("the file is not open")
	}
	var block bytes.Buffer
	sequence, previous := w.last.Sequence, w.previous
	if w.lost > 0 {
		events = append([]Event{Gap{Lost: w.lost}}, events...)
	}
	for _, e := range events {
		sequence++
		line, err := record[Event]{sequence, previous, w.cfg.Server, now, e.kind(), e}.Canonical()
		if err != nil {
			return err
		}
		if len(line) >= MaxRecord {
			return fmt.Errorf("a record of %d bytes is over the limit", len(line))
		}
		previous = sha256.Sum256(line)
		block.Write(line)
		block.WriteByte('\n')
	}
	if _, err := w.file.WriteAt(block.Bytes(), w.size); err != nil {
		w.abandonLocked()
		return err
	}
	w.size += int64(block.Len())
	w.last.Sequence, w.previous, w.lost = sequence, previous, 0
	select {
	case w.written <- struct{}{}:
	default:
	}
	return nil
}

func (w *Writer) abandonLocked() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
	}
	w.life++
	w.retryAt = time.Now().Add(reopenEvery)
}

func (w *Writer) reopenLocked(now time.Time) {
	if _, err := w.openLocked(); err != nil {
		w.retryAt = now.Add(reopenEvery)
		return
	}
	w.cfg.Log.Warn("audit trail reopened", "count", w.dropped)
}

// openLocked opens the file, repairs its end and reads where the chain stands.
// It returns how many bytes were set aside.
func (w *Writer) openLocked() (aside int64, err error) {
	f, err := os.OpenFile(w.cfg.Path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return 0, fault.New(fault.Precondition, "audit_file_unsafe", "%q is not a regular file that only its owner can write", w.cfg.Path).
			Fix("chmod 600 %s", w.cfg.Path)
	}
	complete, line, err := tail(f, info.Size())
	if err != nil {
		return 0, err
	}
	last, previous := Record{Server: w.cfg.Server}, Hash{}
	if line != nil {
		if last, err = parse(line); err != nil {
			return 0, broken(0, "its last record cannot be read: %v", err)
		}
		if last.Server != w.cfg.Server {
			return 0, fault.New(fault.Precondition, "audit_broken", "the audit trail %s is that of the server %s, and this one is %s", w.cfg.Path, last.Server, w.cfg.Server).
				Fix("move it elsewhere and keep it; this server begins its own")
		}
		previous = sha256.Sum256(line)
	}
	if aside = info.Size() - complete; aside > 0 {
		if err := setAside(f, complete, aside, w.cfg.Path); err != nil {
			return 0, err
		}
	}
	if info.Size() == 0 {
		if err := syncDir(filepath.Dir(w.cfg.Path)); err != nil {
			return 0, err
		}
	}
	w.file, w.size, w.previous, w.synced = f, complete, previous, 0
	w.last = Record{Sequence: last.Sequence, Server: last.Server}
	return aside, nil
}

// tail returns the length of the complete lines and the last of them, nil if there is none.
func tail(f *os.File, size int64) (complete int64, line []byte, err error) {
	// Two records always fit: the last complete one and a torn one.
	from := max(0, size-2*MaxRecord)
	b := make([]byte, size-from)
	if _, err := f.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
		return 0, nil, err
	}
	end := bytes.LastIndexByte(b, '\n')
	if end < 0 {
		if from > 0 {
			return 0, nil, broken(0, "no record in its last %d bytes", len(b))
		}
		return 0, nil, nil
	}
	start := bytes.LastIndexByte(b[:end], '\n') + 1
	if start == 0 && from > 0 {
		return 0, nil, broken(0, "its last record is longer than %d bytes", MaxRecord)
	}
	return from + int64(end) + 1, b[start:end], nil
}

// setAside keeps a torn end next to the trail, then cuts it off.
func setAside(f *os.File, at, n int64, path string) error {
	torn, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".torn-*")
	if err != nil {
		return err
	}
	_, err = io.Copy(torn, io.NewSectionReader(f, at, n))
	if err = errors.Join(err, torn.Sync(), torn.Close()); err != nil {
		return err
	}
	if err := f.Truncate(at); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func gapOf(r Record) (uint64, error) {
	var g Gap
	err := json.Unmarshal(r.Event, &g)
	return g.Lost, err
}
