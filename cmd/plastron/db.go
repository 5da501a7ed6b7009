package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	storev1 "github.com/plastron/plastron/api/plastron/store/v1"
	"github.com/plastron/plastron/internal/server"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/upkeep"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
)

// wholeStore is how long a command waits that reads all of a store.
const wholeStore = 10 * time.Minute

const dbHow = `

The server at the admin socket is asked. If none answers there, the store is opened as
-config says and the work is done here: run it as the server's user then, on the
server's machine.`

// database is a store that a command works on: through the server that runs on
// it, or else by itself.
type database struct {
	p    *program
	cfg  *server.Config
	file *configFile
	load func() error
	at   *socket
	out  *format
}

func (p *program) database(c *cobra.Command) *database {
	d := &database{p: p, cfg: new(server.Config), file: newConfigFile(c, "conf/server/server.conf"), at: serverSocketFlags(c.Flags()), out: outputFlag(c.Flags())}
	*d.cfg = server.Default()
	d.load = func() error { return d.file.load(d.cfg, d.cfg.Validate) }
	return d
}

// do runs online if a server answers, and offline if none does and the
// configuration is known.
func (d *database) do(c *cobra.Command, online func(storev1.StoreClient) error, offline func() error) error {
	configured := c.Flags().Changed("config")
	if _, err := os.Stat(d.file.path); err == nil {
		configured = true
	}
	if configured {
		if err := d.load(); err != nil {
			return err
		}
		if d.at.path == "" && d.at.instance == "" && c.Flags().Changed("config") {
			d.at.path = d.cfg.Server.SocketPath
		}
	}
	path, err := d.at.find()
	if err != nil {
		return err
	}
	if err := probe(c.Context(), path); err != nil && configured && !errors.Is(err, fs.ErrPermission) {
		return withCauses(offline())
	}
	conn, peer, err := d.at.dial(c.Context())
	if err != nil {
		return err
	}
	defer conn.Close()
	return peer.fault(online(storev1.NewStoreClient(conn)))
}

// quietLog shows what goes wrong with a store that is opened here.
func (p *program) quietLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func (p *program) dbCheckCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "check",
		Short: "Prove that the store, its log and the audit trail hold together",
		Long: `Reads the whole store, its log and this server's audit trail, and says what is wrong
with them, a line for each fault with what to do. Remarks are what is odd and may be as
it should. The exit status is 0 if there is no fault, 1 otherwise.

-repair mends what needs no decision, which are the rows that keep two entries from
having the same parent, ID and selectors. Each is an ordinary change, on record with
who asked for it. Then all is checked again.` + dbHow,
	}
	d := p.database(c)
	var repair bool
	c.Flags().BoolVar(&repair, "repair", false, "mend what needs no decision")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, cancel := contextWithTimeout(c, wholeStore)
		defer cancel()
		var got *storev1.CheckReply
		by := "no server answers, so this program has checked"
		err := d.do(c, func(client storev1.StoreClient) (err error) {
			by = "the running server has checked"
			got, err = client.Check(ctx, &storev1.CheckRequest{Repair: repair}, grpc.MaxCallRecvMsgSize(64<<20))
			return err
		}, func() error {
			open, caller := server.Offline, ""
			if repair {
				open, caller = server.OfflineRepair, "operator"
			}
			return open(ctx, *d.cfg, p.quietLog(), func(u *upkeep.Upkeep) error {
				r, err := u.Check(ctx, caller)
				if err == nil {
					got = serverapi.CheckReply(r)
				}
				return err
			})
		})
		if err != nil {
			return err
		}
		if *d.out == asJSON {
			err = printJSON(p.stdout, got)
		} else {
			err = printCheck(p.stdout, got, by)
		}
		if err == nil && got.GetFaults() > 0 {
			return exitStatus(exitFailed)
		}
		return err
	}
	return c
}

func printCheck(w io.Writer, r *storev1.CheckReply, by string) error {
	lines := []string{fmt.Sprintf("%s %s at %s: %d rows, %d batches of the log, %d records of the audit trail",
		by, r.GetEngine(), storePositionText(r.GetPosition()), r.GetRows(), r.GetBatches(), r.GetRecords())}
	for _, d := range r.GetRepaired() {
		lines = append(lines, "repaired: "+defectText(d))
	}
	for _, d := range r.GetDefects() {
		kind := "fault: "
		if d.GetRemark() {
			kind = "remark: "
		}
		lines = append(lines, kind+defectText(d))
	}
	if r.GetMore() > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", r.GetMore()))
	}
	remarks := uint64(len(r.GetDefects())) + r.GetMore() - r.GetFaults()
	lines = append(lines, fmt.Sprintf("%d faults, %d remarks, %d repaired", r.GetFaults(), remarks, len(r.GetRepaired())))
	_, err := fmt.Fprintln(w, strings.Join(lines, "\n"))
	return err
}

func defectText(d *storev1.Defect) string {
	text := d.GetCode() + ": "
	if d.GetKey() != "" {
		text += d.GetKey() + ": "
	}
	text += d.GetFound()
	if d.GetFix() != "" {
		text += ". To do: " + d.GetFix()
	}
	return text
}

func storePositionText(p *storev1.Position) string {
	return fmt.Sprintf("%.8s:%d", p.GetEpoch(), p.GetRevision())
}

func (p *program) dbStatsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "stats",
		Short: "Measure the store: its size, what is in it, its log",
		Long:  `Measures the store: its size, what is in it, and how long its log is. It reads all of it.` + dbHow,
	}
	d := p.database(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, cancel := contextWithTimeout(c, wholeStore)
		defer cancel()
		var got *storev1.StoreStats
		err := d.do(c, func(client storev1.StoreClient) (err error) {
			got, err = client.Stats(ctx, &storev1.StatsRequest{})
			return err
		}, func() error {
			return server.Offline(ctx, *d.cfg, p.quietLog(), func(u *upkeep.Upkeep) error {
				s, err := u.Stats(ctx)
				if err == nil {
					got = serverapi.StoreStats(s)
				}
				return err
			})
		})
		switch {
		case err != nil:
			return err
		case *d.out == asJSON:
			return printJSON(p.stdout, got)
		}
		return printStats(p.stdout, got, p.start)
	}
	return c
}

func printStats(w io.Writer, s *storev1.StoreStats, now time.Time) error {
	rows := facts{{"Engine", s.GetEngine()}, {"On disk", bytesText(s.GetBytes())}, {"Epoch", s.GetEnd().GetEpoch()},
		{"Newest revision", fmt.Sprint(s.GetEnd().GetRevision())}, {"Compacted up to", fmt.Sprint(s.GetBegin().GetRevision())},
		{"Log", fmt.Sprintf("%d batches", s.GetBatches())}}
	if s.GetOldest() != 0 {
		rows.add("Log since", since(s.GetOldest(), now))
	}
	if s.GetStartedAt() != 0 {
		up := max(now.Sub(time.Unix(s.GetStartedAt(), 0)), time.Second)
		rows.add("Commits", fmt.Sprintf("%d since the server's start, %.3g a second", s.GetCommits(), float64(s.GetCommits())/up.Seconds()))
	}
	if err := rows.print(w); err != nil {
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "KIND\tROWS\tBYTES")
	for _, k := range s.GetKinds() {
		fmt.Fprintf(table, "%s\t%d\t%d\n", k.GetName(), k.GetRows(), k.GetBytes())
	}
	return table.Flush()
}

func (p *program) dbCompactCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "compact",
		Short: "Drop old batches of the store's log now",
		Long: `Drops old batches of the store's log. What is registered stays; a server that was away
for longer than the log reaches back loads everything once. Servers do this by
themselves, with the same bounds.` + dbHow,
	}
	d := p.database(c)
	var keep uint64
	var age time.Duration
	c.Flags().Uint64Var(&keep, "keep", upkeep.KeepBatches, "`NUMBER` of batches that stay in any case")
	c.Flags().DurationVar(&age, "age", upkeep.KeepAge, "`TIME` for which a batch stays in any case, such as 10m")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if age < 0 || age%time.Second != 0 {
			return usage(c, "-age must be whole seconds and not negative")
		}
		ctx, cancel := contextWithTimeout(c, wholeStore)
		defer cancel()
		var got *storev1.CompactReply
		err := d.do(c, func(client storev1.StoreClient) (err error) {
			got, err = client.Compact(ctx, &storev1.CompactRequest{Keep: keep, AgeSeconds: int64(age / time.Second)})
			return err
		}, func() error {
			return server.Offline(ctx, *d.cfg, p.quietLog(), func(u *upkeep.Upkeep) error {
				at, err := u.Compact(ctx, keep, age)
				got = &storev1.CompactReply{Begin: &storev1.Position{Epoch: fmt.Sprintf("%x", at.Epoch[:]), Revision: at.Revision}}
				return err
			})
		})
		switch {
		case err != nil:
			return err
		case *d.out == asJSON:
			return printJSON(p.stdout, got)
		}
		_, err = fmt.Fprintf(p.stdout, "The log is compacted up to revision %d.\n", got.GetBegin().GetRevision())
		return err
	}
	return c
}
