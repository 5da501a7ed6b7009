package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// Only who answers yes, or has said so before, goes on; and nobody is asked who
// cannot answer.
func TestCaution(t *testing.T) {
	path := filepath.Join(t.TempDir(), "yes")
	if err := os.WriteFile(path, []byte("yes\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, c := range map[string]struct {
		care   caution
		stdin  io.Reader
		reason string
		shown  bool
	}{
		"yes":           {stdin: strings.NewReader("yes\n"), shown: true},
		"no":            {stdin: strings.NewReader("no\n"), reason: "not_confirmed", shown: true},
		"y":             {stdin: strings.NewReader("y\n"), reason: "not_confirmed", shown: true},
		"nothing":       {stdin: strings.NewReader("\n"), reason: "not_confirmed", shown: true},
		"an end":        {stdin: strings.NewReader(""), reason: "usage", shown: true},
		"a file":        {stdin: file, reason: "usage"},
		"said before":   {care: caution{yes: true}, stdin: strings.NewReader("")},
		"nothing to do": {care: caution{dry: true}, stdin: strings.NewReader("")},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			shown := false
			err := c.care.ask(&program{stdin: c.stdin, stdout: io.Discard, stderr: &out}, func() error { shown = true; return nil })
			if (err == nil) != (c.reason == "") || err != nil && fault.ReasonOf(err) != c.reason || shown != c.shown {
				t.Errorf("ask() = %v, shown %v; want %q, %v", err, shown, c.reason, c.shown)
			}
			if asked := strings.Contains(out.String(), "Write yes"); asked != c.shown {
				t.Errorf("it printed %q", out.String())
			}
		})
	}
}
