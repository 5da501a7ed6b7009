package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/plastron/plastron/test/parts"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestMain makes this test binary stand for the program in scripts.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"plastron":     main,
		"spire-server": main,
		"spire-agent":  main,
		"jsonlines":    jsonLines,
	})
}

// jsonLines looks whether each line of each file is one event of a JSON log.
func jsonLines() {
	for _, name := range os.Args[1:] {
		text, err := os.ReadFile(name)
		if err != nil || len(text) == 0 {
			fmt.Println(name, "is empty", err)
			os.Exit(1)
		}
		for line := range strings.Lines(string(text)) {
			var event struct{ Time, Level, Msg string }
			if err := json.Unmarshal([]byte(line), &event); err != nil || event.Time == "" || event.Level == "" || event.Msg == "" {
				fmt.Println(name, err, line)
				os.Exit(1)
			}
		}
	}
	fmt.Println("every line is one event")
}

// TestScripts runs the command lines in testdata/scripts.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata/scripts",
		UpdateScripts: *update,
		Setup: func(env *testscript.Env) error {
			// Sockets need short paths, and each script its own instances.
			dir, err := os.MkdirTemp("", "pl")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("TMPDIR", dir)
			port, err := parts.ReservePort() // for a server that is started again at its port
			if err != nil {
				return err
			}
			env.Defer(port.Release)
			env.Setenv("PORT", fmt.Sprint(port.Number))
			env.Setenv("UID", fmt.Sprint(os.Getuid()))
			me, err := user.Current()
			if err != nil {
				return err
			}
			env.Setenv("USERNAME", me.Username)
			env.Setenv("XDG_RUNTIME_DIR", "")
			return nil
		},
	})
}

// serve runs a server of the test's own on a Unix socket and returns its path.
func serve(t *testing.T, register func(*grpc.Server)) string {
	t.Helper()
	path := filepath.Join(shortTempDir(t), "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	var group sync.WaitGroup
	group.Go(func() { s.Serve(listener) })
	t.Cleanup(func() { s.Stop(); group.Wait() })
	return path
}

// shortTempDir is a directory whose path leaves room for the name of a socket.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// call runs one command line in this process.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"plastron"}, args...), strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestNormalize(t *testing.T) {
	p := &program{}
	for _, tt := range []struct{ in, want string }{
		{"server entry create -spiffeID spiffe://a/b -selector unix:uid:1 -selector=x:y",
			"server entry create --spiffeID=spiffe://a/b --selector=unix:uid:1 --selector=x:y"},
		{"server entry create --spiffeID -strange -downstream --admin=false", "server entry create --spiffeID=-strange --downstream --admin=false"},
		{"agent api fetch -socketPath /s", "agent api fetch --socketPath=/s"},
		{"agent api fetch x509 -silent", "agent api fetch x509 --silent"},
		{"run -files d -- cmd -x -- -spiffeID", "run --files=d -- cmd -x -- -spiffeID"},
		{"server entry count -h", "server entry count --help"},
		{"server entry count -help", "server entry count --help"},
		{"help server", "help server"},
		{"__complete server en", "__complete server en"},
		{"completion bash -no-descriptions", "completion bash --no-descriptions"},
		{"", ""},
	} {
		got, err := normalize(p.root(), strings.Fields(tt.in))
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("normalize(%s) = %s, %v, want %s", tt.in, strings.Join(got, " "), err, tt.want)
		}
	}
}

// TestMistakes: a wrong command line is one error that names the flag and
// the nearest name, and nothing is done.
func TestMistakes(t *testing.T) {
	t.Setenv("SPIRE_SERVER_PRIVATE_SOCKET", "")
	for _, tt := range []struct{ in, want string }{
		{"sever", "\"sever\" is not a command of plastron\n  Fix: did you mean \"server\"?"},
		{"server entry", ""},
		{"server entry xyzzy", "\"xyzzy\" is not a command of plastron server entry\n  Fix: there are count, create, delete, show, update, why"},
		{"server entry show -parrentID x", "plastron server entry show has no flag -parrentID\n  Fix: did you mean -parentID?"},
		{"server entry show --parentid x", "plastron server entry show has no flag -parentid\n  Fix: did you mean -parentID?"},
		{"server entry show -qqqqqqqqqq", "plastron server entry show has no flag -qqqqqqqqqq\n  Fix: see plastron server entry show -h"},
		{"server entry show -parentID", "the flag -parentID needs a value\n  Fix: see plastron server entry show -h"},
		{"server entry show extra", "plastron server entry show does not take the argument \"extra\"\n  Fix: a flag begins with a dash; see plastron server entry show -h"},
		{"server entry show -downstream=maybe", "the value \"maybe\" of -downstream is not true or false\n  Fix: see plastron server entry show -h"},
		{"server entry show -output yaml", "the value \"yaml\" of -output is wrong: there are pretty and json\n  Fix: see plastron server entry show -h"},
		{"server entry show -selector nocolon", "the selector \"nocolon\" has no colon\n  Fix: write it as TYPE:VALUE, such as unix:uid:1000"},
		{"server entry show -selector a:b -matchSelectorsOn some", "the value \"some\" of -matchSelectorsOn is none of exact, any, superset, subset\n  Fix: see plastron server entry show -h"},
		{"server entry create", "at least one -selector is required\n  Fix: see plastron server entry create -h"},
		{"server entry create -selector a:b", "-parentID is required unless -node is given\n  Fix: see plastron server entry create -h"},
		{"server entry create -selector a:b -node", "-spiffeID is required\n  Fix: see plastron server entry create -h"},
		{"server entry create -selector a:b -node -spiffeID x", "-spiffeID: \"x\" is not a SPIFFE ID: scheme is missing or invalid\n  Fix: write it as spiffe://TRUST-DOMAIN/PATH"},
		{"server entry create -selector a:b -node -spiffeID spiffe://a/b -x509SVIDTTL -5", "-x509SVIDTTL, -jwtSVIDTTL and -entryExpiry must not be negative\n  Fix: see plastron server entry create -h"},
		{"server entry create -data - -spiffeID spiffe://a/b", "-data and -spiffeID exclude each other\n  Fix: see plastron server entry create -h"},
		{"server entry create -data /nowhere/x.json", "the configuration file cannot be read: open /nowhere/x.json: no such file or directory\n  Fix: check its path and its mode"},
		{"server entry update", "-entryID or -data is required\n  Fix: see plastron server entry update -h"},
		{"server entry update -entryID a", "there is nothing to change: give a flag besides -entryID\n  Fix: see plastron server entry update -h"},
		{"server entry update -entryID a -node", "plastron server entry update has no flag -node\n  Fix: see plastron server entry update -h"},
		{"server entry update -entryID a -spiffeID=", "-spiffeID: \"\" is not a SPIFFE ID: cannot be empty\n  Fix: write it as spiffe://TRUST-DOMAIN/PATH"},
		{"server entry update -entryID a -jwtSVIDTTL -1", "-x509SVIDTTL, -jwtSVIDTTL and -entryExpiry must not be negative\n  Fix: see plastron server entry update -h"},
		{"server entry update -data - -admin", "-data and -admin exclude each other\n  Fix: see plastron server entry update -h"},
		{"server entry delete", "-entryID or -file is required\n  Fix: see plastron server entry delete -h"},
		{"server rule create -selector a:b", "-idTemplate is required\n  Fix: see plastron server rule create -h"},
		{"server rule create -selector a:b -idTemplate x", "-parentID is required\n  Fix: see plastron server rule create -h"},
		{"server rule create -parentID a -idTemplate x", "at least one -selector is required\n  Fix: see plastron server rule create -h"},
		{"server rule create -selector a:b -parentID a -idTemplate x -ruleExpiry -1", "-x509SVIDTTL, -jwtSVIDTTL and -ruleExpiry must not be negative\n  Fix: see plastron server rule create -h"},
		{"server panic -yes", "plastron server panic needs WHO\n  Fix: see plastron server panic -h"},
		{"server revoke", "plastron server revoke needs WHAT\n  Fix: see plastron server revoke -h"},
		{"server authority rotate -force", "plastron server authority rotate needs KIND\n  Fix: see plastron server authority rotate -h"},
		{"agent why", "plastron agent why needs PID\n  Fix: see plastron agent why -h"},
		{"server panic spiffe://a.test/nested -now", "-now is for servers that share the store\n  Fix: see plastron server panic -h"},
		{"server rule delete", "-ruleID is required\n  Fix: see plastron server rule delete -h"},
		{"server logger set", "-level is required\n  Fix: see plastron server logger set -h"},
		{"server logger set -level loud", "the value \"loud\" of -level is none of panic, fatal, error, warn, info, debug, trace\n  Fix: see plastron server logger set -h"},
		{"server token generate -ttl 0", "-ttl must be positive\n  Fix: see plastron server token generate -h"},
		{"server agent list -banned=maybe", "the value \"maybe\" of -banned is not true or false\n  Fix: see plastron server agent list -h"},
		{"server agent list -expiresBefore 2026-01-01", "the value \"2026-01-01\" of -expiresBefore is not a time written as \"2006-01-02 15:04:05 -0700 -07\"\n  Fix: see plastron server agent list -h"},
		{"server agent list -matchSelectorsOn some", "the value \"some\" of -matchSelectorsOn is none of exact, any, superset, subset\n  Fix: see plastron server agent list -h"},
		{"server entry show -matchFederatesWithOn some", "the value \"some\" of -matchFederatesWithOn is none of exact, any, superset, subset\n  Fix: see plastron server entry show -h"},
		{"server agent count -selector a:b -matchSelectorsOn some", "the value \"some\" of -matchSelectorsOn is none of exact, any, superset, subset\n  Fix: see plastron server agent count -h"},
		{"server agent show", "-spiffeID is required\n  Fix: see plastron server agent show -h"},
		{"server agent ban -spiffeID x", "-spiffeID: \"x\" is not a SPIFFE ID: scheme is missing or invalid\n  Fix: write it as spiffe://TRUST-DOMAIN/PATH"},
		{"server agent purge -expiredFor -1h", "-expiredFor must not be negative\n  Fix: see plastron server agent purge -h"},
		{"server bundle show -format der", "the value \"der\" of -format is wrong: there are pem and spiffe\n  Fix: see plastron server bundle show -h"},
		{"server bundle set", "-id is required\n  Fix: see plastron server bundle set -h"},
		{"server bundle set -id spiffe://A", "-id: \"A\" is not a trust domain name: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"},
		{"server bundle set -id a.test", "the PEM bundle holds no certificate\n  Fix: write the server's bundle to it: plastron server bundle show"},
		{"server bundle set -id a.test -path /nowhere/x", "the file cannot be read: open /nowhere/x: no such file or directory\n  Fix: check its path and its mode"},
		{"server bundle delete -id a.test -mode some", "the value \"some\" of -mode is none of restrict, delete, dissociate\n  Fix: see plastron server bundle delete -h"},
		{"server x509 mint", "-spiffeID is required\n  Fix: see plastron server x509 mint -h"},
		{"server x509 mint -spiffeID spiffe://a/b -ttl -1s", "-ttl must be from 0 to 596523h14m7s\n  Fix: see plastron server x509 mint -h"},
		{"server x509 mint -spiffeID spiffe://a/b -ttl 60", "the value \"60\" of -ttl is not a duration such as 5s\n  Fix: see plastron server x509 mint -h"},
		{"server x509 mint -spiffeID spiffe://a/b -write /nowhere", "-write: there is no directory /nowhere\n  Fix: see plastron server x509 mint -h"},
		{"server jwt mint -spiffeID spiffe://a/b", "-audience is required\n  Fix: see plastron server jwt mint -h"},
		{"server jwt mint -spiffeID spiffe://a/b -audience a -write /nowhere/x", "-write: there is no directory /nowhere\n  Fix: see plastron server jwt mint -h"},
		{"server jwt mint -audience a", "-spiffeID is required\n  Fix: see plastron server jwt mint -h"},
		{"server jwt mint -audience a -spiffeID spiffe://a/b -ttl 600000h", "-ttl must be from 0 to 596523h14m7s\n  Fix: see plastron server jwt mint -h"},
		{"server token generate -address example.org", "-address: \"example.org\" is not the address of a server\n  Fix: write it as HOST:PORT, with a name in lower case or an IP address, such as plastron.example.org:8081 or [2001:db8::1]:8081"},
		{"server token generate -address a:1 -address a:1", "-address is given twice with a:1\n  Fix: see plastron server token generate -h"},
		{"agent run -ticketFile f -ticket plastron1", "-ticket and -ticketFile exclude each other\n  Fix: see plastron agent run -h"},
		{"agent run -ticketFile /nowhere/ticket", "-ticketFile: open /nowhere/ticket: no such file or directory"},
		{"agent run -ticket plastron2.x", "-ticket: the ticket is of version 2, this agent reads version 1\n  Fix: install the version of plastron that the server has, or one newer"},
		{"agent run -ticket plastron1.AAB", "-ticket: the ticket is cut off: its end is missing\n  Fix: copy the whole line again, or make another ticket with 'plastron server token generate'"},
		{"server entry show -socketPath /a -instance b", "-socketPath and -instance exclude each other\n  Fix: give one of them"},
		{"server entry show -instance b", "-instance needs the environment variable SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE\n  Fix: set it to a path that holds %i"},
		{"server entry show -socketPath tcp://a:1", "\"tcp://a:1\" is not the address of a Unix socket\n  Fix: write it as unix:///PATH or as a plain path"},
		{"agent api fetch jwt", "-audience is required\n  Fix: see plastron agent api fetch jwt -h"},
		{"agent api fetch jwt -audience a -spiffeID spiffe://A/b", "-spiffeID: \"spiffe://A/b\" is not a SPIFFE ID: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores\n  Fix: write it as spiffe://TRUST-DOMAIN/PATH"},
		{"agent api validate jwt -audience a", "-svid is required\n  Fix: see plastron agent api validate jwt -h"},
		{"agent api fetch x509 -timeout 5", "the value \"5\" of -timeout is not a duration such as 5s\n  Fix: see plastron agent api fetch x509 -h"},
		{"run", "there is no command to run\n  Fix: write it after --, such as plastron run -- env"},
		{"run ls", "plastron run does not take the argument \"ls\"\n  Fix: put -- before the command to run: plastron run -- ls"},
		{"run -hint x -- ls", "-spiffeID and -hint choose what is in the files, so they need -files\n  Fix: see plastron run -h"},
	} {
		code, stdout, stderr := call(t, strings.Fields(tt.in)...)
		if tt.want == "" {
			if code != exitOK || stderr != "" {
				t.Errorf("%s: exit %d, stderr %q", tt.in, code, stderr)
			}
			continue
		}
		if code != exitFailed || stdout != "" || stderr != "Error: "+tt.want+"\n" {
			t.Errorf("%s: exit %d, stdout %q, stderr\n%s\nwant\nError: %s", tt.in, code, stdout, stderr, tt.want)
		}
	}
}

// F8: a socket path that the kernel would cut is refused.
func TestSocketPathTooLong(t *testing.T) {
	code, _, stderr := call(t, "server", "entry", "show", "-socketPath", "/"+strings.Repeat("x", 107))
	if code != exitFailed || !strings.Contains(stderr, "is 108 bytes long, the limit is 107") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

func TestSocketOrder(t *testing.T) {
	const variable, template = "SPIRE_SERVER_PRIVATE_SOCKET", "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE"
	for _, tt := range []struct {
		path, instance, variable, template, want string
	}{
		{"", "", "", "", serverSocket},
		{"/flag", "", "/env", "/t/%i", "/flag"},
		{"unix:///flag", "", "", "", "/flag"},
		{"unix:/flag", "", "", "", "/flag"},
		{"", "", "unix:///env", "/t/%i", "/env"},
		{"", "blue", "/env", "/t/%i/s", "/t/blue/s"},
		{"", "", "", "/t/%i", "/t/main"},
	} {
		t.Setenv(variable, tt.variable)
		t.Setenv(template, tt.template)
		s := serverSocketFlags((&cobra.Command{}).Flags())
		s.path, s.instance = tt.path, tt.instance
		if got, err := s.find(); err != nil || got != tt.want {
			t.Errorf("%+v: %q, %v", tt, got, err)
		}
	}
}

func TestProgramNames(t *testing.T) {
	for name, want := range map[string]string{
		"plastron": "plastron COMMAND", "spire-server": "plastron server COMMAND",
		"/usr/bin/spire-agent": "plastron agent COMMAND", "spire-agent.exe": "plastron agent COMMAND",
	} {
		var out bytes.Buffer
		if code := run(context.Background(), []string{name}, strings.NewReader(""), &out, &out); code != 0 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: exit %d, %s", name, code, out.String())
		}
	}
}
