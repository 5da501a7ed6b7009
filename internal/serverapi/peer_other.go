//go:build !linux

package serverapi

import "net"

// localPeer says who opened the admin socket. Only Linux is asked.
func localPeer(net.Conn) string { return "local" }

// setUserTimeout leaves it to TCP keepalive on this system.
func setUserTimeout(*net.TCPConn) {}
