// Program summary reads what go test -json writes and tells a person what
// happened: each package as it ends, the output of what failed, the reason of
// what was skipped, then shortly once more why what failed did, and last one
// line "N passed, N failed, N skipped".
//
// It ends with status 1 if anything failed, if nothing ran, or if CI=true and
// anything was skipped: there every part that a test needs has to be present.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is what cmd/test2json documents, plus the build events of go test.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string // the ImportPath of what did not build
}

func main() {
	ok, err := summarize(os.Stdin, os.Stdout, os.Getenv("CI") == "true")
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func summarize(in io.Reader, out io.Writer, strict bool) (ok bool, err error) {
	var passed, failed, skipped int
	output := make(map[[2]string]*strings.Builder) // of tests that run, by package and test
	built := make(map[string]string)               // what builds said, by import path
	var failures []failure
	decoder := json.NewDecoder(in)
	for {
		var e event
		if err := decoder.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return false, fmt.Errorf("read the events of go test: %w", err)
		}
		key := [2]string{e.Package, e.Test}
		switch e.Action {
		case "build-output":
			fmt.Fprint(out, e.Output)
			built[e.ImportPath] += e.Output
		case "output":
			if output[key] == nil {
				output[key] = new(strings.Builder)
			}
			output[key].WriteString(e.Output)
		case "pass", "fail", "skip":
			said := ""
			if output[key] != nil {
				said = output[key].String()
			}
			delete(output, key)
			if e.Test == "" {
				// Tests that never ended are those of a program that panicked or ran out
				// of time. A package that fails without them and without a failed test
				// did not build, or its own output says why.
				if e.Action == "fail" {
					more := unfinished(output, e.Package)
					if len(more) == 0 && !slices.ContainsFunc(failures, func(f failure) bool { return f.pkg == e.Package }) {
						more = []failure{{e.Package, "", said}}
					}
					for _, f := range more {
						fmt.Fprint(out, f.said)
					}
					if len(more) > 0 {
						failed++
						more[0].said = built[e.FailedBuild] + more[0].said
					}
					failures = append(failures, more...)
				}
				if e.Action != "skip" { // no test files
					fmt.Fprintf(out, "%s\t%s\t%.1fs\n", e.Action, e.Package, e.Elapsed)
				}
				continue
			}
			switch e.Action {
			case "pass":
				passed++
			case "fail":
				failed++
				failures = append(failures, failure{e.Package, e.Test, said})
				fmt.Fprint(out, said)
			case "skip":
				skipped++
				fmt.Fprintf(out, "skipped %s %s:\n%s", e.Package, e.Test, said)
			}
		}
	}
	recall(out, failures)
	if strict && skipped > 0 {
		fmt.Fprintln(out, "with CI=true nothing may be skipped")
	}
	if passed+failed+skipped == 0 {
		fmt.Fprintln(out, "no test ran")
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	return failed == 0 && passed > 0 && (!strict || skipped == 0), nil
}

// unfinished takes the package's tests that never ended.
func unfinished(output map[[2]string]*strings.Builder, pkg string) []failure {
	var tests []failure
	for key, said := range output {
		if key[0] == pkg {
			tests = append(tests, failure{pkg, key[1], said.String()})
			delete(output, key)
		}
	}
	slices.SortFunc(tests, func(a, b failure) int { return strings.Compare(a.test, b.test) })
	return tests
}
