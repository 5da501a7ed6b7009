package system_test

import (
	"os"
	"os/exec"
	"os/user"
	"strings"
	"syscall"
	"testing"
)

// One rule, programs of two users: each process gets the ID of its own user and
// program, and no other (R46); what the facts do not fill is refused by name; and
// with the rule its SVIDs end, in open streams too.
func TestRuleForTwoUsers(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root to run programs as others")
		}
		t.Skip("needs root to run programs as others")
	}
	t.Parallel()
	d := newDeployment(t)
	agent := d.start()
	binary, err := os.ReadFile(plastron)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web", "api", "two words"} {
		if err := os.WriteFile(d.path(name), binary, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const group = 61999 // that the processes of both users have
	as := func(uid uint32, program string, args ...string) *exec.Cmd {
		cmd := exec.Command(d.path(program), append(append([]string{"agent", "api"}, args...), "-socketPath", d.workloadSocket())...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: group}}
		cmd.Dir = "/"
		return cmd
	}
	out := d.run("server", "rule", "create", "-socketPath", d.adminSocket(), "-ruleID", "users", "-parentID", agent, "-selector", "unix:gid:61999",
		"-idTemplate", "spiffe://example.org/user/{unix.user}/{unix.program}", "-trust", "agent", "-wait", "120s")
	for _, want := range []string{"1 agent: " + agent, "compromised", "under spiffe://example.org/user/\n", "in force on 1/1 agent"} {
		if !strings.Contains(out, want) {
			t.Errorf("rule create did not print %q:\n%s", want, out)
		}
	}

	name := func(uid string) string {
		t.Helper()
		u, err := user.LookupId(uid)
		if err != nil {
			t.Fatal(err)
		}
		return u.Username
	}
	fetched := func(out []byte) (ids []string) {
		for line := range strings.Lines(string(out)) {
			if id, ok := strings.CutPrefix(line, "SPIFFE ID:"); ok {
				ids = append(ids, strings.TrimSpace(id))
			}
		}
		return ids
	}
	for _, c := range []struct {
		uid           uint32
		program, want string
	}{
		{1, "web", "spiffe://example.org/user/" + name("1") + "/web"},
		{1, "api", "spiffe://example.org/user/" + name("1") + "/api"},
		{65534, "web", "spiffe://example.org/user/" + name("65534") + "/web"},
	} {
		out, err := as(c.uid, c.program, "fetch", "x509").CombinedOutput()
		if ids := fetched(out); err != nil || len(ids) != 1 || ids[0] != c.want {
			t.Errorf("uid %d, %s: %v, %v, want %s\n%s", c.uid, c.program, ids, err, c.want, out)
		}
		out, err = as(c.uid, c.program, "fetch", "jwt", "-audience", "x").CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("uid %d, %s, a token: %v\n%s", c.uid, c.program, err, out)
		}
	}
	refused := func(uid uint32, program, reason string) {
		t.Helper()
		out, err := as(uid, program, "fetch", "x509").CombinedOutput()
		if err == nil || !strings.Contains(string(out), reason) {
			t.Errorf("uid %d, %q: %v, want %s\n%s", uid, program, err, reason, out)
		}
	}
	refused(1, "two words", "rule_fact_invalid")
	refused(987654, "web", "rule_fact_missing") // a user without a name

	trail, err := os.ReadFile(d.path("server/audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `"facts":{"unix.program":"web","unix.user":"` + name("65534") + `"},"trust":"agent"`; !strings.Contains(string(trail), want) {
		t.Errorf("the audit trail does not hold %s", want)
	}

	watching := start(t, as(1, "web", "watch"))
	eventually(t, "the stream brings the identity", func() bool { return strings.Contains(watching.Output(), "/web") })
	d.run("server", "rule", "delete", "-socketPath", d.adminSocket(), "-ruleID", "users", "-wait", "120s")
	eventually(t, "the stream says that there is none any more", func() bool {
		select {
		case <-watching.done:
			return true
		default:
			return strings.Contains(watching.Output(), "no identity")
		}
	})
	refused(1, "web", "no identity issued")
}
