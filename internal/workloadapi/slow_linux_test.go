package workloadapi_test

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/workloadapi"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

func (r *rig) raw(window uint32) *raw {
	r.t.Helper()
	conn, err := net.Dial("unix", r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	c, err := open(conn, window)
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// closed waits until the server closes a connection.
func closed(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(deadline))
	// It is reset if the server leaves something unread.
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection was not closed: %v", err)
	}
}

// W8, W38: a caller that opens a stream and gives it no window is dropped, and so
// is one that reads nothing at all; others see nothing of it, and who is merely
// quiet stays.
func TestSlowReaders(t *testing.T) {
	r := newRig(t, func(c *workloadapi.Config) { c.Hurry(time.Minute, time.Second, time.Hour) })
	r.grant("a", "/a")
	quiet, err := r.client().FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := quiet.Recv(); err != nil {
		t.Fatal(err)
	}
	slow := r.raw(0)
	if err := slow.call("FetchX509SVID"); err != nil {
		t.Fatal(err)
	}
	closed(t, slow)
	if n := r.api.Stats().SlowReaders; n != 1 {
		t.Errorf("%d slow readers", n)
	}

	deaf := r.raw(0)
	for deaf.WriteSettings() == nil { // each is acknowledged, until the socket is full
	}
	until(t, func() bool { return r.api.Stats().Connections == 1 })

	r.server.Put(r.server.Grant("b", "/b", "unix:uid:1"))
	if m, err := quiet.Recv(); err != nil || len(m.GetSvids()) != 2 {
		t.Errorf("the quiet one: %v, %v", m, err)
	}
}

// The request of a call has to arrive: what came of it is held meanwhile.
func TestHalfARequest(t *testing.T) {
	r := newRig(t, func(c *workloadapi.Config) { c.Hurry(time.Second, time.Minute, time.Hour) })
	r.grant("a", "/a")
	whole := r.raw(1 << 16)
	if err := whole.call("FetchX509SVID"); err != nil {
		t.Fatal(err)
	}
	if m, text, err := whole.answer(); err != nil || len(m.GetSvids()) != 1 {
		t.Fatal(m, text, err)
	}
	for _, method := range []string{"FetchX509SVID", "FetchJWTSVID", "Nope"} {
		half := r.raw(1 << 16)
		if err := half.begin(method); err != nil {
			t.Fatal(err)
		}
		if method == "Nope" {
			if _, text, err := half.answer(); err != nil || text == "" {
				t.Error(text, err)
			}
			continue
		}
		half.WriteData(1, false, []byte{0, 0, 1, 0, 0, 'x'}) // the server may have lost its patience by now
		closed(t, half)
	}
	// Complete in time: open for as long as it likes.
	r.server.Put(r.server.Grant("b", "/b", "unix:uid:1"))
	if m, text, err := whole.answer(); err != nil || len(m.GetSvids()) != 2 {
		t.Fatal(m, text, err)
	}
}

// R42: the caller of a stream is looked at again by the clock, too: lost selectors
// shrink or end it.
func TestReattestedInTime(t *testing.T) {
	r := newRig(t, func(c *workloadapi.Config) { c.Hurry(time.Minute, time.Minute, 50*time.Millisecond) })
	r.grant("a", "/a")
	b := r.server.Grant("b", "/b", "unix:uid:1", "unix:gid:1")
	r.facts.set(nil, "unix:uid:1", "unix:gid:1")
	s, err := r.client().FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func(want int) {
		t.Helper()
		if m, err := s.Recv(); err != nil || len(m.GetSvids()) != want {
			t.Fatalf("%d SVIDs, %v; want %d", len(m.GetSvids()), err, want)
		}
	}
	recv(1)
	r.server.Put(b)
	recv(2)
	r.facts.set(nil, "unix:uid:1")
	recv(1)
	r.facts.set(nil)
	_, err = s.Recv()
	wants(t, err, codes.PermissionDenied, "no_grant")
}

// R49: who is in debt for bytes is refused until it is paid, and loses a
// connection on which it sends on without calling. Others are not concerned.
func TestBytesAreLimited(t *testing.T) {
	r := newRig(t, func(c *workloadapi.Config) { c.Limits = workloadapi.Limits{BytesPerUser: 1 << 12} })
	r.grant("a", "/a")
	if err := calls(r.dial())["FetchX509SVID"](r.ctx()); err != nil {
		t.Fatal(err)
	}
	flood := r.raw(1 << 16)
	for flood.WriteSettings() == nil {
	}
	until(t, func() bool { return r.api.Stats().OverLimit["bytes"] > 0 })
}
