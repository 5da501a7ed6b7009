package sqlite_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store/sqlite"
)

// examine looks at a store and reports a test error if that leaves anything behind.
func examine(t *testing.T, dir string) (sqlite.Examined, error) {
	t.Helper()
	before := files(t, dir)
	found, err := sqlite.Examine(t.Context(), dir, func(string, []byte) error { return nil })
	if d := cmp.Diff(before, files(t, dir)); d != "" {
		t.Errorf("Examine changed the directory (-before +after):\n%s", d)
	}
	return found, err
}

func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		found[e.Name()] = info.Mode().String() + info.ModTime().String()
	}
	return found
}

func TestExamine(t *testing.T) {
	dir := t.TempDir()
	if _, err := examine(t, dir); fault.KindOf(err) != fault.NotFound {
		t.Errorf("nothing there: %v", err)
	}
	s := openDir(t, dir)
	at := fill(t, s, 0, 30)
	if found, err := examine(t, dir); err != nil || !found.Open || found.Bytes == 0 {
		t.Errorf("while it is open: %+v, %v", found, err)
	}
	if err := s.Check(); err != nil {
		t.Errorf("Check() = %v", err)
	}
	if s.Size() == 0 {
		t.Error("it takes no space")
	}
	want := map[string]string{}
	if _, err := s.Load(t.Context(), func(key string, _ uint64, value []byte) error { want[key] = string(value); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	found, err := sqlite.Examine(t.Context(), dir, func(key string, value []byte) error { got[key] = string(value); return nil })
	if err != nil || found.Open || found.Position != at || !maps.Equal(got, want) {
		t.Errorf("Examine() = %+v, %v with %v, want %v with %v", found, err, got, at, want)
	}
	if _, err := examine(t, dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "plastron.db-shm")); !os.IsNotExist(err) {
		t.Errorf("an index was made: %v", err)
	}
	if err := s.Check(); fault.ReasonOf(err) != "closed" {
		t.Errorf("Check() after Close = %v", err)
	}
}

// A page that is damaged under a running server is found by reading it all.
func TestCheckFindsDamage(t *testing.T) {
	dir := t.TempDir()
	s := openDir(t, dir)
	fill(t, s, 0, 2000)
	if err := s.Close(); err != nil { // everything is in the database now
		t.Fatal(err)
	}
	path := filepath.Join(dir, "plastron.db")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4096 { // the last page
		b[len(b)-4096+i] = 0xff
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := examine(t, dir); fault.ReasonOf(err) != "store_corrupt" {
		t.Errorf("Examine() = %v", err)
	}
}
