package server

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/store"
)

func TestSeen(t *testing.T) { // R21
	path := filepath.Join(t.TempDir(), seenName)
	open := func() *seen {
		t.Helper()
		s, err := openSeen(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.file.Close() })
		return s
	}
	if got := open().position; got != (store.Position{}) {
		t.Errorf("an absent file remembers %v", got)
	}
	s := open()
	old, now := store.NewEpoch(), store.NewEpoch()
	for _, p := range []store.Position{{Epoch: old, Revision: 9}, {Epoch: old, Revision: 12345}, {Epoch: old, Revision: 10}} {
		if err := s.note(p); err != nil {
			t.Fatal(err)
		}
	}
	if got := open().position; got != (store.Position{Epoch: old, Revision: 12345}) {
		t.Errorf("remembers %v, want the newest", got)
	}
	last := store.Position{Epoch: now, Revision: 3} // a new epoch begins where it does
	if err := s.note(last); err != nil {
		t.Fatal(err)
	}
	if got := open().position; got != last {
		t.Errorf("remembers %v, want %v", got, last)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole { // damaged anywhere, or cut off: it remembers nothing
		damaged := append([]byte(nil), whole...)
		damaged[i] ^= 1
		if got := parseSeen(string(damaged)); got != (store.Position{}) {
			t.Errorf("byte %d changed: %v", i, got)
		}
		if got := parseSeen(string(whole[:i])); got != (store.Position{}) {
			t.Errorf("cut off at %d: %v", i, got)
		}
	}
}
