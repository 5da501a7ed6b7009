package main

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A renewal that does not fit on the disk leaves the files as they were.
func TestFilesOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to mount a small file system")
		}
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil { // four pages: three files, and one of the next three
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, 0)
	files, err := openFilesDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	svid, bundles := selfSigned(t, "spiffe://a.test/x", "")
	if err := files.write(svid, bundles); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		next, bundles := selfSigned(t, "spiffe://a.test/x", "")
		if err := files.write(next, bundles); err == nil {
			t.Fatal("the second set fits as well: the test shows nothing")
		}
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem")); err != nil {
		t.Error(err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, "svid.pem")); err != nil || string(after) != string(before) {
		t.Errorf("the certificate has changed, %v", err)
	}
	if inner, _ := filepath.Glob(filepath.Join(dir, versionPrefix+"*")); len(inner) != 1 {
		t.Errorf("left behind: %v", inner)
	}
}
