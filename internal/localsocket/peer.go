package localsocket

import "fmt"

// Peer is who opened a connection, in the kernel's words, as of that moment.
type Peer struct {
	UID, GID uint32
	PID      int32
	Known    bool // false where the kernel does not tell
}

// String is how logs and the audit trail name the peer.
func (p Peer) String() string {
	if !p.Known {
		return "local"
	}
	return fmt.Sprintf("local uid=%d gid=%d pid=%d", p.UID, p.GID, p.PID)
}
