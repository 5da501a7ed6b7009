package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// failure is a test that failed or never ended, or a package that failed without one.
type failure struct{ pkg, test, said string }

// message is the first line of what a test says with t.Error or t.Log, or of how
// the test program died. The lines that follow are indented deeper, or belong to
// the death.
var message = regexp.MustCompile(`^(    \S+\.go:\d+: |panic: |fatal error: |WARNING: DATA RACE)`)

// frame is a line of go test's own.
var frame = regexp.MustCompile(`^(=== | *--- (FAIL|PASS|SKIP): )`)

const (
	maxMessage  = 1200 // bytes of a message
	first, last = 8, 4 // messages of a test
	maxDetailed = 40   // failures; of more the names alone
)

// recall says once more, shortly, why each test failed: of a long log only the
// end may be kept.
func recall(out io.Writer, failures []failure) {
	if len(failures) == 0 {
		return
	}
	fmt.Fprintln(out, "\nWhat failed, in short:")
	for i, f := range failures {
		messages := f.messages()
		if len(messages) == 0 && f.test != "" && contains(failures, f) {
			continue // a test of its own says why
		}
		fmt.Fprintln(out, strings.TrimSpace("--- FAIL: "+f.pkg+" "+f.test))
		if i >= maxDetailed {
			continue
		}
		if more := len(messages) - first - last; more > 0 {
			messages = slices.Replace(messages, first, first+more, fmt.Sprintf("    … %d messages", more))
		}
		for _, m := range messages {
			fmt.Fprintln(out, short(m))
		}
	}
}

// contains reports whether a test inside of f is one of the failures.
func contains(failures []failure, f failure) bool {
	for _, other := range failures {
		if other.pkg == f.pkg && strings.HasPrefix(other.test, f.test+"/") {
			return true
		}
	}
	return false
}

// messages splits what was said. If there is no message in it, all is one.
func (f failure) messages() []string {
	var messages []string
	var other strings.Builder
	inside := false
	for line := range strings.Lines(f.said) {
		switch {
		case frame.MatchString(line):
			inside = false
		case message.MatchString(line):
			inside = true
			messages = append(messages, line)
		case inside:
			messages[len(messages)-1] += line
		default:
			other.WriteString(line)
		}
	}
	if len(messages) == 0 && strings.TrimSpace(other.String()) != "" {
		messages = []string{other.String()}
	}
	return messages
}

// short leaves out the middle of a long message.
func short(message string) string {
	message = strings.TrimRight(message, "\n")
	if len(message) <= maxMessage {
		return message
	}
	return message[:maxMessage/2] + "\n        […]\n" + message[len(message)-maxMessage/2:]
}
