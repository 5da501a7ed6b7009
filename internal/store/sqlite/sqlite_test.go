package sqlite_test

import (
	"log/slog"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/store/storetest"
)

func TestContract(t *testing.T) {
	t.Run("Default", func(t *testing.T) { storetest.Run(t, create(sqlite.Config.Open)) })
	// With limits so small that folding, copying the WAL and reading the log from
	// disk happen all the time.
	t.Run("Small", func(t *testing.T) { storetest.Run(t, create(sqlite.OpenSmall)) })
}

func create(open sqlite.OpenFunc) func(t *testing.T) storetest.Open {
	return func(t *testing.T) storetest.Open {
		dir := t.TempDir()
		return func(t *testing.T) store.Store {
			s, err := open(sqlite.Config{Dir: dir}, t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil)))
			if err != nil {
				t.Fatalf("Open() = %v", err)
			}
			return s
		}
	}
}

// openDir opens the store in a directory. The test closes it.
func openDir(t *testing.T, dir string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Config{Dir: dir}.Open(t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatalf("Open(%s) = %v", dir, err)
	}
	return s
}

// refuses opens a directory, which must fail with fault.Precondition.
func refuses(t *testing.T, dir, reason string) error {
	t.Helper()
	s, err := sqlite.Config{Dir: dir}.Open(t.Context(), slog.New(slog.DiscardHandler))
	if err == nil {
		s.Close()
	}
	if fault.KindOf(err) != fault.Precondition || fault.ReasonOf(err) != reason {
		t.Fatalf("Open(%s) = %v (%s), want precondition, %s", dir, err, fault.ReasonOf(err), reason)
	}
	return err
}
