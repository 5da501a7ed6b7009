package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// filesDir is the directory of run -files:
//
//	svid.pem   → ..data/svid.pem
//	key.pem    → ..data/key.pem
//	bundle.pem → ..data/bundle.pem
//	..data     → ..123456789
//	..123456789/{svid,key,bundle}.pem
//
// A renewal makes a new inner directory and renames a new ..data over the old
// one, so that all three files change in one step and the directory itself stays
// (it may be a mount). A reader who needs a set that fits together opens ..data
// once and reads below it.
type filesDir struct {
	dir               string
	lock              *os.File
	present, previous string // inner directories: the one in use, and the one before
}

const linkName, versionPrefix = "..data", "..v"

// openFilesDir makes or takes over the directory. It refuses one that holds files
// of these names which it did not write, and one that another run keeps.
func openFilesDir(dir string) (*filesDir, error) {
	refuse := func(format string, args ...any) (*filesDir, error) {
		return nil, fault.New(fault.Invalid, "files_dir", format, args...).Fix("name a directory for these files alone")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return refuse("-files %s: %v", dir, err)
	}
	for _, name := range []string{"svid.pem", "key.pem", "bundle.pem", linkName} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return refuse("-files %s: %v", dir, err)
		}
		target, err := os.Readlink(filepath.Join(dir, name))
		if info.Mode()&fs.ModeSymlink == 0 || err != nil || !strings.HasPrefix(target, "..") {
			return refuse("-files %s: there is a %s that plastron run did not write", dir, name)
		}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "..lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return refuse("-files %s: %v", dir, err)
	}
	if !lockFile(lock) {
		lock.Close()
		return refuse("-files %s: another plastron run keeps the files there", dir)
	}
	d := &filesDir{dir: dir, lock: lock}
	d.sweep()
	return d, nil
}

// Close leaves the last files in place and lets others take the directory.
func (d *filesDir) Close() error { return d.lock.Close() }

// sweep removes inner directories that are not in use, such as those of a run
// that was killed. The one before the present stays, since somebody may just be
// on the way into it.
func (d *filesDir) sweep() {
	if now, _ := os.Readlink(filepath.Join(d.dir, linkName)); now != d.present {
		d.present, d.previous = now, d.present
	}
	inner, _ := filepath.Glob(filepath.Join(d.dir, versionPrefix+"*"))
	for _, path := range inner {
		if name := filepath.Base(path); name != d.present && name != d.previous {
			_ = os.RemoveAll(path) // tried again at the next renewal
		}
	}
}

// write replaces the three files at once.
func (d *filesDir) write(svid *x509svid.SVID, bundles *x509bundle.Set) error {
	bundle, err := bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return fmt.Errorf("the bundle of %s: %w", svid.ID.TrustDomain(), err)
	}
	authorities, err := bundle.Marshal()
	if err != nil {
		return err
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		return err
	}
	inner, err := os.MkdirTemp(d.dir, versionPrefix) // 0700
	if err != nil {
		return err
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(inner, "svid.pem"), chain, 0o644),
		os.WriteFile(filepath.Join(inner, "key.pem"), key, 0o600),
		os.WriteFile(filepath.Join(inner, "bundle.pem"), authorities, 0o644),
	)
	if err != nil { // the set before stays in use
		return errors.Join(err, os.RemoveAll(inner))
	}
	err = d.link(linkName, filepath.Base(inner)) // the step after which the new ones count
	for _, name := range []string{"svid.pem", "key.pem", "bundle.pem"} {
		if err == nil {
			err = d.link(name, linkName+"/"+name)
		}
	}
	d.sweep()
	return err
}

// clear removes the files, all three in one step, and the key that they held.
func (d *filesDir) clear() error {
	var faults []error
	for _, name := range []string{linkName, "svid.pem", "key.pem", "bundle.pem"} {
		if err := os.Remove(filepath.Join(d.dir, name)); !errors.Is(err, fs.ErrNotExist) {
			faults = append(faults, err)
		}
	}
	d.present, d.previous = "", ""
	d.sweep()
	return errors.Join(faults...)
}

// link makes name point to target, atomically if it exists.
func (d *filesDir) link(name, target string) error {
	path := filepath.Join(d.dir, name)
	if old, err := os.Readlink(path); err == nil && old == target {
		return nil
	}
	next := filepath.Join(d.dir, "..next")
	_ = os.Remove(next) // left by a run that was killed
	if err := os.Symlink(target, next); err != nil {
		return err
	}
	return os.Rename(next, path)
}
