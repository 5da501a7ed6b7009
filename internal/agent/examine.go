package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/serverlink"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Subject is an agent that is to be examined: by its configuration, by what it
// says of itself, or by both.
type Subject struct {
	Config  *Config               // nil: it is not known
	Running *statusv1.AgentStatus // nil: it does not answer
	Err     error                 // why it does not
}

// Warnings says what the agent will log of settings that work but may surprise,
// and which files it could not read on this machine. It only reads.
func (c *Config) Warnings() (out []string) {
	a, err := New(*c, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil // the faults come first
	}
	set := a.cfg.Agent
	unread := func(key string, err error) {
		if err != nil {
			out = append(out, fmt.Sprintf("%s: on this machine: %s", key, fault.Sentence(err)))
		}
	}
	if set.InsecureBootstrap {
		out = append(out, "agent.insecure_bootstrap: whoever answers first at the server's address is trusted")
	}
	if set.TrustBundlePath != "" {
		_, err := readBundle(set)
		unread("agent.trust_bundle_path", err)
	}
	_, err = set.joinToken()
	unread("agent.join_token_file", err)
	if a.attestor != jointoken.Name {
		_, err = a.prover.Prover("")
		unread(fmt.Sprintf("plugins.NodeAttestor %q", a.attestor), err)
	}
	return out
}

// AdminSocketPath is where an agent with this configuration has its admin socket.
func (c *Config) AdminSocketPath() string { return c.Agent.adminSocketPath() }

// examined is what is found out about an agent before anything is judged.
type examined struct {
	dataDir, keyFile, public, admin string
	address                         []string
	domain                          string
	domains                         map[string]string // by where they are named
	bundle                          *bundle.Bundle    // by which it recognises the server; nil: not known
	stored                          *storedState
}

// storedState is what matters of the agent's file.
type storedState struct {
	domain string
	bundle *bundle.Bundle
	leaf   *x509.Certificate
	err    error
}

// Examine looks at an agent, what it stands on and whether its server can be
// reached from here, and changes nothing.
func Examine(ctx context.Context, s Subject, now time.Time) (found []doctor.Finding) {
	e := examined{domains: map[string]string{}}
	if s.Config != nil {
		found = append(found, e.configured(*s.Config))
	}
	if r := s.Running; r != nil {
		e.running(r)
	}
	e.stored = readStored(filepath.Join(e.dataDir, stateFile))
	e.domains["the data directory"] = e.stored.domain
	if e.stored.bundle != nil {
		e.bundle = e.stored.bundle // what was learnt wins
		e.domain = e.stored.domain
	}
	found = append(found, alive(s, now), doctor.DataDir(e.dataDir), doctor.Keys(e.keyFile), doctor.Disk(e.dataDir),
		doctor.Socket("workload_api_socket", e.public, true, s.Running != nil),
		doctor.Socket("admin_socket", e.admin, false, s.Running != nil),
		e.identity(s.Running, now), e.trusted(now), e.sameDomain(), e.server(ctx), clock(s.Running))
	return found
}

// configured takes over what the configuration says.
func (e *examined) configured(c Config) doctor.Finding {
	a, err := New(c, slog.New(slog.DiscardHandler))
	if err == nil {
		c = a.cfg
		e.address = append(slices.Clone(c.Agent.addresses()), a.joining.others...)
		if disk, ok := a.keeper.(*builtin.AgentDiskKeys); ok {
			e.keyFile = filepath.Join(disk.Directory, "keys.json")
		}
	} else { // look at what can be told all the same
		e.address = c.Agent.addresses()
		e.keyFile = filepath.Join(c.Agent.DataDir, "keys.json")
	}
	set := c.Agent
	e.dataDir, e.public, e.admin, e.domain = set.DataDir, set.SocketPath, set.adminSocketPath(), set.TrustDomain.Name()
	e.domains["the configuration"] = e.domain
	if set.TrustBundlePath != "" {
		b, readErr := readBundle(set)
		err = errors.Join(err, readErr)
		if readErr == nil {
			e.bundle = b
			e.domains["the configured bundle"] = domainOf(b.Roots())
		}
	}
	return doctor.Error("configuration", err, "it is valid")
}

// running takes over what the agent says.
func (e *examined) running(r *statusv1.AgentStatus) {
	e.domains["the running agent"] = r.GetTrustDomain()
	if e.dataDir == "" {
		e.dataDir, e.public, e.admin, e.domain = r.GetDataDir(), r.GetSocketPath(), r.GetAdminSocketPath(), r.GetTrustDomain()
		e.address = []string{r.GetFollowing().GetAddress()}
		e.keyFile = filepath.Join(e.dataDir, "keys.json")
	}
}

// domainOf is the trust domain that roots name in their own certificates, if they do.
func domainOf(roots []*x509.Certificate) string {
	for _, root := range roots {
		for _, uri := range root.URIs {
			if uri.Scheme == "spiffe" {
				return uri.Host
			}
		}
	}
	return ""
}

// readStored reads the agent's file without setting a broken one aside.
func readStored(path string) *storedState {
	var whose struct{ TrustDomain string }
	if err := readJSON(path, &whose); err != nil {
		return &storedState{err: err}
	}
	td, err := spiffeid.TrustDomainFromString(whose.TrustDomain)
	if err != nil {
		return &storedState{err: err}
	}
	s, b, err := readState(path, td)
	out := &storedState{domain: td.Name(), bundle: b, err: err}
	if len(s.SVID) > 0 && err == nil {
		out.leaf, out.err = x509.ParseCertificate(s.SVID[0])
	}
	return out
}

func alive(s Subject, now time.Time) doctor.Finding {
	r := s.Running
	switch {
	case r == nil:
		f := doctor.Error("running", s.Err, "")
		f.Verdict = doctor.Warn
		return f
	case r.GetId() == "":
		return doctor.Say("running", doctor.Fail, "it answers, but the server has not admitted it yet").Do("see the agent's log")
	case !r.GetFollowing().GetInStep():
		return doctor.Say("running", doctor.Warn, "it serves what it has, but is not in step with its server: %s (%s)",
			r.GetFollowing().GetFault().GetMessage(), r.GetFollowing().GetFault().GetReason()).Do("see the check server, and the agent's log")
	}
	return doctor.Say("running", doctor.OK, "it answers, since %s, and is in step with its server", now.Sub(time.Unix(r.GetStartedAt(), 0)).Round(time.Second))
}

// identity judges the agent's own SVID, as it is in use or as it is stored.
func (e *examined) identity(r *statusv1.AgentStatus, now time.Time) doctor.Finding {
	switch {
	case r.GetId() != "":
		return doctor.Expiry("identity", "the agent's own SVID", time.Unix(r.GetIssuedAt(), 0), time.Unix(r.GetExpiresAt(), 0), now, 4)
	case errors.Is(e.stored.err, fs.ErrNotExist):
		return doctor.Say("identity", doctor.Skipped, "none is stored; the agent attests when it starts")
	case e.stored.err != nil:
		return doctor.Say("identity", doctor.Fail, "what is stored cannot be read: %v", e.stored.err).
			Do("the agent sets it aside and attests again; it may need a new join token")
	case e.stored.leaf == nil:
		return doctor.Say("identity", doctor.Skipped, "none is stored; the agent attests when it starts")
	}
	if end := e.stored.leaf.NotAfter; end.After(now) {
		return doctor.Say("identity", doctor.OK, "the stored SVID ends in %s", end.Sub(now).Round(time.Second))
	}
	return doctor.Expiry("identity", "the stored SVID", e.stored.leaf.NotBefore, e.stored.leaf.NotAfter, now, 4)
}

// trusted judges the roots by which the agent recognises its server.
func (e *examined) trusted(now time.Time) doctor.Finding {
	if e.bundle == nil {
		return doctor.Say("bundle", doctor.Skipped, "no root is stored or configured")
	}
	var from, end time.Time
	for _, root := range e.bundle.Roots() {
		if root.NotAfter.After(end) {
			from, end = root.NotBefore, root.NotAfter
		}
	}
	return doctor.Expiry("bundle", "the last root", from, end, now, 8)
}

// sameDomain also looks at what the roots name.
func (e *examined) sameDomain() doctor.Finding {
	if e.stored.bundle != nil {
		e.domains["the stored bundle"] = domainOf(e.stored.bundle.Roots())
	}
	return doctor.SameTrustDomain(e.domains)
}

// server tries to reach each server as the agent does, and asks it for what anybody
// may have: its bundle. One of several that is away is a warning.
func (e *examined) server(ctx context.Context) doctor.Finding {
	const check = "server"
	td, err := spiffeid.TrustDomainFromString(e.domain)
	if len(e.address) == 0 || err != nil {
		return doctor.Say(check, doctor.Skipped, "where it is, or of which trust domain, is not known")
	}
	var good, bad []doctor.Finding
	for _, address := range e.address {
		if found := e.oneServer(ctx, td, address); found.Verdict == doctor.OK {
			good = append(good, found)
		} else {
			bad = append(bad, found)
		}
	}
	if len(bad) == 0 {
		good, bad = nil, good
	}
	all := bad[0]
	for _, found := range append(bad[1:], good...) {
		all.Found += "; " + found.Found
	}
	if len(good) > 0 {
		all.Verdict = doctor.Warn
	}
	return all
}

func (e *examined) oneServer(ctx context.Context, td spiffeid.TrustDomain, where string) doctor.Finding {
	const check = "server"
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if e.bundle == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", where)
		if err != nil {
			return unreachable(check, where, err)
		}
		conn.Close()
		return doctor.Say(check, doctor.OK, "%s accepts connections; who it is cannot be told without a bundle", where)
	}
	link, err := serverlink.New(serverlink.Config{Route: serverlink.NewRoute(where), TrustDomain: td,
		Roots: func() []*x509.Certificate { return e.bundle.Roots() }})
	if err != nil {
		return doctor.Error(check, err, "")
	}
	defer link.Close()
	if _, err := link.Bundle(ctx); err != nil {
		return unreachable(check, where, err)
	}
	return doctor.Say(check, doctor.OK, "%s answers, and is a server of %q", where, e.domain)
}

func unreachable(check, where string, err error) doctor.Finding {
	text := err.Error()
	if fault.KindOf(err) == fault.Unauthenticated {
		return doctor.Say(check, doctor.Fail, "%s answers, but is not a server that the agent's bundle vouches for: %s", where, text).
			Do("see that the address, the trust domain, the bundle and both clocks are right")
	}
	return doctor.Say(check, doctor.Fail, "%s cannot be reached from here: %s", where, text).
		Do("see that the server runs, that the address is right and that no firewall is in the way")
}

func clock(r *statusv1.AgentStatus) doctor.Finding {
	if !r.GetFollowing().GetClockKnown() {
		return doctor.Say("clock", doctor.Skipped, "only an agent that follows its server knows the server's clock")
	}
	return doctor.Clock("the server", time.Duration(r.GetFollowing().GetClockAheadMs())*time.Millisecond)
}
