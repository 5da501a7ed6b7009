package main

import (
	"fmt"
	"io"
	"math/big"
	"strings"
	"text/tabwriter"
	"time"

	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/spf13/cobra"
)

func (p *program) ttlExplainCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "explain",
		Short: "Say how long what the server signs lives, and what limits it",
		Long: `Says of each kind of document how long one lives that is signed now, and what limits
it, the limit that counts first. Without a flag it does so for all that the server
signs, with -entryID for what one entry or rule grants.

With -serial it says what limited one certificate when it was signed. That is on record
with the server that signed it.`,
	}
	request := &lifetimev1.ExplainRequest{}
	c.Flags().StringVar(&request.EntryId, "entryID", "", "`ID` of an entry or a rule")
	serial := c.Flags().String("serial", "", "serial `NUMBER` of a certificate: decimal, or hexadecimal with 0x or colons")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		var err error
		if request.Serial, err = decimalSerial(*serial); err != nil {
			return err
		}
		if request.EntryId != "" && request.Serial != "" {
			return usage(c, "-entryID and -serial are two questions")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := lifetimev1.NewLifetimeClient(conn).Explain(c.Context(), request)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, got)
		}
		return printLifetimes(p.stdout, got, p.start)
	}
	return c
}

// decimalSerial reads a serial number as tools print them.
func decimalSerial(text string) (string, error) {
	digits, base := strings.ReplaceAll(text, ":", ""), 10
	if hex, ok := strings.CutPrefix(strings.ToLower(digits), "0x"); ok {
		digits, base = hex, 16
	} else if digits != text {
		base = 16
	}
	n, ok := new(big.Int).SetString(digits, base)
	switch {
	case text == "":
		return "", nil
	case !ok || n.Sign() <= 0:
		return "", fault.New(fault.Invalid, "usage", "the value of -serial must be a positive number: decimal, or hexadecimal with 0x or colons")
	}
	return n.String(), nil
}

func printLifetimes(w io.Writer, got *lifetimev1.ExplainResponse, now time.Time) error {
	if i := got.GetIssued(); i != nil {
		printIssued(w, i, now)
		if len(got.GetDocuments()) == 0 {
			return nil
		}
		fmt.Fprint(w, "\nSigned now:\n\n")
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "DOCUMENT\tLIVES\tLIMITED BY")
	for _, d := range got.GetDocuments() {
		what := documentText(d.GetKind())
		for _, l := range d.GetLimits() {
			life := time.Duration(l.GetLifeMs()) * time.Millisecond
			text := lifetime.Text(life)
			if life == 0 {
				text = roughly(time.Unix(l.GetEndsAt(), 0).Sub(now))
			}
			fmt.Fprintf(table, "%s\t%s\t%s\n", what, text, limitText(l, got))
			what = ""
		}
	}
	return table.Flush()
}

func printIssued(w io.Writer, i *lifetimev1.Issued, now time.Time) {
	fmt.Fprintf(w, "%s %s of %s\n", documentText(i.GetKind()), i.GetSerial(), i.GetSpiffeId())
	signed := since(i.GetSignedAt(), now)
	if i.GetCaller() != i.GetSpiffeId() {
		signed += ", for " + i.GetCaller()
	}
	fmt.Fprintf(w, "  signed: %s\n", signed)
	fmt.Fprintf(w, "  ends: %s, %s after that\n", until(i.GetEndsAt(), now), lifetime.Text(time.Duration(i.GetEndsAt()-i.GetSignedAt())*time.Second))
	limit := "not on record"
	if i.GetLimit() != "" {
		limit = limitText(&lifetimev1.Limit{Name: i.GetLimit(), EndsAt: i.GetEndsAt()}, nil)
	}
	fmt.Fprintf(w, "  limited by: %s\n", limit)
	switch {
	case i.GetEntryId() == "":
	case i.GetRevisionNow() == 0:
		fmt.Fprintf(w, "  granted by: %s, which is gone\n", i.GetEntryId())
	case i.GetRevisionNow() != i.GetRevision():
		fmt.Fprintf(w, "  granted by: %s, which has changed since\n", i.GetEntryId())
	default:
		fmt.Fprintf(w, "  granted by: %s\n", i.GetEntryId())
	}
}

func documentText(kind string) string {
	switch kind {
	case "x509":
		return "X.509-SVID"
	case "jwt":
		return "JWT-SVID"
	case "agent":
		return "agent's certificate"
	case "agent_reattest":
		return "the same, of an agent that proves its node again"
	case "server":
		return "server's certificate"
	case "ca":
		return "server's authority"
	case "downstream":
		return "authority of a server below"
	}
	return kind
}

// limitText says in words what a limit is. With what it is from it knows the promise.
func limitText(l *lifetimev1.Limit, from *lifetimev1.ExplainResponse) string {
	end := time.Unix(l.GetEndsAt(), 0).UTC().Format(time.RFC3339)
	switch l.GetName() {
	case "default":
		return "the built-in default"
	case "survive_outage":
		if from == nil {
			return "survive_outage"
		}
		return "survive_outage = " + lifetime.Text(time.Duration(from.GetSurviveOutageMs())*time.Millisecond)
	case "x509_svid_ttl", "jwt_svid_ttl":
		return "the entry's " + l.GetName()
	case "requested":
		return "what was asked for"
	case "entry_expiry":
		return "the entry, which ends " + end
	case "authority_end":
		return "the authority that signs, which ends " + end
	case "upstream_end":
		return "a certificate above the authority, which ends " + end
	}
	return "server." + l.GetName()
}
