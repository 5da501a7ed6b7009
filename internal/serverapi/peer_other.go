//go:build !linux

package serverapi

import "net"

// setUserTimeout leaves it to TCP keepalive on this system.
func setUserTimeout(*net.TCPConn) {}
