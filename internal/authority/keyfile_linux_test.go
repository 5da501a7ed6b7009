package authority

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/registry"
)

// R66, R67, R71: in the middle of a rotation the key file's disk is full, or a
// restart finds the file wrong. The error says what it is, what signs goes on or is
// there again, and the rotation is taken up where it stood.
func TestKeyFileInARotation(t *testing.T) {
	if os.Geteuid() != 0 {
		const text = "mounting a small disk and giving a file away need root"
		if os.Getenv("CI") == "true" {
			t.Fatal(text)
		}
		t.Skip(text)
	}
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	path, ballast := filepath.Join(mount, "keys.json"), filepath.Join(mount, "ballast")
	open := func() (keys.Keeper, error) { return (&diskkeys.Config{Path: path}).Open(t.Context()) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	keeper, err := open()
	must(err)
	w := newWorld(t, keeper, 24*time.Hour)
	a, stop := w.start("s1")
	first, _ := authorities(t, a)
	signed := []documents{sign(t, a, time.Hour)}
	verify := func(what string) {
		t.Helper()
		for _, d := range signed {
			if err := w.verify(d); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}

	// 1. The disk fills up: the key cannot be made, and what signs goes on.
	fill := func() {
		f, err := os.Create(ballast)
		must(err)
		for _, err = f.Write(make([]byte, 4096)); err == nil; _, err = f.Write(make([]byte, 4096)) {
		}
		must(f.Close())
	}
	fill()
	_, err = a.Prepare(t.Context(), "test", X509)
	if fault.ReasonOf(err) != "key_file_unwritable" {
		t.Errorf("on a full disk: %v", err)
	}
	signed = append(signed, sign(t, a, time.Hour))
	if x, _ := authorities(t, a); x != first {
		t.Errorf("%s signs", x)
	}
	if slots := a.Slots(X509); len(slots) != 2 || slots[1].State != registry.SlotIntended {
		t.Errorf("what was intended is not stored: %+v", slots)
	}
	verify("on a full disk")

	// 2. The process ends, and each start finds the file wrong.
	stop()
	w.stop()
	must(os.Remove(ballast))
	good, err := os.ReadFile(path)
	must(err)
	for _, c := range []struct {
		name, reason string
		spoil        func() error
	}{
		{"empty", "key_file_invalid", func() error { return os.Truncate(path, 0) }},
		{"readable by the group", "key_file_unsafe", func() error { return os.Chmod(path, 0o640) }},
		{"of another owner", "key_file_unsafe", func() error { return os.Chown(path, 65534, 65534) }},
	} {
		must(c.spoil())
		if _, err := open(); fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: %v (%s)", c.name, err, fault.ReasonOf(err))
		}
		must(os.Remove(path)) // as the error asks
		must(os.WriteFile(path, good, 0o600))
	}

	// 3. It goes on with what it had, and the rotation with it.
	w.keeper, err = open()
	must(err)
	w.open()
	a, stop = w.start("s1")
	defer stop()
	signed = append(signed, sign(t, a, time.Hour))
	if x, _ := authorities(t, a); x != first {
		t.Errorf("after the restart %s signs", x)
	}
	s, ok := find(a.Slots(X509), func(s registry.Slot) bool { return s.State == registry.SlotPrepared })
	if !ok {
		t.Fatalf("the rotation was not taken up: %+v", a.Slots(X509))
	}
	_, _, err = a.Activate(t.Context(), "test", X509, s.AuthorityID, false)
	must(err)
	signed = append(signed, sign(t, a, time.Hour))
	if x, _ := authorities(t, a); x != s.AuthorityID {
		t.Errorf("%s signs", x)
	}
	verify("in the end")
	if n := len(w.bundle().X509); n != 2 {
		t.Errorf("%d authorities in the bundle, want 2", n)
	}
}
