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
	r, err := measureFetch(ctx, o, client)
	if err != nil {
		return result{}, err
	}
	r.Reference = "bare gRPC stream, same message"
	r.ReferenceNS, err = referenceFetch(ctx, o, first)
	return r, err
}

func dialWorkload(ctx context.Context, path string) (*grpc.ClientConn, *workload.X509SVIDResponse, error) {
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
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

// referenceFetch measures a bare server. It is this program again, as a process
// of its own, so that its CPU time can be told from ours.
func referenceFetch(ctx context.Context, o options, reply *workload.X509SVIDResponse) (int64, error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "echo.sock")
	message, err := proto.Marshal(reply)
	if err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	child := exec.CommandContext(ctx, self, echoVerb, path)
	child.Stdin = bytes.NewReader(message)
	ready, err := child.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := child.Start(); err != nil {
		return 0, err
	}
	defer child.Wait()
	defer child.Process.Kill()
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		return 0, fmt.Errorf("start the reference server: %w", err)
	}
	conn, _, err := dialWorkload(ctx, path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	o.pid = child.Process.Pid
	r, err := measureFetch(ctx, o, conn)
	return r.CPUNS, err
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
