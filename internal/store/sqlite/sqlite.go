// Package sqlite keeps the ordered log of package store in one SQLite database
// (pure Go, WAL, synchronous FULL) in a directory that one process holds. It
// decides how a commit becomes durable and what a restored or copied database
// means; what the keys and values are is not its business.
//
// What must always hold: a commit is acknowledged only after its log row is
// synced to disk; a row is there whole or not at all; rows form a chain without
// a hole; the table kv never says anything that the log did not say first.
//
// # Files
//
//	plastron.db      meta (one row), log (one row per group commit), kv (live keys)
//	plastron.db-wal  written and synced by each commit; copied into the database in the background
//	plastron.db-shm  SQLite's index of the WAL; rebuilt when missing
//	position         the epoch and revision last acknowledged, and which file that was
//	lock             held by the process that has the store open; holds its pid
//
// The directory is 0700 and the files 0600. A directory that others can write,
// or one below such a directory, is refused.
//
// # A commit
//
// Callers queue; one loop takes what is queued, cuts it into groups
// (store.Groups), judges the conditions against a map from key to revision in
// memory, appends one row to log (prepared statement, one sync of the WAL),
// writes position, tells the watchers, and answers. The table kv is folded from
// the log later, in key order and in short transactions between commits. A fold
// that was cut off by a crash does no harm: folded in meta moves last, and
// Load lays all log rows after it over kv.
//
// # Backup and restore
//
// While the server runs: sqlite3 plastron.db "VACUUM INTO 'backup.db'". While it
// is stopped: copy plastron.db. To restore, stop the server, remove
// plastron.db-wal and plastron.db-shm, and move (not overwrite) the backup to
// plastron.db. Leave position where it is: it is how Open sees that the
// database is older than what was once acknowledged and draws a new epoch,
// which voids what must not live twice. Without position, or with one that
// describes another file, Open draws a new epoch as well. A snapshot of the
// whole machine, position included, cannot be told from a reboot: remove
// position after going back to one.
//
// # What an attacker gains
//
// Reading: every registration, node, selector and bundle, and the hashes of
// outstanding join tokens, but no private key and no usable token. Writing:
// everything the trust domain's registrations can grant; a new entry is a new
// identity, a changed bundle a new root, a deleted ban a returning agent.
// Nothing here is signed: who can write these files is trusted like the server.
// Deleting position forces a new epoch, which voids outstanding tokens and
// makes agents compare hashes; it does not change what is registered.
//
// # How it fails
//
// The commit loop. Disk full: the group is refused (fault.Unavailable,
// "disk_full"), nothing of it is written, the next one is tried afresh. Any
// other failure of a write, a failed sync above all, ends the use of the open
// files: the connections are closed, the WAL is written anew and synced (so
// that nothing is believed because it merely sits in the page cache), the
// database is opened again and the log tells whether the group is in. Until
// that succeeds every commit and load answers fault.Unavailable and tries
// again. If the log then holds anything but what this process wrote, it stays
// refused ("store_changed") until a restart. A failed write of position is
// logged, not fatal: the next commit repeats it.
//
// The fold loop. A failed round is logged and ends the use of the open files as
// above; it is repeated after a later commit. Commits go on meanwhile and the
// log grows.
//
// A watcher reads from memory, or from log when it is behind; it ends with an
// error when it cannot go on without a hole.
package sqlite

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Config says where the store is.
type Config struct {
	// Dir is the directory that holds the database. It is created (0700) when it
	// is missing; its parent must exist. It must be on a local disk: neither
	// SQLite's locks nor its WAL work over a network file system, and one that
	// numbers its files anew at each mount makes every start look like a copy.
	Dir string
	// Existing refuses (fault.NotFound, "store_not_found") to make a store that is not there.
	Existing bool
}

// Opened says what Open found.
type Opened struct {
	NewEpoch bool
	Reason   string // why the epoch is new: "created", "restored", "copied" or "replaced"
}

// Store is an open store. It implements store.Store. Open starts two goroutines
// (commits and folding) that Close ends.
type Store struct {
	// Opened is how the store was found; it does not change.
	Opened Opened

	dir   string
	log   *slog.Logger
	lock  *dirLock
	epoch store.Epoch
	limit limits
	queue *store.Queue
	loops sync.WaitGroup

	// writing is held from before a row is written until it is published, for
	// each short transaction of a fold, and while the files are reopened. It
	// guards the fields up to the next comment. It is taken before files, and
	// files before mu.
	writing  sync.Mutex
	writer   *writer
	position *positionFile
	revs     *revisions // nil until the first Load or Commit
	broken   error      // why the open files may not be used; nil when they may
	pending  *row       // the row whose fate is unknown while broken

	// checking is held by the one Check that is under way; it guards nothing else.
	checking sync.Mutex

	// folding is held by the one fold that is under way; it is taken before all others.
	folding sync.Mutex

	// files is held for reading by whoever uses a connection other than writer,
	// for writing while they are all replaced.
	files  sync.RWMutex
	reader *reader // for log rows; has its own lock
	keeper *conn   // for checkpoints; only the fold loop uses it

	// mu guards what follows and is held for a few instructions only.
	mu        sync.Mutex
	closed    bool
	head      uint64
	folded    uint64
	compacted uint64
	tail      int           // bytes and rows of the log after folded, see weight
	unchecked int           // bytes written to the WAL since the last checkpoint
	recent    []row         // the newest rows, without a hole, the last one is head
	recentLen int           // their bytes
	changed   chan struct{} // closed and replaced when head, compacted or closed change

	wakeFold chan struct{} // capacity 1
}

// limits are fixed; tests make them small.
type limits struct {
	recentRows  int // rows kept in memory for watchers
	recentBytes int
	fold        int // fold when the log's tail weighs this much
	foldChunk   int // keys in one transaction of a fold
	foldBytes   int // bytes in one transaction of a fold
	checkpoint  int // copy the WAL into the database after so many bytes
}

func defaultLimits() limits {
	return limits{recentRows: 4096, recentBytes: 8 << 20, fold: 32 << 20, foldChunk: 1024, foldBytes: 1 << 20, checkpoint: 16 << 20}
}

// weight is what a log row adds to the tail: its bytes, and some for its keys
// while they are folded.
func (r *row) weight() int { return len(r.batch) + rowWeight }

const rowWeight = 256

// Open opens the store, and creates it when the directory is empty. It fails
// with fault.Precondition when another process holds it ("store_in_use"), when
// others may write it ("unsafe_permissions"), when it is of a newer version
// ("schema_newer") or damaged ("store_corrupt"), and when there was a database
// and is none ("database_missing").
func (c Config) Open(ctx context.Context, log *slog.Logger) (*Store, error) {
	if _, err := os.Lstat(filepath.Join(c.Dir, databaseName)); c.Existing && errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "store_not_found", "there is no store in %s", c.Dir).
			Fix("see whether the configuration names the right place")
	}
	return open(ctx, c.Dir, log, defaultLimits())
}

func open(ctx context.Context, dir string, log *slog.Logger, limit limits) (_ *Store, err error) {
	s := &Store{
		log: log, limit: limit,
		changed: make(chan struct{}), queue: store.NewQueue(), wakeFold: make(chan struct{}, 1),
	}
	if s.dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if err := prepareDir(s.dir); err != nil {
		return nil, err
	}
	if s.lock, err = lockDir(s.dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if s.position, err = openPosition(s.dir); err != nil {
		return nil, err
	}
	if err := prepareDatabase(s.dir, s.position.found); err != nil {
		return nil, err
	}
	if err := s.connect(); err != nil {
		return nil, err
	}
	m, err := s.writer.prepareSchema()
	if err != nil {
		return nil, err
	}
	if err := s.findEnd(m); err != nil {
		return nil, err
	}
	if err := s.settleEpoch(m); err != nil {
		return nil, err
	}
	s.log.InfoContext(ctx, "store opened", "dir", s.dir, "epoch", s.epoch.String(), "revision", s.head)
	s.loops.Go(func() { s.queue.Run(nil, s.commitGroup) }) // it alone appends to the log
	s.loops.Go(s.foldLoop)
	return s, nil
}

// settleEpoch compares the database with what position remembers and draws a
// new epoch when the database has been elsewhere or back in time.
func (s *Store) settleEpoch(m meta) error {
	file, err := fileIdentity(filepath.Join(s.dir, databaseName))
	if err != nil {
		return err
	}
	switch was := s.position.found; {
	case m.fresh:
		s.Opened = Opened{NewEpoch: true, Reason: "created"}
	case was == nil:
		s.Opened = Opened{NewEpoch: true, Reason: "copied"}
	case was.epoch != m.epoch:
		s.Opened = Opened{NewEpoch: true, Reason: "replaced"}
	case was.revision > s.head:
		s.Opened = Opened{NewEpoch: true, Reason: "restored"}
	case was.file != file:
		s.Opened = Opened{NewEpoch: true, Reason: "copied"}
	}
	s.epoch = m.epoch
	if s.Opened.NewEpoch && !m.fresh {
		// A database that came from elsewhere may be paired with a WAL that is not
		// its own. That is rare enough to look at every page.
		if err := s.writer.check(); err != nil {
			return err
		}
		s.epoch = store.NewEpoch()
		if err := s.writer.setEpoch(s.epoch); err != nil {
			return err
		}
		s.log.Warn("store has a new epoch", "dir", s.dir, "reason", s.Opened.Reason,
			"epoch", s.epoch.String(), "revision", s.head)
	}
	return s.position.settle(mark{epoch: s.epoch, revision: s.head, file: file})
}

// Close finishes the commits that were queued, ends the watchers and releases
// the directory. Later calls of any method answer fault.Unavailable.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.announceLocked()
	s.mu.Unlock()
	s.queue.Close()
	wake(s.wakeFold)
	s.loops.Wait()
	s.writing.Lock()
	defer s.writing.Unlock()
	s.files.Lock()
	defer s.files.Unlock()
	return s.release()
}

// announceLocked wakes everyone who waits for a change.
func (s *Store) announceLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// release closes what open opened, in reverse order.
func (s *Store) release() error {
	s.disconnect()
	if s.position != nil {
		s.position.close()
	}
	return s.lock.release()
}

// connect opens the three connections.
func (s *Store) connect() (err error) {
	path := filepath.Join(s.dir, databaseName)
	if s.writer, err = openWriter(path); err != nil {
		return err
	}
	if s.reader, err = openReader(path); err != nil {
		return err
	}
	s.keeper, err = openConn(path)
	return err
}

// disconnect closes the connections. The last one to close copies the WAL into
// the database and removes it. Errors are of no use here: what did not reach
// the disk is still in the WAL, and is looked at when it is opened again.
func (s *Store) disconnect() {
	if s.keeper != nil {
		s.keeper.close()
	}
	if s.reader != nil {
		s.reader.close()
	}
	if s.writer != nil {
		s.writer.close()
	}
	s.keeper, s.reader, s.writer = nil, nil, nil
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
