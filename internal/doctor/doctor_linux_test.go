package doctor_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
)

func want(t *testing.T, f doctor.Finding, v doctor.Verdict, text string) {
	t.Helper()
	if f.Verdict != v || !strings.Contains(f.Found, text) || (v == doctor.Warn || v == doctor.Fail) != (f.Fix != "") {
		t.Errorf("%+v, want %s with %q, and a fix if it is bad", f, v, text)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestDataDir(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	want(t, doctor.DataDir(data), doctor.Warn, "does not exist")
	must(t, os.Mkdir(data, 0o700))
	for mode, v := range map[os.FileMode]doctor.Verdict{0o700: doctor.OK, 0o755: doctor.Warn, 0o770: doctor.Fail, 0o702: doctor.Fail} {
		must(t, os.Chmod(data, mode))
		want(t, doctor.DataDir(data), v, "has mode 07")
	}
	must(t, os.Chmod(data, 0o700))
	must(t, os.Chmod(dir, 0o777)) // R113: through what lies above
	want(t, doctor.DataDir(data), doctor.Fail, "writable by them")
	must(t, os.Chmod(dir, 0o700))
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	want(t, doctor.DataDir(file), doctor.Fail, "not a directory")
	want(t, doctor.DataDir("/proc/self"), doctor.Fail, "cannot be written") // not even by root
	if os.Getuid() == 0 {
		// Root may look at another user's directory without taking it for unsafe.
		must(t, os.Chmod(dir, 0o711))
		must(t, os.Chown(data, 12345, 12345))
		want(t, doctor.DataDir(data), doctor.OK, "0700")
	}
}

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	want(t, doctor.Keys(path), doctor.Skipped, "no key file")
	must(t, os.WriteFile(path, nil, 0o600))
	want(t, doctor.Keys(path), doctor.OK, "0600")
	must(t, os.Chmod(path, 0o640))
	want(t, doctor.Keys(path), doctor.Fail, "others may read the private keys")
	must(t, os.Remove(path))
	must(t, os.Symlink("/etc/passwd", path))
	want(t, doctor.Keys(path), doctor.Fail, "not a file")
}

func TestDisk(t *testing.T) {
	want(t, doctor.Disk(filepath.Join(t.TempDir(), "none")), doctor.Skipped, "nothing is on disk")
	want(t, doctor.Disk(t.TempDir(), "/proc"), doctor.Fail, "0 MiB are free under /proc")
	for _, c := range []struct {
		free, inodes uint64
		counted      bool
		want         doctor.Verdict
	}{
		{1 << 30, 1 << 20, true, doctor.OK}, {1 << 30, 0, false, doctor.OK},
		{500 << 20, 1 << 20, true, doctor.Warn}, {1 << 30, 5000, true, doctor.Warn},
		{63 << 20, 1 << 20, true, doctor.Fail}, {1 << 30, 99, true, doctor.Fail}, {0, 0, false, doctor.Fail},
	} {
		want(t, doctor.JudgeRoom("/x", c.free, c.inodes, c.counted), c.want, "under /x")
	}
}

func TestSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "pl")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	look := func(public bool) doctor.Finding { return doctor.Socket("socket", path, public, true) }
	want(t, doctor.Socket("socket", path, false, false), doctor.Skipped, "is not there")
	want(t, look(false), doctor.Fail, "is gone")
	must(t, os.WriteFile(path, nil, 0o600))
	want(t, look(false), doctor.Fail, "is not a socket")
	must(t, os.Remove(path))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, os.Chmod(path, 0o600))
	want(t, look(false), doctor.OK, "0600")
	want(t, look(true), doctor.Fail, "cannot open it")
	must(t, os.Chmod(path, 0o777))
	want(t, look(false), doctor.Fail, "others may use it")
	want(t, look(true), doctor.OK, "0777")
	must(t, os.Chmod(dir, 0o777))
	want(t, look(true), doctor.Fail, "writable by them")
	must(t, os.Chmod(dir, 0o755))
	l.Close()
	want(t, look(true), doctor.Warn, "nobody listens")
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for left, v := range map[time.Duration]doctor.Verdict{time.Hour: doctor.OK, 15 * time.Minute: doctor.OK, 14 * time.Minute: doctor.Warn,
		time.Second: doctor.Warn, 0: doctor.Fail, -time.Hour: doctor.Fail} {
		end := now.Add(left)
		want(t, doctor.Expiry("x", "the thing", end.Add(-time.Hour), end, now, 4), v, "the thing end")
	}
}

func TestClock(t *testing.T) {
	for ahead, v := range map[time.Duration]doctor.Verdict{0: doctor.OK, 4 * time.Second: doctor.OK, -4 * time.Second: doctor.OK,
		5 * time.Second: doctor.Warn, -20 * time.Second: doctor.Warn, 30 * time.Second: doctor.Fail, -time.Hour: doctor.Fail} {
		want(t, doctor.Clock("the server", ahead), v, "the clock of the server is")
	}
}

func TestSameTrustDomain(t *testing.T) {
	want(t, doctor.SameTrustDomain(map[string]string{"a": "", "b": ""}), doctor.OK, "not known")
	want(t, doctor.SameTrustDomain(map[string]string{"a": "x.org", "b": "", "c": "x.org"}), doctor.OK, "x.org")
	want(t, doctor.SameTrustDomain(map[string]string{"a": "x.org", "b": "", "c": "y.org"}), doctor.Fail, `a is of "x.org", but c of "y.org"`)
}

func TestWorst(t *testing.T) {
	say := func(v ...doctor.Verdict) (out []doctor.Finding) {
		for _, v := range v {
			out = append(out, doctor.Say("x", v, ""))
		}
		return out
	}
	for _, c := range []struct {
		of   []doctor.Finding
		want doctor.Verdict
	}{
		{nil, doctor.OK}, {say(doctor.OK, doctor.Skipped), doctor.OK}, {say(doctor.Warn, doctor.OK), doctor.Warn}, {say(doctor.Warn, doctor.Fail, doctor.OK), doctor.Fail},
	} {
		if got := doctor.Worst(c.of); got != c.want {
			t.Errorf("Worst(%v) = %s", c.of, got)
		}
	}
}

// A cause is for logs; what to do is shown (R131).
func TestError(t *testing.T) {
	if f := doctor.Error("x", nil, "good"); f.Verdict != doctor.OK || f.Found != "good" {
		t.Errorf("%+v", f)
	}
	f := doctor.Error("x", fault.New(fault.Invalid, "r", "bad").Fix("mend it").Because(os.ErrClosed), "")
	if f.Verdict != doctor.Fail || f.Found != "bad" || f.Fix != "mend it" {
		t.Errorf("%+v", f)
	}
}
