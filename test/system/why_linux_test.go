package system_test

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// W18, R131: the mistake of running the agent in a pid namespace of its own. Its
// workloads are told so, by the Workload API and by 'why self'.
func TestAgentInAnotherPIDNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root for a pid namespace")
		}
		t.Skip("needs root for a pid namespace")
	}
	d := newDeployment(t)
	d.agentAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	d.createEntry(d.start(), "/web", nil, mine())
	for _, args := range [][]string{{"api", "fetch", "x509"}, {"why", "self"}} {
		out, err := exec.Command(plastron, append(append([]string{"agent"}, args...), "-socketPath", d.workloadSocket())...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "(peer_unresolvable)\n  Fix: run the agent in a pid namespace that contains its workloads") {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}
