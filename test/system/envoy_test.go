package system_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fakes/envoy"
)

// Two Envoys connect to each other all the time, with secrets that a real agent
// gives them over SDS, while their certificates are replaced ten times, half of
// them under another authority. No handshake fails.
func TestEnvoy(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.agentOptions = fmt.Sprintf("sds { socket_path = %q }\n  disable_sds_api = true", d.path("sds/socket"))
	agent := d.start()
	var entries []*spiretypes.Entry
	for _, path := range []string{"/a", "/b"} {
		entries = append(entries, d.createEntry(agent, path, nil, mine()))
	}
	d.waitServed()
	proxy := envoy.New(t, d.path("sds/socket"), envoy.Node("one", 1, 36))
	peers := []*envoy.Peer{proxy.Peer("spiffe://example.org/a", "ROOTCA"), proxy.Peer("spiffe://example.org/b", "ALL")}
	traffic := envoy.Connect(t, peers[0], peers[1])
	authorities := map[string]bool{}
	for i := range 10 {
		before := []string{peers[0].SVID.Now().Version, peers[1].SVID.Now().Version}
		if i == 5 {
			was := peers[0].Trust.Now().Version
			if _, err := authorityv1.NewAuthorityClient(dialUnix(t, d.adminSocket())).Rotate(t.Context(), &authorityv1.RotateRequest{Kind: "x509", WithinMs: patience.Milliseconds()}); err != nil {
				t.Fatal(err)
			}
			for _, p := range peers {
				p.Trust.Until(func(m *envoy.Material) bool { return m.Version != was })
			}
		}
		for _, e := range entries {
			e.DnsNames = []string{fmt.Sprintf("n%d.test", i)}
		}
		resp, err := d.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: entries, InputMask: &spiretypes.EntryMask{DnsNames: true}})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatal(resp, err)
		}
		for n, p := range peers {
			m := p.SVID.Until(func(m *envoy.Material) bool { return m.Version != before[n] })
			authorities[string(m.Certificate.Leaf.AuthorityKeyId)] = true
		}
		traffic.Round()
	}
	for _, err := range traffic.Failures() {
		t.Error(err)
	}
	if len(authorities) != 2 {
		t.Errorf("%d authorities signed, want 2", len(authorities))
	}
	t.Logf("%d handshakes", traffic.Handshakes())
}

// A client in another language takes secrets, gets a push and refuses it, which an
// operator sees.
func TestEnvoyInPython(t *testing.T) {
	t.Parallel()
	stubs := pythonStubs(t, "sds.proto")
	d := newDeployment(t)
	agent := d.start()
	e := d.createEntry(agent, "/python", nil, mine())
	d.waitServed()
	cmd := exec.Command(python, "testdata/sdsclient.py", d.workloadSocket(), "spiffe://example.org/python", stubs)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	client := start(t, cmd)
	sees := func(what string) {
		t.Helper()
		eventually(t, what, func() bool {
			select {
			case <-client.done:
				t.Fatalf("the client ended: %s", client.Output())
			default:
			}
			return strings.Contains(client.Output(), "saw "+what+"\n")
		})
	}
	sees("an answer")
	e.DnsNames = []string{"python.test"}
	if _, err := d.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{e}, InputMask: &spiretypes.EntryMask{DnsNames: true}}); err != nil {
		t.Fatal(err)
	}
	sees("a push")
	sees("single answers")
	var status string
	eventually(t, "the operator sees it", func() bool {
		out, _ := exec.Command(plastron, "agent", "status", "-adminSocketPath", d.path("private/admin.sock")).CombinedOutput()
		status = string(out)
		return strings.Contains(status, `"python does not like it"`)
	})
	who := fmt.Sprintf(`pid %d, uid %d, node "python": `, cmd.Process.Pid, os.Getuid())
	for _, want := range []string{who + `"nonsense" (secret_unknown)`, who + `["nonsense" "spiffe://example.org" "spiffe://example.org/python"]: `, "1 stream"} {
		if !strings.Contains(status, want) {
			t.Errorf("%q is not in\n%s", want, status)
		}
	}
	in.Close()
	select {
	case <-client.done:
	case <-time.After(patience):
		t.Fatal("the client did not end")
	}
	if client.err != nil {
		t.Errorf("the client: %v\n%s", client.err, client.Output())
	}
}
