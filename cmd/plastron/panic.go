package main

import (
	"fmt"
	"io"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/spf13/cobra"
)

func (p *program) serverPanicCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "panic WHO",
		Short: "Cut off an agent or a server that is in wrong hands, and say what it could reach",
		Long: `Cuts off WHO is in wrong hands, and says what it could reach and when the last of what
it holds ends.

An agent, by its SPIFFE ID, is banned. A downstream server, by its SPIFFE ID, loses its
entries, and with them the right to another authority; the one that it has goes on.`,
	}
	care, wait := cautionFlags(c.Flags()), waitFlag(c.Flags())
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := cutoffv1.NewCutoffClient(wait.over(conn))
		call := func(dry bool) (*cutoffv1.PanicResponse, error) {
			reply, err := client.Panic(c.Context(), &cutoffv1.PanicRequest{What: args[0], DryRun: dry})
			return reply, peer.fault(err)
		}
		err = care.ask(p, func() error {
			reply, err := call(true)
			if err == nil {
				printPanic(p.stderr, reply, true, p.start)
			}
			return err
		})
		if err != nil {
			return err
		}
		wait.began = time.Now()
		reply, err := call(care.dry)
		if err != nil {
			return err
		}
		if *out == asJSON {
			err = printJSON(p.stdout, reply)
		} else {
			printPanic(p.stdout, reply, care.dry, p.start)
		}
		if care.dry {
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
