//go:build !unix

package diskkeys

import "github.com/plastron/plastron/internal/fault"

// Who may read a file cannot be told here the way it is told on Unix, so keys
// are not kept on disk.
func checkPath(string) error {
	return fault.New(fault.Unsupported, "disk_keys_unsupported", "keys cannot be kept on disk on this system").
		Fix(`use KeyManager "memory"`)
}

func readSecret(path string) ([]byte, error) { return nil, checkPath(path) }
