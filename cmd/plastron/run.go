package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (p *program) runCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command that needs an identity, if need be from files",
		Long: `Waits until the Workload API has an identity for this process, then runs the
command with SPIFFE_ENDPOINT_SOCKET set. It passes on signals and ends with the
command's status, 128+N if signal N ended it.

With -files the command needs no SPIFFE library: the directory gets svid.pem (the
certificate and its intermediates), key.pem and bundle.pem, all three replaced
at once whenever they are renewed. The identity in the files is that of plastron
run itself, not of the command. When it is withdrawn, the files stay unless
-withdrawn says otherwise; what they hold is good until it ends.`,
	}
	var dir string
	var want choice
	var timeout time.Duration
	withdrawn := keepFiles
	c.Flags().StringVar(&dir, "files", "", "`DIR` to keep svid.pem, key.pem and bundle.pem in")
	c.Flags().StringVar(&want.id, "spiffeID", "", "SPIFFE `ID` of the identity for the files, if there are several")
	c.Flags().StringVar(&want.hint, "hint", "", "`TEXT` of the hint of the identity for the files, if there are several")
	c.Flags().Var(&withdrawn, "withdrawn", "`WHAT` becomes of the files when the identity in them is withdrawn: keep or remove; they come back with it")
	c.Flags().DurationVar(&timeout, "timeout", 0, "`TIME` to wait for the first identity; otherwise without end")
	at := agentSocketFlags(c.Flags())
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(c *cobra.Command, argv []string) error {
		if len(argv) == 0 {
			return fault.New(fault.Invalid, "usage", "there is no command to run").Fix("write it after --, such as plastron run -- env")
		}
		if want != (choice{}) && dir == "" {
			return usage(c, "-spiffeID and -hint choose what is in the files, so they need -files")
		}
		if c.Flags().Changed("withdrawn") && dir == "" {
			return usage(c, "-withdrawn is about the files, so it needs -files")
		}
		if want.id != "" {
			if _, err := wireID("-spiffeID", want.id); err != nil {
				return err
			}
		}
		path, err := at.find()
		if err != nil {
			return err
		}
		var files *filesDir
		if dir != "" {
			if files, err = openFilesDir(dir); err != nil {
				return err
			}
			defer files.Close()
		}
		ctx, cancel := context.WithCancel(c.Context())
		defer cancel()
		w := p.watch(context.WithoutCancel(ctx), path)
		defer w.Close()
		if timeout > 0 {
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		first, err := w.first(ctx, at.peer(path), p.stderr)
		if err != nil {
			return err
		}
		if files != nil {
			svid, err := want.from(first.SVIDs)
			if err != nil {
				return err
			}
			if err := files.write(svid, first.Bundles); err != nil {
				return err
			}
			fmt.Fprintf(p.stderr, "plastron: the files in %s carry %s, the identity of plastron run (pid %d) itself, and are renewed before %s\n",
				dir, svid.ID, os.Getpid(), svid.Certificates[0].NotAfter.Local().Format(time.TimeOnly))
			kept := make(chan struct{})
			go func() {
				defer close(kept)
				p.keep(w, files, svid, withdrawn)
			}()
			defer func() {
				w.Close()
				<-kept
			}()
		}
		return p.supervise(argv, append(os.Environ(), workloadapi.SocketEnv+"=unix://"+path), nil)
	}
	return c
}

// onWithdrawal is the value of -withdrawn.
type onWithdrawal string

const (
	keepFiles   onWithdrawal = "keep"
	removeFiles onWithdrawal = "remove"
)

func (o *onWithdrawal) String() string { return string(*o) }
func (o *onWithdrawal) Type() string   { return "WHAT" }

func (o *onWithdrawal) Set(s string) error {
	if s != string(keepFiles) && s != string(removeFiles) {
		return fault.New(fault.Invalid, "usage", "there are keep and remove")
	}
	*o = onWithdrawal(s)
	return nil
}

// keep renews the files that hold an SVID until the watch ends. An agent that
// cannot be reached withdraws nothing; one that answers without the identity does.
func (p *program) keep(w *watch, files *filesDir, svid *x509svid.SVID, withdrawn onWithdrawal) {
	which, gone := choice{id: svid.ID.String(), hint: svid.Hint}, false
	for {
		var err error
		select {
		case next, open := <-w.updates:
			if !open {
				return
			}
			var now *x509svid.SVID
			if now, err = which.from(next.SVIDs); err == nil {
				if err = files.write(now, next.Bundles); err != nil { // the command goes on with the files that are there
					p.report(about("the files are not renewed", err))
				} else if svid = now; gone {
					fmt.Fprintf(p.stderr, "plastron: %s is back in the files\n", which.id)
					gone = false
				}
				continue
			}
		case err = <-w.errors:
			if status.Code(err) != codes.PermissionDenied {
				continue
			}
		}
		if gone {
			continue
		}
		gone = true
		if withdrawn == keepFiles {
			fmt.Fprintf(p.stderr, "plastron: %s is withdrawn; the files in %s stay and are good until %s\n",
				which.id, files.dir, svid.Certificates[0].NotAfter.Local().Format(time.DateTime))
		} else if err := files.clear(); err != nil {
			p.report(about("the files of a withdrawn identity are not all removed", err))
		} else {
			fmt.Fprintf(p.stderr, "plastron: %s is withdrawn; the files in %s are removed\n", which.id, files.dir)
		}
	}
}

// choice says which of several identities is meant.
type choice struct{ id, hint string }

// from returns the only identity that fits.
func (c choice) from(svids []*x509svid.SVID) (*x509svid.SVID, error) {
	var fit []*x509svid.SVID
	var list strings.Builder
	for _, svid := range svids {
		fmt.Fprintf(&list, "\n    %s", svid.ID)
		if svid.Hint != "" {
			fmt.Fprintf(&list, " (hint %q)", svid.Hint)
		}
		if (c.id == "" || svid.ID.String() == c.id) && (c.hint == "" || svid.Hint == c.hint) {
			fit = append(fit, svid)
		}
	}
	switch {
	case len(fit) == 1:
		return fit[0], nil
	case len(fit) == 0:
		return nil, fault.New(fault.Invalid, "identity_absent", "this process has no such identity, but:%s", list.String()).
			Fix("give one of these with -spiffeID")
	}
	return nil, fault.New(fault.Invalid, "identity_ambiguous", "this process has several identities:%s", list.String()).
		Fix("say with -spiffeID or -hint which one the files shall carry")
}

// watch follows the Workload API.
type watch struct {
	updates chan *workloadapi.X509Context // the newest only
	errors  chan error                    // likewise
	cancel  context.CancelFunc
	done    chan struct{}
}

// watch starts to follow the Workload API at a socket, and tries again for as
// long as it is not there.
func (p *program) watch(ctx context.Context, path string) *watch {
	ctx, cancel := context.WithCancel(ctx)
	w := &watch{updates: make(chan *workloadapi.X509Context, 1), errors: make(chan error, 1), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		defer close(w.updates)
		err := workloadapi.WatchX509Context(ctx, w, workloadapi.WithAddr("unix://"+path), workloadapi.WithBackoffStrategy(&patience{}))
		w.OnX509ContextWatchError(err)
	}()
	return w
}

// Close ends the watch.
func (w *watch) Close() {
	w.cancel()
	<-w.done
}

// OnX509ContextUpdate takes in what the Workload API sends. Why it sent nothing
// before does not matter any more.
func (w *watch) OnX509ContextUpdate(next *workloadapi.X509Context) {
	drain(w.errors)
	drain(w.updates)
	w.updates <- next
}

// OnX509ContextWatchError takes in why it sends nothing. Whoever has no identity
// any more has no use for the last one that nobody looked at.
func (w *watch) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.PermissionDenied {
		drain(w.updates)
	}
	drain(w.errors)
	w.errors <- err
}

// drain takes what is in a channel of one.
func drain[T any](c chan T) {
	select {
	case <-c:
	default:
	}
}

// first waits for the first identities, and says what it waits for whenever that
// changes.
func (w *watch) first(ctx context.Context, at peer, stderr io.Writer) (*workloadapi.X509Context, error) {
	said := ""
	say := func(text string) {
		if text != said {
			fmt.Fprintf(stderr, "plastron: %s\n", text)
			said = text
		}
	}
	slow := time.After(time.Second)
	for {
		select {
		case next := <-w.updates:
			if next == nil {
				return nil, at.fault(<-w.errors)
			}
			return next, nil
		case err := <-w.errors:
			say(waitingFor(at, err))
		case <-slow:
			if said != "" {
				continue
			}
			say("waiting for the first answer of " + at.name)
		case <-ctx.Done():
			text := "interrupted while waiting"
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				text = "no identity came in time"
			}
			return nil, fault.New(fault.Unavailable, "no_identity", "%s (last: %s)", text, said)
		}
	}
}

// waitingFor says why there is no identity yet.
func waitingFor(at peer, err error) string {
	said := "an entry with a fitting selector gives it one"
	row := rowOf(status.Convert(err))
	if row != nil {
		said = fmt.Sprintf("%s (%s)", row.Message, row.Reason)
	}
	switch status.Code(err) {
	case codes.PermissionDenied:
		self, _ := os.Executable()
		return fmt.Sprintf("waiting for an identity: %s has none for this process (uid %d, %s); %s", at.name, os.Getuid(), self, said)
	case codes.Unavailable:
		if row != nil {
			return fmt.Sprintf("waiting for an identity: %s: %s", at.name, said)
		}
		return fmt.Sprintf("waiting for %s: %s", at.name, why(probe(context.Background(), at.path)))
	}
	return fmt.Sprintf("waiting for %s: %s", at.name, status.Convert(err).Message())
}

// patience is how long to wait between attempts to reach the Workload API:
// shortly at first, since a person or a service waits for the command, then longer.
type patience struct{ last time.Duration }

// NewBackoff returns a fresh one.
func (*patience) NewBackoff() workloadapi.Backoff { return &patience{} }

// Next is the time to the next attempt.
func (p *patience) Next() time.Duration {
	p.last = min(max(p.last*3/2, 500*time.Millisecond), 10*time.Second)
	return p.last
}

// Reset begins anew after a success.
func (p *patience) Reset() { p.last = 0 }
