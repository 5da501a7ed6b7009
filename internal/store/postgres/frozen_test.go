//go:build linux

package postgres_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
)

// writeForever is the process that TestFrozenProcess freezes: it commits groups
// of all sizes and prints a line after each.
func writeForever(url string) error {
	s, err := postgres.Config{ConnectionString: url}.Open(context.Background(), slog.New(slog.DiscardHandler))
	for fault.KindOf(err) == fault.Unavailable {
		s, err = postgres.Config{ConnectionString: url}.Open(context.Background(), slog.New(slog.DiscardHandler))
	}
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		txn := store.Txn{Puts: []store.Put{{Key: "frozen", Value: bytes.Repeat([]byte{byte(i)}, 1<<(i%21))}}}
		for j := range i % 7 {
			txn.Puts = append(txn.Puts, store.Put{Key: fmt.Sprint("frozen/", j), Value: []byte{byte(i)}})
		}
		// Two calls at once: one is read by the database while the other is sent.
		if r := s.Commit(context.Background(), []store.Txn{txn, {Puts: txn.Puts[:1]}}); r[0].Err != nil && fault.KindOf(r[0].Err) != fault.Unavailable {
			return r[0].Err
		}
		fmt.Println(i)
	}
}

// A process is frozen (SIGSTOP) at any moment of its commits: others commit
// within 5 s, and it goes on when it is let.
func TestFrozenProcess(t *testing.T) {
	name := database(t)
	url := cluster.URL(name)
	s := opened(t, url)
	_, begin := storetest.State(t, s)
	cmd := osexec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PLASTRON_TEST_WRITE="+url)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	var longest time.Duration
	slow := 0 // commits that took longer than they may
	for i := range 40 {
		for range 1 + i%3 {
			if !lines.Scan() {
				t.Fatal("the writing process ended")
			}
		}
		if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		commit(t, s, create(fmt.Sprint(i), ""))
		took := time.Since(start)
		longest = max(longest, took)
		if took > 5*time.Second {
			slow++
		}
		if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("longest commit %v", longest.Round(time.Millisecond))
	// A busy machine may hold up one or two, and not for that long.
	if slow > 2 || longest > 50*time.Second {
		t.Errorf("%d commits took longer than 5 s, the longest %v", slow, longest)
	}
	cmd.Process.Kill()
	// Its last group may still be on its way; then only our own session is left.
	await(t, name, "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name LIKE 'plastron-%-w' AND datname = current_database()")
	agree(t, begin, s)
}

// A full disk refuses a group and nothing of it is written; reading goes on, and
// writing once there is room.
func TestFullDisk(t *testing.T) {
	name := database(t)
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to mount a small disk")
		}
		t.Skip("needs root to mount a small disk")
	}
	mount := filepath.Join(cluster.Dir, "small")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Stat(cluster.Dir)
	if err != nil {
		t.Fatal(err)
	}
	owner := dir.Sys().(*syscall.Stat_t)
	options := fmt.Sprintf("size=24m,mode=0700,uid=%d,gid=%d", owner.Uid, owner.Gid)
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(mount)
	defer unix.Unmount(mount, unix.MNT_DETACH)
	exec(t, "postgres", "CREATE TABLESPACE small LOCATION '"+mount+"'")
	defer exec(t, "postgres", "DROP TABLESPACE small")
	defer exec(t, "postgres", "DROP DATABASE "+name+" WITH (FORCE)")
	exec(t, "postgres", "ALTER DATABASE "+name+" SET TABLESPACE small")

	s := open(t, cluster.URL(name))
	defer s.Close()
	_, begin := storetest.State(t, s)
	value := make([]byte, 512<<10)
	for i := range value {
		value[i] = byte(i * i >> 7) // nothing that is compressed away
	}
	var refused error
	n := 0
	for ; refused == nil && n < 200; n++ {
		value[0] = byte(n)
		copy(value[1:], fmt.Sprint(n*7919))
		refused = s.Commit(context.Background(), []store.Txn{{Puts: []store.Put{
			{Key: fmt.Sprintf("big/%d/1", n), Value: bytes.Clone(value)}, {Key: fmt.Sprintf("big/%d/2", n)},
		}}})[0].Err
	}
	must(t, "Commit", refused, fault.Unavailable, "disk_full")
	rows := agree(t, begin, s)
	if len(rows) != 2*(n-1) {
		t.Errorf("%d rows after %d groups that were written", len(rows), n-1)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", unix.MS_REMOUNT, strings.Replace(options, "24m", "64m", 1)); err != nil {
		t.Fatal(err)
	}
	commit(t, s, create("after", ""))
	agree(t, begin, s)
}
