package serverapi

import (
	"container/list"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// room is how many connections a listener holds: in all, and of those that have
// shown no valid certificate, in all and per address.
type room struct{ all, strangers, perAddress int }

// door keeps the connections of one listener within its room. A connection is a
// stranger's until its handshake has shown a certificate. When strangers have
// filled their share, a newcomer takes the place of the one that came first (of
// the same address, if that has filled its own share): so whoever holds all that
// a stranger can keeps nobody out, not even those behind the same address, and
// an agent has, in a flood, the time that it takes to fill the share anew (R101).
type door struct {
	net.Listener
	room room
	log  *slog.Logger

	// mu guards everything below.
	mu        sync.Mutex
	open      int
	strangers list.List             // of *held, in the order in which they came
	byAddress map[string]*list.List // the same by addressKey; none is empty
	refused   uint64                // refused, or closed for a newcomer
	unlogged  uint64
	logged    time.Time
}

func newDoor(l net.Listener, r room, log *slog.Logger) *door {
	return &door{Listener: l, room: r, log: log, byAddress: make(map[string]*list.List)}
}

var errTooMuch = errors.New("a connection without a certificate has sent too much")

// held is a connection that a door counts.
type held struct {
	net.Conn
	door    *door
	address string
	known   atomic.Bool // spares reads the lock

	// The door's mu guards everything below.
	idle             *time.Timer   // ends a stranger that sends nothing
	received         int           // bytes, while it was a stranger's
	among, atAddress *list.Element // its places among the strangers; nil when it is none
	gone             bool
}

// Read implements net.Conn.
func (h *held) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if n > 0 && !h.known.Load() {
		if err := h.door.touch(h, n, time.Now()); err != nil {
			return 0, err
		}
	}
	return n, err
}

// Close implements net.Conn.
func (h *held) Close() error {
	h.door.mu.Lock()
	h.door.dropLocked(h)
	h.door.mu.Unlock()
	return h.Conn.Close()
}

// Accept implements net.Listener. Whom there is no room for is closed at once,
// so that the backlog does not hold those who would get in.
func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		h := &held{Conn: c, door: d, address: addressKey(c.RemoteAddr().String())}
		if out := d.enter(h, time.Now()); out != nil {
			out.Close()
			if out == h {
				continue
			}
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: tcpKeepalive, Interval: tcpKeepalive, Count: 3})
			setUserTimeout(tcp)
		}
		return h, nil
	}
}

// enter counts a connection and returns the one to close for it, which is h
// itself when there is no room at all.
func (d *door) enter(h *held, now time.Time) (out *held) {
	d.mu.Lock()
	defer d.mu.Unlock()
	reason := ""
	same := d.byAddress[h.address]
	switch {
	case same != nil && same.Len() >= d.room.perAddress:
		out, reason = same.Front().Value.(*held), "strangers of one address"
	case d.strangers.Len() >= d.room.strangers:
		out, reason = d.strangers.Front().Value.(*held), "strangers"
	case d.open >= d.room.all && d.strangers.Len() > 0:
		out, reason = d.strangers.Front().Value.(*held), "connections"
	case d.open >= d.room.all:
		out, reason, h.gone = h, "connections", true
	}
	if out != nil {
		d.refuseLocked(out, "too many "+reason, now)
	}
	if out == h {
		return out
	}
	if out != nil {
		d.dropLocked(out)
	}
	if d.byAddress[h.address] == nil {
		d.byAddress[h.address] = list.New()
	}
	d.open++
	h.among, h.atAddress = d.strangers.PushBack(h), d.byAddress[h.address].PushBack(h)
	h.idle = time.AfterFunc(strangerIdle, func() { h.Close() })
	return out
}

// refuseLocked counts a connection that is closed, and logs such now and then:
// strangers decide how often it happens (R104).
func (d *door) refuseLocked(h *held, reason string, now time.Time) {
	d.refused++
	if d.unlogged++; now.Sub(d.logged) >= time.Second {
		d.log.Warn("connection closed", "peer", h.address, "reason", reason, "count", d.unlogged)
		d.logged, d.unlogged = now, 0
	}
}

// touch gives a stranger that sends something more time, until it has sent more
// than a stranger may. The library knows one limit of messages for all callers;
// counting all bytes of a connection gives strangers theirs before anything is
// read for them, whatever calls the bytes are spread over (R97).
func (d *door) touch(h *held, n int, now time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h.among == nil {
		return nil
	}
	h.idle.Reset(strangerIdle)
	if h.received += n; h.received <= strangerBytes {
		return nil
	}
	if h.received-n <= strangerBytes { // once
		d.refuseLocked(h, "too many bytes without a certificate", now)
	}
	return errTooMuch
}

// know says that a connection is no stranger's.
func (d *door) know(h *held) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.knowLocked(h)
}

func (d *door) knowLocked(h *held) {
	if h.among == nil {
		return
	}
	d.strangers.Remove(h.among)
	same := d.byAddress[h.address]
	if same.Remove(h.atAddress); same.Len() == 0 {
		delete(d.byAddress, h.address)
	}
	h.among, h.atAddress = nil, nil
	h.known.Store(true)
	h.idle.Stop()
}

// dropLocked stops counting a connection.
func (d *door) dropLocked(h *held) {
	if h.gone {
		return
	}
	d.knowLocked(h)
	h.gone = true
	d.open--
}
