package process

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func TestParseStat(t *testing.T) {
	rest := " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2"
	for _, name := range []string{"sh", "a) S 1 (b", ") S 1 1 1 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 5", "new\nline", "", "((("} { // W21
		st, err := parseStat([]byte("42 (" + name + ")" + rest))
		if err != nil || st.state != 'S' || st.start != 987654 {
			t.Errorf("%q: %+v, %v", name, st, err)
		}
	}
	for _, s := range []string{"", "42 (sh)", "42 sh S", "42 (sh) S 1 2 3", "42 (sh)" + strings.ReplaceAll(rest, "987654", "x")} {
		if st, err := parseStat([]byte(s)); err == nil {
			t.Errorf("%q: %+v, want an error", s, st)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) { parseStat(b) })
}

func TestParseStatus(t *testing.T) {
	var many strings.Builder
	for i := range 65536 { // W24
		many.WriteString(strconv.Itoa(4000000000+i) + " ")
	}
	head := "Name:\tUid:\\n\nUid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\n"
	st, err := parseStatus([]byte(head + "Groups:\t" + many.String() + "\n"))
	if err != nil || st.UID != 1000 || st.GID != 100 || len(st.Groups) != maxGroups || !st.More || st.setuid {
		t.Errorf("%d groups, more %v, uid %d, %v", len(st.Groups), st.More, st.UID, err)
	}
	st, err = parseStatus([]byte("Uid:\t1000\t0\t0\t0\nGid:\t1\t1\t1\t1\nGroups:\t\n"))
	if err != nil || st.UID != 0 || !st.setuid {
		t.Errorf("setuid: %+v, %v", st, err)
	}
	for _, s := range []string{"", "Uid:\t1\t1\t1\t1\n", "Uid:\t1\nGid:\t1\t1\t1\t1\nGroups:\t\n",
		"Uid:\t1\t1\t1\tx\nGid:\t1\t1\t1\t1\nGroups:\t\n", "Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t-1\n"} {
		if st, err := parseStatus([]byte(s)); err == nil {
			t.Errorf("%q: %+v, want an error", s, st)
		}
	}
}

func FuzzParsePeer(f *testing.F) {
	f.Add(make([]byte, 48))
	f.Fuzz(func(t *testing.T, b []byte) { parsePeer(b) })
}

// W22: with every reader stuck on a file system that hangs, a caller waits no
// longer than its own deadline, and no further goroutine gets stuck.
func TestReadersAreBounded(t *testing.T) {
	var progs Programs
	release := make(chan struct{})
	var wg sync.WaitGroup
	for range maxReading {
		started := make(chan struct{})
		wg.Go(func() {
			await(t.Context(), &progs, func() (int, error) { close(started); <-release; return 0, nil })
		})
		<-started
	}
	ctx, cancel := context.WithCancel(t.Context())
	answers := make(chan error)
	go func() {
		_, err := progs.SHA256(ctx, os.Getpid(), 0)
		answers <- err
	}()
	cancel()
	if err := <-answers; !errors.Is(err, context.Canceled) {
		t.Errorf("SHA256() = %v", err)
	}
	close(release)
	wg.Wait()
	if _, err := progs.SHA256(t.Context(), os.Getpid(), 0); err != nil {
		t.Error(err)
	}
}
