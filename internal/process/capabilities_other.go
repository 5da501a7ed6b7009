//go:build !linux

package process

import "errors"

// Right is a capability that looking at other users' processes takes.
type Right uint

// The rights.
const (
	SeePrograms Right = 1 << iota
	ReadPrograms
)

// Has reports whether this process has all of some rights.
func Has(Right) bool { return false }

// KeepOnly gives up every capability but some rights.
func KeepOnly(Right) error { return errors.ErrUnsupported }
