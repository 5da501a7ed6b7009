package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	nodev1 "github.com/plastron/plastron/api/plastron/node/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// agentFilter is what list and count look for.
type agentFilter struct {
	selectors                         []string
	selectorsOn, attestation, expires string
	banned, canReattest               bool
}

// expiresBefore is the form of -expiresBefore and of the API.
const expiresBefore = "2006-01-02 15:04:05 -0700 -07"

func (f *agentFilter) addFlags(c *cobra.Command) {
	flags := c.Flags()
	flags.StringArrayVar(&f.selectors, "selector", nil, "`TYPE:VALUE` of the agent; may be given more than once")
	flags.StringVar(&f.selectorsOn, "matchSelectorsOn", "superset", "`MODE` of comparing selectors: exact, any, superset or subset")
	flags.StringVar(&f.attestation, "attestationType", "", "`NAME` of the attestor that admitted the agent, such as join_token")
	flags.BoolVar(&f.canReattest, "canReattest", false, "agents that can attest again by themselves; =false those that cannot")
	flags.BoolVar(&f.banned, "banned", false, "agents that are banned; =false those that are not")
	flags.StringVar(&f.expires, "expiresBefore", "", "agents whose certificate ends before `TIME`, written as \""+expiresBefore+"\"")
}

// list returns the filter as the API writes it, or nothing if nothing is asked.
func (f *agentFilter) list(c *cobra.Command) (*agentv1.ListAgentsRequest_Filter, error) {
	filter := &agentv1.ListAgentsRequest_Filter{ByAttestationType: f.attestation, ByExpiresBefore: f.expires}
	var err error
	if filter.BySelectorMatch, err = selectorMatch(c, f.selectors, f.selectorsOn); err != nil {
		return nil, err
	}
	if c.Flags().Changed("canReattest") {
		filter.ByCanReattest = wrapperspb.Bool(f.canReattest)
	}
	if c.Flags().Changed("banned") {
		filter.ByBanned = wrapperspb.Bool(f.banned)
	}
	if f.expires != "" {
		if _, err := time.Parse(expiresBefore, f.expires); err != nil {
			return nil, usage(c, "the value %q of -expiresBefore is not a time written as %q", f.expires, expiresBefore)
		}
	}
	return filter, nil
}

func (p *program) agentListCommand() *cobra.Command {
	c := &cobra.Command{Use: "list", Short: "List the agents that have joined, or those that fit"}
	var f agentFilter
	f.addFlags(c)
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		filter, err := f.list(c)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		found, err := listAgents(c.Context(), agentv1.NewAgentClient(conn), filter)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, found)
		}
		if len(found.GetAgents()) == 0 {
			_, err = fmt.Fprintln(p.stdout, "No attested agents found")
			return err
		}
		at := attachments(c.Context(), conn, found.GetAgents())
		fmt.Fprintf(p.stdout, "Found %s:\n\n", plural(len(found.GetAgents()), "attested agent", "attested agents"))
		for _, one := range found.GetAgents() {
			printAgent(p.stdout, one, at)
			fmt.Fprintln(p.stdout)
		}
		return nil
	}
	return c
}

// attachments says to which server each agent is attached, as far as the server that
// is asked knows such a thing.
func attachments(ctx context.Context, conn grpc.ClientConnInterface, agents []*spiretypes.Agent) map[string]string {
	at := map[string]string{}
	for part := range slices.Chunk(agents, 500) {
		req := &nodev1.AttachedRequest{}
		for _, one := range part {
			req.Agents = append(req.Agents, idText(one.GetId()))
		}
		reply, err := nodev1.NewNodeClient(conn).Attached(ctx, req)
		if err != nil {
			break // the list itself is what was asked for
		}
		for _, a := range reply.GetAgents() {
			at[a.GetAgent()] = a.GetServer()
		}
	}
	return at
}

// listAgents collects all pages.
func listAgents(ctx context.Context, client agentv1.AgentClient, filter *agentv1.ListAgentsRequest_Filter) (*agentv1.ListAgentsResponse, error) {
	found := &agentv1.ListAgentsResponse{}
	request := &agentv1.ListAgentsRequest{Filter: filter, PageSize: 500}
	for {
		page, err := client.ListAgents(ctx, request)
		if err != nil {
			return nil, err
		}
		found.Agents = append(found.Agents, page.GetAgents()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			return found, nil
		}
	}
}

func (p *program) agentCountCommand() *cobra.Command {
	c := &cobra.Command{Use: "count", Short: "Count the agents that have joined, or those that fit"}
	var f agentFilter
	f.addFlags(c)
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		filter, err := f.list(c)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := agentv1.NewAgentClient(conn).CountAgents(c.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
			ByAttestationType: filter.ByAttestationType, BySelectorMatch: filter.BySelectorMatch, ByBanned: filter.ByBanned,
			ByCanReattest: filter.ByCanReattest, ByExpiresBefore: filter.ByExpiresBefore,
		}})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		_, err = fmt.Fprintln(p.stdout, plural(int(reply.GetCount()), "attested agent", "attested agents"))
		return err
	}
	return c
}

func (p *program) agentShowCommand() *cobra.Command {
	var attached map[string]string
	return p.oneAgentCommand("show", "Show one agent", nil, func(ctx context.Context, conn grpc.ClientConnInterface, id *spiretypes.SPIFFEID) (proto.Message, error) {
		one, err := agentv1.NewAgentClient(conn).GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
		if err == nil {
			attached = attachments(ctx, conn, []*spiretypes.Agent{one})
		}
		return one, err
	}, func(reply proto.Message) {
		one := reply.(*spiretypes.Agent)
		fmt.Fprint(p.stdout, "Found an attested agent given its SPIFFE ID\n\n")
		printAgent(p.stdout, one, attached)
		for _, s := range one.GetSelectors() {
			agentLine(p.stdout, "Selectors", s.GetType()+":"+s.GetValue())
		}
	})
}

func (p *program) agentEvictCommand() *cobra.Command {
	return p.oneAgentCommand("evict", "Forget an agent, a ban included; it has to join anew", waitFlag, func(ctx context.Context, conn grpc.ClientConnInterface, id *spiretypes.SPIFFEID) (proto.Message, error) {
		return agentv1.NewAgentClient(conn).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
	}, func(proto.Message) { fmt.Fprintln(p.stdout, "Agent evicted successfully") })
}

func (p *program) agentBanCommand() *cobra.Command {
	return p.oneAgentCommand("ban", "Keep an agent out until it is unbanned or evicted", waitFlag, func(ctx context.Context, conn grpc.ClientConnInterface, id *spiretypes.SPIFFEID) (proto.Message, error) {
		return agentv1.NewAgentClient(conn).BanAgent(ctx, &agentv1.BanAgentRequest{Id: id})
	}, func(proto.Message) { fmt.Fprintln(p.stdout, "Agent banned successfully") })
}

func (p *program) agentUnbanCommand() *cobra.Command {
	c := p.oneAgentCommand("unban", "Let a banned agent attest again", waitFlag, func(ctx context.Context, conn grpc.ClientConnInterface, id *spiretypes.SPIFFEID) (proto.Message, error) {
		return nodev1.NewNodeClient(conn).Unban(ctx, &nodev1.UnbanRequest{Id: idText(id)})
	}, func(proto.Message) { fmt.Fprintln(p.stdout, "Agent unbanned successfully") })
	c.Long = `Lets a banned agent attest again. Nothing else of it is kept: no certificate and no
join token that it had counts any more, so it attests anew, by a new token or by
what its attestor proves. An agent that is not banned is refused.`
	return c
}

// oneAgentCommand is a verb on the one agent that -spiffeID names; waitFlag is nil
// for one that changes nothing.
func (p *program) oneAgentCommand(name, short string, waitFlag func(*pflag.FlagSet) *waiting,
	call func(context.Context, grpc.ClientConnInterface, *spiretypes.SPIFFEID) (proto.Message, error), show func(proto.Message)) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short}
	var text string
	wait := &waiting{}
	if waitFlag != nil {
		wait = waitFlag(c.Flags())
	}
	c.Flags().StringVar(&text, "spiffeID", "", "SPIFFE `ID` of the agent")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if text == "" {
			return usage(c, "-spiffeID is required")
		}
		id, err := wireID("-spiffeID", text)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := call(c.Context(), wait.over(conn), id)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			err = printJSON(p.stdout, reply)
		} else {
			show(reply)
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// purged is what purge says of one agent, and its JSON is SPIRE's.
type purged struct {
	ID      string `json:"agent_id"`
	Deleted bool   `json:"deleted"`
	Error   string `json:"error,omitempty"`
}

func (p *program) agentPurgeCommand() *cobra.Command {
	c := &cobra.Command{Use: "purge", Short: "Evict agents whose certificate ended long ago, as far as they can attest again by themselves and are not banned"}
	var expiredFor time.Duration
	var dryRun bool
	c.Flags().DurationVar(&expiredFor, "expiredFor", 30*24*time.Hour, "`TIME` that must have passed since the certificate's end")
	c.Flags().BoolVar(&dryRun, "dryRun", false, "only say which agents would go")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if expiredFor < 0 {
			return usage(c, "-expiredFor must not be negative")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := agentv1.NewAgentClient(conn)
		found, err := listAgents(c.Context(), client, &agentv1.ListAgentsRequest_Filter{
			ByCanReattest: wrapperspb.Bool(true), ByBanned: wrapperspb.Bool(false), // to evict a banned agent would let it in again
			ByExpiresBefore: time.Now().Add(-expiredFor).UTC().Format(expiresBefore),
		})
		if err != nil {
			return peer.fault(err)
		}
		all, failed := []purged{}, 0
		for _, one := range found.GetAgents() {
			row := purged{ID: idText(one.GetId())}
			if !dryRun {
				_, err := client.DeleteAgent(c.Context(), &agentv1.DeleteAgentRequest{Id: one.GetId()})
				if row.Deleted = err == nil; err != nil {
					row.Error, _ = fault.Words(peer.fault(err))
					failed++
				}
			}
			all = append(all, row)
		}
		if *out == asJSON {
			err = json.NewEncoder(p.stdout).Encode(map[string][]purged{"expired_agents": all})
		} else {
			err = printPurged(p.stdout, all, dryRun)
		}
		if err == nil && failed > 0 {
			return fault.New(fault.Invalid, "partly_failed", "%d of %d agents were not evicted", failed, len(all))
		}
		return err
	}
	return c
}

func printPurged(w io.Writer, all []purged, dryRun bool) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "No agents to purge.")
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "Found %s\n", plural(len(all), "expired agent", "expired agents"))
	block := func(title string, belongs func(purged) bool) {
		head := "\n" + title + ":\n"
		for _, one := range all {
			if !belongs(one) {
				continue
			}
			fmt.Fprintf(&text, "%s%-18s: %s\n", head, "SPIFFE ID", one.ID)
			if head = ""; one.Error != "" {
				fmt.Fprintf(&text, "%-18s: %s\n", "Error", one.Error)
			}
		}
	}
	block("Agents that can be purged", func(purged) bool { return dryRun })
	block("Agents purged", func(one purged) bool { return one.Deleted })
	block("Agents not purged", func(one purged) bool { return one.Error != "" })
	_, err := io.WriteString(w, text.String())
	return err
}

// printAgent prints an agent in SPIRE's form.
func printAgent(w io.Writer, a *spiretypes.Agent, attached map[string]string) {
	agentLine(w, "SPIFFE ID", idText(a.GetId()))
	agentLine(w, "Attestation type", a.GetAttestationType())
	agentLine(w, "Expiration time", time.Unix(a.GetX509SvidExpiresAt(), 0).UTC())
	if a.GetBanned() {
		agentLine(w, "Banned", true)
	} else {
		agentLine(w, "Serial number", a.GetX509SvidSerialNumber())
	}
	agentLine(w, "Can re-attest", a.GetCanReattest())
	if a.GetAgentVersion() != "" {
		agentLine(w, "Agent version", a.GetAgentVersion())
	}
	if server := attached[idText(a.GetId())]; server != "" && !a.GetBanned() {
		agentLine(w, "Attached to", "server "+server)
	}
}

func agentLine(w io.Writer, label string, value any) { fmt.Fprintf(w, "%-18s: %v\n", label, value) }
