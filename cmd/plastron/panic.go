package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

func (p *program) serverPanicCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "panic WHO",
		Short: "Cut off an agent or a server that is in wrong hands, and say what it could reach",
		Long: `Cuts off WHO is in wrong hands, and says what it could reach and when the last of what
it holds ends.

An agent, by its SPIFFE ID, is banned. A downstream server, by its SPIFFE ID, loses its
entries, and with them the right to another authority; the one that it has goes on.

A server that shares the store, by its id as 'server list' shows it or by that of one of
its authorities, is expelled, whether it is there or not: it signs no more, nothing that
it says counts, and its id never comes back. Its authorities are tainted, so that agents
replace within a minute what is under them, and are then revoked by whichever server is
there; with -now at once, and what has not been replaced is refused. Who has the store's
password can still write there: change it.`,
	}
	now := c.Flags().Bool("now", false, "of a server: revoke its authorities at once")
	care, wait := cautionFlags(c.Flags()), waitFlag(c.Flags())
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		server := !strings.HasPrefix(args[0], "spiffe://")
		if *now && !server {
			return usage(c, "-now is for servers that share the store")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := cutoffv1.NewCutoffClient(wait.over(conn))
		call := func(dry bool) (proto.Message, error) {
			if server {
				reply, err := client.Expel(c.Context(), &cutoffv1.ExpelRequest{Server: args[0], Now: *now, DryRun: dry})
				return reply, peer.fault(err)
			}
			reply, err := client.Panic(c.Context(), &cutoffv1.PanicRequest{What: args[0], DryRun: dry})
			return reply, peer.fault(err)
		}
		show := func(w io.Writer, reply proto.Message, dry bool) {
			switch r := reply.(type) {
			case *cutoffv1.ExpelResponse:
				printExpelled(w, r, *now, dry, p.start)
			case *cutoffv1.PanicResponse:
				printPanic(w, r, dry, p.start)
			}
		}
		done, err := care.carryOut(p, wait, *out, call, show)
		if !done {
			return err
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

func printPanic(w io.Writer, r *cutoffv1.PanicResponse, dry bool, now time.Time) {
	printRevoked(w, &cutoffv1.RevokeResponse{Agent: r.GetAgent(), BannedBefore: r.GetBannedBefore(), Grants: r.GetGrants(), Alive: r.GetAlive()}, dry, now)
	if r.GetAgent() == "" {
		fmt.Fprintln(w, "It could reach every ID of the trust domain: with an authority of its own it signs what it likes, until that ends.")
		for _, k := range r.GetPublished() {
			fmt.Fprintf(w, "  The JWT key %s may be its own, until %s\n", k.GetKeyId(), until(k.GetExpiresAt(), now))
		}
		return
	}
	fmt.Fprintf(w, "It could reach, besides its own ID, what %s:\n", plural(int(r.GetReached()), "grant gives", "grants give"))
	for _, g := range r.GetReach() {
		fmt.Fprintf(w, "  %s\n", grantText(g))
		switch {
		case g.GetDownstream():
			fmt.Fprintln(w, "    as a downstream server: with an authority of its own, every ID of the trust domain")
		case g.GetAdmin():
			fmt.Fprintln(w, "    as an administrator: whatever an operator can do")
		case g.GetRule():
			fmt.Fprintf(w, "    every ID that the template makes, under %s\n", g.GetPrefix())
		}
	}
	if more := int(r.GetReached()) - len(r.GetReach()); more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}

// printExpelled says what became of a server. now is of before it was asked for:
// what was to be revoked by then is, and so is what was asked to be at once.
func printExpelled(w io.Writer, r *cutoffv1.ExpelResponse, atOnce, dry bool, now time.Time) {
	did := "Expelled"
	switch {
	case r.GetExpelledBefore():
		did = "Expelled already:"
	case dry:
		did = "Would expel"
	}
	where := ""
	if r.GetHost() != "" {
		where = fmt.Sprintf(", %s on host %s", r.GetDataDir(), r.GetHost())
	}
	fmt.Fprintf(w, "%s the server %s (%s%s)\n", did, r.GetServer(), r.GetState(), where)
	upstream := false
	for _, k := range r.GetAuthorities() {
		fmt.Fprintf(w, "  %s authority %s, %s: what it signed ends %s\n", k.GetKind(), k.GetAuthorityId(), k.GetState(), until(k.GetLastExpiry(), now))
		upstream = upstream || k.GetUpstream()
	}
	switch {
	case len(r.GetAuthorities()) == 0:
		fmt.Fprintln(w, "It has no authority in the bundle: nothing that it signs is accepted.")
	case dry:
		fmt.Fprintf(w, "They would be tainted, and revoked %s\n", until(r.GetRevokeAt(), now))
	case !atOnce && r.GetRevokeAt() > now.Unix():
		fmt.Fprintf(w, "They are tainted, and will be revoked %s: until then agents replace what they signed\n", until(r.GetRevokeAt(), now))
	default:
		fmt.Fprintln(w, "They are revoked: whoever has the bundle of now accepts nothing of what they signed.")
	}
	if upstream {
		fmt.Fprintln(w, "An authority above signed or published some of them: its root stays. Below it they count until they end, unless it is tainted and revoked there.")
	}
	fmt.Fprintln(w, "It could reach every ID of the trust domain, and could change whatever is in the store.")
	for _, agent := range r.GetAgents() {
		fmt.Fprintf(w, "  attached to it, and told what it liked: %s\n", agent)
	}
	if more := int(r.GetAttached()) - len(r.GetAgents()); more > 0 {
		fmt.Fprintf(w, "  and %d more agents\n", more)
	}
	if n := int(r.GetDownstream()); n > 0 {
		fmt.Fprintf(w, "  %s of servers below end with them\n", plural(n, "authority", "authorities"))
	}
	for _, k := range r.GetPublished() {
		fmt.Fprintf(w, "  The JWT key %s, of no server here, may be its own, until %s\n", k.GetKeyId(), until(k.GetExpiresAt(), now))
	}
	fmt.Fprintln(w, "Change the store's password: who has it can still write there.")
}
