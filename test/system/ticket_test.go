package system_test

import (
	"crypto/sha256"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/ticket"
)

// ticketLine has the server make a ticket. It returns the line to paste, and the
// ID of the agent that it leads to.
func (d *deployment) ticketLine() (line, agent string) {
	d.t.Helper()
	out := d.run("server", "token", "generate", "-socketPath", d.adminSocket())
	if !strings.HasPrefix(out, "Token: ") { // what scripts read
		d.t.Fatalf("token generate printed:\n%s", out)
	}
	for l := range strings.Lines(out) {
		if strings.HasPrefix(l, "plastron agent run -ticket plastron1.") {
			line = strings.TrimSpace(l)
		}
		if id, ok := strings.CutPrefix(l, "Agent ID: "); ok {
			agent = strings.TrimSpace(id)
		}
	}
	if line == "" || agent == "" {
		d.t.Fatalf("token generate printed:\n%s", out)
	}
	return line, agent
}

// paste runs a line in the shell of a host that has the program and nothing else:
// a network namespace, a /tmp of its own, an empty working directory.
func paste(t *testing.T, ns, line string) *process {
	t.Helper()
	const host = `exec 9<"$1"
mount -t tmpfs none /tmp && mkdir /tmp/bin /tmp/home && cat <&9 >/tmp/bin/plastron && exec 9<&- && chmod 755 /tmp/bin/plastron /tmp || exit 99
cd /tmp/home && PATH=/tmp/bin:$PATH && eval "exec $2"`
	args := append(enter(ns), "unshare", "--mount", "sh", "-c", host, "sh", plastron, line)
	return start(t, exec.Command(args[0], args[1:]...))
}

// refused waits for the end of a pasted line, which must be exit status 1 with that sentence.
func (p *process) refused(want string) {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("it goes on, want: %s", want)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(p.Output(), "Error: "+want) {
		p.t.Errorf("exit status %d, want 1 and: %s\n%s", code, want, p.Output())
	}
}

// A clean second host joins by one pasted line and has an SVID; a ticket with
// another root, a used one, an expired one and half of one are refused.
func TestTicketOnASecondHost(t *testing.T) {
	t.Parallel()
	l := newLink(t, 10)
	d := newDeployment(t)
	d.host, d.serverPrefix = l.serverAddr, enter(l.server)
	d.startServer()
	line, id := d.ticketLine()
	text := strings.TrimPrefix(line, "plastron agent run -ticket ")
	d.createEntry(id, "/second", nil, mine())

	// The root is checked before the token is sent: it is still good afterwards.
	forged, err := ticket.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	forged.Roots = [][sha256.Size]byte{sha256.Sum256([]byte("another root"))}
	other, err := forged.Reveal()
	if err != nil {
		t.Fatal(err)
	}
	paste(t, l.agent, "plastron agent run -ticket "+other).refused("what answers at the server's address is not the server that the ticket is from")
	paste(t, l.agent, line[:len(line)-5]).refused("-ticket: the ticket is cut off: its end is missing")

	began := time.Now()
	agent := paste(t, l.agent, line)
	eventually(t, "an SVID on the second host", func() bool {
		select {
		case <-agent.done:
			t.Fatalf("the agent ended:\n%s", agent.Output())
		default:
		}
		fetch := exec.Command("nsenter", "--target", strconv.Itoa(agent.cmd.Process.Pid), "--mount", "--net", "/tmp/bin/plastron", "agent", "api", "fetch", "x509")
		out, err := fetch.CombinedOutput()
		return err == nil && strings.Contains(string(out), "spiffe://"+d.trustDomain+"/second")
	})
	t.Logf("an SVID %v after the line was pasted", time.Since(began).Round(time.Millisecond))

	paste(t, l.agent, line).refused("the server does not take the ticket any more: it was used before")
	out := d.run("server", "token", "generate", "-ttl", "1", "-socketPath", d.adminSocket())
	short := strings.TrimSpace(out[strings.Index(out, "plastron agent run"):])
	late, err := ticket.Parse(strings.TrimPrefix(short, "plastron agent run -ticket "))
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(time.Until(late.Expires))
	paste(t, l.agent, short).refused("the ticket has expired at " + late.Expires.Format(time.RFC3339))

	agent.stop(syscall.SIGTERM)
	d.server.stop(syscall.SIGTERM)
	for who, p := range map[string]*process{"server": d.server, "agent": agent} { // R112
		if s := p.Output(); strings.Contains(s, forged.Token) || strings.Contains(s, text) {
			t.Errorf("the %s prints the secret", who)
		}
	}
}
