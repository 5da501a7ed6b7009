package serverapi

import (
	"net"
	"sync"
)

// listener accepts up to maxConnections at a time; more are closed at once, so
// that the backlog does not hold those who would get in.
type listener struct {
	net.Listener
	slots chan struct{}
}

func capped(l net.Listener) *listener {
	return &listener{l, make(chan struct{}, maxConnections)}
}

// held is a connection that gives its slot back when it is closed.
type held struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (h *held) Close() error {
	h.release()
	return h.Conn.Close()
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: tcpKeepalive, Interval: tcpKeepalive, Count: 3})
			setUserTimeout(tcp)
		}
		return &held{c, sync.OnceFunc(func() { <-l.slots })}, nil
	}
}
