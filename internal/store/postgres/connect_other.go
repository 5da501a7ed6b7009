//go:build !linux

package postgres

import "syscall"

// userTimeout does nothing: keep-alive and the deadline of each call must do.
func userTimeout(string, string, syscall.RawConn) error { return nil }
