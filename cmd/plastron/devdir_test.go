package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// shortTemp gives the test a temporary directory with a short path.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	t.Setenv("XDG_RUNTIME_DIR", "")
	return dir
}

func TestDevDir(t *testing.T) {
	temp := shortTemp(t)
	first, err := openDevDir()
	if err != nil {
		t.Fatal(err)
	}
	second, err := openDevDir()
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Base(first.path) != "1" || filepath.Base(second.path) != "2" {
		t.Errorf("directories are %s and %s", first.path, second.path)
	}
	base := filepath.Dir(first.path)

	// A killed instance: directory and lock file are there, nobody holds the lock.
	if err := first.lock.Close(); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(base, "notes")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	third, err := openDevDir()
	if err != nil {
		t.Fatal(err)
	}
	if third.path != first.path {
		t.Errorf("the third lives in %s, want %s", third.path, first.path)
	}
	if _, err := os.Stat(second.path); err != nil {
		t.Errorf("the living second was cleared: %v", err)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("a directory that is none of ours was cleared: %v", err)
	}
	os.Remove(foreign)
	for _, d := range []*devDir{second, third} {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(temp); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDevDirOfOthers(t *testing.T) {
	temp := shortTemp(t)
	base, err := devBase()
	if err != nil || !strings.HasPrefix(base, temp) {
		t.Fatalf("%s, %v", base, err)
	}
	if err := os.Chmod(base, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := openDevDir(); err == nil || !strings.Contains(err.Error(), "other users may enter it") {
		t.Errorf("a directory open to all: %v", err)
	}
	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), base); err != nil {
		t.Fatal(err)
	}
	if _, err := openDevDir(); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a link: %v", err)
	}
}
