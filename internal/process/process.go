// Package process says which local process is at the other end of a unix
// connection, and what the kernel knows of it. It decides nothing about
// identities; it only makes sure that a fact belongs to the process that
// connected, not to one that took over its number, its socket or its program.
//
// What must always hold: a Process is held by a pidfd, taken when the
// connection was accepted; facts read under its number count only if the pidfd
// still lives after they were read; descriptors are closed on every path.
//
// The work is done on Linux; elsewhere every call answers with a fault that says so.
package process

import (
	"net"
	"sync"
	"sync/atomic"

	"github.com/plastron/plastron/internal/fault"
)

// Via is how the process behind a connection is found.
type Via uint8

// The ways. Auto takes PeerPIDFD where the kernel has it (Linux 6.5) and PIDFDOpen otherwise.
const (
	Auto Via = iota
	PeerPIDFD
	PIDFDOpen
)

// Faults that more than one function returns. All are fault.Denied: the caller
// is known to be not, or no longer, the process that connected.
var (
	errChanged = fault.New(fault.Denied, "peer_changed",
		"the calling process is no longer what it was when it connected").
		Fix("connect again after exec, or after a change of user or group")
	errForeignSender = fault.New(fault.Denied, "peer_foreign_sender",
		"the connection is used by a process that did not open it").
		Fix("let each process open its own connection")
	errSetuid = fault.New(fault.Denied, "peer_setuid",
		"the calling process has another effective than real user or group").
		Fix("drop or take the privilege completely before connecting")
)

// Process is one running process, held so that its number cannot pass to
// another unnoticed. All methods may be called concurrently.
type Process struct {
	PID      int
	UID, GID uint32 // effective, as of connect

	start  uint64 // clock ticks since boot
	exact  bool   // handle is of SO_PEERPIDFD
	exe    exeID
	handle *handle
}

// exeID names the file a process runs. Known is false where the kernel does
// not let us look (another user's process, without privilege).
type exeID struct {
	Known    bool
	Dev, Ino uint64
}

// Conn is an accepted connection and the process that opened it. Its Read
// notices bytes that another process wrote.
type Conn struct {
	net.Conn // hides what the socket offers beyond it: every read must pass by Read
	socket   *net.UnixConn
	peer     *Process // nil if err is set
	err      error
	foreign  atomic.Bool
	close    sync.Once
}

// Peer returns the process that opened the connection, or why it cannot be told.
func (c *Conn) Peer() (*Process, error) { return c.peer, c.err }

// Check returns nil as long as the peer lives, is what it was when it
// connected, and nobody else has written to the connection. It reads the
// kernel anew on each call; call it before and after looking at facts.
func (c *Conn) Check() error {
	switch {
	case c.err != nil:
		return c.err
	case c.foreign.Load():
		return errForeignSender
	}
	return c.peer.Check()
}

// Close closes the connection and lets go of the process.
func (c *Conn) Close() error {
	err := net.ErrClosed
	c.close.Do(func() {
		err = c.socket.Close()
		if c.peer != nil {
			c.peer.Close()
		}
	})
	return err
}

// Listener accepts connections together with the process behind each.
type Listener struct {
	*net.UnixListener
	Via Via
}

// Accept waits for a connection. A peer that cannot be told is not an error
// here: Conn.Peer says why, so that the caller can be given the reason.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	conn := &Conn{Conn: c, socket: c}
	conn.peer, conn.err = peer(c, l.Via)
	return conn, nil
}
