package main

import (
	"cmp"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
)

func (p *program) authorityStatusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "Say what state the signing keys of all servers are in, and what happens next",
		Long: `Says of each server, and each kind of key, what state its keys are in, when the last
document under each ends, what happens next and when, and who has not acknowledged the
bundle that holds a prepared key.`,
	}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := authorityv1.NewAuthorityClient(conn).Status(c.Context(), &authorityv1.StatusRequest{})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, got)
		}
		return printAuthorities(p.stdout, got, p.start)
	}
	return c
}

func printAuthorities(w io.Writer, got *authorityv1.StatusResponse, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "SERVER\tKIND\tAUTHORITY\tSTATE\tLAST DOCUMENT ENDS")
	for _, l := range got.GetLines() {
		for _, k := range l.GetKeys() {
			state, last := k.GetState(), "-"
			switch {
			case k.GetTainted():
				state += ", tainted"
			case !k.GetPublished() && state != "intended":
				state += ", not in the bundle"
			}
			if k.GetUnready() > 0 {
				state += fmt.Sprintf(", went on without %d", k.GetUnready())
			}
			if k.GetLastExpiry() != 0 {
				last = until(k.GetLastExpiry(), now)
			}
			fmt.Fprintf(table, "%.8s\t%s\t%s\t%s\t%s\n", l.GetServer(), l.GetKind(), cmp.Or(k.GetAuthorityId(), "-"), state, last)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, l := range got.GetLines() {
		fmt.Fprintf(w, "\n%.8s %s: ", l.GetServer(), l.GetKind())
		switch {
		case l.GetFault() != "":
			fmt.Fprintln(w, l.GetFault())
		case l.GetNext() == "":
			fmt.Fprintln(w, "nothing is due")
		case l.GetUnacknowledged() > 0:
			fmt.Fprintf(w, "the prepared key waits for %d who have not acknowledged it, until %s at the latest\n", l.GetUnacknowledged(), until(l.GetNextAt(), now))
		default:
			fmt.Fprintf(w, "%s: %s\n", nextText(l.GetNext()), until(l.GetNextAt(), now))
		}
		printWaiting(w, l.GetWaiting(), int(l.GetUnacknowledged()), now)
	}
	return nil
}

func printWaiting(w io.Writer, waiting []*authorityv1.Waiting, all int, now time.Time) {
	for _, m := range waiting {
		fmt.Fprintf(w, "  %s", m.GetId())
		switch {
		case m.GetByTime():
			fmt.Fprint(w, ", which asks now and then")
		case m.GetServer() != "":
			fmt.Fprintf(w, ", attached to %.8s", m.GetServer())
		default:
			fmt.Fprint(w, ", away")
		}
		if m.GetUntil() != 0 {
			fmt.Fprintf(w, ", its certificate ends %s", until(m.GetUntil(), now))
		}
		fmt.Fprintln(w)
	}
	if more := all - len(waiting); more > 0 && len(waiting) > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}

// nextText says in words what a rule of the machine does.
func nextText(rule string) string {
	switch rule {
	case "intend", "make", "publish":
		return "the next key is prepared"
	case "ready":
		return "the prepared key is ready"
	case "activate":
		return "the prepared key signs"
	case "retire":
		return "the active key ends"
	case "drop":
		return "the prepared key is given up"
	case "prune":
		return "the old key leaves the bundle"
	}
	return rule
}

func (p *program) authorityRotateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate KIND",
		Short: "Replace the server's active x509 or jwt authority",
		Long: `Replaces the server's active authority of KIND, x509 or jwt: prepares another, unless
one is prepared, and lets it sign once all agents and servers have acknowledged it.

With -force it signs at once, and those who were not ready are listed: until they have
the bundle, they refuse what it signs.`,
	}
	force := c.Flags().Bool("force", false, "do not wait for those who have not acknowledged the key")
	within := c.Flags().Duration("wait", 20*time.Second, "`TIME` to wait for acknowledgements, 10m at most")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		if *within < 0 || *within > maxWait {
			return fault.New(fault.Invalid, "usage", "the value of -wait must be between 0 and 10m")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := authorityv1.NewAuthorityClient(conn).Rotate(c.Context(), &authorityv1.RotateRequest{
			Kind: args[0], Force: *force, WithinMs: within.Milliseconds(),
		})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		fmt.Fprintf(p.stdout, "The %s authority %s signs, until %s.\n", args[0], reply.GetActive().GetAuthorityId(), until(reply.GetActive().GetNotAfter(), p.start))
		if n := int(reply.GetUnreadyCount()); n > 0 {
			fmt.Fprintf(p.stdout, "Not ready: %d.\n", n)
			printWaiting(p.stdout, reply.GetUnready(), n, p.start)
		}
		return nil
	}
	return c
}
