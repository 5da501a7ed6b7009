package main

import (
	"strings"
	"testing"
)

func TestSummarize(t *testing.T) {
	const (
		pass    = `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n"
		fail    = `{"Action":"output","Package":"p","Test":"TestB","Output":"b_test.go:1: wrong\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestB"}` + "\n"
		skip    = `{"Action":"output","Package":"p","Test":"TestC","Output":"no strace\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"TestC"}` + "\n"
		pkgPass = `{"Action":"pass","Package":"p","Elapsed":1.5}` + "\n"
		pkgFail = `{"Action":"fail","Package":"p","Elapsed":1.5}` + "\n"
		noTests = `{"Action":"skip","Package":"q"}` + "\n"
		noBuild = `{"ImportPath":"p","Action":"build-output","Output":"a.go:1: syntax error\n"}` + "\n" + `{"ImportPath":"p","Action":"build-fail"}` + "\n" +
			`{"Action":"output","Package":"p","Output":"FAIL p [build failed]\n"}` + "\n" + `{"Action":"fail","Package":"p","FailedBuild":"p"}` + "\n"
		ranOut = `{"Action":"output","Package":"p","Test":"TestD","Output":"=== RUN   TestD\n"}` + "\n" +
			`{"Action":"output","Package":"p","Test":"TestD","Output":"panic: test timed out after 2s\n"}` + "\n"
		panicked = `{"Action":"output","Package":"p","Test":"TestD","Output":"panic: no\n"}` + "\n"
	)
	tests := []struct {
		name, in string
		strict   bool
		ok       bool
		last     string
		says     string
	}{
		{"all pass", pass + pkgPass + noTests, true, true, "1 passed, 0 failed, 0 skipped", "pass\tp\t1.5s"},
		{"one fails", pass + fail + pkgFail, false, false, "1 passed, 1 failed, 0 skipped", "b_test.go:1: wrong"},
		{"one skipped", pass + skip + pkgPass, false, true, "1 passed, 0 failed, 1 skipped", "no strace"},
		{"one skipped in CI", pass + skip + pkgPass, true, false, "1 passed, 0 failed, 1 skipped", "nothing may be skipped"},
		{"no build", pass + noBuild, false, false, "1 passed, 1 failed, 0 skipped", "--- FAIL: p\na.go:1: syntax error\nFAIL p [build failed]\n"},
		{"panic", pass + panicked + pkgFail, false, false, "1 passed, 1 failed, 0 skipped", "panic: no"},
		{"one fails and one never ends", fail + ranOut + pkgFail, false, false, "0 passed, 2 failed, 0 skipped", "--- FAIL: p TestD\npanic: test timed out after 2s\n"},
		{"nothing", noTests, false, false, "0 passed, 0 failed, 0 skipped", "no test ran"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			ok, err := summarize(strings.NewReader(test.in), &out, test.strict)
			if err != nil || ok != test.ok {
				t.Errorf("summarize() = %v, %v, want %v", ok, err, test.ok)
			}
			if !strings.HasSuffix(out.String(), "\n"+test.last+"\n") || !strings.Contains(out.String(), test.says) {
				t.Errorf("it says\n%swant %q and at the end %q", out.String(), test.says, test.last)
			}
		})
	}
	if _, err := summarize(strings.NewReader("not JSON"), new(strings.Builder), false); err == nil {
		t.Error("summarize(not JSON) found no error")
	}
}

// What failed stands shortly at the end, wherever in a long log it was said.
func TestRecall(t *testing.T) {
	long := "    a_test.go:3: [server run] printed:\n" + strings.Repeat("        much\n", 1000) + "        the end\n"
	many := strings.Repeat("    b_test.go:7: once more\n", 100)
	var out strings.Builder
	recall(&out, []failure{
		{"p", "TestA/one", "=== RUN   TestA/one\n    a_test.go:2: wrong: exit status 1\n        its output\n    --- FAIL: TestA/one (0.00s)\n"},
		{"p", "TestA", "=== RUN   TestA\n=== CONT  TestA\n" + long + "--- FAIL: TestA (0.00s)\n"},
		{"p", "TestB", many + "    b_test.go:8: last\n"},
		{"q", "TestC/one", "    c_test.go:1: no\n"},
		{"q", "TestC", "=== RUN   TestC\n--- FAIL: TestC (0.00s)\n"},
		{"r", "TestD", "=== RUN   TestD\nunusual\n"},
	})
	for _, want := range []string{
		"--- FAIL: p TestA/one\n    a_test.go:2: wrong: exit status 1\n        its output\n--- FAIL: p TestA\n",
		"--- FAIL: p TestA\n    a_test.go:3: [server run] printed:\n        much\n",
		"        much\n        the end\n--- FAIL: p TestB\n",
		"    … 89 messages\n    b_test.go:7: once more\n    b_test.go:7: once more\n    b_test.go:7: once more\n    b_test.go:8: last\n",
		"--- FAIL: q TestC/one\n    c_test.go:1: no\n--- FAIL: r TestD\nunusual\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it says\n%s\nwant\n%s", out.String(), want)
		}
	}
	if out.Len() > 3000 {
		t.Errorf("%d bytes", out.Len())
	}
}
