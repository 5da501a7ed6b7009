package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
)

func open(t *testing.T, path string, strict bool) *audit.Writer {
	t.Helper()
	w, err := audit.Open(audit.Config{Path: path, Server: "s1", Version: "test", Strict: strict, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func issuance(i int) audit.Issuance {
	return audit.Issuance{Caller: "spiffe://td/spire/agent/x", Kind: "x509", ID: fmt.Sprintf("spiffe://td/%d", i),
		Serial: "17", Expiry: time.Unix(1700000000, 0).UTC()}
}

func verify(t *testing.T, path string) audit.Summary {
	t.Helper()
	s, err := audit.Verify(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestChainGoesOnAfterRestart(t *testing.T) { // R14
	path := filepath.Join(t.TempDir(), "audit.log")
	for range 3 {
		w := open(t, path, false)
		for i := range 10 {
			if err := w.Append(issuance(i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if s := verify(t, path); s.Records != 33 || s.Torn != 0 || s.Lost != 0 {
		t.Errorf("Verify() = %+v, want 33 records", s)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode = %v (%v), want 0600", info.Mode().Perm(), err)
	}
}

func TestTornLastLineIsSetAside(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	w := open(t, path, false)
	w.Append(issuance(1), issuance(2))
	w.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	torn := []byte(`{"seq":4,"prev":"00`)
	if err := os.WriteFile(path, append(whole, torn...), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := verify(t, path); s.Records != 3 || s.Torn != int64(len(torn)) {
		t.Errorf("Verify() = %+v, want 3 records and %d torn bytes", s, len(torn))
	}
	w = open(t, path, false)
	w.Close()
	if s := verify(t, path); s.Records != 4 || s.Torn != 0 {
		t.Errorf("Verify() = %+v, want 4 records", s)
	}
	kept, err := filepath.Glob(path + ".torn-*")
	if err != nil || len(kept) != 1 {
		t.Fatalf("set aside: %v (%v), want one file", kept, err)
	}
	if b, _ := os.ReadFile(kept[0]); !bytes.Equal(b, torn) {
		t.Errorf("set aside %q, want %q", b, torn)
	}
}

func TestVerifyFindsEveryChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	w := open(t, path, false)
	for i := range 5 {
		w.Append(issuance(i))
	}
	w.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(whole), "\n")
	lines = lines[:len(lines)-1]
	changed := map[string]string{
		"a byte changed":     strings.Replace(string(whole), "spiffe://td/2", "spiffe://td/9", 1),
		"a line removed":     strings.Join(append(append([]string{}, lines[:2]...), lines[3:]...), ""),
		"first line removed": strings.Join(lines[1:], ""),
		"lines swapped":      strings.Join([]string{lines[0], lines[2], lines[1], lines[3], lines[4], lines[5]}, ""),
		"a line twice":       strings.Join(append(append([]string{}, lines...), lines[5]), ""),
		"white space":        strings.Replace(string(whole), `{"seq":3,`, `{"seq": 3,`, 1),
		"unknown member":     strings.Replace(string(whole), `{"seq":3,`, `{"x":1,"seq":3,`, 1),
		"a long line":        string(whole) + strings.Repeat("x", audit.MaxRecord+1) + "\n",
	}
	for name, text := range changed {
		t.Run(name, func(t *testing.T) {
			if text == string(whole) {
				t.Fatal("the case changes nothing")
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := audit.Verify(path)
			if !errors.Is(err, &fault.Error{Kind: fault.Precondition, Reason: "audit_broken"}) {
				t.Errorf("Verify() = %v, want audit_broken", err)
			}
		})
	}
}

func TestAnotherServersTrailIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	open(t, path, false).Close()
	_, err := audit.Open(audit.Config{Path: path, Server: "s2", Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, &fault.Error{Kind: fault.Precondition}) {
		t.Errorf("Open() = %v, want fault.Precondition", err)
	}
}

func TestFileOthersMayWriteIsRefused(t *testing.T) { // R113
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o622); err != nil {
		t.Fatal(err)
	}
	_, err := audit.Open(audit.Config{Path: path, Server: "s1", Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, &fault.Error{Kind: fault.Precondition, Reason: "audit_file_unsafe"}) {
		t.Errorf("Open() = %v, want audit_file_unsafe", err)
	}
}

func TestConcurrentStrictAppends(t *testing.T) { // R14: durable before it returns
	path := filepath.Join(t.TempDir(), "audit.log")
	w := open(t, path, true)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := w.Append(issuance(i), issuance(i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := w.Durable(); n != 101 {
		t.Errorf("durable up to %d, want 101", n)
	}
	if s := verify(t, path); s.Records != 101 {
		t.Errorf("Verify() = %+v, want 101 records", s)
	}
}

func TestSinkFailure(t *testing.T) { // R14
	for _, strict := range []bool{true, false} {
		t.Run(fmt.Sprintf("strict=%v", strict), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.log")
			w := open(t, path, strict)
			w.BreakFile()
			err := w.Append(issuance(1), issuance(2))
			if strict && !errors.Is(err, &fault.Error{Kind: fault.Unavailable, Reason: "audit_unavailable"}) {
				t.Errorf("Append() = %v, want audit_unavailable", err)
			}
			if !strict && err != nil {
				t.Errorf("Append() = %v, want nil", err)
			}
			if n := w.Dropped(); n != 2 {
				t.Errorf("Dropped() = %d, want 2", n)
			}
			w.RetryNow()
			if err := w.Append(issuance(3)); err != nil {
				t.Fatalf("after recovery: %v", err)
			}
			if s := verify(t, path); s.Records != 3 || s.Lost != 2 {
				t.Errorf("Verify() = %+v, want 3 records, 2 lost", s)
			}
		})
	}
}

// What is written is durable a second later, however long nothing was written before.
func TestDurableWithinASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, filepath.Join(t.TempDir(), "audit.log"), false)
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go w.Run(ctx)
		for sequence := uint64(2); sequence < 5; sequence++ { // the first says that the server has started
			if err := w.Append(issuance(int(sequence))); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if durable := w.Durable(); durable != sequence {
				t.Errorf("%d records are durable after a second, want %d", durable, sequence)
			}
			time.Sleep(time.Hour)
		}
	})
}

func TestOutsidersTextIsEscapedAndCut(t *testing.T) { // R104
	path := filepath.Join(t.TempDir(), "audit.log")
	w := open(t, path, false)
	w.Append(audit.Refusal{Caller: audit.Text("a\n\x00\xff\x1b[31m" + strings.Repeat("x", 1<<20)), Reason: "r"})
	w.Close()
	if s := verify(t, path); s.Records != 2 {
		t.Errorf("Verify() = %+v, want 2 records", s)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n != 2 || bytes.ContainsAny(b, "\x00\x1b") || len(b) > 8<<10 {
		t.Errorf("%d bytes, %d lines, want 2 short lines without control bytes", len(b), n)
	}
}

func TestFind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	w := open(t, path, false)
	w.Append(
		audit.Issuance{Kind: "x509", ID: "spiffe://td/a", Serial: "117", Limit: "x509_svid_ttl"},
		audit.Refusal{Subject: `"serial":"18"`},
		audit.Issuance{Kind: "x509", ID: `spiffe://td/"serial":"18"`, Serial: "17"},
		audit.Admission{Node: "spiffe://td/n", Serial: "18", Limit: "agent_ttl"},
	)
	if s, err := w.Find(t.Context(), "117"); err != nil || s.Issuance.ID != "spiffe://td/a" || s.Issuance.Limit != "x509_svid_ttl" || s.Record.Sequence != 2 {
		t.Errorf("Find(117) = %+v, %v", s, err)
	}
	if s, err := w.Find(t.Context(), "18"); err != nil || s.Issuance != nil || s.Admission.Limit != "agent_ttl" {
		t.Errorf("Find(18) = %+v, %v", s, err)
	}
	for _, serial := range []string{"", "1", `17","x":"`, "19"} {
		if s, err := w.Find(t.Context(), serial); !errors.Is(err, &fault.Error{Kind: fault.NotFound, Reason: "serial_unknown"}) {
			t.Errorf("Find(%q) = %+v, %v, want serial_unknown", serial, s, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	path := filepath.Join(f.TempDir(), "audit.log")
	w, err := audit.Open(audit.Config{Path: path, Server: "s1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	w.Append(issuance(1))
	w.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		before, err := audit.Verify(path)
		if err != nil {
			return
		}
		// Whatever verifies can be continued, if it is this server's.
		w, err := audit.Open(audit.Config{Path: path, Server: "s1", Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return
		}
		w.Close()
		after, err := audit.Verify(path)
		if err != nil || after.Records != before.Records+1 {
			t.Errorf("continued %+v: %+v, %v", before, after, err)
		}
	})
}

// Seen hears of what is let pass: in strict mode not of what must not happen
// because it cannot be recorded.
func TestSeen(t *testing.T) {
	for strict, want := range map[bool]int{false: 3, true: 2} {
		var seen []audit.Event
		w, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.log"), Server: "s1", Strict: strict,
			Seen: func(e audit.Event) { seen = append(seen, e) }, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Append(issuance(1)); err != nil {
			t.Fatal(err)
		}
		w.Note(issuance(2))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if err := w.Append(issuance(3)); (err != nil) != strict {
			t.Errorf("strict %v: Append() to a closed trail = %v", strict, err)
		}
		if len(seen) != want {
			t.Errorf("strict %v: %d events seen, want %d", strict, len(seen), want)
		}
	}
}
