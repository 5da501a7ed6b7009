package workloadapi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// raw speaks gRPC by hand, for what no library lets one do: send half, read
// nothing, go on after exec on the same socket.
type raw struct {
	net.Conn
	*http2.Framer
	next uint32 // stream
}

// open begins a connection on which each stream may receive window bytes.
func open(conn net.Conn, window uint32) (*raw, error) {
	r := &raw{Conn: conn, Framer: http2.NewFramer(conn, conn), next: 1}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return nil, err
	}
	return r, r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window},
		http2.Setting{ID: http2.SettingHeaderTableSize}) // so that headers can be read by who comes later
}

// greeted waits for the server's settings, which it sends once it has looked at who
// connected: until then, one who becomes another program is that one from the start.
func (r *raw) greeted() error {
	r.Conn.SetReadDeadline(time.Now().Add(deadline))
	f, err := r.ReadFrame()
	if _, ok := f.(*http2.SettingsFrame); err == nil && !ok {
		err = fmt.Errorf("the first frame is %v", f)
	}
	if err != nil {
		return err
	}
	return r.WriteSettingsAck()
}

// begin sends the headers of a call.
func (r *raw) begin(method string) error {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/" + method}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {"workload.spiffe.io", "true"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			return err
		}
	}
	r.next += 2
	return r.WriteHeaders(http2.HeadersFrameParam{StreamID: r.next - 2, BlockFragment: block.Bytes(), EndHeaders: true})
}

// call sends a whole call with an empty request.
func (r *raw) call(method string) error {
	return errors.Join(r.begin(method), r.WriteData(r.next-2, true, make([]byte, 5)))
}

// answer reads the first message of an answer, or the status that ends it.
func (r *raw) answer() (*workload.X509SVIDResponse, string, error) {
	r.Conn.SetReadDeadline(time.Now().Add(deadline))
	var message []byte
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return nil, "", err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				if err := r.WriteSettingsAck(); err != nil {
					return nil, "", err
				}
			}
		case *http2.DataFrame:
			message = append(message, f.Data()...)
			if len(message) < 5 || len(message) < 5+int(binary.BigEndian.Uint32(message[1:])) {
				continue
			}
			m := new(workload.X509SVIDResponse)
			return m, "", proto.Unmarshal(message[5:], m)
		case *http2.HeadersFrame:
			fields, err := dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				return nil, "", err
			}
			for _, field := range fields {
				if field.Name == "grpc-message" {
					return nil, field.Value, nil
				}
			}
		case *http2.GoAwayFrame:
			return nil, "", fmt.Errorf("the server goes away: %v", f.ErrCode)
		}
	}
}
