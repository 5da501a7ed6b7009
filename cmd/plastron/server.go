package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	joinv1 "github.com/plastron/plastron/api/plastron/join/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/ticket"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func (p *program) tokenGenerateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "generate",
		Short: "Make a join token, a secret with which one agent can join once",
		Long: `Makes a join token, a secret with which one agent can join once, and prints it.

It also prints the command that starts that agent on another host, with a ticket: one
text that holds the server's address, the trust domain, the hashes of its roots, the
token and its expiry. Whoever has it before the agent can join in its place.`,
	}
	var ttl int32
	var id string
	c.Flags().Int32Var(&ttl, "ttl", 600, "lifetime of the token in `SECONDS`")
	c.Flags().StringVar(&id, "spiffeID", "", "SPIFFE `ID` that the agent gets besides its own, for use as a parent")
	var addresses []string
	c.Flags().StringArrayVar(&addresses, "address", nil, "`HOST:PORT` where agents reach the server, for the ticket; may be repeated (otherwise where the server listens)")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if ttl <= 0 {
			return usage(c, "-ttl must be positive")
		}
		if len(addresses) > ticket.MaxAddresses {
			return usage(c, "-address can be given %d times", ticket.MaxAddresses)
		}
		for i, address := range addresses {
			if err := ticket.CheckAddress(address); err != nil {
				return about("-address", err)
			}
			if slices.Contains(addresses[:i], address) {
				return usage(c, "-address is given twice with %s", address)
			}
		}
		request := &agentv1.CreateJoinTokenRequest{Ttl: ttl}
		if id != "" {
			alias, err := wireID("-spiffeID", id)
			if err != nil {
				return err
			}
			request.AgentId = alias
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		token, err := agentv1.NewAgentClient(conn).CreateJoinToken(c.Context(), request)
		if err != nil {
			return peer.fault(err)
		}
		text, noTicket := ticketOf(c.Context(), conn, peer, token, addresses)
		if noTicket != nil { // the token is there, so it must be shown
			defer p.remark("there is no ticket with this token", noTicket)
		}
		if *out == asJSON {
			return printTokenJSON(p.stdout, token, text)
		}
		fmt.Fprintf(p.stdout, "Token: %s\n", token.GetValue())
		if id == "" {
			fmt.Fprintln(p.stdout, "Warning: Missing SPIFFE ID.")
		}
		agent, err := agentOf(c.Context(), conn, token.GetValue())
		if err != nil {
			return peer.fault(err)
		}
		fmt.Fprintf(p.stdout, "Agent ID: %s\n", agent)
		if text == "" {
			return nil
		}
		_, err = fmt.Fprintf(p.stdout, "Run this on the host that shall join:\nplastron agent run -ticket %s\n", text)
		return err
	}
	return c
}

// remark says what did not work although the command did.
func (p *program) remark(what string, err error) {
	text, remedy := fault.Words(err)
	fmt.Fprintf(p.stderr, "plastron: %s: %s\n", what, text)
	if remedy != "" {
		fmt.Fprintf(p.stderr, "  Fix: %s\n", remedy)
	}
}

// ticketOf makes the ticket of a token that has just been made.
func ticketOf(ctx context.Context, conn *grpc.ClientConn, at peer, token *spiretypes.JoinToken, addresses []string) (string, error) {
	if len(addresses) == 0 {
		reply, err := joinv1.NewJoinClient(conn).Address(ctx, &joinv1.AddressRequest{})
		if err != nil {
			return "", about("where agents reach the server", at.fault(err))
		}
		if addresses = reply.GetAddresses(); len(addresses) == 0 {
			return "", fault.New(fault.Precondition, "server_address_unknown", "the server does not know where agents reach it").
				Fix("give -address HOST:PORT")
		}
	}
	wire, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return "", at.fault(err)
	}
	own, err := bundleOf(wire)
	if err != nil {
		return "", err
	}
	return ticket.Ticket{
		Addresses: addresses, TrustDomain: own.TrustDomain, Roots: pins(own.X509),
		Token: token.GetValue(), Expires: time.Unix(token.GetExpiresAt(), 0),
	}.Reveal()
}

// pins are the hashes of the roots that a server may show now. The newest come
// last in a bundle; they are kept if there are too many.
func pins(authorities []bundle.X509Authority) (roots [][sha256.Size]byte) {
	for _, a := range slices.Backward(authorities) {
		if root := sha256.Sum256(a.ASN1); !a.Tainted && !slices.Contains(roots, root) && len(roots) < ticket.MaxRoots {
			roots = append(roots, root)
		}
	}
	return roots
}

// printTokenJSON prints the API's message of a token, and with it the ticket.
func printTokenJSON(w io.Writer, token *spiretypes.JoinToken, text string) error {
	return json.NewEncoder(w).Encode(struct {
		Value     string `json:"value"`
		ExpiresAt int64  `json:"expires_at,string"` // as protobuf JSON writes it
		Ticket    string `json:"ticket,omitempty"`
	}{token.GetValue(), token.GetExpiresAt(), text})
}

// agentOf returns the ID of the agent that joins with a token. It is derived from
// the token one way, so that the secret is never part of an ID (R22).
func agentOf(ctx context.Context, conn *grpc.ClientConn, text string) (string, error) {
	token, err := jointoken.Parse(text)
	if err != nil {
		return "", err
	}
	own, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &spiretypes.BundleMask{}})
	if err != nil {
		return "", err
	}
	return "spiffe://" + own.GetTrustDomain() + "/spire/agent/join_token" + token.Path(), nil
}

func (p *program) serverHealthcheckCommand() *cobra.Command {
	return p.healthcheck("server", func(c *cobra.Command) *socket { return serverSocketFlags(c.Flags()) }, "Server")
}

func (p *program) agentHealthcheckCommand() *cobra.Command {
	return p.healthcheck("agent", func(c *cobra.Command) *socket { return agentSocketFlags(c.Flags()) }, "Agent")
}

func (p *program) healthcheck(kind string, socketOf func(*cobra.Command) *socket, title string) *cobra.Command {
	c := &cobra.Command{Use: "healthcheck", Short: "Say whether the " + kind + " is healthy"}
	var verbose, shallow bool
	c.Flags().BoolVar(&verbose, "verbose", false, "say what is done")
	c.Flags().BoolVar(&shallow, "shallow", false, "only see whether it answers")
	at := socketOf(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if verbose {
			fmt.Fprintf(p.stdout, "Checking %s health...\n", kind)
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return about(title+" is unhealthy", err)
		}
		defer conn.Close()
		if !shallow {
			ctx, cancel := contextWithTimeout(c, 30*time.Second)
			defer cancel()
			reply, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			if err != nil {
				return about(title+" is unhealthy", peer.fault(err))
			}
			if reply.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
				return fault.New(fault.Unavailable, "unhealthy", "%s is unhealthy: it says %s", title, reply.GetStatus()).
					Fix("'plastron %s status' says what is wrong", kind)
			}
		}
		_, err = fmt.Fprintf(p.stdout, "%s is healthy.\n", title)
		return err
	}
	return c
}
