package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	rulev1 "github.com/plastron/plastron/api/plastron/rule/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/logging"
	"github.com/plastron/plastron/internal/process"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// The names in the trust domain of dev.
const (
	devTrustDomain = "dev.local"
	devAgentAlias  = "spiffe://dev.local/agent" // the agent's own ID is different each time
	devTemplate    = "spiffe://dev.local/user/{unix.user}/{unix.program}"
)

type devOptions struct {
	id             string
	x509TTL, caTTL time.Duration
	logLevel       string
}

func (p *program) devCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dev [flags] [-- COMMAND [ARGUMENT...]]",
		Short: "Run server, agent and Workload API in one process, for development",
		Long: `Runs a server and an agent with their Workload API in one process, in a directory
that is removed at the end. All else is as in earnest: the agent joins with a
join token over mutual TLS, processes are recognised by what the kernel says of
them. One rule gives every process of this user spiffe://dev.local/user/NAME/PROGRAM,
where PROGRAM is the name of its program's file: programs of one interpreter share it.

With a command, that is run with the sockets in its environment, and dev ends
with its status.`,
	}
	var o devOptions
	c.Flags().StringVar(&o.id, "spiffeID", "", "SPIFFE `ID` for all processes of this user, instead of spiffe://dev.local/user/NAME/PROGRAM")
	c.Flags().DurationVar(&o.x509TTL, "x509SVIDTTL", time.Hour, "`TIME` that X.509-SVIDs live")
	c.Flags().DurationVar(&o.caTTL, "caTTL", 24*time.Hour, "`TIME` that the server's authorities live")
	c.Flags().StringVar(&o.logLevel, "logLevel", "WARN", "`LEVEL` of the log on standard error: PANIC, FATAL, ERROR, WARN, INFO, DEBUG or TRACE")
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(c *cobra.Command, argv []string) error {
		if o.x509TTL < time.Second || o.caTTL < time.Second {
			return usage(c, "-x509SVIDTTL and -caTTL must be at least 1s")
		}
		return p.dev(c.Context(), o, argv)
	}
	return c
}

// dev starts everything, proves that it works, and runs until it is told to stop
// or the command has ended.
func (p *program) dev(ctx context.Context, o devOptions, argv []string) error {
	grant, want, err := devGrant(o.id)
	if err != nil {
		return err
	}
	dir, err := openDevDir()
	if err != nil {
		return err
	}
	defer dir.Close()
	// Signals end the command first, and the roles only after it.
	roles := newRoles(context.WithoutCancel(ctx))
	defer roles.stop()
	d, err := p.startDev(ctx, o, dir.path, grant, want, roles)
	if err != nil {
		return err
	}
	out := p.stdout
	if len(argv) > 0 {
		out = p.stderr // standard output is the command's
	}
	d.print(out, time.Since(p.start))
	if len(argv) > 0 {
		environment := append(os.Environ(), workloadapi.SocketEnv+"=unix://"+d.workloadSocket, "SPIRE_SERVER_PRIVATE_SOCKET="+d.adminSocket,
			"PLASTRON_AGENT_ADMIN_SOCKET="+d.agentAdmin)
		err = p.supervise(argv, environment, roles.failed)
	} else {
		select {
		case <-ctx.Done():
		case <-roles.failed:
		}
	}
	return errors.Join(roles.stop(), err)
}

// devGrant returns what the processes of this user get: by -spiffeID all the
// same ID, otherwise what the rule of dev makes. want is this very process's.
func devGrant(chosen string) (grant entry.Entry, want spiffeid.ID, err error) {
	td := spiffeid.RequireTrustDomainFromString(devTrustDomain)
	if chosen != "" {
		if grant.SPIFFEID, err = identity.ParseWorkload(td, chosen); err != nil {
			return grant, want, about("-spiffeID", err)
		}
		return grant, grant.SPIFFEID, nil
	}
	if grant.Rule, err = entry.ParseRule(td, devTemplate, "", entry.TrustAgent); err != nil {
		return grant, want, err
	}
	facts := map[string]string{}
	if me, err := user.Current(); err == nil {
		facts["unix.user"] = me.Username
	}
	if facts["unix.program"], err = process.ProgramName(os.Getpid()); err != nil {
		return grant, want, err
	}
	want, _, bad := grant.Grants(facts)
	if bad != nil {
		return grant, want, bad.Fault().Fix("choose the ID yourself: plastron dev -spiffeID spiffe://%s/uid/%d", devTrustDomain, os.Getuid())
	}
	return grant, want, nil
}

// development is what a running dev shows of itself.
type development struct {
	adminSocket, workloadSocket string
	agentAdmin                  string         // the agent's admin socket
	grant                       string         // what gives this process its identity, for people
	user                        string         // below this each process of the user has an ID of its own; empty: all have one
	proof                       *x509svid.SVID // fetched through the socket and verified
}

// startDev brings up the server, has the agent join it with a token, registers
// this user, and fetches the first identity.
func (p *program) startDev(ctx context.Context, o devOptions, dir string, grant entry.Entry, want spiffeid.ID, roles *roles) (*development, error) {
	d := &development{adminSocket: filepath.Join(dir, "server.sock"), workloadSocket: filepath.Join(dir, "agent.sock"),
		agentAdmin: filepath.Join(dir, "agent", "admin.sock")}
	opened, err := logging.Settings{Level: o.logLevel}.Open(p.stderr)
	if err != nil {
		return nil, err
	}
	log := opened.Logger
	address, err := roles.startServer(ctx, o, dir, d.adminSocket, log)
	if err != nil {
		return nil, err
	}
	at := &socket{kind: "server", path: d.adminSocket}
	conn, peer, err := at.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	alias, err := wireID("alias", devAgentAlias)
	if err != nil {
		return nil, err
	}
	token, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: alias})
	if err != nil {
		return nil, peer.fault(err)
	}
	reply, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, peer.fault(err)
	}
	trust, err := bundleOf(reply)
	if err != nil {
		return nil, err
	}
	if err := roles.startAgent(ctx, dir, d.workloadSocket, address, token.GetValue(), trust, log); err != nil {
		return nil, err
	}
	if grant.Rule == nil {
		made, err := registerUser(ctx, conn, alias, want)
		if err != nil {
			return nil, peer.fault(err)
		}
		d.grant = "entry " + made.GetId()
	} else {
		made, err := makeRule(ctx, conn)
		if err != nil {
			return nil, peer.fault(err)
		}
		d.grant, d.user = "rule "+made.GetId(), strings.TrimSuffix(want.String(), path.Base(want.Path()))
	}
	d.proof, err = proof(ctx, d.workloadSocket, want)
	return d, err
}

func devSelector() string { return "uid:" + strconv.Itoa(os.Getuid()) }

// makeRule creates the one rule of dev.
func makeRule(ctx context.Context, conn *grpc.ClientConn) (*rulev1.Rule, error) {
	reply, err := rulev1.NewRulesClient(conn).Create(ctx, &rulev1.CreateRequest{Rules: []*rulev1.Rule{{
		ParentId: devAgentAlias, IdTemplate: devTemplate, Trust: entry.TrustAgent,
		Selectors: []*rulev1.Selector{{Type: "unix", Value: devSelector()}},
	}}})
	if err != nil {
		return nil, err
	}
	if len(reply.GetResults()) != 1 || reply.GetResults()[0].GetRefusal() != nil {
		return nil, fmt.Errorf("make the rule for this user: %v", reply.GetResults())
	}
	return reply.GetResults()[0].GetRule(), nil
}

// registerUser creates the one ordinary entry of dev -spiffeID.
func registerUser(ctx context.Context, conn *grpc.ClientConn, parent *spiretypes.SPIFFEID, id spiffeid.ID) (*spiretypes.Entry, error) {
	reply, err := entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
		SpiffeId: &spiretypes.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, ParentId: parent,
		Selectors: []*spiretypes.Selector{{Type: "unix", Value: devSelector()}},
	}}})
	if err != nil {
		return nil, err
	}
	if len(reply.GetResults()) != 1 || reply.GetResults()[0].GetStatus().GetCode() != int32(codes.OK) {
		return nil, fmt.Errorf("register this user: %v", reply.GetResults())
	}
	return reply.GetResults()[0].GetEntry(), nil
}

// proof fetches this process's identity as any workload would, and verifies it.
func proof(ctx context.Context, socket string, want spiffeid.ID) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(
		workloadapi.WithAddr("unix://"+socket), workloadapi.WithBackoffStrategy(&patience{})))
	if err != nil {
		return nil, fmt.Errorf("fetch the first identity: %w", err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("fetch the first identity: %w", err)
	}
	id, _, err := x509svid.Verify(svid.Certificates, source)
	if err != nil {
		return nil, fmt.Errorf("verify the first identity: %w", err)
	}
	if id != want {
		return nil, fmt.Errorf("the first identity is %s, not %s", id, want)
	}
	return svid, nil
}

// print says what runs, how to use it, and how we know that it works.
func (d *development) print(w io.Writer, took time.Duration) {
	expires := d.proof.Certificates[0].NotAfter
	fmt.Fprintf(w, `plastron dev is ready in %.1f s. Ctrl-C stops it and removes everything.

For programs in another terminal, and for plastron itself there:

export %s=unix://%s
export SPIRE_SERVER_PRIVATE_SOCKET=%s
export PLASTRON_AGENT_ADMIN_SOCKET=%s

This process has fetched its own identity through that socket and verified it:

  %s
  until %s (%s from now), since it has the selector unix:%s
  of %s

`, took.Seconds(), workloadapi.SocketEnv, d.workloadSocket, d.adminSocket, d.agentAdmin, d.proof.ID,
		expires.Local().Format(time.DateTime), time.Until(expires).Round(time.Second), devSelector(), d.grant)
	if d.user != "" {
		fmt.Fprintf(w, `Each program that you start gets an ID of its own by that rule, named after its
file: ./web would get %sweb. Programs of one interpreter
share an ID: all Python scripts would get %spython3.11, say.

`, d.user, d.user)
	}
	fmt.Fprintf(w, `To give one program another identity:

  %s server entry create -parentID %s -spiffeID spiffe://%s/NAME -selector unix:%s -selector unix:path:/PATH/OF/PROGRAM

`, self(), devAgentAlias, devTrustDomain, devSelector())
}

// self is how a person in another terminal can call this program.
func self() string {
	if path, err := os.Executable(); err == nil {
		return path
	}
	return "plastron"
}
