package agent

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/plastron/plastron/internal/ticket"
)

// joining is what an agent takes from its ticket beyond what fits into Settings.
// Its zero value is that of an agent without one.
type joining struct {
	others []string              // more addresses of that server
	roots  []serverlink.RootHash // by which it is recognised at first; empty: by another source
	token  bool                  // the join token is the ticket's
	ticket ticket.Ticket
}

// withTicket returns the configuration with everything that is not set taken from
// the ticket, if there is one.
func (c *Config) withTicket() (Config, joining, error) {
	complete := *c
	s := &complete.Agent
	if s.Ticket == "" {
		return complete, joining{}, nil
	}
	t, err := ticket.Parse(s.Ticket)
	if err != nil {
		return complete, joining{}, fmt.Errorf("agent: ticket: %w", err)
	}
	j := joining{ticket: t}
	if s.TrustDomain.IsZero() {
		s.TrustDomain.TrustDomain = t.TrustDomain
	} else if s.TrustDomain.TrustDomain != t.TrustDomain {
		return complete, joining{}, fault.New(fault.Invalid, "ticket_foreign", "agent: ticket: it is for the trust domain %q, but trust_domain is %q",
			t.TrustDomain.Name(), s.TrustDomain.Name()).Fix("make a ticket on a server of that trust domain, or leave trust_domain out")
	}
	if len(s.ServerAddresses) == 0 {
		if s.ServerAddress == "" && s.ServerPort == 0 {
			j.others = t.Addresses[1:]
		}
		host, port, err := net.SplitHostPort(t.Addresses[0])
		if err != nil {
			return complete, joining{}, err
		}
		if s.ServerAddress == "" {
			s.ServerAddress = host
		}
		if s.ServerPort == 0 {
			if s.ServerPort, err = strconv.Atoi(port); err != nil {
				return complete, joining{}, err
			}
		}
	}
	if s.TrustBundlePath == "" && s.TrustBundleHash == "" && s.TrustBundleURL == "" && s.TrustBundleWorkloadAPI == "" {
		for _, root := range t.Roots {
			j.roots = append(j.roots, root)
		}
	}
	if s.JoinToken == "" && s.JoinTokenFile == "" {
		s.JoinToken, j.token = t.Token, true
	}
	complete.Plugins = slices.Clone(c.Plugins)
	for _, usual := range []config.Plugin{
		{Type: typeKeyManager, Name: "disk"}, {Type: typeNodeAttestor, Name: jointoken.Name}, {Type: typeWorkloadAttestor, Name: "unix"},
	} {
		if !slices.ContainsFunc(c.Plugins, func(p config.Plugin) bool { return p.Type == usual.Type }) {
			complete.Plugins = append(complete.Plugins, usual)
		}
	}
	return complete, j, nil
}

// usable says whether a node may try to join with the ticket's token. It is asked
// only when the node has to attest: one that has joined starts with an old ticket.
func (j joining) usable(now time.Time) error {
	if !j.token {
		return nil
	}
	return j.ticket.Check(now)
}

// explain gives the refusals that a ticket can meet its own words.
func (j joining) explain(err error) error {
	switch {
	case len(j.roots) > 0 && fault.ReasonOf(err) == reasonUntrusted:
		return fault.New(fault.Unauthenticated, reasonWrongRoot, "what answers at the server's address is not the server that the ticket is from: it does not prove any of the ticket's roots. The token was not sent").
			Fix("find out what answers there, or make another ticket on that server").Because(err)
	case j.token && fault.ReasonOf(err) == "join_token_refused":
		return fault.New(fault.Denied, "ticket_used", "the server does not take the ticket any more: it was used before, or is over by the server's clock").
			Fix("make another with 'plastron server token generate'; each node needs its own").Because(err)
	}
	return err
}

// Reasons why a server is not recognised: by the bundle that is held, and by a ticket.
const (
	reasonUntrusted = "server_untrusted"
	reasonWrongRoot = "ticket_wrong_root"
)
