package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/reason"
	"github.com/spf13/cobra"
)

func (p *program) agentWhyCommand() *cobra.Command {
	c := &cobra.Command{Use: "why PID", Short: "Say what a process is given, and why not more",
		Long: `Says what the agent sees of a process: what each attestor says, the grants that fit,
those that one selector keeps away, and what has to be done. It asks on the agent's
admin socket. 'why self' asks on the Workload API socket, about the process that asks.`}
	at, out := agentAdminFlags(c.Flags()), outputFlag(c.Flags())
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(c *cobra.Command, args []string) error {
		pid, err := strconv.ParseInt(args[0], 10, 32)
		if err != nil || pid <= 0 {
			return usage(c, "%q is not the number of a process", args[0])
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := whyv1.NewProcessClient(conn).Ask(c.Context(), &whyv1.AskProcessRequest{Pid: pid})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, resp)
		}
		printWhy(p.stdout, resp)
		return nil
	}
	c.AddCommand(p.whySelfCommand())
	return c
}

func (p *program) whySelfCommand() *cobra.Command {
	c := &cobra.Command{Use: "self", Short: "Say what this process is to the agent, and why it is refused if it is"}
	at, out := agentSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := whyv1.NewSelfClient(conn).Ask(withHeader(c.Context()), &whyv1.AskSelfRequest{})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, resp)
		}
		l := lines{p.stdout}
		l.reason(resp.GetReason())
		l.line("Identities", resp.GetIdentities())
		l.line("Process", resp.GetPid())
		l.selectors(resp.GetSelectors())
		return nil
	}
	return c
}

func (p *program) entryWhyCommand() *cobra.Command {
	c := &cobra.Command{Use: "why", Short: "Say which entries reach an agent's processes, and why others do not",
		Long: `Says which entries reach processes with these selectors on an agent's node, and what
keeps away those that nearly do: a selector, the parent, an alias, or their end. With
-spiffeID only entries that give this ID are judged, however far away they are.`}
	flags := c.Flags()
	var agent, id string
	var selectors []string
	flags.StringVar(&agent, "agentID", "", "SPIFFE `ID` of the agent")
	flags.StringArrayVar(&selectors, "selector", nil, "`TYPE:VALUE` that the process shows; may be given more than once")
	flags.StringVar(&id, "spiffeID", "", "SPIFFE `ID` that the process should get")
	at, out := serverSocketFlags(flags), outputFlag(flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if agent == "" || len(selectors) == 0 {
			return usage(c, "-agentID and at least one -selector are required")
		}
		req := &whyv1.AskEntriesRequest{AgentId: agent, SpiffeId: id}
		for _, text := range selectors {
			s, err := entry.ParseSelector(text)
			if err != nil {
				return about("-selector", err)
			}
			req.Selectors = append(req.Selectors, &whyv1.Selector{Type: s.Type, Value: s.Value})
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := whyv1.NewEntriesClient(conn).Ask(c.Context(), req)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, resp)
		}
		l := lines{p.stdout}
		l.reason(resp.GetReason())
		for _, e := range resp.GetEntries() {
			fmt.Fprintln(p.stdout)
			l.entry(e)
		}
		if resp.GetMore() {
			fmt.Fprintln(p.stderr, "There are more entries; name one by -spiffeID.")
		}
		return nil
	}
	return c
}

// lines prints labels and values as the other commands do.
type lines struct{ w io.Writer }

func (l lines) line(label string, value any) { fmt.Fprintf(l.w, "%-17s: %v\n", label, value) }

func (l lines) reason(r *whyv1.Reason) {
	if r == nil {
		l.line("Reason", "none: nothing is missing")
		return
	}
	l.line("Reason", r.GetCode())
	l.line("That is", r.GetMessage())
	l.line("Fix", r.GetFix())
}

func (l lines) selectors(selectors []*whyv1.Selector) {
	for _, s := range selectors {
		l.line("Selector", selectorText(s))
	}
}

func selectorText(s *whyv1.Selector) string { return s.GetType() + ":" + s.GetValue() }

func (l lines) entry(e *whyv1.Entry) {
	l.line("Entry ID", e.GetId())
	l.line("SPIFFE ID", e.GetSpiffeId())
	l.line("Parent ID", e.GetParentId())
	if e.GetReaches() {
		l.line("Reaches", "yes")
		return
	}
	l.line("Reaches", "no, "+e.GetReason().GetCode()+": "+e.GetReason().GetMessage())
	for _, id := range e.GetAgents() {
		l.line("Reaches instead", id)
	}
	if rest := int(e.GetAgentCount()) - len(e.GetAgents()); rest > 0 && len(e.GetAgents()) > 0 {
		l.line("Reaches instead", fmt.Sprintf("and %d agents more", rest))
	}
}

func printWhy(w io.Writer, r *whyv1.AskProcessResponse) {
	l := lines{w}
	l.reason(r.GetReason())
	switch r.GetReason().GetCode() {
	case reason.ParentMismatch.Reason, reason.AliasMismatch.Reason:
		l.line("Ask the server", askServer(r))
	}
	who := fmt.Sprintf("%d, user %d, group %d", r.GetPid(), r.GetUid(), r.GetGid())
	if r.GetSync() == nil { // it is gone, and nothing was looked at
		who = fmt.Sprint(r.GetPid())
	}
	l.line("Process", who)
	l.line("Agent", cmp.Or(r.GetAgentId(), "not attested yet"))
	for _, a := range r.GetAttestors() {
		fmt.Fprintln(w)
		took := time.Duration(a.GetTookUs()) * time.Microsecond
		if a.GetError() != "" {
			l.line("Attestor", fmt.Sprintf("%s, failed after %v: %s", a.GetName(), took, a.GetError()))
			continue
		}
		l.line("Attestor", fmt.Sprintf("%s, %v", a.GetName(), took))
		l.selectors(a.GetSelectors())
		for _, name := range slices.Sorted(maps.Keys(a.GetFacts())) {
			l.line("Fact", name+" = "+a.GetFacts()[name])
		}
		for _, text := range a.GetOmitted() {
			l.line("Left out", text)
		}
	}
	for _, g := range r.GetGrants() {
		fmt.Fprintln(w)
		l.line("Grant", g.GetId())
		l.line("SPIFFE ID", g.GetSpiffeId())
		l.line("State", grantState(g))
		switch g.GetFactsBy() {
		case "agent":
			l.line("Facts", "on this agent's word")
		case "server":
			l.line("Facts", "verified by the server")
		}
		if g.GetReason() != nil {
			l.line("Because", g.GetReason().GetCode()+": "+g.GetReason().GetMessage())
		}
	}
	for _, n := range r.GetNear() {
		fmt.Fprintln(w)
		l.line("Near miss", n.GetId())
		l.line("SPIFFE ID", n.GetSpiffeId())
		l.line("Asks for", selectorText(n.GetMissing()))
		for _, s := range n.GetHave() {
			l.line("Process shows", selectorText(s))
		}
	}
	if r.GetSync() == nil {
		return
	}
	fmt.Fprintln(w)
	l.line("Server", serverState(r.GetSync()))
	if r.GetSync().GetSkewKnown() {
		skew, side := time.Duration(r.GetSync().GetSkewMs())*time.Millisecond, "ahead of"
		if skew < 0 {
			skew, side = -skew, "behind"
		}
		l.line("Server's clock", fmt.Sprintf("%v %s this machine's", skew, side))
	}
	if r.GetSync().GetError() != "" {
		l.line("Server error", r.GetSync().GetError())
	}
}

// askServer is the command by which the server's operator sees the entry that an
// agent may not name.
func askServer(r *whyv1.AskProcessResponse) string {
	command := "plastron server entry why -agentID " + r.GetAgentId()
	for _, s := range r.GetSelectors() {
		command += " -selector '" + strings.ReplaceAll(selectorText(s), "'", `'\''`) + "'"
	}
	return command
}

func grantState(g *whyv1.Grant) string {
	switch g.GetState() {
	case whyv1.Grant_STATE_READY:
		return "ready until " + time.Unix(g.GetExpiresAt(), 0).UTC().Format(time.RFC3339)
	case whyv1.Grant_STATE_SHADOWED:
		return "has the hint of the older grant " + g.GetShadowedBy()
	case whyv1.Grant_STATE_REFUSED:
		if g.GetNextAttempt() != 0 {
			return "refused, next attempt " + time.UnixMilli(g.GetNextAttempt()).UTC().Format(time.RFC3339)
		}
	}
	return strings.ToLower(strings.TrimPrefix(g.GetState().String(), "STATE_"))
}

func serverState(s *whyv1.Sync) string {
	heard := "never heard"
	if s.GetHeardMs() >= 0 {
		heard = fmt.Sprintf("heard %v ago", (time.Duration(s.GetHeardMs()) * time.Millisecond).Round(100*time.Millisecond))
	}
	state := "not connected"
	if s.GetConnected() {
		state = "connected"
	}
	if !s.GetSynced() {
		return state + ", not in step, " + heard
	}
	return fmt.Sprintf("%s, in step at revision %d, %s", state, s.GetRevision(), heard)
}
