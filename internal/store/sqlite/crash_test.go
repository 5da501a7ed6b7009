package sqlite_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// TestCrash kills a writing process 50 times over one directory (R73). After each kill
// every acknowledged transaction is there, none is there in part, and the log is
// one chain that gives the same state as the snapshot.
func TestCrash(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	acked := make(map[int]int) // writer → last acknowledged transaction
	var epoch store.Epoch
	begin := time.Now()
	kills, total := 0, 0
	for kills < 50 {
		// Sometimes it is killed again before anyone looks, mostly while it recovers.
		unseen := 0
		for again := true; again; again = r.IntN(4) == 0 {
			mode := "crash"
			if r.IntN(2) == 0 {
				mode = "crash-small" // folds and checkpoints all the time
			}
			c := start(t, mode, dir)
			var lines []string
			for n := r.IntN(400) - 20; n > 0; n-- {
				lines = append(lines, c.next(t))
			}
			lines = append(lines, c.kill(t)...)
			kills++
			unseen++
			for _, line := range lines {
				if line == "open" {
					continue
				}
				var w, n int
				if _, err := fmt.Sscanf(line, "%d %d", &w, &n); err != nil {
					t.Fatalf("line %q: %v", line, err)
				}
				acked[w] = n
				total++
			}
		}
		epoch = checkCrashed(t, fmt.Sprintf("after kill %d", kills), dir, acked, unseen, epoch)
	}
	t.Logf("%d kills, %d acknowledged transactions, %v", kills, total, time.Since(begin).Round(time.Millisecond))
	if total < 1000 {
		t.Errorf("only %d transactions were acknowledged", total)
	}
}

func checkCrashed(t *testing.T, when string, dir string, acked map[int]int, kills int, epoch store.Epoch) store.Epoch {
	t.Helper()
	s := openDir(t, dir)
	defer s.Close()
	if epoch != (store.Epoch{}) && s.Opened.NewEpoch {
		t.Fatalf("%s: new epoch, %s", when, s.Opened.Reason)
	}
	rows, at := storetest.State(t, s)
	parts := make(map[string]int) // "writer/n" → keys there
	for key := range rows {
		if parent, _, ok := cutLast(key); ok && !strings.HasPrefix(key, "last/") {
			parts[parent]++
		}
	}
	for w := range crashWriters {
		last, _ := strconv.Atoi(rows[fmt.Sprintf("last/%d", w)].Value)
		if last < acked[w] || last > acked[w]+kills { // each kill may leave one that is in and was not acknowledged
			t.Fatalf("%s: writer %d was acknowledged %d, the store has %d", when, w, acked[w], last)
		}
		acked[w] = last
		for n := max(1, last-19); n <= last; n++ {
			if got := parts[fmt.Sprintf("%d/%d", w, n)]; got != 3 {
				t.Fatalf("%s: %d of 3 keys of transaction %d of writer %d, the last is %d", when, got, n, w, last)
			}
			delete(parts, fmt.Sprintf("%d/%d", w, n))
		}
	}
	if len(parts) > 0 {
		t.Fatalf("%s: parts of transactions that are not: %v", when, slices.Sorted(maps.Keys(parts)))
	}
	replayed := make(map[string]storetest.Row)
	for _, b := range storetest.Replay(t, s, store.Position{Epoch: at.Epoch}, at) {
		storetest.Apply(replayed, b)
	}
	if diff := cmp.Diff(rows, replayed); diff != "" {
		t.Fatalf("%s: log and snapshot differ: -snapshot +log\n%s", when, diff)
	}
	return at.Epoch
}

func cutLast(key string) (before, after string, ok bool) {
	i := strings.LastIndexByte(key, '/')
	if i < 0 {
		return key, "", false
	}
	return key[:i], key[i+1:], true
}
