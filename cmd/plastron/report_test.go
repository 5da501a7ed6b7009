package main

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// What ends a server or an agent is said with its cause, once and in one line.
func TestCauses(t *testing.T) {
	away := fault.New(fault.Unavailable, "away", "it does not answer").Fix("start it")
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"nothing":        {nil, ""},
		"no fault":       {errors.New("plain"), "Error: plain\n"},
		"no cause":       {away, "Error: it does not answer\n  Fix: start it\n"},
		"a cause":        {fmt.Errorf("open: %w", away.Because(errors.New("a:\n\tb"))), "Error: open: it does not answer: a: b\n  Fix: start it\n"},
		"said already":   {fault.New(fault.Invalid, "x", "no: %v", "b").Because(errors.New("b")), "Error: no: b\n"},
		"of another":     {fault.New(fault.Invalid, "x", "c: %s", away.Message).Because(away.Because(errors.New("b"))), "Error: c: it does not answer: b\n"},
		"two, one plain": {errors.Join(away.Because(errors.New("b")), errors.New("plain")), "Error: it does not answer: b\n  Fix: start it\nError: plain\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var got bytes.Buffer
			(&program{stderr: &got}).report(withCauses(c.err))
			if got.String() != c.want {
				t.Errorf("it says\n%swant\n%s", got.String(), c.want)
			}
		})
	}
}
