//go:build linux

package fleet_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"golang.org/x/sys/unix"
)

// resumes is how soon after a repair writes succeed again, without a restart (R80):
// ten times what is promised, since tests run on busy machines. How long it took is told.
const resumes = 10 * 10 * time.Second

// The disk under the database's tables is full, the disk under its log is full
// (which ends PostgreSQL), and the database is read-only: each is refused in one
// sentence that says which it is, by every server; nothing of what was refused is
// there; identities are served on; and writes go on soon after the repair. R80,
// FM26, FM31.
func TestDatabaseThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	f := onPostgres(t)
	p, ctx := f.postgres, t.Context()
	tables, log := f.smallDisk("tables", "64m"), f.smallDisk("wal", "128m")
	for _, sql := range []string{"CREATE TABLESPACE small LOCATION '" + tables + "'", "ALTER DATABASE plastron SET TABLESPACE small"} {
		if err := p.Exec(ctx, "postgres", sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.MoveLog(ctx, log); err != nil {
		t.Fatal(err)
	}
	f.start(2)
	f.attach(f.servers[0])
	f.attach(f.servers[1])
	stop := f.fetching()
	defer stop()

	// try creates one more entry, and notes whether it was acknowledged, unless the
	// answer says that it may be there or not.
	var mu sync.Mutex // guards what is below
	written, n := map[string]bool{}, 0
	try := func(s *server) error {
		mu.Lock()
		n++
		path := fmt.Sprintf("/full/%d", n)
		mu.Unlock()
		err := s.create(ctx, path, nobody, "uid:1")
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			t.Logf("%s through %s: %v", path, s.name, err)
		}
		if err != nil && strings.Contains(err.Error(), "is committed at") {
			err = nil // it is written, and only not seen yet
		}
		if err == nil || !strings.Contains(err.Error(), "look whether it is there") {
			written[path] = err == nil
		}
		return err
	}
	// refused creates entries through every server until each refuses, which must
	// happen in these words. Its status shows the same if really nothing can be
	// written: a full disk may have room for a small one.
	refused := func(what, words string, nothing bool) {
		t.Helper()
		errs := make([]error, len(f.servers))
		var all sync.WaitGroup
		for i, s := range f.servers {
			all.Go(func() {
				// A conflict with the other server is no refusal.
				for deadline := time.Now().Add(patience); (errs[i] == nil || status.Code(errs[i]) == codes.Aborted) && time.Now().Before(deadline); {
					errs[i] = try(s)
				}
			})
		}
		all.Wait()
		for i, s := range f.servers {
			if status.Code(errs[i]) != codes.Unavailable || !strings.Contains(errs[i].Error(), words) {
				t.Fatalf("%s: %s refuses with %v, want %q", what, s.name, errs[i], words)
			}
			if st := s.says(); nothing && (st == nil || st.Store.Fault == nil) {
				t.Errorf("%s: the status of %s shows nothing of it", what, s.name)
			}
		}
	}
	repaired := func(what string) {
		t.Helper()
		began := time.Now()
		for _, s := range f.servers {
			eventually(t, s.name+" writes again", func() bool { return try(s) == nil })
		}
		took := time.Since(began)
		if took > resumes {
			t.Errorf("%s: writes went on %v after the repair", what, took)
		}
		f.agree()
		for _, s := range f.servers {
			eventually(t, what+": the status of "+s.name+" shows nothing of it any more", func() bool {
				st := s.says()
				return st != nil && st.Store.Fault == nil
			})
			listed := s.run("server", "entry", "show")
			for path, there := range written {
				if strings.Contains(listed, "example.org"+path+"\n") != there {
					t.Errorf("%s: %s lists the entry of %s: %v, and it was acknowledged: %v", what, s.name, path, !there, there)
				}
			}
		}
		f.whole()
		t.Logf("%s: all servers wrote %v after the repair", what, took.Round(time.Millisecond))
	}

	release := fill(t, tables)
	refused("full disk", "disk", false)
	release()
	repaired("full disk")

	readOnly := func(change string) {
		t.Helper()
		for _, sql := range []string{"ALTER SYSTEM " + change, "SELECT pg_reload_conf()"} {
			if err := p.Exec(ctx, "postgres", sql); err != nil {
				t.Fatal(err)
			}
		}
	}
	readOnly("SET default_transaction_read_only = on")
	refused("read-only database", "can only be read", true)
	readOnly("RESET default_transaction_read_only")
	repaired("read-only database")

	release = fill(t, log)
	for p.Exec(ctx, "postgres", "SELECT txid_current(), pg_switch_wal()") == nil { // until there is no segment left to write again
	}
	refused("full log", "database", false)
	release()
	p.Crash()
	if err := p.Start(ctx); err != nil {
		t.Fatal(err)
	}
	repaired("full log")
	stop()
}

// smallDisk mounts a disk in memory for the database's user.
func (f *fleet) smallDisk(name, size string) string {
	t := f.t
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to mount a small disk")
		}
		t.Skip("needs root to mount a small disk")
	}
	owner, err := os.Stat(f.postgres.Dir)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(f.postgres.Dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	st := owner.Sys().(*syscall.Stat_t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%s,mode=0700,uid=%d,gid=%d", size, st.Uid, st.Gid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// fill takes what is free on a disk, until release is called.
func fill(t *testing.T, dir string) (release func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for block := make([]byte, 1<<16); len(block) > 0; {
		if _, err := file.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	return func() {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}
