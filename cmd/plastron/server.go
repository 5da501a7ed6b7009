package main

import (
	"context"
	"fmt"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func (p *program) tokenGenerateCommand() *cobra.Command {
	c := &cobra.Command{Use: "generate", Short: "Make a join token, a secret with which one agent can join once"}
	var ttl int32
	var id string
	c.Flags().Int32Var(&ttl, "ttl", 600, "lifetime of the token in `SECONDS`")
	c.Flags().StringVar(&id, "spiffeID", "", "SPIFFE `ID` that the agent gets besides its own, for use as a parent")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if ttl <= 0 {
			return usage(c, "-ttl must be positive")
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
		if *out == asJSON {
			return printJSON(p.stdout, token)
		}
		fmt.Fprintf(p.stdout, "Token: %s\n", token.GetValue())
		if id == "" {
			fmt.Fprintln(p.stdout, "Warning: Missing SPIFFE ID.")
		}
		agent, err := agentOf(c.Context(), conn, token.GetValue())
		if err != nil {
			return peer.fault(err)
		}
		_, err = fmt.Fprintf(p.stdout, "Agent ID: %s\n", agent)
		return err
	}
	return c
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
				return fault.New(fault.Unavailable, "unhealthy", "%s is unhealthy: it says %s", title, reply.GetStatus())
			}
		}
		_, err = fmt.Fprintf(p.stdout, "%s is healthy.\n", title)
		return err
	}
	return c
}
