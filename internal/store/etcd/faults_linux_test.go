package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// R73, R78: each of three members is killed, or frozen for a while, under 50
// writers. No acknowledged write is lost, none that was refused is there, and the
// log tells the same as a snapshot.
func TestMembersLost(t *testing.T) {
	e, c := cluster(t, 3)
	check := opened(t, c)
	_, begin := storetest.State(t, check)
	var stores [2]*Store
	for i := range stores {
		for ctx := limited(t); stores[i] == nil; { // the limits are short: a lost member must cost seconds
			s, err := c.open(t.Context(), slogTo(t), defaultLimits())
			if err != nil && (fault.KindOf(err) != fault.Unavailable || ctx.Err() != nil) {
				t.Fatalf("Open() = %v", err)
			}
			stores[i] = s
		}
		defer stores[i].Close()
	}
	const writers = 50
	var stop atomic.Bool
	var wg sync.WaitGroup
	acked, refused := make([]map[string]uint64, writers), make([]map[string]error, writers)
	var count atomic.Int64
	for w := range writers {
		acked[w], refused[w] = make(map[string]uint64), make(map[string]error)
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				key := fmt.Sprintf("%d/%d", w, i)
				r := stores[w%2].Commit(context.Background(), []store.Txn{create(key, key)})[0]
				if r.Err == nil {
					acked[w][key] = r.Position.Revision
					count.Add(1)
				} else if fault.ReasonOf(r.Err) != "outcome_unknown" {
					refused[w][key] = r.Err
				}
			}
		})
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	more := func() { // some commits succeed
		t.Helper()
		for until, ctx := count.Load()+100, limited(t); count.Load() < until; {
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatal("no commits succeed any more")
			}
		}
	}
	defer func() { stop.Store(true); wg.Wait() }()
	for i := range 3 {
		more()
		if err := e.Kill(i); err != nil {
			t.Fatal(err)
		}
		more() // while it is away
		if i == 0 {
			if _, r := examine(t, c); r["members"].Fix == "" || !strings.Contains(r["members"].Found, "1 of 3 do not answer: "+e.Endpoints[0]) {
				t.Errorf("examined while one is away: %+v", r)
			}
		}
		if err := e.Start(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		if err := e.Freeze(i); err != nil {
			t.Fatal(err)
		}
		more()
		if err := e.Thaw(i); err != nil {
			t.Fatal(err)
		}
		if err := e.Ready(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	rows, end := storetest.State(t, check)
	failed := 0
	for w := range writers {
		for key, rev := range acked[w] {
			if rows[key] != (storetest.Row{Rev: rev, Value: key}) {
				t.Errorf("%s was acknowledged at %d; there is %v", key, rev, rows[key])
			}
		}
		for key, err := range refused[w] {
			if _, there := rows[key]; there {
				t.Errorf("%s was refused (%v), and is there", key, err)
			}
		}
		failed += len(refused[w])
	}
	replayed := make(map[string]storetest.Row)
	for _, b := range storetest.Replay(t, check, begin, end) {
		storetest.Apply(replayed, b)
	}
	if diff := cmp.Diff(rows, replayed); diff != "" {
		t.Error(diff)
	}
	t.Logf("%d acknowledged, %d refused, %d keys", count.Load(), failed, len(rows))
}

// told closes itself when something is logged.
type told struct {
	once sync.Once
	done chan struct{}
}

func (l *told) Write(b []byte) (int, error) {
	l.once.Do(func() { close(l.done) })
	return len(b), nil
}

// A cluster that does not answer for a while, as in an election, ends no start; one
// that never answers does.
func TestOpenInsists(t *testing.T) {
	e, c := cluster(t, 1)
	need(t, e.Freeze(0))
	limit := patient()
	limit.attempt, limit.opening = time.Second, 120*time.Second
	first := &told{done: make(chan struct{})}
	var late *Store
	var opening errgroup.Group
	opening.Go(func() (err error) {
		late, err = c.open(t.Context(), slog.New(slog.NewTextHandler(first, nil)), limit)
		return err
	})
	select {
	case <-first.done: // that it did not answer
	case <-limited(t).Done():
		t.Error("nothing is logged")
	}
	need(t, e.Thaw(0))
	if err := opening.Wait(); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	defer late.Close()
	commit(t, late, put("a", "1"))

	need(t, e.Freeze(0))
	limit.opening = 0
	s, err := c.open(t.Context(), slogTo(t), limit)
	if err == nil {
		s.Close()
	}
	need(t, e.Thaw(0))
	must(t, err, fault.Unavailable, "store_timeout")
}

// A cluster over its quota refuses writes in one sentence, reads go on, and
// writing goes on once there is room.
func TestQuota(t *testing.T) {
	_, c := cluster(t, 1, "--quota-backend-bytes", "16777216")
	s := opened(t, c)
	begin := commit(t, s, put("first", ""))
	value := string(make([]byte, 256<<10))
	var err error
	last := begin
	for i := 0; i < 200 && err == nil; i++ {
		r := s.Commit(t.Context(), []store.Txn{put("k", value)})[0]
		if err = r.Err; err == nil {
			last = r.Position
		}
	}
	must(t, err, fault.Unavailable, "store_full")
	if _, r := examine(t, c); !r["alarms"].Fails || !strings.Contains(r["alarms"].Fix, "alarm disarm") {
		t.Errorf("examined while it is full: %+v", r)
	}
	must(t, s.Commit(t.Context(), []store.Txn{put("small", "")})[0].Err, fault.Unavailable, "store_full")
	if rows, at := storetest.State(t, s); at != last || rows["k"].Rev != last.Revision {
		t.Fatalf("at %v, the last commit was at %v", at, last)
	}
	storetest.Replay(t, s, begin, last)
	if err := s.Compact(t.Context(), last.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Defragment(t.Context(), c.Endpoints[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.AlarmDisarm(t.Context(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	commit(t, s, put("small", ""))
}

// Users with passwords and roles: each refusal is told apart, and none shows the
// password.
func TestUsers(t *testing.T) {
	_, c := cluster(t, 1)
	root := opened(t, c).client
	for _, err := range []error{
		second(root.UserAdd(t.Context(), "root", "root")), second(root.UserGrantRole(t.Context(), "root", "root")),
		second(root.UserAdd(t.Context(), "server", "open sesame")), second(root.RoleAdd(t.Context(), "store")),
		second(root.RoleGrantPermission(t.Context(), "store", "/plastron/", clientv3.GetPrefixRangeEnd("/plastron/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(root.UserGrantRole(t.Context(), "server", "store")), second(root.AuthEnable(t.Context())),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.Username, c.PasswordFile = "server", filepath.Join(t.TempDir(), "password")
	password := func(text string) {
		if err := os.WriteFile(c.PasswordFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	password("open sesame\n")
	commit(t, opened(t, c), put("k", "1"))
	if found, r := examine(t, c, "k"); found.Revision == 0 || len(r) != 2 { // also by one who may do no more than it has to
		t.Errorf("examined as the user: %+v", found)
	}
	refuse := func(c Config, reason string) {
		t.Helper()
		s, err := c.open(t.Context(), slogTo(t), patient())
		if err == nil {
			s.Close()
		}
		must(t, err, fault.Precondition, reason)
		_, err = c.examine(t.Context(), patient(), nil, nil)
		must(t, err, fault.Precondition, reason)
		if strings.Contains(err.Error(), "wrong") || strings.Contains(err.Error(), "sesame") {
			t.Errorf("the password is in %q", err)
		}
	}
	other := c
	other.Prefix = "/other/"
	refuse(other, "store_denied")
	password("wrong")
	refuse(c, "store_login")
	password("")
	refuse(c, "store_login")
	password("open sesame")
	if err := os.Chmod(c.PasswordFile, 0o644); err != nil {
		t.Fatal(err)
	}
	refuse(c, "key_file_unsafe") // R113: others can read it
	c.Username, c.PasswordFile = "", ""
	refuse(c, "store_login")
}

func second[T any](_ T, err error) error { return err }
