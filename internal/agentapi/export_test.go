package agentapi

import "github.com/plastron/plastron/internal/localsocket"

// Admitted is admitted.
func Admitted(p localsocket.Peer) bool { return admitted(p) }
