//go:build unix

package config

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// used is the processor time of this process so far, which a busy machine does not
// prolong as it does what a clock shows.
func used(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// F17: too much of anything is refused, and quickly.
func TestBounds(t *testing.T) {
	for name, src := range map[string]string{
		"F17 10 MiB":             "a = \"" + strings.Repeat("x", 10<<20) + "\"",
		"F17 10000 blocks deep":  strings.Repeat("a {", 10000) + strings.Repeat("}", 10000),
		"F17 10000 labels":       strings.Repeat("a ", 10000) + "{}",
		"F17 10000 lists deep":   "a = " + strings.Repeat("[", 10000) + strings.Repeat("]", 10000),
		"F17 10000 JSON objects": strings.Repeat(`{"a":`, 10000) + "1" + strings.Repeat("}", 10000),
		"F17 10000 JSON lists":   `{"a":` + strings.Repeat("[", 10000) + strings.Repeat("]", 10000) + "}",
		"F17 many keys":          strings.Repeat("a=1\n", 250_000),
		"F17 many long keys":     strings.Repeat(strings.Repeat("k", 100)+"=1\n", 10_000),
		"F17 many JSON keys":     `{` + strings.Repeat(`"a":1,`, 170_000) + `"a":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			start := used(t)
			err := Decode("big.conf", []byte(src), new(role))
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("error = %.200v, want an invalid fault", err)
			}
			if len(err.Error()) > 8<<10 {
				t.Errorf("the error is %d bytes long", len(err.Error()))
			}
			if took := used(t) - start; took > 20*time.Second {
				t.Errorf("it took %v of a processor", took)
			}
		})
	}
	path := filepath.Join(t.TempDir(), "big.conf")
	if err := os.WriteFile(path, make([]byte, MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Load(path, new(role)); fault.ReasonOf(err) != "config_too_large" {
		t.Errorf("Load() = %v", err)
	}
}
