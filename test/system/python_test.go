package system_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

const python = "/usr/bin/python3" // Debian's, which has Debian's packages

// pythonStubs makes what Python's gRPC needs to call the services of a .proto file.
func pythonStubs(t *testing.T, proto string) string {
	t.Helper()
	if out, err := exec.Command(python, "-c", "import grpc, grpc_tools").CombinedOutput(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("python3-grpcio and python3-grpc-tools are needed: %v\n%s", err, out)
		}
		t.Skip("python3-grpcio and python3-grpc-tools are needed")
	}
	stubs := t.TempDir()
	generate := exec.Command(python, "-m", "grpc_tools.protoc", "-I", "testdata", "--python_out", stubs, "--grpc_python_out", stubs, "testdata/"+proto)
	if out, err := generate.CombinedOutput(); err != nil {
		t.Fatalf("make stubs: %v\n%s", err, out)
	}
	return stubs
}

// A client in another language, with its own gRPC, its own stubs and openssl as
// the judge, gets and verifies all that the Workload API offers.
func TestPythonClient(t *testing.T) {
	t.Parallel()
	stubs := pythonStubs(t, "workload.proto")
	d := newDeployment(t)
	agent := d.start()
	d.createEntry(agent, "/python", nil, mine())
	d.waitServed()
	out, err := exec.CommandContext(t.Context(), python, "testdata/client.py", d.workloadSocket(), "spiffe://example.org/python", stubs).CombinedOutput()
	if err != nil {
		t.Fatalf("the client: %v\n%s", err, out)
	}
	for _, want := range []string{"no answer without the header", "an X.509-SVID", "a JWT-SVID", "validation"} {
		if !strings.Contains(string(out), "saw "+want+"\n") {
			t.Errorf("the client did not see %s:\n%s", want, out)
		}
	}
}
