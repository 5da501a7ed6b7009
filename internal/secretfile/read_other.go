//go:build !unix

package secretfile

import "github.com/plastron/plastron/internal/fault"

// CheckPlace always refuses: who may read a file cannot be told here the way it
// is told on Unix, so keys are not kept on disk.
func CheckPlace(string) error {
	return fault.New(fault.Unsupported, "disk_keys_unsupported", "keys cannot be kept on disk on this system").
		Fix(`use KeyManager "memory"`)
}

// ReadOwn refuses as CheckPlace does.
func ReadOwn(path string, _ int64) ([]byte, error) { return nil, CheckPlace(path) }

// Mounted is never so.
func Mounted(string) bool { return false }

// ReadGiven refuses as CheckPlace does.
func ReadGiven(path string, _ int64) ([]byte, error) { return nil, CheckPlace(path) }
