package workloadapi_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/workloadapi"
)

// The socket is open to everybody, and its directory passable: callers are told
// apart by what they are.
func TestSocketFile(t *testing.T) {
	path := filepath.Join(shortDir(t), "made", "deeper", "s")
	open := func() (*workloadapi.Server, error) {
		return workloadapi.Open(workloadapi.Config{SocketPath: path, Log: slog.New(slog.DiscardHandler)})
	}
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); fault.ReasonOf(err) != "socket_in_use" {
		t.Errorf("a second one: %v, want socket_in_use", err)
	}
	for at, mode := range map[string]os.FileMode{path: 0o777, filepath.Dir(path): 0o755} {
		if info, err := os.Stat(at); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v, want %v", at, info.Mode(), err, mode)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after Close: %v, want it gone", err)
	}
}
