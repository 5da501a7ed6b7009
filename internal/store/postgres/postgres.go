// Package postgres keeps the ordered log of package store in three tables of a
// PostgreSQL database (12 or later) that any number of processes may share. It
// decides how a commit becomes durable and how other processes' commits are
// noticed; what the keys and values are is not its business.
//
// What must always hold: a commit is acknowledged only after the primary has
// committed it; the order of commits is the order of revisions, which are dense;
// the table plastron_kv is what the log says, in every snapshot.
//
// # Tables
//
//	plastron_head  one row: format, epoch, revision, compacted, origin
//	plastron_log   one row per group commit
//	plastron_kv    live keys, byte-exact
//
// They are in the first schema of the search path, which must not hold SPIRE's
// tables. origin names the cluster, the database and the table: a dump that was
// restored elsewhere has another one, and the next Open draws a new epoch. A
// physical copy or a return to an earlier backup cannot be told from a restart
// by looking at it; a process that is running notices that revisions it has seen
// are gone or are others, and Open that the log ends before what its caller
// remembers (Config.Seen). Both draw a new epoch then.
//
// # A commit
//
// Callers queue; one loop takes what is queued and cuts it into groups
// (store.Groups). A group is one pipelined round trip: begin, lock the head row,
// one statement that judges the conditions, advances the head, appends the log
// row and changes plastron_kv for the transactions that hold, commit. The lock is
// held for as long as the server takes, whatever becomes of the client: all its
// messages leave in one small write. A larger group is sent without the lock
// statement. In both cases the statement changes nothing unless the head it
// judged by is still the newest when it has locked it; if not, the group is sent
// again. So it is right under every isolation level.
//
// # Noticing commits
//
// One connection follows the log: it listens (LISTEN) and reads what is new
// when it is told, and every ten seconds in any case. Behind a pooler, where
// notifications do not arrive, it reads the head row each half second instead.
// A pooler is recognised by the process id it invents.
//
// # What an attacker gains
//
// Who reads these tables reads every registration, node, selector and bundle,
// and the hashes of outstanding join tokens, but no private key and no usable
// token. Who writes them is trusted like the server: nothing in them is signed.
// Who is between server and database is the same unless TLS verifies the
// database's name: sslmode=verify-full.
//
// # How it fails
//
// The commit loop. An error that the database answers is final: nothing is
// written. When the connection is lost instead, the loop connects again, ends
// the session that was lost if it lives on, and looks for the group's id in the
// log: what is there is acknowledged once a synchronous replica has it too, what
// is not is sent again. Only when that cannot be done the outcome is unknown.
//
// A failover. Of the hosts in the connection string the primary is used, and
// never one of an earlier timeline than was seen: see host.go.
//
// The follower. It connects again, without end, and meanwhile watchers at the
// end of the log get an error: they are not up to date and must know it.
package postgres

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Config says where the database is.
type Config struct {
	// ConnectionString is what libpq takes: a URL or key=value pairs, with
	// several hosts, TLS files and a password. It is read again, with the files
	// it names, for each connection: renewed certificates need no restart.
	ConnectionString string

	// Seen is the newest position that the caller remembers of this store, if any.
	Seen store.Position
	// Existing refuses (fault.NotFound, "store_not_found") to make a store that is not there.
	Existing bool
}

// String returns the type's name: the connection string may hold a password.
func (Config) String() string { return "postgres.Config" }

// GoString is String.
func (c Config) GoString() string { return c.String() }

// Opened says what Open found.
type Opened struct {
	NewEpoch bool
	Reason   string // why the epoch is new: "created" or "restored"
}

// Store is an open store. It implements store.Store. Open starts two goroutines
// (commits and following) that Close ends.
type Store struct {
	// Opened is how the store was found; it does not change.
	Opened Opened

	config Config
	schema string // quoted
	name   string // of this store's sessions, unique: application_name
	log    *slog.Logger
	sql    statements
	limit  limits
	queue  *store.Queue
	loops  sync.WaitGroup
	life   context.Context // of the follower
	end    context.CancelFunc

	writer *session // only the commit loop uses it; nil while not connected

	// reading is held while reader is used; it guards reader. It is taken before pulling.
	reading sync.Mutex
	reader  *session

	// pulling is held from before rows are read for recent until they are there.
	// It is taken before mu.
	pulling sync.Mutex

	// mu guards what follows and is held for a few instructions only.
	mu        sync.Mutex
	closed    bool
	epoch     store.Epoch // the database's, as last seen
	loaded    store.Epoch // of the last Load: commits are judged in this one
	head      uint64
	headID    []byte // of the log row at head, nil if not known
	compacted uint64
	recent    []row // the newest rows, without a hole, the last one is head
	recentLen int
	host      string        // that was connected to last
	newest    timeline      // of those that were connected to
	broken    error         // why the follower does not know the head now
	changed   chan struct{} // closed and replaced when any of these change

	wakeFollow chan struct{} // capacity 1
}

// limits are fixed; tests make them small.
type limits struct {
	recentRows  int // rows kept in memory for watchers
	recentBytes int
	locked      int           // largest group that is sent after the lock statement, in bytes
	call        time.Duration // one exchange with the database
	commit      time.Duration // how long a group is sent again when it was not its turn
	resolve     time.Duration // how long it is tried to find out what became of one
	poll        time.Duration // between two looks at the head where notifications do not arrive
	look        time.Duration // the same where they do
	opening     time.Duration // how long Open bears a database that was there and is busy

	// What the database allows each session: a statement, waiting for a lock, and
	// doing nothing in a transaction.
	statement, lock, idle time.Duration
}

func defaultLimits() limits {
	return limits{
		recentRows: 4096, recentBytes: 8 << 20, locked: 16 << 10,
		call: 8 * time.Second, commit: 7 * time.Second, resolve: 10 * time.Second, poll: 500 * time.Millisecond, look: 10 * time.Second,
		opening: 30 * time.Second, statement: 5 * time.Second, lock: 2 * time.Second, idle: 3 * time.Second,
	}
}

// Validate refuses (fault.Invalid) a connection string that cannot be used, or
// that would let the connection fall back to plain text on a network.
func (c Config) Validate() error {
	_, err := c.parse("")
	return err
}

// Open opens the store, and creates the tables when there are none. It fails
// with fault.Invalid when Validate does, with fault.Precondition when the
// database is not one to use ("spire_database", "schema_newer", "schema_foreign",
// "database_too_old", "database_login", "database_unknown", "database_privilege"),
// and with fault.Unavailable when it cannot be reached or written now
// ("database_unreachable", "database_read_only", "disk_full" and others). It
// leaves nothing behind then.
func (c Config) Open(ctx context.Context, log *slog.Logger) (*Store, error) {
	return open(ctx, c, log, defaultLimits())
}

func open(ctx context.Context, c Config, log *slog.Logger, limit limits) (*Store, error) {
	var id [8]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	s := &Store{
		config: c, name: "plastron-" + hex.EncodeToString(id[:]), log: log, limit: limit,
		changed: make(chan struct{}), queue: store.NewQueue(), wakeFollow: make(chan struct{}, 1),
	}
	found, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	s.Opened = found.Opened
	s.epoch, s.loaded, s.head, s.headID, s.compacted = found.epoch, found.epoch, found.rev, found.id, found.compacted
	if found.NewEpoch && found.Reason != "created" {
		log.Warn("store has a new epoch", "reason", found.Reason, "epoch", s.epoch.String(), "revision", s.head)
	}
	log.InfoContext(ctx, "store opened", "epoch", s.epoch.String(), "revision", s.head)
	s.life, s.end = context.WithCancel(context.WithoutCancel(ctx))
	s.loops.Go(func() { // it alone uses the writer
		defer func() { s.writer.close() }()
		s.queue.Run(nil, s.commitGroup)
	})
	s.loops.Go(s.follow)
	return s, nil
}

// begin finds or makes the tables. A database that let us in, and then is busy or
// goes away, is asked again for a while: others may be starting too.
func (s *Store) begin(ctx context.Context) (f found, err error) {
	for began, reached := time.Now(), false; ; {
		conn, err := s.dial(ctx, "")
		if err == nil {
			reached = true
			if f, err = s.prepare(ctx, conn); err != nil {
				err = explain(ctx, err)
			}
			conn.close()
		}
		reason := fault.ReasonOf(err)
		passing := reason == "database_busy" || reason == "database_unreachable"
		if !reached || !passing || time.Since(began) > s.limit.opening {
			return f, err
		}
		s.log.WarnContext(ctx, "store not opened", "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return f, err
		}
	}
}

// Close finishes the commits that were queued, ends the watchers and closes the
// connections. Later calls of any method answer fault.Unavailable.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.announceLocked()
	s.mu.Unlock()
	s.end()
	s.queue.Close()
	s.loops.Wait()
	s.reading.Lock()
	defer s.reading.Unlock()
	s.reader.close()
	return nil
}

// announceLocked wakes everyone who waits for a change.
func (s *Store) announceLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// usable returns an error after Close.
func (s *Store) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return store.Closed()
	}
	return nil
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// session is one connection. A nil session is a closed one.
type session struct {
	*pgconn.PgConn
	host     string
	timeline timeline
	pooled   bool // what answers is not the process that was connected to
	prepared bool // its statements are: those of commits, or that of fetch
	notified bool // since it was last set to false
	warned   bool // the same
}

func (c *session) close() {
	if c == nil {
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	c.Close(ctx) // of no use: the server notices in any case
}
