//go:build unix

package secretfile

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// R113: a key that somebody else put there is read through links of root's or
// ours, from a file of root's or ours that others cannot read.
func TestReadGiven(t *testing.T) {
	const nobody = 65534
	for _, c := range []struct {
		name string
		edit func(file, link string) error
		root bool // needs root, to give something away
		ok   bool
	}{
		{name: "ours", edit: func(string, string) error { return nil }, ok: true},
		{name: "readable by a group", edit: func(file, _ string) error {
			if os.Geteuid() != 0 { // root's file is for whom root says
				return os.Chmod(file, 0o640)
			}
			return os.Chown(file, nobody, nobody)
		}},
		{name: "root's, readable by a group", root: true, ok: true, edit: func(file, _ string) error { return os.Chmod(file, 0o440) }},
		{name: "root's, readable by a group that is not ours", root: true, edit: func(file, _ string) error {
			return errors.Join(os.Chown(file, 0, nobody), os.Chmod(file, 0o440))
		}},
		{name: "writable by a group", edit: func(file, _ string) error { return os.Chmod(file, 0o620) }},
		{name: "readable by all", edit: func(file, _ string) error { return os.Chmod(file, 0o604) }},
		{name: "link of another user", root: true, edit: func(_, link string) error { return os.Lchown(link, nobody, nobody) }},
		{name: "directory of another user", root: true, edit: func(file, _ string) error { return os.Chown(filepath.Dir(file), nobody, nobody) }},
		{name: "directory that all may write", edit: func(file, _ string) error { return os.Chmod(filepath.Dir(file), 0o777) }},
		{name: "directory", edit: func(file, _ string) error {
			if err := os.Remove(file); err != nil {
				return err
			}
			return os.Mkdir(file, 0o700)
		}},
		{name: "too large", edit: func(file, _ string) error { return os.WriteFile(file, make([]byte, 2000), 0o600) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.root && os.Geteuid() != 0 {
				t.Skip("needs root to give a file away")
			}
			dir := t.TempDir()
			file, link := filepath.Join(dir, "v1", "key"), filepath.Join(dir, "key")
			for _, err := range []error{
				os.Mkdir(filepath.Dir(file), 0o700), os.WriteFile(file, []byte("secret"), 0o600), os.Symlink("v1/key", link), c.edit(file, link),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			got, err := ReadGiven(link, 1000)
			switch {
			case c.ok && (err != nil || string(got) != "secret"):
				t.Errorf("ReadGiven() = %q, %v", got, err)
			case !c.ok && fault.ReasonOf(err) != "key_file_unsafe":
				t.Errorf("ReadGiven() = %d bytes, %v", len(got), err)
			}
			if _, err := ReadOwn(link, 1000); fault.ReasonOf(err) != "key_file_unsafe" {
				t.Errorf("our own file is a link: %v", err)
			}
		})
	}
	if _, err := ReadGiven(filepath.Join(t.TempDir(), "missing"), 1000); err == nil {
		t.Error("a missing file is read")
	}
}
