// Package workloadtest is the contract of workload.Attestor as a test suite.
// Every attestor's own test calls Run.
package workloadtest

import (
	"context"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/workload"
)

// Run checks that what open returns keeps the contract, on this very process.
func Run(t *testing.T, open func(t *testing.T) workload.Attestor) { RunOn(t, os.Getpid(), open) }

// RunOn does so on a process of which the attestor knows something.
func RunOn(t *testing.T, pid int, open func(t *testing.T) workload.Attestor) {
	t.Run("facts are well formed and repeatable", func(t *testing.T) {
		a := open(t)
		first, err := a.Attest(t.Context(), pid)
		if err != nil {
			t.Fatal(err)
		}
		if len(first.Selectors) == 0 {
			t.Error("no selector for a living process")
		}
		seen := map[entry.Selector]bool{}
		for _, s := range first.Selectors {
			switch {
			case s.Type == "" || strings.Contains(s.Type, ":") || len(s.Type) > entry.MaxSelectorType:
				t.Errorf("selector type %q", s.Type)
			case s.Value == "" || len(s.Value) > entry.MaxSelectorValue || !utf8.ValidString(s.Value) || strings.ContainsAny(s.Value, "\x00\n"):
				t.Errorf("selector value %q", s.Value)
			case seen[s]:
				t.Errorf("selector %s twice", s)
			}
			seen[s] = true
		}
		for name, value := range first.Facts {
			kind, rest, _ := strings.Cut(name, ".")
			switch {
			case kind != first.Selectors[0].Type || rest == "" || strings.Contains(rest, "."):
				t.Errorf("fact %q: its name must be the attestor's own and one more word", name)
			case value == "" || len(value) > entry.MaxSelectorValue || !utf8.ValidString(value) || strings.ContainsAny(value, "\x00\n"):
				t.Errorf("fact %s is %q", name, value)
			}
		}
		again, err := a.Attest(t.Context(), pid)
		if err != nil || !reflect.DeepEqual(first, again) {
			t.Errorf("second call: %+v, %v; first: %+v", again, err, first)
		}
	})
	t.Run("absence is an error, not an empty answer", func(t *testing.T) { // RG43
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if got, err := open(t).Attest(t.Context(), cmd.Process.Pid); err == nil {
			t.Errorf("a process that has gone: %+v", got)
		}
	})
	t.Run("a call that is over returns an error", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := open(t).Attest(ctx, pid); err == nil {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("concurrent calls", func(t *testing.T) { // RG44
		a := open(t)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				if _, err := a.Attest(t.Context(), pid); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}
