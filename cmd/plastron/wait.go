package main

import (
	"context"
	"fmt"
	"time"

	receiptv1 "github.com/plastron/plastron/api/plastron/receipt/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// maxWait is the longest -wait that a server takes.
const maxWait = 10 * time.Minute

// waiting is -wait: it collects what the calls of a command changed and, in the
// end, waits for the agents that this affects.
type waiting struct {
	within   time.Duration
	began    time.Time
	receipts []string
}

func waitFlag(flags *pflag.FlagSet) *waiting {
	w := &waiting{}
	flags.Var(w, "wait", "`TIME` to wait for the agents that the change affects to hold it, such as 10s; if some do not by then, the exit status is 3")
	return w
}

func (w *waiting) String() string { return w.within.String() }
func (w *waiting) Type() string   { return "TIME" }

func (w *waiting) Set(s string) (err error) {
	w.within, err = time.ParseDuration(s)
	if err != nil || w.within < time.Millisecond || w.within > maxWait {
		return fault.New(fault.Invalid, "usage", "write a time from 1ms to 10m, such as 10s")
	}
	return nil
}

// over returns the connection through which the changes are to be made.
func (w *waiting) over(conn grpc.ClientConnInterface) grpc.ClientConnInterface {
	w.began = time.Now()
	return collecting{conn, w}
}

type collecting struct {
	grpc.ClientConnInterface
	w *waiting
}

// Invoke implements grpc.ClientConnInterface.
func (c collecting) Invoke(ctx context.Context, method string, request, reply any, opts ...grpc.CallOption) error {
	var trailer metadata.MD
	err := c.ClientConnInterface.Invoke(ctx, method, request, reply, append(opts, grpc.Trailer(&trailer))...)
	c.w.receipts = append(c.w.receipts, trailer.Get("plastron-receipt")...)
	return err
}

// finish ends a command that changed something, or failed to, with failed. It
// waits for what was changed all the same.
func (w *waiting) finish(c *cobra.Command, p *program, conn grpc.ClientConnInterface, at peer, out format, failed error) error {
	if w.within == 0 || failed != nil && len(w.receipts) == 0 {
		return failed
	}
	reply, err := w.ask(c.Context(), conn)
	if err != nil {
		err = about("the change is made, but whether it is in force is not known", at.fault(err))
	} else if out == asJSON {
		err = printJSON(p.stdout, reply)
	} else {
		err = w.print(p, reply)
	}
	if lagging := reply.GetAffected() - reply.GetInForce(); err == nil && lagging > 0 {
		err = fault.New(fault.Unavailable, "not_in_force", "the change is made, but after %s it is not in force on %d of %s",
			w.within, lagging, plural(int(reply.GetAffected()), "agent", "agents")).
			Fix("an agent that is not attached gets the change when it comes back; wait longer for one that is behind")
	}
	if err == nil {
		return failed
	}
	p.report(err)
	if failed != nil {
		return failed
	}
	return exitStatus(exitNotInForce)
}

func (w *waiting) ask(ctx context.Context, conn grpc.ClientConnInterface) (*receiptv1.WaitResponse, error) {
	return receiptv1.NewReceiptClient(conn).Wait(ctx, &receiptv1.WaitRequest{Receipts: w.receipts, WithinMs: w.within.Milliseconds()})
}

func (w *waiting) print(p *program, reply *receiptv1.WaitResponse) error {
	if reply.GetAffected() == 0 {
		_, err := fmt.Fprintln(p.stdout, "no agent is affected")
		return err
	}
	took := time.Since(w.began)
	text := fmt.Sprintf("%d ms", took.Milliseconds())
	if took >= 10*time.Second {
		text = fmt.Sprintf("%.1f s", took.Seconds())
	}
	fmt.Fprintf(p.stdout, "in force on %d/%s, %s\n", reply.GetInForce(), plural(int(reply.GetAffected()), "agent", "agents"), text)
	for _, l := range reply.GetLaggards() {
		why := fmt.Sprintf("behind, at server %.8s", l.GetServer())
		if l.GetReason() == receiptv1.Laggard_REASON_NOT_ATTACHED {
			why = "not attached"
		}
		fmt.Fprintf(p.stdout, "not in force on %s (%s)\n", l.GetAgent(), why)
	}
	return nil
}
