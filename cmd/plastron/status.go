package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/spf13/cobra"
)

func (p *program) serverStatusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "Say how the server is doing",
		Long: `Says how the server is doing: where its log stands, what it holds, its signing keys
and which agents follow it. The exit status is 0 if it can serve and issue, 1 if it
cannot or does not answer.`,
	}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		got, err := serverStatus(c, at, false)
		if err != nil {
			return err
		}
		if *out == asJSON {
			err = printJSON(p.stdout, got)
		} else {
			err = printServerStatus(p.stdout, got, p.start)
		}
		if err == nil && got.GetUnhealthy() != nil {
			return exitStatus(exitFailed)
		}
		return err
	}
	return c
}

func (p *program) serverListCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "list",
		Short: "List the servers of the trust domain, with where each stands",
		Long: `Lists the servers that share the store, as the one that is asked sees them; it
comes first. The others say every 10 s that they live and where they stood.

BEHIND is how many revisions the log has gone on since that position, BEAT how long
ago that was seen here. DIGEST says whether both held the same at one position, CLOCK
how far its clock is from that of the server that is asked, LEASE for how long it may
sign if it does not reach the store again. LAGGARDS are attached agents that have not
acknowledged all that affects them.`,
	}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := statusv1.NewServerClient(conn).List(c.Context(), &statusv1.ListRequest{})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, got)
		}
		return printServers(p.stdout, got.GetServers(), p.start)
	}
	return c
}

func printServers(w io.Writer, servers []*statusv1.ServerStatus, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "SERVER\tSTATE\tVERSION\tUP\tPOSITION\tBEHIND\tBEAT\tDIGEST\tAGENTS\tLAGGARDS\tCLOCK\tLEASE\tADDRESS")
	for _, s := range servers {
		seen, state, up := s.GetSeen(), "silent", ago(s.GetStartedAt(), now)
		switch seen.GetState() {
		case statusv1.Seen_STATE_LIVE:
			state = "live"
		case statusv1.Seen_STATE_STOPPED:
			state, up = "stopped", "-"
		}
		beat, digest, clock := roughly(time.Duration(seen.GetBeatAgeMs())*time.Millisecond), "?", "?"
		switch seen.GetAgreement() {
		case statusv1.Seen_AGREEMENT_SAME:
			digest = "same"
		case statusv1.Seen_AGREEMENT_DIFFERS:
			digest = "DIFFERS"
		}
		if seen.GetClockKnown() {
			clock = fmt.Sprintf("%+dms", seen.GetClockAheadMs())
		}
		if seen.GetSelf() {
			beat, digest, clock = "-", "-", "-"
		}
		fmt.Fprintf(table, "%.8s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", s.GetId(), state, s.GetVersion(), up,
			positionText(s.GetPosition()), seen.GetBehind(), beat, digest, s.GetAttached().GetAgents(), len(s.GetAttached().GetLaggards()), clock,
			leaseText(seen), cmp.Or(strings.Join(s.GetAddresses(), ","), "-"))
	}
	fmt.Fprintln(table)
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(table, "SERVER\tKIND\tSTATE\tAUTHORITY\tUNTIL")
	for _, s := range servers {
		for _, a := range s.GetAuthorities() {
			fmt.Fprintf(table, "%.8s\t%s\t%s\t%s\t%s\n", s.GetId(), a.GetKind(), a.GetState(), a.GetAuthorityId(), until(a.GetExpiresAt(), now))
		}
	}
	return table.Flush()
}

// leaseText says for how long a server may sign without its store.
func leaseText(seen *statusv1.Seen) string {
	switch {
	case !seen.GetLeased():
		return "-"
	case seen.GetLeaseLeftMs() == 0:
		return "ended"
	}
	return roughly(time.Duration(seen.GetLeaseLeftMs()) * time.Millisecond)
}

func (p *program) agentStatusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "Say how the agent is doing",
		Long: `Says how the agent is doing: who it is, how far it is with its server, what it holds
and what of that ends first, how often callers were refused and why. It asks the
agent's admin socket, which lets in root and the agent's own user.

The exit status is 0 if the agent is in step with its server, 2 if it is not and serves
what it has, 1 if it has no identity that is still good, or does not answer.`,
	}
	at, out := agentAdminFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		got, err := agentStatus(c, at)
		if err != nil {
			return err
		}
		if *out == asJSON {
			err = printJSON(p.stdout, got)
		} else {
			err = printAgentStatus(p.stdout, got, p.start)
		}
		switch {
		case err != nil:
			return err
		case got.GetId() == "" || got.GetExpiresAt() <= p.start.Unix():
			return exitStatus(exitFailed)
		case !got.GetFollowing().GetInStep():
			return exitStatus(exitWarned)
		}
		return nil
	}
	return c
}

func agentStatus(c *cobra.Command, at *socket) (*statusv1.AgentStatus, error) {
	conn, peer, err := at.dial(c.Context())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := contextWithTimeout(c, 10*time.Second)
	defer cancel()
	got, err := statusv1.NewAgentClient(conn).Status(ctx, &statusv1.AgentStatusRequest{})
	return got, peer.fault(err)
}

func printAgentStatus(w io.Writer, s *statusv1.AgentStatus, now time.Time) error {
	f := s.GetFollowing()
	rows := facts{{"Agent", cmp.Or(s.GetId(), "not attested yet")}, {"Version", s.GetVersion()}, {"Trust domain", s.GetTrustDomain()},
		{"Up since", since(s.GetStartedAt(), now)}, {"Own SVID", "until " + until(s.GetExpiresAt(), now)}, {"Attestor", s.GetAttestor()}}
	if s.GetCanReattest() {
		rows[len(rows)-1][1] += ", which can attest again at any time"
	}
	rows.add("Server", fmt.Sprintf("%s, by %s", f.GetAddress(), f.GetMode()))
	state := "no"
	if f.GetInStep() {
		state = "yes"
	}
	if f.GetSince() != 0 {
		state += ", since " + since(f.GetSince(), now)
	}
	rows.add("In step", state)
	if f.GetFault() != nil {
		rows.add("Because", fmt.Sprintf("%s (%s)", f.GetFault().GetMessage(), f.GetFault().GetReason()))
	}
	rows.add("Position", positionText(f.GetPosition()))
	rows.add("Last heard", since(f.GetHeardAt(), now))
	rows.add("Last acknowledged", since(f.GetAcknowledgedAt(), now))
	if f.GetClockKnown() {
		rows.add("Server's clock", aheadText(f.GetClockAheadMs()))
	}
	rows.add("Bundle", fmt.Sprintf("sequence %d, %s, until %s", s.GetBundleSequence(),
		plural(int(s.GetX509Authorities()), "X.509 authority", "X.509 authorities"), until(s.GetBundleExpiresAt(), now)))
	rows.add("Holds", fmt.Sprintf("%s, %s, %s", plural(int(s.GetGrants()), "grant", "grants"),
		plural(int(s.GetX509Svids()), "X.509-SVID", "X.509-SVIDs"), plural(int(s.GetJwtSvids()), "JWT-SVID", "JWT-SVIDs")))
	if n := s.GetX509SvidsTainted(); n > 0 {
		rows.add("To replace", plural(int(n), "X.509-SVID", "X.509-SVIDs")+" of a tainted authority")
	}
	rows.add("Serves", fmt.Sprintf("%s, %s, %d listening at %s", plural(int(s.GetConnections()), "connection", "connections"),
		plural(int(s.GetCalls()), "call", "calls"), s.GetSubscribers(), s.GetSocketPath()))
	for _, e := range s.GetEnding() {
		rows.add("Ends first", fmt.Sprintf("%s, %s", e.GetSpiffeId(), until(e.GetExpiresAt(), now)))
	}
	if n := s.GetSdsStreams(); n > 0 {
		rows.add("Envoy SDS", plural(int(n), "stream", "streams"))
	}
	for _, c := range s.GetSdsClients() {
		secretClient(&rows, c, now)
	}
	for _, reason := range slices.Sorted(maps.Keys(s.GetRefusals())) {
		rows.add("Refused", fmt.Sprintf("%s, %s", reason, plural(int(s.GetRefusals()[reason]), "time", "times")))
	}
	return rows.print(w)
}

// secretClient says what trouble a client of Envoy's secret discovery has. What are
// its own words is quoted.
func secretClient(rows *facts, c *statusv1.SecretClient, now time.Time) {
	who := fmt.Sprintf("pid %d, uid %d, node %q", c.GetPid(), c.GetUid(), c.GetNode())
	for _, m := range c.GetMissing() {
		rows.add("SDS missing", fmt.Sprintf("%s: %q (%s)", who, m.GetName(), m.GetReason()))
	}
	if c.GetRejected() == "" {
		return
	}
	state := ""
	if !c.GetOpen() {
		state = ", and is gone"
	}
	rows.add("SDS rejected", fmt.Sprintf("%s: %q: %q, %s%s", who, c.GetNames(), c.GetRejected(), since(c.GetAt(), now), state))
}

func serverStatus(c *cobra.Command, at *socket, checkStore bool) (*statusv1.ServerStatus, error) {
	conn, peer, err := at.dial(c.Context())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := contextWithTimeout(c, 40*time.Second)
	defer cancel()
	got, err := statusv1.NewServerClient(conn).Status(ctx, &statusv1.ServerStatusRequest{CheckStore: checkStore})
	return got, peer.fault(err)
}

func printServerStatus(w io.Writer, s *statusv1.ServerStatus, now time.Time) error {
	rows := facts{{"Server", s.GetId()}, {"Version", s.GetVersion()}, {"Trust domain", s.GetTrustDomain()},
		{"Up since", since(s.GetStartedAt(), now)}, {"Agents reach it at", strings.Join(s.GetAddresses(), ", ")},
		{"Position", positionText(s.GetPosition())}, {"Digest", s.GetDigest()},
		{"Store", storeText(s.GetStore())},
		{"Entries", fmt.Sprintf("%d, and %s", s.GetEntries(), plural(int(s.GetRules()), "rule", "rules"))},
		{"Join tokens", fmt.Sprintf("%d unused", s.GetJoinTokens())},
		{"Agents", fmt.Sprintf("%d joined, %d attached, %d behind", s.GetAgents(), s.GetAttached().GetAgents(), len(s.GetAttached().GetLaggards()))},
	}
	for _, id := range s.GetAttached().GetLaggards() {
		rows.add("Behind", id)
	}
	if a := s.GetAttached(); a.GetClocks() > 0 {
		rows.add("Clocks of agents", fmt.Sprintf("at most %s, that of %s", aheadText(a.GetClockAheadMs()), a.GetClockAgent()))
	}
	if n := s.GetUnreadable(); n > 0 {
		rows.add("Unreadable", fmt.Sprintf("%d stored rows are left aside", n))
	}
	b := s.GetBundle()
	rows.add("Bundle", fmt.Sprintf("sequence %d, %d X.509 and %d JWT authorities, until %s", b.GetSequence(), b.GetX509Authorities(), b.GetJwtAuthorities(), until(b.GetExpiresAt(), now)))
	for _, a := range s.GetAuthorities() {
		text := fmt.Sprintf("%s %s %s", a.GetKind(), a.GetSlot(), a.GetState())
		if id := a.GetAuthorityId(); id != "" { // what is only intended has no key yet
			text += fmt.Sprintf(" %s, until %s", id, until(a.GetExpiresAt(), now))
		}
		rows.add("Authority", text)
	}
	rows.add("Own certificate", "until "+until(s.GetCertificateExpiresAt(), now))
	rows.add("Healthy", healthText(s.GetUnhealthy()))
	for _, f := range s.GetDegraded() {
		rows.add("Degraded", f.GetMessage()+" ("+f.GetReason()+")")
	}
	return rows.print(w)
}

func storeText(s *statusv1.Store) string {
	if s.GetAddress() != "" {
		return s.GetKind() + " at " + s.GetAddress()
	}
	return fmt.Sprintf("%s in %s, %s", s.GetKind(), s.GetDir(), bytesText(s.GetBytes()))
}

// facts are lines of a name and a value.
type facts [][2]string

func (f *facts) add(name, value string) { *f = append(*f, [2]string{name, value}) }

func (f facts) print(w io.Writer) error {
	for _, row := range f {
		if _, err := fmt.Fprintf(w, "%-18s: %s\n", row[0], cmp.Or(row[1], "-")); err != nil {
			return err
		}
	}
	return nil
}

func positionText(p *statusv1.Position) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprintf("%.8s:%d", p.GetEpoch(), p.GetRevision())
}

func healthText(f *statusv1.Fault) string {
	if f == nil {
		return "yes"
	}
	return fmt.Sprintf("no: %s (%s)", f.GetMessage(), f.GetReason())
}

// aheadText says how far another clock is from ours.
func aheadText(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	if d < 0 {
		return d.Abs().String() + " behind"
	}
	return d.String() + " ahead"
}

// since is a moment that has been, and how long ago; ago is the latter alone.
func since(unix int64, now time.Time) string {
	if unix == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%s ago)", time.Unix(unix, 0).UTC().Format(time.RFC3339), ago(unix, now))
}

func ago(unix int64, now time.Time) string { return roughly(now.Sub(time.Unix(unix, 0))) }

// until is a moment that is to come, and how soon.
func until(unix int64, now time.Time) string {
	if unix == 0 {
		return "-"
	}
	end := time.Unix(unix, 0)
	if !end.After(now) {
		return fmt.Sprintf("%s (%s ago)", end.UTC().Format(time.RFC3339), ago(unix, now))
	}
	return fmt.Sprintf("%s (in %s)", end.UTC().Format(time.RFC3339), roughly(end.Sub(now)))
}

// roughly is a duration as people say it.
func roughly(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func bytesText(n uint64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
