package postgres

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// commitSQL judges a group on its own snapshot and applies what holds, if that
// snapshot's head is still the newest once the head row is locked. A log row is
// put together from the transactions' encodings: version, count (at most
// store.MaxGroup, so one byte), writes.
//
//	$1 epoch  $2 revision that the store has at least reached  $3 time  $4 id
//	$5 the transactions' encodings, empty for one without changes
//	$6 $7 $8 conditions: transaction, key, revision
//	$9 $10 $11 puts: transaction, key, value   $12 $13 deletes: transaction, key
//	$16 $17 $18 puts of keys that a condition says are absent
//	$14 payload of the notification
//	$15 id of the log row at that revision, empty if it is not known
const commitSQL = `WITH
head AS MATERIALIZED (
	SELECT epoch, rev, epoch = $1 AND rev >= $2 AND ($15 = '' OR compacted >= $2
		OR EXISTS (SELECT FROM {s}.plastron_log l WHERE l.rev = $2 AND l.id = $15)) AS same
	FROM {s}.plastron_head),
failed AS MATERIALIZED (
	SELECT DISTINCT ON (c.txn) c.txn, c.n, c.at FROM (
		SELECT u.txn, u.n, u.rev, coalesce((SELECT k.rev FROM {s}.plastron_kv k WHERE k.key = u.key), 0) AS at
		FROM unnest($6::bigint[], $7::bytea[], $8::bigint[]) WITH ORDINALITY AS u(txn, key, rev, n)) c
	WHERE c.at <> c.rev ORDER BY c.txn, c.n),
held AS MATERIALIZED (
	SELECT p.i, p.part FROM unnest($5::bytea[]) WITH ORDINALITY AS p(part, i)
	WHERE NOT EXISTS (SELECT FROM failed WHERE failed.txn = p.i)),
txns AS MATERIALIZED (SELECT array_agg(i) AS held FROM held),
size AS MATERIALIZED (SELECT count(*)::int AS n FROM held WHERE length(part) > 0),
next AS (
	UPDATE {s}.plastron_head h SET rev = h.rev + 1 FROM head, size
	WHERE size.n > 0 AND head.same AND h.rev = head.rev AND h.epoch = head.epoch
	RETURNING h.rev),
log AS (
	INSERT INTO {s}.plastron_log (rev, prev, time, id, batch)
	SELECT next.rev, next.rev - 1, $3, $4, '\x01'::bytea || set_byte('\x00'::bytea, 0, size.n) ||
		(SELECT string_agg(part, ''::bytea ORDER BY i) FROM held)
	FROM next, size),
puts AS (
	INSERT INTO {s}.plastron_kv (key, rev, value)
	SELECT u.key, next.rev, u.value FROM next, unnest($9::bigint[], $10::bytea[], $11::bytea[]) AS u(txn, key, value)
	WHERE u.txn = ANY ((SELECT held FROM txns)::bigint[])
	ON CONFLICT (key) DO UPDATE SET rev = excluded.rev, value = excluded.value),
creates AS (
	INSERT INTO {s}.plastron_kv (key, rev, value)
	SELECT u.key, next.rev, u.value FROM next, unnest($16::bigint[], $17::bytea[], $18::bytea[]) AS u(txn, key, value)
	WHERE u.txn = ANY ((SELECT held FROM txns)::bigint[])),
dels AS (
	DELETE FROM {s}.plastron_kv k USING next, unnest($12::bigint[], $13::bytea[]) AS u(txn, key)
	WHERE k.key = u.key AND u.txn = ANY ((SELECT held FROM txns)::bigint[]))
SELECT head.rev, size.n::bigint, next.rev, failed.txn, failed.n, failed.at, head.same::int::bigint, head.epoch,
	(SELECT pg_notify('plastron_log', $14) FROM next)::text
FROM head CROSS JOIN size LEFT JOIN next ON true LEFT JOIN failed ON true`

// group is one group commit on its way.
type group struct {
	txns    []store.Txn
	id      [16]byte
	params  []param // from $5
	creates []param // from $16
	parts   [][]byte
	keys    []store.Condition // in the order of $7
	results []store.Result
	at      store.Position // the last position that the database named
}

func newGroup(txns []store.Txn) *group {
	g := &group{txns: txns, results: make([]store.Result, len(txns))}
	rand.Read(g.id[:]) // never fails (crypto/rand)
	var conditionTxn, conditionRev, putTxn, createTxn, deleteTxn []int64
	var conditionKey, putKey, createKey, deleteKey []string
	var putValue, createValue [][]byte
	absent := map[string]bool{} // no two transactions of a group share a key
	for i := range txns {
		t, n := &txns[i], int64(i+1)
		for _, c := range t.Conditions {
			if c.Revision == 0 {
				absent[c.Key] = true
			}
			conditionTxn = append(conditionTxn, n)
			conditionKey = append(conditionKey, c.Key)
			conditionRev = append(conditionRev, signed(c.Revision))
			g.keys = append(g.keys, c)
		}
		for _, p := range t.Puts {
			if absent[p.Key] { // an insert that looks for no conflict costs half
				createTxn = append(createTxn, n)
				createKey = append(createKey, p.Key)
				createValue = append(createValue, p.Value)
				continue
			}
			putTxn = append(putTxn, n)
			putKey = append(putKey, p.Key)
			putValue = append(putValue, p.Value)
		}
		for _, key := range t.Deletes {
			deleteTxn = append(deleteTxn, n)
			deleteKey = append(deleteKey, key)
		}
		var part []byte
		if len(t.Puts)+len(t.Deletes) > 0 {
			part = store.AppendWrites(nil, []store.Write{t.Write()})[2:] // without version and count
		}
		g.parts = append(g.parts, part)
	}
	g.params = []param{
		listParam(g.parts), numbersParam(conditionTxn), listParam(conditionKey), numbersParam(conditionRev),
		numbersParam(putTxn), listParam(putKey), listParam(putValue), numbersParam(deleteTxn), listParam(deleteKey),
	}
	g.creates = []param{numbersParam(createTxn), listParam(createKey), listParam(createValue)}
	return g
}

func (g *group) size() (n int) {
	for _, p := range slices.Concat(g.params, g.creates) {
		n += len(p.value)
	}
	return n
}

// write brings a group into the database. After an error nothing of it is there,
// unless the reason is "outcome_unknown".
func (s *Store) write(g *group) error {
	ctx := context.Background()
	until := time.Now().Add(s.limit.commit)
	for {
		if s.writer != nil && s.current(s.writer) != nil {
			s.writer.close()
		}
		if s.writer == nil || s.writer.IsClosed() {
			var err error
			if s.writer, err = s.connect(ctx, "-w"); err != nil {
				return err
			}
		}
		done, err := s.try(ctx, g)
		late := time.Now().After(until)
		switch {
		case done:
			return nil
		case err == nil && late:
			return fault.New(fault.Unavailable, "database_busy", "other servers write faster than this one").Fix("try again")
		case err == nil:
			continue // another store was faster
		}
		if f, ok := errors.AsType[*fault.Error](err); ok {
			return unusable(f)
		}
		s.writer.close() // it is in a failed transaction, or lost
		s.writer = nil
		cause := explain(ctx, err)
		switch {
		case refused(err) && fault.ReasonOf(cause) == "database_busy" && !late:
			continue // nothing is written, and there is time left
		case refused(err):
			return unusable(cause)
		}
		s.log.Warn("connection to the store lost during a commit", "err", err)
		if there, err := s.resolve(g, cause); there || err != nil {
			return err
		}
		if time.Now().After(until) {
			return fault.New(fault.Unavailable, "not_written", "the connection to the database was lost; nothing of the change is there").
				Fix("try again").Because(cause)
		}
	}
}

// try sends the group once. It reports whether the group is judged and what
// holds of it committed; if not, and there is no error, it is to be sent again.
// The error is a fault when the group cannot be committed at all.
func (s *Store) try(ctx context.Context, g *group) (bool, error) {
	ctx, stop := context.WithTimeout(ctx, s.limit.call)
	defer stop()
	s.mu.Lock()
	epoch, known, id := s.loaded, uint64(0), []byte(nil)
	if s.loaded == s.epoch {
		known, id = s.head, s.headID
	}
	s.mu.Unlock()
	g.at = store.Position{Epoch: epoch, Revision: known}

	c := s.writer
	c.warned = false
	params := append([]param{bytesParam(epoch[:]), revisionParam(known), numberParam(time.Now().UnixNano()), bytesParam(g.id[:])}, g.params...)
	params = append(params, textParam(s.schema), bytesParam(id))
	values, oids, formats := split(append(params, g.creates...))
	binary := []int16{1}
	if !c.pooled && !c.prepared {
		if _, err := c.Prepare(ctx, "plastron_commit", s.sql.commit, oids); err != nil {
			return false, err
		}
		if _, err := c.Prepare(ctx, "plastron_lock", s.sql.lock, nil); err != nil {
			return false, err
		}
		c.prepared = true
	}
	b := &pgconn.Batch{}
	b.ExecParams("BEGIN ISOLATION LEVEL READ COMMITTED", nil, nil, nil, nil)
	judged := 1 // which result is the statement's
	if c.pooled {
		b.ExecParams(s.limit.settings(true), nil, nil, nil, nil)
		judged++
	}
	if g.size() <= s.limit.locked {
		if c.prepared {
			b.ExecPrepared("plastron_lock", nil, nil, nil)
		} else {
			b.ExecParams(s.sql.lock, nil, nil, nil, nil)
		}
		judged++
	}
	if c.prepared {
		b.ExecPrepared("plastron_commit", values, formats, binary)
	} else {
		b.ExecParams(s.sql.commit, values, oids, formats, binary)
	}
	b.ExecParams("COMMIT", nil, nil, nil, nil)
	results, err := c.ExecBatch(ctx, b).ReadAll()
	if err != nil {
		return false, err
	}
	if len(results) != judged+2 || results[judged+1].CommandTag.String() != "COMMIT" {
		return false, fmt.Errorf("the database answers %d results, the last is %q", len(results), results[len(results)-1].CommandTag)
	}
	if c.warned {
		return false, errors.New("the database has committed without waiting for its synchronous replica")
	}
	return g.read(results[judged].Rows)
}

// read fills in the results from the statement's rows.
func (g *group) read(rows [][][]byte) (bool, error) {
	failed := make(map[int64]error)
	at, next := store.Position{}, int64(0)
	for _, row := range rows {
		var head, size, txn, n, rev, same int64
		if err := numbers(row, &head, &size, &next, &txn, &n, &rev, &same); err != nil {
			return false, err
		}
		if len(row) < 8 || copy(at.Epoch[:], row[7]) != len(at.Epoch) {
			return false, corrupt("plastron_head has no epoch")
		}
		at.Revision = uint64(head)
		switch {
		case same == 0:
			return false, fault.New(fault.Unavailable, "epoch_changed", "the store was restored or replaced while this server used it; nothing was written").
				Fix("the server loads it afresh by itself; try again then")
		case size > 0 && next == 0:
			return false, nil // the snapshot was not of the newest head
		case txn > 0 && n > 0 && int(n) <= len(g.keys):
			c := g.keys[n-1]
			failed[txn] = fault.New(fault.Conflict, "key_changed", "key %q is at revision %d, expected %d", c.Key, rev, c.Revision).
				Fix("read it again and retry")
		}
	}
	if len(rows) == 0 {
		return false, corrupt("plastron_head is empty")
	}
	for i := range g.results {
		g.results[i] = store.Result{Position: at, Err: failed[int64(i+1)]}
		if g.results[i].Err == nil && len(g.parts[i]) > 0 {
			g.results[i].Position.Revision = uint64(next)
		}
	}
	return true, nil
}

// resolve finds out what became of a group whose connection was lost, and tries
// to for some time. It reports whether the group is there; if not, and there is
// no error, it never will be unless it is sent again.
func (s *Store) resolve(g *group, cause error) (bool, error) {
	ctx, stop := context.WithTimeout(context.Background(), s.limit.resolve)
	defer stop()
	var rows [][][]byte
	for {
		var err error
		if rows, err = s.look(ctx, g); err == nil {
			break
		}
		s.writer.close()
		s.writer = nil
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return false, unknown(cause)
		}
	}
	if len(rows) == 0 {
		if s.writer.pooled {
			return false, unknown(cause) // the pooler may still have it
		}
		return false, nil
	}
	rev, err := number(rows[0][0])
	if err != nil || len(rows[0][1]) < 2 {
		return false, unknown(err)
	}
	// Which transactions held is told by the row: each one's encoding says where
	// it ends, and no two of a group are alike.
	rest := rows[0][1][2:]
	for i, part := range g.parts {
		r := &g.results[i]
		r.Position = store.Position{Epoch: g.at.Epoch, Revision: uint64(rev)}
		switch {
		case len(part) == 0:
			r.Err = fault.New(fault.Unavailable, "not_judged", "the connection to the database was lost").Fix("try again").Because(cause)
		case bytes.HasPrefix(rest, part):
			r.Err, rest = nil, rest[len(part):]
		default:
			r.Position.Revision--
			r.Err = fault.New(fault.Conflict, "key_changed", "a key is at another revision than expected").Fix("read it again and retry")
		}
	}
	return true, nil
}

// look connects, makes sure that the session that was lost is gone, and returns
// the group's log row, if there is one and it is as safe as if the commit had
// been answered: a session that ends, like a database that restarts, shows what
// its synchronous replica may not have. A commit after it that succeeds proves
// that it has (R73).
func (s *Store) look(ctx context.Context, g *group) (_ [][][]byte, err error) {
	if s.writer, err = s.connect(ctx, "-w"); err != nil {
		return nil, err
	}
	for gone := s.writer.pooled; !gone; {
		rows, err := s.writer.rows(ctx, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1 AND pid <> pg_backend_pid()",
			textParam(s.name+"-w"))
		if err != nil {
			return nil, err
		}
		n, err := int64Of(rows, 0)
		if err != nil {
			return nil, err
		}
		if gone = n == 0; !gone {
			if _, err := s.writer.rows(ctx, "SELECT pg_sleep(0.02)"); err != nil {
				return nil, err
			}
		}
	}
	rows, err := s.writer.rows(ctx, s.sql.find, revisionParam(g.at.Revision), bytesParam(g.id[:]))
	if err != nil || len(rows) == 0 {
		return rows, err
	}
	s.writer.warned = false
	if _, err := s.writer.rows(ctx, s.sql.touch); err != nil {
		return nil, err
	}
	if s.writer.warned {
		return nil, errors.New("the database does not wait for its synchronous replica")
	}
	return rows, nil
}
