package audit_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/fault"
)

// Since finds, wherever in a trail of any length it begins, all that is about what is
// asked for and nothing else.
func TestSince(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	w := open(t, path, false)
	var marks []time.Time // before record i
	const n = 6000        // 2.4 MB: the search halves it a few times
	for i := range n {
		marks = append(marks, time.Now())
		e := issuance(i % 7)
		e.Serial = fmt.Sprint(i)
		if err := w.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	for _, from := range []int{0, 1, 17, n / 2, n - 3, n - 1} {
		var got []string
		first, lost, err := w.Since(t.Context(), marks[from], []string{"spiffe://td/3", "nothing"}, func(r audit.Record) error {
			var e audit.Issuance
			if err := json.Unmarshal(r.Event, &e); err != nil {
				return err
			}
			got = append(got, e.Serial)
			return nil
		})
		var want []string
		for i := from; i < n; i++ {
			if i%7 == 3 {
				want = append(want, fmt.Sprint(i))
			}
		}
		if err != nil || lost != 0 || first.After(marks[from]) || !slices.Equal(got, want) {
			t.Errorf("from %d: %d records, want %d; first %v, %d lost, %v", from, len(got), len(want), first, lost, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", info.Size())
	stop := errors.New("enough")
	if _, _, err := w.Since(t.Context(), marks[0], []string{"spiffe://td/3"}, func(audit.Record) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the caller's error: %v", err)
	}
}

// A trail that is not there, or lost something, says so.
func TestSinceSaysWhatIsMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	began := time.Now()
	w := open(t, path, false)
	if err := w.Append(audit.Gap{Lost: 3}); err != nil {
		t.Fatal(err)
	}
	none := func(audit.Record) error { return nil }
	if first, lost, err := w.Since(t.Context(), began.Add(-time.Hour), nil, none); err != nil || lost != 3 || first.Before(began.Add(-time.Minute)) {
		t.Errorf("it begins %v, %d lost, %v", first, lost, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.Since(t.Context(), began, nil, none); err == nil {
		t.Error("a trail that is gone was read")
	}
}

// A trail that came with a copied directory is not gone on with, and it says what to do.
func TestTrailOfAnotherServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := open(t, path, false).Close(); err != nil {
		t.Fatal(err)
	}
	_, err := audit.Open(audit.Config{Path: path, Server: "s2", Log: slog.New(slog.DiscardHandler)})
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Reason != "audit_broken" || f.Remedy == "" {
		t.Errorf("Open() = %v", err)
	}
}
