package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
)

func (p *program) ruleCreateCommand() *cobra.Command {
	c := &cobra.Command{Use: "create", Short: "Give processes that fit the selectors identities named after facts about them",
		Long: `Makes a rule: each process that fits the selectors gets the SPIFFE ID that the
template makes of facts about it, such as unix.user and unix.program. A process for
which a fact is missing, or holds what a SPIFFE ID cannot, gets nothing from it.

It prints whom the rule reaches. With -trust agent those agents state the facts, so
each of them, if it is compromised, can obtain every ID that the template makes.
Without it the server finds out by itself whether they are true, which it can of
pods (k8s.ns, k8s.sa, k8s.pod, k8s.pod_uid, k8s.node) if it has access to the API
of their cluster. SPIRE's agents do not see rules.`}
	var rule rulev1.Rule
	var selectors []string
	flags := c.Flags()
	flags.StringVar(&rule.IdTemplate, "idTemplate", "", "SPIFFE `ID` with facts in braces, such as spiffe://example.org/user/{unix.user}/{unix.program}")
	flags.StringVar(&rule.ParentId, "parentID", "", "SPIFFE `ID` of the agent, or of the node alias, that hands the identities out")
	flags.StringArrayVar(&selectors, "selector", nil, "`TYPE:VALUE` that a process must have; may be given more than once, and then all must fit")
	flags.StringVar(&rule.Trust, "trust", "", "`WHO` states the facts: agent. Without it only facts that the server itself verifies may be named: those of pods")
	flags.StringVar(&rule.IdPrefix, "prefix", "", "SPIFFE `ID` below which all IDs must lie; otherwise all of the template before the segment with the first fact")
	flags.Int32Var(&rule.X509SvidTtl, "x509SVIDTTL", 0, "lifetime of X.509-SVIDs in `SECONDS`; otherwise the server's default")
	flags.Int32Var(&rule.JwtSvidTtl, "jwtSVIDTTL", 0, "lifetime of JWT-SVIDs in `SECONDS`; otherwise the server's default")
	flags.StringArrayVar(&rule.FederatesWith, "federatesWith", nil, "`TRUST DOMAIN` whose bundle the processes also get; may be given more than once")
	flags.StringVar(&rule.Hint, "hint", "", "`TEXT` by which a process with several identities tells them apart")
	flags.Int64Var(&rule.ExpiresAt, "ruleExpiry", 0, "time in Unix `SECONDS` at which the rule ends")
	flags.StringVar(&rule.Id, "ruleID", "", "`ID` of the new rule; otherwise the server chooses one")
	wait, at, out := waitFlag(flags), serverSocketFlags(flags), outputFlag(flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		switch {
		case rule.IdTemplate == "":
			return usage(c, "-idTemplate is required")
		case rule.ParentId == "":
			return usage(c, "-parentID is required")
		case len(selectors) == 0:
			return usage(c, "at least one -selector is required")
		case rule.X509SvidTtl < 0 || rule.JwtSvidTtl < 0 || rule.ExpiresAt < 0:
			return usage(c, "-x509SVIDTTL, -jwtSVIDTTL and -ruleExpiry must not be negative")
		}
		shown, err := wireSelectors(selectors)
		if err != nil {
			return err
		}
		for _, s := range shown {
			rule.Selectors = append(rule.Selectors, &rulev1.Selector{Type: s.GetType(), Value: s.GetValue()})
		}
		if rule.FederatesWith, err = trustDomains(rule.FederatesWith); err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := rulev1.NewRulesClient(wait.over(conn)).Create(c.Context(), &rulev1.CreateRequest{Rules: []*rulev1.Rule{&rule}})
		if err == nil && len(reply.GetResults()) != 1 {
			err = fmt.Errorf("the server answered with %d results", len(reply.GetResults()))
		}
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			if err := printJSON(p.stdout, reply); err != nil {
				return err
			}
		}
		made := reply.GetResults()[0]
		if err = refusalOf(made.GetRefusal()); err != nil {
			if made.GetRule() != nil && *out == pretty {
				fmt.Fprintln(p.stderr, "There is already this rule:")
				printRule(p.stderr, made.GetRule(), made.GetReach())
			}
			return wait.finish(c, p, conn, peer, *out, err)
		}
		if *out == pretty {
			printRule(p.stdout, made.GetRule(), made.GetReach())
		}
		return wait.finish(c, p, conn, peer, *out, nil)
	}
	return c
}

func (p *program) ruleShowCommand() *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "Show the rules and whom they reach"}
	var id string
	c.Flags().StringVar(&id, "ruleID", "", "`ID` of the one rule to show")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := rulev1.NewRulesClient(conn)
		found := &rulev1.ListResponse{}
		if id != "" {
			one, err := client.Show(c.Context(), &rulev1.ShowRequest{Id: id})
			if err != nil {
				return peer.fault(err)
			}
			found.Rules = append(found.Rules, one)
		} else {
			request := &rulev1.ListRequest{}
			for {
				page, err := client.List(c.Context(), request)
				if err != nil {
					return peer.fault(err)
				}
				found.Rules = append(found.Rules, page.GetRules()...)
				if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
					break
				}
			}
		}
		if *out == asJSON {
			return printJSON(p.stdout, found)
		}
		fmt.Fprintf(p.stdout, "Found %s\n", plural(len(found.GetRules()), "rule", "rules"))
		for _, one := range found.GetRules() {
			printRule(p.stdout, one.GetRule(), one.GetReach())
		}
		return nil
	}
	return c
}

func (p *program) ruleDeleteCommand() *cobra.Command {
	c := &cobra.Command{Use: "delete", Short: "Delete a rule; the processes lose what it gave them at once"}
	var id string
	c.Flags().StringVar(&id, "ruleID", "", "`ID` of the rule to delete")
	wait, at, out := waitFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if id == "" {
			return usage(c, "-ruleID is required")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := rulev1.NewRulesClient(wait.over(conn)).Delete(c.Context(), &rulev1.DeleteRequest{Ids: []string{id}})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			if err := printJSON(p.stdout, reply); err != nil {
				return err
			}
		}
		for _, r := range reply.GetResults() {
			if err = refusalOf(r.GetRefusal()); err == nil && *out == pretty {
				fmt.Fprintf(p.stdout, "Deleted rule with ID: %s\n", r.GetId())
			}
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// refusalOf returns what the server refused as a fault of its reason, or nil.
func refusalOf(r *rulev1.Refusal) error {
	if r == nil {
		return nil
	}
	return fault.New(fault.Invalid, r.GetReason(), "%s", r.GetMessage()).Fix("%s", r.GetRemedy())
}

// verifiedOf says of a rule without trust which facts and selectors the server
// verifies by itself, and which selectors are taken on the agent's word.
func verifiedOf(r *rulev1.Rule) (verified, stated []string) {
	for i, part := range strings.Split(r.GetIdTemplate(), "{") {
		if name, _, found := strings.Cut(part, "}"); found && i > 0 && !slices.Contains(verified, name) {
			verified = append(verified, name)
		}
	}
	for _, s := range r.GetSelectors() {
		selector := entry.Selector{Type: s.GetType(), Value: s.GetValue()}
		if selector.Verifiable() {
			verified = append(verified, selector.String())
		} else {
			stated = append(stated, selector.String())
		}
	}
	return verified, stated
}

// printRule prints a rule as entries are printed, and whom it reaches.
func printRule(w io.Writer, r *rulev1.Rule, reach *rulev1.Reach) {
	line := func(label string, value any) { fmt.Fprintf(w, "%-17s: %v\n", label, value) }
	ttl := func(seconds int32) any {
		if seconds == 0 {
			return "default"
		}
		return seconds
	}
	line("Rule ID", r.GetId())
	line("ID template", r.GetIdTemplate())
	line("Prefix", r.GetIdPrefix())
	line("Parent ID", r.GetParentId())
	line("Revision", r.GetRevision())
	line("X509-SVID TTL", ttl(r.GetX509SvidTtl()))
	line("JWT-SVID TTL", ttl(r.GetJwtSvidTtl()))
	if r.GetExpiresAt() != 0 {
		line("Expiration time", time.Unix(r.GetExpiresAt(), 0).UTC())
	}
	for _, s := range r.GetSelectors() {
		line("Selector", s.GetType()+":"+s.GetValue())
	}
	for _, name := range r.GetFederatesWith() {
		line("FederatesWith", name)
	}
	if r.GetHint() != "" {
		line("Hint", r.GetHint())
	}
	agents := plural(int(reach.GetAgents()), "agent", "agents")
	switch more := int(reach.GetAgents()) - len(reach.GetFirst()); {
	case reach.GetAgents() == 0:
		agents = "no agent now"
	case more > 0:
		agents += fmt.Sprintf(": %s and %d more", strings.Join(reach.GetFirst(), ", "), more)
	default:
		agents += ": " + strings.Join(reach.GetFirst(), ", ")
	}
	line("Reaches", agents)
	if r.GetTrust() == entry.TrustAgent {
		line("Trust", "agent: one that is compromised can obtain every ID of the template under "+r.GetIdPrefix())
	} else {
		verified, stated := verifiedOf(r)
		line("Verified", strings.Join(verified, ", "))
		if len(stated) > 0 {
			line("On agents' word", strings.Join(stated, ", "))
		}
	}
	fmt.Fprintln(w)
}
