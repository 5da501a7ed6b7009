//go:build unix

package sqlite_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/store"
)

// F13: one process, one store; and the refusal names the other.
func TestLock(t *testing.T) {
	dir := t.TempDir()
	t.Run("F13 same process", func(t *testing.T) {
		s := openDir(t, dir)
		err := refuses(t, dir, "store_in_use")
		if !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%v: names neither pid nor directory", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("F13 other process", func(t *testing.T) {
		c := start(t, "hold", dir)
		if line := c.next(t); line != "open" {
			t.Fatalf("child says %q", line)
		}
		if err := refuses(t, dir, "store_in_use"); !strings.Contains(err.Error(), fmt.Sprint("process ", c.cmd.Process.Pid)) {
			t.Errorf("%v: does not name process %d", err, c.cmd.Process.Pid)
		}
		c.kill(t) // the lock goes with it
		if err := openDir(t, dir).Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// F10, R113: private files in a directory that nobody else can change.
func TestPermissions(t *testing.T) {
	t.Run("made private", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "new")
		s := openDir(t, dir)
		fill(t, s, 0, 3)
		check := func(want ...string) {
			t.Helper()
			var got []string
			filepath.WalkDir(dir, func(path string, d fs.DirEntry, _ error) error {
				info, err := d.Info()
				if err != nil {
					t.Fatal(err)
				}
				if d.IsDir() && info.Mode().Perm() != 0o700 || !d.IsDir() && info.Mode().Perm() != 0o600 {
					t.Errorf("%s has mode %o", path, info.Mode().Perm())
				}
				if !d.IsDir() {
					got = append(got, d.Name())
				}
				return nil
			})
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("files %v, want %v", got, want)
			}
		}
		check("lock", "plastron.db", "plastron.db-shm", "plastron.db-wal", "position")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		check("lock", "plastron.db", "position") // everything is in the database
	})
	t.Run("readable by others is narrowed", func(t *testing.T) {
		dir := t.TempDir()
		if err := openDir(t, dir).Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "plastron.db")
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		s := openDir(t, dir)
		defer s.Close()
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	})
	for _, tc := range []struct {
		name string
		// change makes something wrong around dir, which holds a store, and returns
		// the directory to open.
		change func(dir string) (string, error)
		root   bool
	}{
		{"F10 group may write the directory", func(dir string) (string, error) { return dir, os.Chmod(dir, 0o770) }, false},
		{"F10 all may write the directory", func(dir string) (string, error) { return dir, os.Chmod(dir, 0o702) }, false},
		{"F10 all may write it, sticky", func(dir string) (string, error) { return dir, os.Chmod(dir, 0o777|fs.ModeSticky) }, false},
		{"all may write the directory above", func(dir string) (string, error) { return dir, os.Chmod(filepath.Dir(dir), 0o777) }, false},
		{"all may write the database", func(dir string) (string, error) { return dir, os.Chmod(filepath.Join(dir, "plastron.db"), 0o666) }, false},
		{"all may write position", func(dir string) (string, error) { return dir, os.Chmod(filepath.Join(dir, "position"), 0o606) }, false},
		{"group may write the lock", func(dir string) (string, error) { return dir, os.Chmod(filepath.Join(dir, "lock"), 0o620) }, false},
		{"the database is a link", func(dir string) (string, error) {
			path := filepath.Join(dir, "plastron.db")
			if err := os.Rename(path, path+".real"); err != nil {
				return "", err
			}
			return dir, os.Symlink(path+".real", path)
		}, false},
		{"another's directory", func(dir string) (string, error) { return dir, os.Chown(dir, 65534, 65534) }, true},
		{"another's database", func(dir string) (string, error) {
			return dir, os.Chown(filepath.Join(dir, "plastron.db"), 65534, 65534)
		}, true},
		{"through another's link", func(dir string) (string, error) {
			link := filepath.Join(filepath.Dir(dir), "link")
			if err := os.Symlink(dir, link); err != nil {
				return "", err
			}
			return link, os.Lchown(link, 65534, 65534)
		}, true},
		{"a link to a directory below one that all may write", func(dir string) (string, error) {
			open := filepath.Join(filepath.Dir(dir), "open")
			if err := os.Mkdir(open, 0o700); err != nil {
				return "", err
			}
			if err := os.Rename(dir, filepath.Join(open, "store")); err != nil {
				return "", err
			}
			if err := os.Symlink(filepath.Join(open, "store"), dir); err != nil {
				return "", err
			}
			return dir, os.Chmod(open, 0o777)
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.root && os.Geteuid() != 0 {
				missing(t, "giving files away needs root")
			}
			dir := filepath.Join(t.TempDir(), "store")
			if err := openDir(t, dir).Close(); err != nil {
				t.Fatal(err)
			}
			dir, err := tc.change(dir)
			if err != nil {
				t.Fatal(err)
			}
			refuses(t, dir, "unsafe_permissions")
		})
	}
	t.Run("a file is not a directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refuses(t, path, "not_a_directory")
	})
}

// A directory may be named with anything; the name must not leak into SQLite's
// own parameters.
func TestDirectoryNames(t *testing.T) {
	for _, name := range []string{"a b", "a?mode=memory", "a#b", "a%41", "a&b=c", "é", "a'b\"c", "a;b"} {
		dir := filepath.Join(t.TempDir(), name)
		s := openDir(t, dir)
		fill(t, s, 0, 2)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(filepath.Join(dir, "plastron.db")); err != nil || info.Size() == 0 {
			t.Errorf("%q: no database in it: %v", name, err)
		}
		s = openDir(t, dir)
		if r := s.Commit(t.Context(), []store.Txn{{Conditions: []store.Condition{{Key: "k0", Revision: 1}}}})[0]; r.Err != nil {
			t.Errorf("%q: %v", name, r.Err)
		}
		s.Close()
	}
}
