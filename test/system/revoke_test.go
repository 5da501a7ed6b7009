package system_test

import (
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// revoke runs the command and returns what it printed, each wanted text of which is checked.
func (d *deployment) revoke(what string, want ...string) string {
	d.t.Helper()
	out := d.run("server", "revoke", what, "-yes", "-wait", "120s", "-socketPath", d.adminSocket())
	for _, text := range want {
		if !strings.Contains(out, text) {
			d.t.Errorf("revoke %s did not print %q:\n%s", what, text, out)
		}
	}
	return out
}

// A workload with an open stream sees its SVIDs go, one by one, as they are revoked;
// its tokens are not served any more though they are cached; and a banned agent comes
// back neither with what it has nor by its old proof. R29, R30, R52
func TestRevoke(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	one := d.createEntry(agent, "/one", nil, mine())
	d.createEntry(agent, "/two", nil, mine())
	three := func() { d.createEntry(agent, "/three", nil, mine()) }
	ids := func(want ...string) func(received) bool {
		return func(r received) bool {
			slices.Sort(r.ids)
			return r.err == nil && slices.Equal(r.ids, want)
		}
	}
	stream := d.watchX509(t.Context())
	got := next(t, stream, "both SVIDs", ids("spiffe://example.org/one", "spiffe://example.org/two"))
	token := func(id string) error {
		_, err := d.workloadAPI().FetchJWTSVID(withHeader(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"x"}, SpiffeId: id})
		return err
	}
	for _, id := range []string{"spiffe://example.org/one", "spiffe://example.org/two"} { // cached from here on
		if err := token(id); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(id, text string) {
		t.Helper()
		if err := token(id); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), text) {
			t.Errorf("a token for %s: %v, want a refusal that says %q", id, err, text)
		}
	}

	d.revoke(one.Id, "Revoked entry "+one.Id+": spiffe://example.org/one", got.leaves["spiffe://example.org/one"].SerialNumber.String(),
		"JWT-SVID", "in force on 1/1 agent")
	next(t, stream, "one SVID less", ids("spiffe://example.org/two"))
	refused("spiffe://example.org/one", "not one of this process's")
	if err := token("spiffe://example.org/two"); err != nil {
		t.Errorf("the other token: %v", err)
	}

	d.revoke("spiffe://example.org/two", "Revoked entry", "in force on 1/1 agent")
	end := next(t, stream, "the end of the stream", func(r received) bool { return r.err != nil })
	if status.Code(end.err) != codes.PermissionDenied || !strings.Contains(end.err.Error(), "no identity issued") {
		t.Errorf("the stream ended with %v", end.err)
	}
	refused("", "no identity issued")

	three()
	stream = d.watchX509(t.Context())
	next(t, stream, "the third SVID", ids("spiffe://example.org/three"))
	d.revoke(agent, "Revoked the agent "+agent+": it is banned", "agent's SVID", "spiffe://example.org/three")
	next(t, stream, "the end of the stream", func(r received) bool { return r.err != nil })
	ended := func(p *process) {
		t.Helper()
		select {
		case <-p.done:
		case <-time.After(patience):
			t.Fatalf("it goes on:\n%s", p.Output())
		}
		var exit *exec.ExitError
		if out := p.Output(); !errors.As(p.err, &exit) || !strings.Contains(out, "is banned") {
			t.Errorf("it ended with %v:\n%s", p.err, out)
		}
	}
	ended(d.agent)
	// With the token, the SVID and the key that it had.
	ended(start(t, exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf"))))
}
