package main

import (
	"fmt"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spf13/cobra"
)

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
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		own, err := bundleOf(reply)
		if err != nil {
			return err
		}
		if form == "spiffe" {
			_, err = fmt.Fprintf(p.stdout, "%s\n", own.Marshal())
		} else {
			_, err = p.stdout.Write(own.MarshalPEM())
		}
		return err
	}
	return c
}

// bundleOf reads a bundle as the API writes it.
func bundleOf(wire *spiretypes.Bundle) (*bundle.Bundle, error) {
	td, err := identity.ParseTrustDomain(wire.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	b := &bundle.Bundle{TrustDomain: td, RefreshHint: time.Duration(wire.GetRefreshHint()) * time.Second, Sequence: wire.GetSequenceNumber()}
	for _, a := range wire.GetX509Authorities() {
		b.X509 = append(b.X509, bundle.X509Authority{ASN1: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	for _, a := range wire.GetJwtAuthorities() {
		authority := bundle.JWTAuthority{KeyID: a.GetKeyId(), PublicKey: a.GetPublicKey(), Tainted: a.GetTainted()}
		if a.GetExpiresAt() != 0 {
			authority.ExpiresAt = time.Unix(a.GetExpiresAt(), 0)
		}
		b.JWT = append(b.JWT, authority)
	}
	return b, nil
}
