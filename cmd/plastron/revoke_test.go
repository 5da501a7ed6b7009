package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
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

// What is revoked at once is told as revoked, though the server's second may be a
// later one than that in which the command began.
func TestExpelledAtOnce(t *testing.T) {
	began := time.Unix(1_900_000_000, 0)
	const tainted, revoked = "They are tainted, and will be revoked", "They are revoked"
	for _, tt := range []struct {
		revokeAt time.Time
		atOnce   bool
		want     string
	}{
		{began.Add(time.Minute), false, tainted},
		{began, false, revoked},
		{began, true, revoked},
		{began.Add(time.Second), true, revoked},
	} {
		var out strings.Builder
		printExpelled(&out, &cutoffv1.ExpelResponse{RevokeAt: tt.revokeAt.Unix(), Authorities: []*cutoffv1.Key{{Kind: "x509"}}}, tt.atOnce, false, began)
		if !strings.Contains(out.String(), tt.want) {
			t.Errorf("%v after the begin, at once %v: it printed\n%swant %q", tt.revokeAt.Sub(began), tt.atOnce, out.String(), tt.want)
		}
	}
}
