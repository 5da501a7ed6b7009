//go:build unix

package diskkeys

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/keystest"
)

// TestMain lets the test binary be the process that is killed or traced: with a
// key file in its environment it replaces two keys in turn, COUNT times, and
// says each public key as soon as Generate has returned.
func TestMain(m *testing.M) {
	if path := os.Getenv("PLASTRON_TEST_KEY_FILE"); path != "" {
		if err := replaceKeys(path, os.Getenv("PLASTRON_TEST_KEY_COUNT")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func replaceKeys(path, count string) error {
	var n int
	if _, err := fmt.Sscan(count, &n); err != nil {
		return err
	}
	k, err := (&Config{Path: path}).Open(context.Background())
	if err != nil {
		return err
	}
	for i := range n {
		id := []string{"A", "B"}[i%2]
		key, err := k.Generate(context.Background(), id, keys.ECP256)
		if err != nil {
			return err
		}
		fmt.Println(id, publicOf(key))
	}
	return nil
}

func publicOf(key keys.Key) string {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err.Error()
	}
	return base64.StdEncoding.EncodeToString(spki)
}

// directory is a temporary one with the mode a data directory has.
func directory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func config(t *testing.T) keys.Config { return &Config{Path: filepath.Join(directory(t), "keys.json")} }

func TestContract(t *testing.T) {
	keystest.Run(t, config)
	keystest.RunDurable(t, config)
	keystest.RunSealer(t, config)
}

func TestFile(t *testing.T) {
	path := filepath.Join(directory(t), "keys.json")
	k, err := (&Config{Path: path}).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("opening made a file")
	}
	key, err := k.Generate(t.Context(), "x509-CA-A", keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	der, err := key.Signer.(keys.Private).PKCS8()
	if err != nil {
		t.Fatal(err)
	}
	// The form that SPIRE's disk keeper reads and writes (spire-interop §10.6).
	got, err := os.ReadFile(path)
	if want := `{"keys":{"x509-CA-A":"` + base64.StdEncoding.EncodeToString(der) + `"}}`; err != nil || string(got) != want {
		t.Errorf("file = %d bytes, %v; want %d", len(got), err, len(want))
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("%d files beside the key file", len(entries))
	}
}

// F10, F11, R113: what others could have read or written is refused, and left
// as it is.
func TestRefuses(t *testing.T) {
	good := filepath.Join(directory(t), "good.json")
	if err := replaceKeys(good, "1"); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	write := func(t *testing.T, path string, data []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, prepare := range map[string]func(t *testing.T, path string){
		"F11 mode 0644": func(t *testing.T, path string) { write(t, path, content, 0o644) },
		"F11 mode 0640": func(t *testing.T, path string) { write(t, path, content, 0o640) },
		"F11 mode 0602": func(t *testing.T, path string) { write(t, path, content, 0o602) },
		"F11 symbolic link": func(t *testing.T, path string) {
			if err := os.Symlink(good, path); err != nil {
				t.Fatal(err)
			}
		},
		"directory": func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		},
		"pipe": func(t *testing.T, path string) {
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"F11 wrong owner": func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a file away")
			}
			write(t, path, content, 0o600)
			if err := os.Chown(path, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		},
		"F10 directory writable by its group": func(t *testing.T, path string) {
			write(t, path, content, 0o600)
			if err := os.Chmod(filepath.Dir(path), 0o770); err != nil {
				t.Fatal(err)
			}
		},
		"F10 directory writable by all": func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o1777); err != nil {
				t.Fatal(err)
			}
		},
		"R113 directory of another user": func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			if err := os.Chown(filepath.Dir(path), 65534, 65534); err != nil {
				t.Fatal(err)
			}
		},
		"no directory": func(t *testing.T, path string) {
			if err := os.Remove(filepath.Dir(path)); err != nil {
				t.Fatal(err)
			}
		},
		"empty": func(t *testing.T, path string) { write(t, path, nil, 0o600) },
		"torn":  func(t *testing.T, path string) { write(t, path, content[:len(content)-20], 0o600) },
		"trailing bytes": func(t *testing.T, path string) {
			write(t, path, append(content[:len(content):len(content)], 'x'), 0o600)
		},
		"no keys":   func(t *testing.T, path string) { write(t, path, []byte(`{}`), 0o600) },
		"key twice": func(t *testing.T, path string) { write(t, path, []byte(`{"keys":{"A":"","A":""}}`), 0o600) },
		"not a key": func(t *testing.T, path string) { write(t, path, []byte(`{"keys":{"A":"AAAA"}}`), 0o600) },
		"too large": func(t *testing.T, path string) { write(t, path, make([]byte, maxFile+1), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(directory(t), "keys.json")
			prepare(t, path)
			before := regular(path)
			k, err := (&Config{Path: path}).Open(t.Context())
			if fault.KindOf(err) != fault.Precondition {
				t.Fatalf("Open() = %v, %v", k, err)
			}
			if strings.Contains(err.Error(), base64.StdEncoding.EncodeToString(content)[:20]) {
				t.Errorf("the error holds the file: %v", err)
			}
			if regular(path) != before {
				t.Error("the refused file was changed")
			}
		})
	}
	if _, err := (&Config{}).Open(t.Context()); fault.KindOf(err) != fault.Invalid {
		t.Errorf("Open(no path) = %v", err)
	}
}

// regular returns the content of a file, if it is one; reading a pipe would wait.
func regular(path string) string {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return ""
	}
	data, err := os.ReadFile(path)
	return fmt.Sprint(string(data), err)
}

// A key that could not be written is not used, and the old one stays (R66).
func TestUnwritable(t *testing.T) {
	dir := directory(t)
	k, err := (&Config{Path: filepath.Join(dir, "keys.json")}).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first, err := k.Generate(t.Context(), "A", keys.ECP256)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "keys.json.tmp"), 0o700); err != nil { // not removable: it holds a file
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keys.json.tmp", "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Generate(t.Context(), "A", keys.ECP256); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("Generate() = %v", err)
	}
	if got, err := k.Key(t.Context(), "A"); err != nil || publicOf(got) != publicOf(first) {
		t.Errorf("Key() is not the key from before: %v", err)
	}
}

// R71: killed at any moment, the file is whole and holds what Generate returned
// last, or what it was about to return.
func TestKilled(t *testing.T) {
	path := filepath.Join(directory(t), "keys.json")
	for round := range 30 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "PLASTRON_TEST_KEY_FILE="+path, "PLASTRON_TEST_KEY_COUNT=1000000")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		returned := map[string]string{}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			id, key, _ := strings.Cut(lines.Text(), " ")
			returned[id] = key
			if n == 2+round%5 {
				// From here on it works on; what it still says is read below.
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the process ended by itself")
		}
		k, err := (&Config{Path: path}).Open(t.Context())
		if err != nil {
			t.Fatalf("round %d: Open() = %v", round, err)
		}
		// The two are replaced in turn: at most one of them may be a step ahead.
		ahead := 0
		for _, id := range []string{"A", "B"} {
			key, err := k.Key(t.Context(), id)
			if err != nil {
				t.Fatalf("round %d: Key(%s) = %v", round, id, err)
			}
			if publicOf(key) != returned[id] {
				ahead++
			}
		}
		if ahead > 1 {
			t.Errorf("round %d: a key that was returned is lost", round)
		}
	}
}

// R71: a kill cannot show a missing fsync; the order of system calls does.
func TestSyncOrder(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("strace is not installed")
	}
	dir := directory(t)
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-o", trace, "-e", "trace=openat,write,fsync,rename,renameat,renameat2", os.Args[0])
	cmd.Env = append(os.Environ(), "PLASTRON_TEST_KEY_FILE="+filepath.Join(dir, "keys.json"), "PLASTRON_TEST_KEY_COUNT=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	data, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	rest := joined(string(data))
	for _, want := range []string{
		"keys.json.tmp\", O_WRONLY|O_CREAT|O_EXCL", // created with mode 0600
		"0600)",
		"keys.json.tmp>, ", // written
		"fsync(",
		"keys.json.tmp>)",
		"rename",
		"keys.json\"",
		"fsync(",
		dir + ">)",
		"keys.json\", O_RDONLY", // read back
		"write(1",               // said
	} {
		_, after, found := strings.Cut(rest, want)
		if !found {
			t.Fatalf("no %q in the rest of the trace:\n%s", want, data)
		}
		rest = after
	}
}

// joined puts the two halves of each call that another thread interrupted into one
// line, where the call ended.
func joined(trace string) string {
	var out strings.Builder
	begun := map[string]string{} // by thread
	for line := range strings.Lines(trace) {
		thread, call, _ := strings.Cut(strings.TrimSpace(line), " ")
		if head, unfinished := strings.CutSuffix(call, " <unfinished ...>"); unfinished {
			begun[thread] = head
			continue
		}
		if _, tail, resumed := strings.Cut(call, " resumed>"); resumed {
			call = begun[thread] + tail
		}
		fmt.Fprintln(&out, thread, call)
	}
	return out.String()
}
