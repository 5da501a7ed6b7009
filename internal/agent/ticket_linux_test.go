package agent_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agent"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/ticket"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ticket is a ticket of the server with a fresh token.
func (d *domain) ticket(change ...func(*ticket.Ticket)) string {
	d.t.Helper()
	resp, err := agentv1.NewAgentClient(d.conn).CreateJoinToken(d.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		d.t.Fatal(err)
	}
	b, err := d.srv.Bundle()
	if err != nil {
		d.t.Fatal(err)
	}
	made := ticket.Ticket{
		Addresses: []string{d.addr}, TrustDomain: b.TrustDomain, Token: resp.GetValue(), Expires: time.Unix(resp.GetExpiresAt(), 0),
		Roots: [][sha256.Size]byte{{1}, sha256.Sum256(b.X509[0].ASN1)}, // one of several is enough
	}
	for _, c := range change {
		c(&made)
	}
	text, err := made.Reveal()
	if err != nil {
		d.t.Fatal(err)
	}
	return text
}

// fromNothing is the configuration of an agent that has a ticket and its places.
func fromNothing(t *testing.T, text string) agent.Config {
	t.Helper()
	dir := shortDir(t)
	os.Chmod(dir, 0o755)
	cfg := agent.Default()
	cfg.Agent.DataDir, cfg.Agent.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "s")
	cfg.Agent.Ticket = text
	return cfg
}

// ends returns with what an agent ends by itself.
func ends(t *testing.T, cfg agent.Config) error {
	t.Helper()
	a, err := agent.New(cfg, logger(t, "agent"))
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- a.Run(t.Context()) }()
	select {
	case err := <-ended:
		return err
	case <-time.After(wait):
		t.Fatal("it goes on")
		return nil
	}
}

func TestTicket(t *testing.T) {
	d := newDomain(t)
	const nobody = "127.0.0.1:1"
	for name, text := range map[string]string{
		"one address":    d.ticket(),
		"second address": d.ticket(func(t *ticket.Ticket) { t.Addresses = []string{nobody, d.addr} }),
	} {
		t.Run(name, func(t *testing.T) {
			cfg := fromNothing(t, text)
			_, stop := d.agent(cfg)
			stop()
			if _, err := os.Stat(filepath.Join(cfg.Agent.DataDir, "keys.json")); err != nil {
				t.Error(err)
			}
			before := len(d.agentIDs())
			_, stop = d.agent(cfg) // the ticket is used by now, and its agent known
			stop()
			if n := len(d.agentIDs()); n != before {
				t.Errorf("%d agents after a restart, %d before", n, before)
			}
			cfg.Agent.DataDir += "2"
			if err := ends(t, cfg); fault.ReasonOf(err) != "ticket_used" { // R20
				t.Errorf("used again: %v", err)
			}
		})
	}
	t.Run("restart after the expiry", func(t *testing.T) {
		cfg := fromNothing(t, d.ticket())
		_, stop := d.agent(cfg)
		stop()
		cfg.Agent.Ticket = d.ticket(func(t *ticket.Ticket) { t.Expires = time.Now().Add(-time.Hour) })
		_, stop = d.agent(cfg)
		stop()
	})
	t.Run("expired", func(t *testing.T) {
		cfg := fromNothing(t, d.ticket(func(t *ticket.Ticket) { t.Expires = time.Now().Add(-time.Second) }))
		if err := ends(t, cfg); fault.ReasonOf(err) != "ticket_expired" {
			t.Error(err)
		}
	})
	t.Run("wrong root", func(t *testing.T) {
		before := len(d.agentIDs())
		text := d.ticket(func(t *ticket.Ticket) { t.Roots = t.Roots[:1] })
		err := ends(t, fromNothing(t, text))
		if fault.ReasonOf(err) != "ticket_wrong_root" || len(d.agentIDs()) != before {
			t.Errorf("%v, %d agents, %d before", err, len(d.agentIDs()), before)
		}
		// The token was not sent, so it is good.
		token, err := ticket.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		cfg := fromNothing(t, d.ticket(func(t *ticket.Ticket) { t.Token = token.Token }))
		_, stop := d.agent(cfg)
		stop()
	})
	t.Run("what is set wins", func(t *testing.T) {
		cfg := fromNothing(t, d.ticket(func(t *ticket.Ticket) { t.Addresses, t.Roots, t.Token = []string{nobody}, t.Roots[:1], "not-a-token" }))
		set := d.agentConfig()
		cfg.Agent.ServerAddress, cfg.Agent.ServerPort = set.Agent.ServerAddress, set.Agent.ServerPort
		cfg.Agent.TrustBundleHash, cfg.Agent.JoinToken, cfg.Plugins = set.Agent.TrustBundleHash, set.Agent.JoinToken, set.Plugins[:1]
		_, stop := d.agent(cfg)
		stop()
		if _, err := os.Stat(filepath.Join(cfg.Agent.DataDir, "keys.json")); err == nil {
			t.Error("keys are on disk, though the key manager is memory")
		}
	})
}

// Each wrong ticket has its own reason, before anything is opened.
func TestTicketRefused(t *testing.T) {
	made := ticket.Ticket{
		Addresses: []string{"127.0.0.1:1"}, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Roots: make([][sha256.Size]byte, 1), Token: "very-secret", Expires: time.Now().Add(time.Hour),
	}
	good, err := made.Reveal()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text, reason string
		change       func(*agent.Settings)
	}{
		"good":      {text: good, reason: "internal"},
		"truncated": {text: good[:len(good)-1], reason: "ticket_truncated"},
		"changed":   {text: good[:40] + strings.Map(func(r rune) rune { return 'A' + (r+1)%2 }, good[40:41]) + good[41:], reason: "ticket_changed"},
		"newer":     {text: "plastron2." + good[10:], reason: "ticket_newer"},
		"malformed": {text: good + "\n", reason: "ticket_malformed"},
		"another trust domain": {text: good, reason: "ticket_foreign", change: func(s *agent.Settings) {
			s.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("other.test")}
		}},
		"insecure besides": {text: good, reason: "config_invalid", change: func(s *agent.Settings) { s.InsecureBootstrap = true }},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := fromNothing(t, c.text)
			if c.change != nil {
				c.change(&cfg.Agent)
			}
			_, err := agent.New(cfg, logger(t, "agent"))
			if fault.ReasonOf(err) != c.reason || (err == nil) != (name == "good") {
				t.Errorf("New() = %v, want %s", err, c.reason)
			}
			for _, verb := range []string{"%v", "%+v", "%#v", "%s"} { // R112
				if s := fmt.Sprintf(verb, cfg) + fmt.Sprint(err); strings.Contains(s, "very-secret") || strings.Contains(s, c.text) {
					t.Errorf("%s prints the ticket", verb)
				}
			}
		})
	}
}
