//go:build !linux && !darwin

package doctor

import "errors"

func room(string) (bytes, inodes uint64, counted bool, err error) {
	return 0, 0, false, errors.ErrUnsupported
}

func writable(string) error { return nil }
