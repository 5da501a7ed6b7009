package main

import (
	"context"
	"fmt"
	"io"
	"time"

	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

// states is what shows the keys of either kind.
type states interface {
	proto.Message
	GetActive() *localauthorityv1.AuthorityState
	GetPrepared() *localauthorityv1.AuthorityState
	GetOld() *localauthorityv1.AuthorityState
}

// localAuthority is the calls for a kind of key. The two kinds' differ in name only.
type localAuthority struct {
	word, name string // on the command line, in sentences
	show       func(context.Context, localauthorityv1.LocalAuthorityClient) (states, error)
	prepare    change
	activate   change
	taint      change
	revoke     change
}

// change is a call about a key: the answer, and the key in it.
type change func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error)

func localX509() localAuthority {
	return localAuthority{
		word: "x509", name: "X.509",
		show: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient) (states, error) {
			return c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
		},
		prepare: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, _ string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			return r, r.GetPreparedAuthority(), err
		},
		activate: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
			return r, r.GetActivatedAuthority(), err
		},
		taint: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
			return r, r.GetTaintedAuthority(), err
		},
		revoke: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
			return r, r.GetRevokedAuthority(), err
		},
	}
}

func localJWT() localAuthority {
	return localAuthority{
		word: "jwt", name: "JWT",
		show: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient) (states, error) {
			return c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
		},
		prepare: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, _ string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
			return r, r.GetPreparedAuthority(), err
		},
		activate: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
			return r, r.GetActivatedAuthority(), err
		},
		taint: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
			return r, r.GetTaintedAuthority(), err
		},
		revoke: func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, *localauthorityv1.AuthorityState, error) {
			r, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id})
			return r, r.GetRevokedAuthority(), err
		},
	}
}

// localAuthorityGroup is SPIRE's commands for the keys of a kind.
func (p *program) localAuthorityGroup(l localAuthority) *cobra.Command {
	return group(l.word, "The server's "+l.name+" authorities",
		p.localShowCommand(l),
		p.localChangeCommand(l, "prepare", "Prepared", "Make and publish another "+l.name+" authority, in place of one that is prepared", l.prepare),
		p.localChangeCommand(l, "activate", "Activated", "Let the prepared "+l.name+" authority sign, once all agents have it", l.activate),
		p.localChangeCommand(l, "taint", "Tainted", "Have all agents replace what an old "+l.name+" authority signed", l.taint),
		p.localChangeCommand(l, "revoke", "Revoked", "Take a tainted old "+l.name+" authority out of the bundle, for ever", l.revoke),
	)
}

func (p *program) localShowCommand(l localAuthority) *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "Show the server's active " + l.name + " authority, and the prepared or the old one"}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		got, err := l.show(c.Context(), localauthorityv1.NewLocalAuthorityClient(conn))
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, got)
		}
		printAuthority(p.stdout, "Active "+l.name+" authority", "No active "+l.name+" authority found", got.GetActive())
		fmt.Fprintln(p.stdout)
		printAuthority(p.stdout, "Prepared "+l.name+" authority", "No prepared "+l.name+" authority found", got.GetPrepared())
		fmt.Fprintln(p.stdout)
		printAuthority(p.stdout, "Old "+l.name+" authority", "No old "+l.name+" authority found", got.GetOld())
		return nil
	}
	return c
}

func (p *program) localChangeCommand(l localAuthority, verb, done, short string, call change) *cobra.Command {
	c := &cobra.Command{Use: verb, Short: short}
	id := new(string)
	if verb != "prepare" {
		c.Flags().StringVar(id, "authorityID", "", "`ID` of the "+l.name+" authority")
	}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if verb != "prepare" && *id == "" {
			return usage(c, "-authorityID is required")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, state, err := call(c.Context(), localauthorityv1.NewLocalAuthorityClient(conn), *id)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		printAuthority(p.stdout, done+" "+l.name+" authority", "", state)
		return nil
	}
	return c
}

func printAuthority(w io.Writer, title, none string, s *localauthorityv1.AuthorityState) {
	fmt.Fprintf(w, "%s:\n", title)
	if s == nil {
		fmt.Fprintf(w, "  %s\n", none)
		return
	}
	fmt.Fprintf(w, "  Authority ID: %s\n", s.GetAuthorityId())
	if s.GetExpiresAt() != 0 {
		fmt.Fprintf(w, "  Expires at: %s\n", time.Unix(s.GetExpiresAt(), 0).UTC())
	}
	if s.GetUpstreamAuthoritySubjectKeyId() != "" {
		fmt.Fprintf(w, "  Upstream authority Subject Key ID: %s\n", s.GetUpstreamAuthoritySubjectKeyId())
	}
}

// upstreamAuthorityGroup is SPIRE's commands for what stands above the server.
func (p *program) upstreamAuthorityGroup() *cobra.Command {
	return group("upstreamauthority", "The upstream authority of the server's X.509 authorities",
		p.upstreamCommand("taint", "Tainted", "Have all agents replace what is under an upstream authority",
			func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, string, error) {
				r, err := c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id})
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}),
		p.upstreamCommand("revoke", "Revoked", "Take a tainted upstream authority out of the bundle, for ever",
			func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, string, error) {
				r, err := c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}),
	)
}

func (p *program) upstreamCommand(verb, done, short string,
	call func(context.Context, localauthorityv1.LocalAuthorityClient, string) (proto.Message, string, error)) *cobra.Command {
	c := &cobra.Command{Use: verb, Short: short}
	id := c.Flags().String("subjectKeyID", "", "`ID` of the subject key of the upstream authority's certificate, in hex")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *id == "" {
			return usage(c, "-subjectKeyID is required")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, key, err := call(c.Context(), localauthorityv1.NewLocalAuthorityClient(conn), *id)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		_, err = fmt.Fprintf(p.stdout, "%s X.509 upstream authority:\n  Upstream authority Subject Key ID: %s\n", done, key)
		return err
	}
	return c
}
