package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	cutoffv1 "github.com/plastron/plastron/api/plastron/cutoff/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"
)

// caution is -yes and -dryRun of the commands that take something away.
type caution struct{ yes, dry bool }

func cautionFlags(flags *pflag.FlagSet) *caution {
	k := &caution{}
	flags.BoolVar(&k.yes, "yes", false, "do not ask; needed if standard input is no terminal")
	flags.BoolVar(&k.dry, "dryRun", false, "change nothing, only say what would be")
	return k
}

// ask lets go on only who says yes, after show has said what will happen.
func (k *caution) ask(p *program, show func() error) error {
	if k.yes || k.dry {
		return nil
	}
	nobody := fault.New(fault.Invalid, "usage", "nothing is changed: nobody can be asked, because standard input is no terminal").
		Fix("give -yes; -dryRun says before what it will do")
	if file, ok := p.stdin.(*os.File); ok {
		if info, err := file.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
			return nobody
		}
	}
	if err := show(); err != nil {
		return err
	}
	fmt.Fprint(p.stderr, "Go on? Write yes: ")
	switch answer, err := bufio.NewReader(p.stdin).ReadString('\n'); {
	case strings.TrimSpace(answer) == "yes":
		return nil
	case err != nil:
		return nobody
	}
	return fault.New(fault.Invalid, "not_confirmed", "nothing is changed: the answer was not yes")
}

// carryOut makes a call once there is a yes to it, or only shows what it would do, and
// shows what came of it. done: it was made, and agents can be waited for.
func (k *caution) carryOut(p *program, wait *waiting, out format, call func(dry bool) (proto.Message, error),
	show func(w io.Writer, reply proto.Message, dry bool)) (done bool, err error) {
	err = k.ask(p, func() error {
		reply, err := call(true)
		if err == nil {
			show(p.stderr, reply, true)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	wait.began = time.Now()
	reply, err := call(k.dry)
	if err != nil {
		return false, err
	}
	if out == asJSON {
		err = printJSON(p.stdout, reply)
	} else {
		show(p.stdout, reply, k.dry)
	}
	return !k.dry, err
}

func (p *program) serverRevokeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "revoke WHAT",
		Short: "Ban an agent or take a grant away, and say what of it lives on",
		Long: `Takes away WHAT: an agent, by its SPIFFE ID, which is banned; an entry or a rule, by its
id; or any other SPIFFE ID, of which all entries go that give exactly it. The change is
pushed: agents drop what they hold of it, and open streams say so.

What is signed is not recalled, it ends. So it says what of it lives on and until when, by
the records of the server that is asked, and for other servers by the longest that they
can have given; and what can still give the same identity, such as a rule.`,
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
		call := func(dry bool) (proto.Message, error) {
			reply, err := client.Revoke(c.Context(), &cutoffv1.RevokeRequest{What: args[0], DryRun: dry})
			return reply, peer.fault(err)
		}
		show := func(w io.Writer, reply proto.Message, dry bool) {
			printRevoked(w, reply.(*cutoffv1.RevokeResponse), dry, p.start)
		}
		done, err := care.carryOut(p, wait, *out, call, show)
		if !done {
			return err
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

func printRevoked(w io.Writer, r *cutoffv1.RevokeResponse, dry bool, now time.Time) {
	did := "Revoked"
	if dry {
		did = "Would revoke"
	}
	switch {
	case r.GetBannedBefore():
		fmt.Fprintf(w, "Banned already: the agent %s\n", r.GetAgent())
	case r.GetAgent() != "":
		fmt.Fprintf(w, "%s the agent %s: it is banned\n", did, r.GetAgent())
	}
	for _, g := range r.GetGrants() {
		fmt.Fprintf(w, "%s %s\n", did, grantText(g))
		if g.GetOwner() != "" {
			fmt.Fprintf(w, "  %s declares it: take it out of the file, or the next apply makes it again\n", g.GetOwner())
		}
	}
	for _, g := range r.GetRemaining() {
		fmt.Fprintf(w, "Still gives it: %s\n", grantText(g))
	}
	printAlive(w, r.GetAlive(), now)
}

// grantText names an entry or a rule in one line.
func grantText(g *cutoffv1.Grant) string {
	kind := "entry"
	if g.GetRule() {
		kind = "rule"
	}
	text := fmt.Sprintf("%s %s: %s, below %s", kind, g.GetId(), g.GetGives(), g.GetParentId())
	if g.GetAdmin() {
		text += ", admin"
	}
	if g.GetDownstream() {
		text += ", downstream"
	}
	return text
}

// printAlive says what was signed and has not ended.
func printAlive(w io.Writer, a *cutoffv1.Alive, now time.Time) {
	if a.GetUntil() == 0 {
		fmt.Fprintln(w, "Nothing that was signed is alive.")
		return
	}
	fmt.Fprintf(w, "What is signed is not recalled, it ends: the last %s\n", until(a.GetUntil(), now))
	if len(a.GetCredentials()) > 0 {
		table := tabwriter.NewWriter(w, 2, 0, 2, ' ', 0)
		fmt.Fprintln(table, "  KIND\tOF\tSERIAL OR JTI\tUNTIL")
		for _, c := range a.GetCredentials() {
			fmt.Fprintf(table, "  %s\t%s\t%s\t%s\n", kindText(c.GetKind()), c.GetSpiffeId(), cmp.Or(c.GetSerial(), c.GetJti(), "-"), until(c.GetExpiresAt(), now))
		}
		table.Flush()
		if more := int(a.GetRecorded()) - len(a.GetCredentials()); more > 0 {
			fmt.Fprintf(w, "  and %d more that end sooner\n", more)
		}
	}
	for _, e := range a.GetElsewhere() {
		why := "has its own records of what it signed"
		if e.GetWhy() != "" {
			why = "cannot tell all that it signed, because " + e.GetWhy()
		}
		fmt.Fprintf(w, "  Server %.8s %s: with lifetimes as here that ends until %s, in any case until %s\n",
			e.GetServer(), why, until(e.GetUntil(), now), until(e.GetNeverAfter(), now))
	}
}

func kindText(kind string) string {
	switch kind {
	case "agent":
		return "agent's SVID"
	case "x509":
		return "X.509-SVID"
	case "jwt":
		return "JWT-SVID"
	case "x509-ca":
		return "server's authority"
	}
	return kind
}
