// Package etcd keeps the ordered log of package store under one prefix of an
// etcd (v3) cluster that several servers share. It decides how a group becomes
// one etcd transaction, how a lost answer is settled, and what a restored or
// foreign cluster means; what the keys and values are is not its business.
//
// What must always hold: a transaction is in one etcd transaction, so it is
// there whole or not at all; a transaction whose answer was lost is never
// applied twice, and never after it was reported as not written; positions are
// etcd's own revisions, so they cannot be given twice within an epoch.
//
// # Keys
//
//	PREFIXmeta        format, epoch, the cluster's id
//	PREFIXhead        what the newest batch was: time, callers, keys (not values).
//	                  Its mod revision is the store's position.
//	PREFIXk/KEY       a live key: 0 and the value, or 1 and where in a part it is
//	PREFIXp/ID        a part: values of a transaction larger than a request may be
//	PREFIXw/ID        one per open store, put by each of its transactions
//
// # A commit
//
// Callers queue; one loop takes what is queued, cuts it into groups
// (store.Groups, and smaller where etcd's limits ask for it) and sends each as
// one etcd transaction: if every condition of the group holds, put the keys, w
// and head. If not, the same transaction has read what the conditions are about;
// those that fail get their conflict, the others are sent again.
//
// The comparison with w is what makes a lost answer harmless: of all that was
// sent under one revision of w only one can ever be applied. So the group is
// simply sent again, and the answer tells which of the two it was. The
// comparison with head refuses to write to a cluster that has gone back in time.
//
// The values of a transaction that is too large for one request are first put as
// parts that hang on a lease; the transaction itself takes them off the lease,
// which etcd does without being sent the value again. If it never comes, etcd
// removes them. Parts that no live key needs go when the log is compacted.
//
// # Watching
//
// A watcher watches the whole prefix. A batch is rebuilt from one revision's
// events: the order and callers from head, the values from k/ and p/.
//
// # Backup and restore
//
// etcdctl snapshot save, and the restore that etcd documents. A new epoch is
// drawn when the cluster's id is not the one in meta, when the log ends before
// what a server saw, or before what the caller of Open remembers (Config.Seen).
// Restore with a new --initial-cluster-token: that alone is always noticed.
//
// # What an attacker gains
//
// Reading the prefix: every registration, node, selector and bundle, and the
// hashes of outstanding join tokens, but no private key and no usable token.
// Writing: everything the trust domain's registrations can grant. Nothing here
// is signed: who can write the prefix is trusted like the server. Give each
// server a client certificate (or user) with a role for this prefix alone; note
// that compaction is not bound to a prefix in etcd.
//
// # How it fails
//
// The commit loop. Unreachable, no quorum, no answer: sent again, at other
// members too, for limits.commit; then fault.Unavailable with a reason that says
// whether anything was sent ("outcome_unknown") or not. Over quota: refused,
// "store_full". A watcher ends with an error when it cannot go on without a hole
// or has no connection for limits.stale; the caller watches again.
package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Config says where the store is.
type Config struct {
	Endpoints []string `hcl:"endpoints"` // "https://etcd-1:2379", …; all of one cluster, and all with the same scheme
	Prefix    string   `hcl:"prefix"`    // in front of every key; DefaultPrefix if empty

	// For https: the roots that etcd's certificate must chain to (the system's if
	// empty), and the client certificate with its key. The files are read for each
	// new connection, so that replaced ones are used without a restart.
	CAFile   string `hcl:"ca_file"`
	CertFile string `hcl:"cert_file"`
	KeyFile  string `hcl:"key_file"`

	// For clusters with passwords: the user, and a file that holds its password.
	Username     string `hcl:"username"`
	PasswordFile string `hcl:"password_file"`

	// Seen is the newest position that the caller remembers of this store, if any.
	Seen store.Position
	// Existing refuses (fault.NotFound, "store_not_found") to make a store that is not there.
	Existing bool
}

// String returns the type's name: who writes a password where none belongs finds
// it in no log.
func (Config) String() string { return "etcd.Config" }

// GoString is String.
func (c Config) GoString() string { return c.String() }

// DefaultPrefix is where the store is unless Config says otherwise.
const DefaultPrefix = "/plastron/"

// Opened says what Open found.
type Opened struct {
	NewEpoch bool
	Reason   string // why this Open drew a new epoch: "created", "restored" or "copied"
}

// Store is an open store. It implements store.Store. Open starts a goroutine
// for commits, which Close ends.
type Store struct {
	// Opened is how the store was found; it does not change.
	Opened Opened

	log    *slog.Logger
	limit  limits
	exists bool // nothing is made
	client *clientv3.Client
	keys   keys
	queue  *store.Queue
	loops  sync.WaitGroup
	ctx    context.Context // ends when Close has finished the commits
	stop   context.CancelFunc

	// looking is held while one caller compares the store with what was known of
	// it, see look. It is taken before mu.
	looking sync.Mutex

	// mu guards what follows and is held for a few instructions only.
	mu       sync.Mutex
	closed   bool
	meta     meta
	head     uint64      // the newest position seen
	loaded   store.Epoch // of the last Load, or of Open: what callers' revisions are of
	snapshot sight       // of the last Load
	foreign  uint64      // the last revision that strangers wrote, as far as a watcher has seen

	// Only the commit loop uses these.
	seq   uint64 // number of the last plan
	fence int64  // mod revision of this store's w key; 0: to be put first
}

// limits are fixed; tests make them small.
type limits struct {
	request int           // bytes of one etcd request
	attempt time.Duration // how long one request may take
	commit  time.Duration // how long a group is sent again and again
	opening time.Duration // how long Open bears a cluster that elects, or a member that hangs
	stale   time.Duration // how long a watcher bears to have no connection
}

func defaultLimits() limits {
	return limits{request: 1400 << 10, attempt: 3 * time.Second, commit: 10 * time.Second, opening: 30 * time.Second, stale: 5 * time.Second}
}

// keys are the store's keys in etcd.
type keys struct{ prefix, meta, head, live, parts, writers, writer string }

func newKeys(prefix string) keys {
	var id [16]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	return keys{
		prefix: prefix, meta: prefix + "meta", head: prefix + "head", live: prefix + "k/",
		parts: prefix + "p/", writers: prefix + "w/", writer: prefix + "w/" + hex.EncodeToString(id[:]),
	}
}

// Open opens the store, and creates it when there is nothing under the prefix.
// It fails with fault.Precondition when something else is there
// ("store_foreign"), when it is of a newer version ("schema_newer") and when
// etcd refuses this server ("store_login", "store_denied"), and with
// fault.Unavailable when no member answers. A cluster that has no leader at the
// moment is asked again for half a minute.
func (c Config) Open(ctx context.Context, log *slog.Logger) (*Store, error) {
	return c.open(ctx, log, defaultLimits())
}

func (c Config) open(ctx context.Context, log *slog.Logger, limit limits) (_ *Store, err error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	prefix := c.prefix()
	s := &Store{log: log, limit: limit, keys: newKeys(prefix), exists: c.Existing, queue: store.NewQueue()}
	s.ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	if s.client, err = c.connect(ctx, s.ctx, limit); err != nil {
		s.stop()
		return nil, err
	}
	defer func() {
		if err != nil {
			s.stop()
			s.client.Close()
		}
	}()
	s.meta.epoch, s.head = c.Seen.Epoch, c.Seen.Revision
	for began := time.Now(); ; {
		_, err = s.look(ctx, true)
		passing := fault.ReasonOf(err) == "store_timeout" || fault.ReasonOf(err) == "store_no_quorum"
		if !passing || time.Since(began) > limit.opening {
			break
		}
		s.log.WarnContext(ctx, "store not opened", "dir", prefix, "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	at := s.position()
	s.loaded = at.Epoch
	s.log.InfoContext(ctx, "store opened", "dir", prefix, "epoch", at.Epoch.String(), "revision", at.Revision)
	// It alone puts w and head.
	s.loops.Go(func() {
		s.queue.Run(func(group []store.Txn) int { return fits(group, s.keys, s.limit.request) }, s.commitGroup)
	})
	return s, nil
}

func (c Config) prefix() string {
	if c.Prefix == "" {
		return DefaultPrefix
	}
	return c.Prefix
}

// Address says where the store is: members and prefix.
func (c Config) Address() string { return strings.Join(c.Endpoints, ",") + c.prefix() }

// position is the newest position seen.
func (s *Store) position() store.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return store.Position{Epoch: s.meta.epoch, Revision: s.head}
}

func (s *Store) cluster() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta.cluster
}

// saw notes that a batch is in the log.
func (s *Store) saw(at store.Position) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at.Epoch == s.meta.epoch {
		s.head = max(s.head, at.Revision)
	}
}

// Commit implements store.Store. What was not yet sent when ctx ends is not written.
func (s *Store) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	return s.queue.Commit(ctx, txns)
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
	s.mu.Unlock()
	s.queue.Close()
	s.loops.Wait()
	// Tidy: the w key of a store that is gone is of no use. Compact removes it if
	// this fails.
	ctx, done := context.WithTimeout(s.ctx, s.limit.attempt)
	_, err := s.client.Delete(ctx, s.keys.writer)
	done()
	if err != nil {
		s.log.Warn("store key not removed", "err", explain(err))
	}
	s.stop()
	s.client.Close() // ends with the error of the context just ended
	return nil
}
