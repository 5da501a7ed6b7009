package sds_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestMain lets the test binary play a client that is another process.
func TestMain(m *testing.M) {
	if path := os.Getenv("SDS_TEST_SOCKET"); path != "" {
		os.Exit(otherProcess(path))
	}
	os.Exit(m.Run())
}

// otherProcess opens a stream, says how much it gets, and lives until its input ends.
func otherProcess(path string) int {
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 1
	}
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(context.Background())
	if err != nil {
		return 1
	}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "nonsense"}}); err != nil {
		return 1
	}
	resp, err := stream.Recv()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(len(resp.GetResources()))
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// R38: a client that exits leaves nothing behind, and is named for as long as it is there.
func TestClientExits(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SDS_TEST_SOCKET="+r.path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "1\n" {
		t.Fatalf("it got %q", line)
	}
	if c := r.service.Troubled(); len(c) != 1 || c[0].PID != cmd.Process.Pid || r.service.Stats().Missing != 1 {
		t.Errorf("shown is %+v", c)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, func() bool { return r.service.Stats().Streams == 0 })
	if c := r.service.Troubled(); len(c) != 0 {
		t.Errorf("left behind is %+v", c)
	}
}
