package main

import (
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/etcd"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/sqlite"
)

// engine is a place for a store and for a bare loop on the same engine.
type engine struct {
	store  store.Store
	bare   func(context.Context, []store.Put) error // puts all, durable when it returns
	remove func() error                             // all that was made
}

// round is how long the store and the bare loop each run before it is the
// other's turn: what else the machine does then hits both.
const round = 500 * time.Millisecond

// storeValue is the size of the larger of the two values that an entry needs.
const storeValue = 500

// benchStore commits what the registry commits for an entry (two keys that must
// not be there yet), -batch of them in one call, and writes the same keys and
// values with the same number in one transaction of the engine in a bare loop.
// The ratio is the median of those of neighbouring rounds.
func benchStore(ctx context.Context, o options) (_ result, err error) {
	open := map[string]func(context.Context, string, string) (*engine, error){
		"sqlite": openSQLite, "postgres": openPostgres, "etcd": openEtcd,
	}[o.store]
	if open == nil {
		return result{}, fmt.Errorf("-store is %q, not sqlite, postgres or etcd", o.store)
	}
	e, err := open(ctx, o.at, fmt.Sprintf("bench_%d", time.Now().UnixNano()))
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, e.remove()) }()

	value := make([]byte, storeValue)
	for i := range value {
		value[i] = byte(rand.Uint32()) // nothing that an engine compresses
	}
	bytes := 0
	puts := func() []store.Put {
		var id [16]byte
		binary.LittleEndian.PutUint64(id[:], rand.Uint64())
		binary.LittleEndian.PutUint64(id[8:], rand.Uint64())
		text := hex.EncodeToString(id[:])
		both := []store.Put{{Key: "/entry/" + text, Value: value}, {Key: "/entry-content/" + text, Value: []byte(text)}}
		bytes = len(both[0].Key) + len(both[0].Value) + len(both[1].Key) + len(both[1].Value)
		return both
	}
	ours := func() error {
		txns := make([]store.Txn, o.batch)
		for i := range txns {
			both := puts()
			txns[i] = store.Txn{Caller: "bench", Puts: both, Conditions: []store.Condition{{Key: both[0].Key}, {Key: both[1].Key}}}
		}
		for _, r := range e.store.Commit(ctx, txns) {
			if r.Err != nil {
				return r.Err
			}
		}
		return nil
	}
	theirs := func() error {
		var all []store.Put
		for range o.batch {
			all = append(all, puts()...)
		}
		return e.bare(ctx, all)
	}
	var r result
	// spend repeats f for a round and returns the time of one transaction.
	spend := func(f func() error) (float64, error) {
		began, n := time.Now(), 0
		for n == 0 || time.Since(began) < min(round, o.period) {
			if err := f(); err != nil {
				return 0, err
			}
			n += o.batch
		}
		r.Operations += n
		return float64(time.Since(began).Nanoseconds()) / float64(n), ctx.Err()
	}
	if _, err := spend(theirs); err != nil { // tables and caches
		return r, err
	}
	r.Operations = 0
	var mine, bare, ratios []float64
	for began := time.Now(); time.Since(began) < o.period || len(ratios) == 0; {
		a, err := spend(ours)
		if err != nil {
			return r, err
		}
		b, err := spend(theirs)
		if err != nil {
			return r, err
		}
		mine, bare, ratios = append(mine, a), append(bare, b), append(ratios, a/b)
	}
	r.WallNS, r.ReferenceWallNS, r.Ratio = int64(median(mine)), int64(median(bare)), median(ratios)
	r.Reference, r.Bytes = "bare loop, wall", bytes
	return r, nil
}

func median(of []float64) float64 {
	slices.Sort(of)
	return of[len(of)/2]
}

func openSQLite(ctx context.Context, at, name string) (*engine, error) {
	dir := filepath.Join(at, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	st, err := sqlite.Config{Dir: dir}.Open(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "bare.db")+"?_pragma=journal_mode(wal)&_pragma=synchronous(full)")
	if err != nil {
		return nil, errors.Join(err, st.Close(), os.RemoveAll(dir))
	}
	e := &engine{store: st, remove: func() error { return errors.Join(st.Close(), db.Close(), os.RemoveAll(dir)) }}
	if _, err := db.ExecContext(ctx, "CREATE TABLE bare (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"); err != nil {
		return nil, errors.Join(err, e.remove())
	}
	insert, err := db.PrepareContext(ctx, "INSERT INTO bare VALUES (?, ?)")
	if err != nil {
		return nil, errors.Join(err, e.remove())
	}
	e.bare = func(ctx context.Context, puts []store.Put) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		prepared := tx.StmtContext(ctx, insert)
		for _, p := range puts {
			if _, err := prepared.ExecContext(ctx, []byte(p.Key), p.Value); err != nil {
				return errors.Join(err, tx.Rollback())
			}
		}
		return tx.Commit()
	}
	return e, nil
}

// openPostgres uses a schema of its own in the database.
func openPostgres(ctx context.Context, at, name string) (*engine, error) {
	in := at + " search_path=" + name
	if u, err := url.Parse(at); err == nil && u.Scheme != "" {
		query := u.Query()
		query.Set("search_path", name)
		u.RawQuery = query.Encode()
		in = u.String()
	}
	c, err := pgconn.Connect(ctx, in)
	if err != nil {
		return nil, err
	}
	e := &engine{remove: func() error {
		ctx := context.WithoutCancel(ctx)
		_, err := c.Exec(ctx, "DROP SCHEMA IF EXISTS "+name+" CASCADE").ReadAll()
		return errors.Join(err, c.Close(ctx))
	}}
	const insert = "INSERT INTO bare SELECT * FROM unnest($1::bytea[], $2::bytea[])"
	_, err = c.Exec(ctx, "CREATE SCHEMA "+name+"; CREATE TABLE bare (key bytea PRIMARY KEY, value bytea NOT NULL)").ReadAll()
	if err == nil {
		_, err = c.Prepare(ctx, "bare", insert, nil)
	}
	var st *postgres.Store
	if err == nil {
		st, err = postgres.Config{ConnectionString: in}.Open(ctx, slog.New(slog.DiscardHandler))
	}
	if err != nil {
		return nil, errors.Join(err, e.remove())
	}
	drop := e.remove
	e.store, e.remove = st, func() error { return errors.Join(st.Close(), drop()) }
	e.bare = func(ctx context.Context, puts []store.Put) error {
		keys, values := make([][]byte, len(puts)), make([][]byte, len(puts))
		for i, p := range puts {
			keys[i], values[i] = []byte(p.Key), p.Value
		}
		b := &pgconn.Batch{} // one round trip
		b.ExecParams("BEGIN", nil, nil, nil, nil)
		b.ExecPrepared("bare", [][]byte{byteaArray(keys), byteaArray(values)}, []int16{1, 1}, nil)
		b.ExecParams("COMMIT", nil, nil, nil, nil)
		_, err := c.ExecBatch(ctx, b).ReadAll()
		return err
	}
	return e, nil
}

// byteaArray is PostgreSQL's binary form of a bytea[].
func byteaArray(list [][]byte) []byte {
	var b []byte
	for _, n := range []int{1, 0, 17, len(list), 1} { // dimensions, no nulls, type, length, first index
		b = binary.BigEndian.AppendUint32(b, uint32(n))
	}
	for _, e := range list {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(e))), e...)
	}
	return b
}

// openEtcd uses a prefix of its own.
func openEtcd(ctx context.Context, at, name string) (*engine, error) {
	endpoints, prefix := strings.Split(at, ","), "/"+name+"/"
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 10 * time.Second, Context: ctx})
	if err != nil {
		return nil, err
	}
	st, err := etcd.Config{Endpoints: endpoints, Prefix: prefix}.Open(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &engine{
		store: st,
		bare: func(ctx context.Context, puts []store.Put) error {
			var ops []clientv3.Op
			for _, p := range puts {
				ops = append(ops, clientv3.OpPut(prefix+"bare"+p.Key, string(p.Value)))
			}
			_, err := c.Txn(ctx).Then(ops...).Commit()
			return err
		},
		remove: func() error {
			closed := st.Close()
			_, err := c.Delete(context.WithoutCancel(ctx), prefix, clientv3.WithPrefix())
			return errors.Join(closed, err, c.Close())
		},
	}, nil
}
