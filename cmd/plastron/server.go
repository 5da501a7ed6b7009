package main

import (
	"encoding/pem"
	"fmt"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
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
		return nil
	}
	return c
}

func (p *program) bundleShowCommand() *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "Print the server's own trust bundle"}
	var form string
	c.Flags().StringVar(&form, "format", "pem", "`FORM` of the bundle: pem or spiffe")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if form != "pem" && form != "spiffe" {
			return usage(c, "the value %q of -format is neither pem nor spiffe", form)
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := bundlev1.NewBundleClient(conn).GetBundle(c.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			return peer.fault(err)
		}
		switch {
		case *out == asJSON:
			return printJSON(p.stdout, reply)
		case form == "spiffe":
			document, err := bundleDocument(reply)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(p.stdout, "%s\n", document)
			return err
		}
		for _, authority := range reply.GetX509Authorities() {
			if err := pem.Encode(p.stdout, &pem.Block{Type: "CERTIFICATE", Bytes: authority.GetAsn1()}); err != nil {
				return err
			}
		}
		return nil
	}
	return c
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
