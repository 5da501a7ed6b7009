package serverapi_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// pipes is a listener whose connections are pipes.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// from is a connection from an address.
type from struct {
	net.Conn
	address string
}

func (f from) RemoteAddr() net.Addr {
	ap, err := net.ResolveTCPAddr("tcp", f.address)
	if err != nil {
		panic(err)
	}
	return ap
}

// street is a door and those who come to it.
type street struct {
	t     *testing.T
	pipes pipes
	door  net.Listener
}

func newStreet(t *testing.T, all, strangers, perAddress int, log io.Writer) *street {
	s := &street{t: t, pipes: make(pipes, 1)}
	s.door = serverapi.NewDoor(s.pipes, all, strangers, perAddress, slog.New(slog.NewTextHandler(log, nil)))
	return s
}

// come returns both ends of a connection that the door let in.
func (s *street) come(address string) (near, far net.Conn) {
	s.t.Helper()
	server, client := net.Pipe()
	s.pipes <- from{server, address}
	near, err := s.door.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	return near, client
}

func (s *street) counts(open, strangers, addresses int, refused uint64) {
	s.t.Helper()
	o, st, a, r := serverapi.Counts(s.door)
	if o != open || st != strangers || a != addresses || r != refused {
		s.t.Errorf("%d open, %d strangers of %d addresses, %d refused, want %d, %d, %d, %d", o, st, a, r, open, strangers, addresses, refused)
	}
}

// closed reports whether the other end has closed a connection.
func closed(far net.Conn) bool {
	far.SetReadDeadline(time.Now())
	_, err := far.Read(make([]byte, 1))
	return errors.Is(err, io.EOF)
}

func TestDoor(t *testing.T) { // R97, R101, R104
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newStreet(t, 6, 4, 2, &log)
		known, knownFar := s.come("192.0.2.1:1")
		serverapi.Know(known)
		first, firstFar := s.come("192.0.2.1:2")
		_, secondFar := s.come("192.0.2.1:3")
		s.counts(3, 2, 1, 0)
		_, thirdFar := s.come("192.0.2.1:4") // the address has had its share: its first goes
		if !closed(firstFar) || closed(secondFar) || closed(knownFar) {
			t.Error("one address: not just its oldest stranger was closed")
		}
		s.counts(3, 2, 1, 1)
		first.Close() // counts no more
		s.counts(3, 2, 1, 1)

		s.come("[2001:db8::1]:1")
		s.come("[2001:db8::2]:1") // the same /64
		s.counts(5, 4, 2, 1)
		s.come("192.0.2.2:1") // the strangers have had their share: the oldest of all goes
		if !closed(secondFar) || closed(thirdFar) {
			t.Error("all strangers: not just the oldest was closed")
		}
		s.counts(5, 4, 3, 2)

		again, _ := s.come("192.0.2.3:1")
		serverapi.Know(again)
		s.counts(5, 3, 2, 3)
		again, _ = s.come("192.0.2.3:2")
		serverapi.Know(again)
		s.counts(6, 3, 2, 3)
		for range 3 { // the house is full, and strangers make room
			c, _ := s.come("192.0.2.4:1")
			serverapi.Know(c)
		}
		s.counts(6, 0, 0, 6)
		if closed(knownFar) {
			t.Error("a known connection was closed for a stranger")
		}
		// Full of known ones: the next is closed at once, and the one after a leave gets in.
		server, client := net.Pipe()
		s.pipes <- from{server, "192.0.2.5:1"}
		let := make(chan net.Conn)
		go func() {
			c, err := s.door.Accept()
			if err != nil {
				t.Error(err)
			}
			let <- c
		}()
		synctest.Wait()
		if !closed(client) {
			t.Error("a connection beyond all is kept")
		}
		known.Close()
		server, _ = net.Pipe()
		s.pipes <- from{server, "192.0.2.5:2"}
		(<-let).Close()
		s.counts(5, 0, 0, 7)
		if n := strings.Count(log.String(), "\n"); n != 1 { // no time has passed
			t.Errorf("%d lines in the log, want 1:\n%s", n, log.String())
		}
	})
}

func TestStrangersIdle(t *testing.T) { // R97
	synctest.Test(t, func(t *testing.T) {
		s := newStreet(t, 10, 10, 10, io.Discard)
		known, _ := s.come("192.0.2.1:1")
		serverapi.Know(known)
		talks, talksFar := s.come("192.0.2.1:2")
		s.come("192.0.2.1:3")
		go io.Copy(io.Discard, talks)
		time.Sleep(serverapi.StrangerIdle - time.Second)
		if _, err := talksFar.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		s.counts(2, 1, 1, 0) // the one that said nothing is gone
		time.Sleep(serverapi.StrangerIdle)
		s.counts(1, 0, 0, 0)
		time.Sleep(time.Hour)
		s.counts(1, 0, 0, 0)
		known.Close()
		s.counts(0, 0, 0, 0)
	})
}

// A stranger that holds all the connections it can, whether they shook hands or
// not, keeps out neither agents nor who wants to become one, even from its own address.
func TestStrangersKeepNobodyOut(t *testing.T) { // R101
	const all, strangers, perAddress = 12, 8, 6
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.SetRoom(all, strangers, perAddress) })
	early := r.agent()
	open := r.connect(&early)
	if err := ping(t, open); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * all {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if i%2 == 0 { // the rest does not even shake hands
			hello := tls.Client(c, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true})
			if err := hello.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := ping(t, open); err != nil {
		t.Errorf("an agent that was connected: %v", err)
	}
	again := r.connect(&early)
	if err := ping(t, again); err != nil {
		t.Errorf("an agent that connects: %v", err)
	}
	late := r.agent() // joins
	if err := ping(t, r.connect(&late)); err != nil {
		t.Errorf("an agent that joined meanwhile: %v", err)
	}
}

// Strangers' messages are read up to 1 MiB, those of agents up to 4 MiB.
func TestStrangersBytes(t *testing.T) { // R97, R98
	r := newRig(t)
	ask := func(conn *grpc.ClientConn, size int) error {
		// A call that agents and strangers may make; the unknown field is read and passed over.
		req := &bundlev1.GetBundleRequest{}
		req.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 1000, protowire.BytesType), make([]byte, size)))
		_, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), req)
		return err
	}
	h := r.agent()
	if err := ask(r.connect(&h), 4<<20-100); err != nil {
		t.Errorf("an agent's message of just under 4 MiB: %v", err)
	}
	if err := ask(r.connect(nil), 1<<20); err != nil {
		t.Errorf("a stranger's message of 1 MiB: %v", err)
	}
	wantCode(t, "a stranger's message of more", ask(r.connect(nil), serverapi.StrangerBytes), codes.Unavailable, "")
	conn, err := r.connect(nil), error(nil)
	for range 20 { // many small ones are no way around it
		if err = ask(conn, 100<<10); err != nil {
			break
		}
	}
	wantCode(t, "2 MiB in messages of 100 KiB", err, codes.Unavailable, "")
}
