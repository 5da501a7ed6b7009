//go:build linux

package sqlite_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/store/storetest"
)

// R106: an open and closed store leaves no file and no goroutine behind, nor
// does one that failed to open, had watchers or was read to the end of its log.
func TestLeavesNothingOpen(t *testing.T) {
	use := func() {
		dir := t.TempDir()
		s, err := sqlite.OpenSmall(sqlite.Config{Dir: dir}, context.Background(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		at := fill(t, s, 0, 50)
		storetest.Replay(t, s, store.Position{Epoch: at.Epoch}, at)
		if err := s.Compact(t.Context(), at.Revision/2); err != nil {
			t.Fatal(err)
		}
		refuses(t, dir, "store_in_use")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	count := func() (files, goroutines int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), runtime.NumGoroutine()
	}
	use()
	files, goroutines := count()
	for range 5 {
		use()
	}
	// Goroutines end a moment after they were waited for, those of the first use
	// maybe after they were counted: so fewer are well, and five leaks show.
	for begin := time.Now(); ; runtime.Gosched() {
		f, g := count()
		if f <= files && g <= goroutines {
			break
		}
		if time.Since(begin) > deadline {
			t.Fatalf("%d files and %d goroutines, %d and %d before", f, g, files, goroutines)
		}
	}
}

// The WAL is copied and begun anew while writers never pause.
func TestWALStaysSmall(t *testing.T) {
	dir := t.TempDir()
	s, err := sqlite.OpenCheckpointing(sqlite.Config{Dir: dir}, t.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// It may grow while the disk, or the processor, is another's; what is written from
	// then on makes up for that, unless there are no checkpoints: then it has more than
	// four times the bytes of the values.
	written, largest := 0, 0
	for i := 0; i < 300 || i < 3000 && largest > written; i++ {
		value := make([]byte, 3000)
		if r := s.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: fmt.Sprint("k", i), Value: value}}}})[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
		info, err := os.Stat(filepath.Join(dir, "plastron.db-wal"))
		if err != nil {
			t.Fatal(err)
		}
		written += len(value)
		largest = max(largest, int(info.Size()))
	}
	t.Logf("%d bytes of values, WAL at most %d", written, largest)
	if largest > written {
		t.Errorf("the WAL grew to %d bytes", largest)
	}
}
