package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// benchFetch opens a stream, takes the first message and leaves, over and over,
// on connections that stay. The reference is the same call on a server that does
// nothing but answer with the same message.
func benchFetch(ctx context.Context, o options) (result, error) {
	client, first, err := dialWorkload(ctx, o.workload)
	if err != nil {
		return result{}, err
	}
	defer client.Close()
	bare, pid, stop, err := startEcho(ctx, first)
	if err != nil {
		return result{}, err
	}
	defer stop()
	// In turns, so that whatever else the machine does meanwhile meets both.
	const turns = 5
	r, reference := result{Reference: "bare gRPC stream, same message"}, o
	o.count, reference.count, reference.pids = (o.count+turns-1)/turns, (o.count+turns-1)/turns, pids{pid}
	for range turns {
		one, err := measureFetch(ctx, o, client)
		if err != nil {
			return result{}, err
		}
		other, err := measureFetch(ctx, reference, bare)
		if err != nil {
			return result{}, err
		}
		r.Operations += one.Operations
		r.WallNS += one.WallNS / turns
		r.CPUNS += one.CPUNS / turns
		r.P50NS, r.P99NS = max(r.P50NS, one.P50NS), max(r.P99NS, one.P99NS) // of the worst turn
		r.ReferenceNS += other.CPUNS / turns
	}
	return r, nil
}

func newWorkloadClient(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
}

func dialWorkload(ctx context.Context, path string) (*grpc.ClientConn, *workload.X509SVIDResponse, error) {
	conn, err := newWorkloadClient(path)
	if err != nil {
		return nil, nil, err
	}
	first, err := fetch(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, first, nil
}

func fetch(ctx context.Context, conn *grpc.ClientConn) (*workload.X509SVIDResponse, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

func measureFetch(ctx context.Context, o options, conn *grpc.ClientConn) (result, error) {
	return measure(ctx, o, 1, func(ctx context.Context, _, _ int) error {
		reply, err := fetch(ctx, conn)
		if err == nil && len(reply.GetSvids()) == 0 {
			err = errors.New("the answer holds no SVID")
		}
		return err
	})
}

// echo answers each call with the same message and holds the stream open, as
// the Workload API does.
type echo struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	reply *workload.X509SVIDResponse
}

// FetchX509SVID sends the message once.
func (e echo) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := stream.Send(e.reply); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// startEcho runs a bare server. It is this program again, as a process of its
// own, so that its CPU time can be told from ours.
func startEcho(ctx context.Context, reply *workload.X509SVIDResponse) (conn *grpc.ClientConn, pid int, stop func(), err error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, 0, nil, err
	}
	clean := []func(){func() { os.RemoveAll(dir) }}
	stop = func() {
		for _, f := range slices.Backward(clean) {
			f()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	path := filepath.Join(dir, "echo.sock")
	message, err := proto.Marshal(reply)
	if err != nil {
		return nil, 0, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, 0, nil, err
	}
	child := exec.CommandContext(ctx, self, echoVerb, path)
	child.Stdin = bytes.NewReader(message)
	ready, err := child.StdoutPipe()
	if err != nil {
		return nil, 0, nil, err
	}
	if err := child.Start(); err != nil {
		return nil, 0, nil, err
	}
	clean = append(clean, func() { child.Process.Kill(); child.Wait() })
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		return nil, 0, nil, fmt.Errorf("start the reference server: %w", err)
	}
	if conn, _, err = dialWorkload(ctx, path); err != nil {
		return nil, 0, nil, err
	}
	clean = append(clean, func() { conn.Close() })
	return conn, child.Process.Pid, stop, nil
}

// echoVerb makes this program the reference server of fetch.
const echoVerb = "-echo"

// serveEcho serves the message on stdin at a socket until it is killed.
func serveEcho(path string, stdin io.Reader, stdout io.Writer) error {
	message, err := io.ReadAll(stdin)
	if err != nil {
		return err
	}
	reply := new(workload.X509SVIDResponse)
	if err := proto.Unmarshal(message, reply); err != nil {
		return err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	bare := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(bare, echo{reply: reply})
	if _, err := io.WriteString(stdout, "\n"); err != nil {
		return err
	}
	return bare.Serve(listener)
}
