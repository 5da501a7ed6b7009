package sqlite

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/windows"

	"github.com/plastron/plastron/internal/fault"
)

// checkDir checks no access lists: on Windows the directory's are the
// operator's to set.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = fault.New(fault.Precondition, "not_a_directory", "%s is not a directory", dir)
	}
	return err
}

func checkOwner(string, fs.FileInfo) error { return nil }

// lockFile reports whether someone else holds the lock. It locks a byte past the
// text, so that others can read the pid.
func lockFile(f *os.File) (held bool, err error) {
	err = windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY,
		0, 1, 0, &windows.Overlapped{Offset: 1 << 20})
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return true, nil
	}
	return false, err
}

// fileIdentity returns what a copy of the file does not share with it.
func fileIdentity(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var info windows.ByHandleFileInformation
	err = windows.GetFileInformationByHandle(windows.Handle(f.Fd()), &info)
	return uint64(info.FileIndexHigh)<<32 | uint64(info.FileIndexLow), err
}

// syncDir does nothing: NTFS orders its own metadata.
func syncDir(string) error { return nil }
