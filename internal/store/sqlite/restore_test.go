package sqlite_test

import (
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/store/storetest"
)

// query opens the database beside the store, as an operator with the sqlite3
// program would, and runs statements.
func query(t *testing.T, path string, statements ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func fill(t *testing.T, s *sqlite.Store, from, to int) store.Position {
	t.Helper()
	var at store.Position
	for i := from; i < to; i++ {
		r := s.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: fmt.Sprint("k", i%20), Value: fmt.Append(nil, i)}}, Deletes: []string{fmt.Sprint("d", i)}}})[0]
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		at = r.Position
	}
	return at
}

// R21, R75, R83: a database that goes back in time, or to another place, gets a
// new epoch; one that was only stopped does not.
func TestRestore(t *testing.T) {
	db := func(dir string) string { return filepath.Join(dir, "plastron.db") }
	move := func(t *testing.T, from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name   string
		reason string // "" for the same epoch
		// change does something to the closed store in dir. backup was made with
		// VACUUM INTO while the store was open and had not yet its newest commits;
		// closed is a copy of the directory from then.
		change func(t *testing.T, dir, backup, closed string)
	}{
		{"only stopped", "", func(*testing.T, string, string, string) {}},
		{"backup moved in place", "restored", func(t *testing.T, dir, backup, _ string) { move(t, backup, db(dir)) }},
		{"backup written over", "restored", func(t *testing.T, dir, backup, _ string) {
			data, err := os.ReadFile(backup)
			if err == nil {
				err = os.WriteFile(db(dir), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"copy of the closed database moved in place", "restored", func(t *testing.T, dir, _, closed string) { move(t, db(closed), db(dir)) }},
		{"position removed", "copied", func(t *testing.T, dir, _, _ string) {
			if err := os.Remove(filepath.Join(dir, "position")); err != nil {
				t.Fatal(err)
			}
		}},
		{"position damaged", "copied", func(t *testing.T, dir, _, _ string) {
			path := filepath.Join(dir, "position")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[30] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"whole directory from before", "copied", func(t *testing.T, dir, _, closed string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			move(t, closed, dir)
		}},
		{"database of another store", "replaced", func(t *testing.T, dir, _, _ string) {
			other := filepath.Join(t.TempDir(), "other")
			s := openDir(t, other)
			fill(t, s, 0, 100)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			move(t, db(other), db(dir))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			dir, backup, closed := filepath.Join(root, "store"), filepath.Join(root, "backup.db"), filepath.Join(root, "closed")
			s := openDir(t, dir)
			if s.Opened != (sqlite.Opened{NewEpoch: true, Reason: "created"}) {
				t.Errorf("a new store says %+v", s.Opened)
			}
			fill(t, s, 0, 30)
			query(t, db(dir), fmt.Sprintf("VACUUM INTO '%s'", backup))
			then, _ := storetest.State(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(closed, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			s = openDir(t, dir)
			last := fill(t, s, 30, 50)
			now, at := storetest.State(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}

			tc.change(t, dir, backup, closed)
			if err := os.Chmod(dir, 0o700); err != nil { // os.CopyFS widens it
				t.Fatal(err)
			}
			s = openDir(t, dir)
			defer func() { s.Close() }()
			if s.Opened.NewEpoch != (tc.reason != "") || s.Opened.Reason != tc.reason {
				t.Fatalf("opened %+v, want reason %q", s.Opened, tc.reason)
			}
			got, pos := storetest.State(t, s)
			want := then
			switch tc.name {
			case "only stopped", "position removed", "position damaged":
				want = now
			case "database of another store":
				want = got
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if (pos.Epoch == at.Epoch) != (tc.reason == "") {
				t.Errorf("was at %v, is at %v", at, pos)
			}
			if tc.reason != "" {
				for _, err := range s.Watch(t.Context(), last) {
					if fault.ReasonOf(err) != "epoch_changed" {
						t.Errorf("Watch(%v) = %v", last, err)
					}
				}
			}
			storetest.Replay(t, s, store.Position{Epoch: pos.Epoch}, pos)

			// It goes on, and the new epoch stays.
			fill(t, s, 100, 105)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openDir(t, dir)
			if _, again := storetest.State(t, s); s.Opened.NewEpoch || again.Epoch != pos.Epoch || again.Revision != pos.Revision+5 {
				t.Errorf("opened again %+v at %v, was at %v", s.Opened, again, pos)
			}
		})
	}
}

// A database that was there and is gone is not replaced by an empty one.
func TestDatabaseMissing(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"removed": os.Remove,
		"emptied": func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openDir(t, dir)
			fill(t, s, 0, 3)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := change(filepath.Join(dir, "plastron.db")); err != nil {
				t.Fatal(err)
			}
			refuses(t, dir, "database_missing")
			if err := os.Remove(filepath.Join(dir, "position")); err != nil {
				t.Fatal(err)
			}
			s = openDir(t, dir)
			defer s.Close()
			if s.Opened.Reason != "created" {
				t.Errorf("opened %+v", s.Opened)
			}
		})
	}
}

// What was damaged or is not ours is refused by name, never read as something else.
func TestDamaged(t *testing.T) {
	for _, tc := range []struct {
		name, sql, reason string
	}{ // the rows' contents are read by Load, all else by Open
		{"newer schema", "UPDATE meta SET schema = 2", "schema_newer"},
		{"older schema than the first", "UPDATE meta SET schema = 0", "store_corrupt"},
		{"no meta", "DELETE FROM meta", "store_corrupt"},
		{"folded past the log", "UPDATE meta SET folded = 5, compacted = 6", "store_corrupt"},
		{"hole in the log", "DELETE FROM log WHERE rev = 5", "store_corrupt"},
		{"kv of the wrong kind, read by Load", "UPDATE meta SET folded = 10; DELETE FROM log; INSERT INTO kv (key, rev, value) VALUES (x'61', -1, NULL)", "store_corrupt"},
		{"wrong predecessor", "UPDATE log SET prev = 2 WHERE rev = 5", "store_corrupt"},
		{"row of a newer version, read by Load", "UPDATE log SET batch = x'02' WHERE rev = 5", "store_corrupt"},
		{"row cut short, read by Load", "UPDATE log SET batch = substr(batch, 1, length(batch) - 1) WHERE rev = 5", "store_corrupt"},
		{"row with more, read by Load", "UPDATE log SET batch = CAST(batch || x'00' AS BLOB) WHERE rev = 5", "store_corrupt"},
		{"another program's", "PRAGMA application_id = 7", "foreign_database"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openDir(t, dir)
			fill(t, s, 0, 10)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			query(t, filepath.Join(dir, "plastron.db"), tc.sql)
			if _, err := examine(t, dir); fault.KindOf(err) != fault.Precondition || fault.ReasonOf(err) != tc.reason {
				t.Errorf("Examine() = %v, want %s", err, tc.reason)
			}
			if !strings.HasSuffix(tc.name, "read by Load") {
				refuses(t, dir, tc.reason)
				return
			}
			s = openDir(t, dir)
			defer s.Close()
			r := s.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: "k"}}}})[0]
			if fault.KindOf(r.Err) != fault.Unavailable || fault.ReasonOf(r.Err) != tc.reason {
				t.Errorf("Commit() = %v", r.Err)
			}
			_, err := s.Load(t.Context(), func(string, uint64, []byte) error { return nil })
			if fault.KindOf(err) != fault.Precondition || fault.ReasonOf(err) != tc.reason {
				t.Errorf("Load() = %v", err)
			}
		})
	}
	t.Run("not a database", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "plastron.db"), make([]byte, 9000), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := examine(t, dir); fault.ReasonOf(err) != "store_corrupt" {
			t.Errorf("Examine() = %v", err)
		}
		refuses(t, dir, "store_corrupt")
	})
}

// A program that writes behind our back is noticed at the next commit.
func TestChangedByAnother(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	defer s.Close()
	fill(t, s, 0, 3)
	query(t, filepath.Join(dir, "plastron.db"), "INSERT INTO log (rev, prev, time, batch) VALUES (4, 3, 0, x'0100')")
	for _, reason := range []string{"outcome_unknown", "store_changed", "store_changed"} {
		r := s.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: "k"}}}})[0]
		if fault.KindOf(r.Err) != fault.Unavailable || fault.ReasonOf(r.Err) != reason {
			t.Fatalf("Commit() = %v (%s), want %s", r.Err, fault.ReasonOf(r.Err), reason)
		}
	}
}
