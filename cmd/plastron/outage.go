package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/spf13/cobra"
)

func (p *program) serverOutageCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "outage",
		Short: "Say what would end first, and when, if all servers were gone from now on",
		Long: `Says which X.509-SVID, which JWT-SVID and which agent's certificate would end first, and
when, if all servers were gone from now on, and of how many agents it does not know. What
ends in any case, with its entry or because nobody asks for it any more, does not count.`,
	}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := lifetimev1.NewLifetimeClient(conn).Outage(c.Context(), &lifetimev1.OutageRequest{})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, got)
		}
		return printOutage(p.stdout, got)
	}
	return c
}

func printOutage(w io.Writer, got *lifetimev1.OutageResponse) error {
	now := time.UnixMilli(got.GetNowMs())
	ends := map[string]*lifetimev1.End{}
	for _, e := range got.GetFirst() {
		ends[e.GetKind()] = e
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "FIRST TO END\tWHEN\tID")
	for _, kind := range []string{"x509", "jwt", "agent"} {
		e := ends[kind]
		if e == nil {
			fmt.Fprintf(table, "%s\t-\t-\n", documentText(kind))
			continue
		}
		id := e.GetSpiffeId()
		if e.GetAgentId() != id {
			id += ", at " + e.GetAgentId()
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", documentText(kind), until(e.GetAtMs()/1000, now), id)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if promise := time.Duration(got.GetSurviveOutageMs()) * time.Millisecond; promise > 0 {
		fmt.Fprintf(w, "Promised is %s (survive_outage): %s.\n", lifetime.Text(promise), promiseText(got, promise))
	}
	known := got.GetAgents() - got.GetPolling() - got.GetAway() - got.GetSilent()
	fmt.Fprintf(w, "Agents with a certificate: %d. What they hold is known of %d.\n", got.GetAgents(), known)
	for _, unknown := range []struct {
		n    uint32
		text string
	}{
		{got.GetPolling(), "polling: they ask now and then, as SPIRE's do, and cannot say it"},
		{got.GetAway(), "away: attached to no server"},
		{got.GetSilent(), "silent: attached, and have not said it yet"},
	} {
		if unknown.n > 0 {
			fmt.Fprintf(w, "  %d %s\n", unknown.n, unknown.text)
		}
	}
	if e := got.GetFirstAway(); e != nil {
		fmt.Fprintf(w, "Of those that are away %s ends first, %s.\n", e.GetSpiffeId(), until(e.GetAtMs()/1000, now))
	}
	return nil
}

// promiseText says whether what is promised is so at this moment.
func promiseText(got *lifetimev1.OutageResponse, promise time.Duration) string {
	for _, e := range got.GetFirst() {
		if left := time.Duration(e.GetAtMs()-got.GetNowMs()) * time.Millisecond; left < promise {
			return fmt.Sprintf("broken, of the first %s %s is left", documentText(e.GetKind()), roughly(left))
		}
	}
	return "kept"
}
