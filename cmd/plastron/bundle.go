package main

import (
	"fmt"
	"io"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (p *program) bundleShowCommand() *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "Print the server's own trust bundle"}
	form := bundleFormFlag(c.Flags())
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
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
		return printBundle(p.stdout, reply, *form)
	}
	return c
}

// bundleForm is the value of -format: certificates alone, or SPIFFE's document.
type bundleForm string

const (
	pemForm    bundleForm = "pem"
	spiffeForm bundleForm = "spiffe"
)

func (f *bundleForm) String() string { return string(*f) }
func (f *bundleForm) Type() string   { return "FORM" }

func (f *bundleForm) Set(s string) error {
	if s != string(pemForm) && s != string(spiffeForm) {
		return fault.New(fault.Invalid, "usage", "there are pem and spiffe")
	}
	*f = bundleForm(s)
	return nil
}

func bundleFormFlag(flags *pflag.FlagSet) *bundleForm {
	f := pemForm
	flags.Var(&f, "format", "`FORM` of the bundle: pem or spiffe")
	return &f
}

func printBundle(w io.Writer, wire *spiretypes.Bundle, form bundleForm) error {
	b, err := bundleOf(wire)
	if err != nil {
		return err
	}
	if form == spiffeForm {
		_, err = fmt.Fprintf(w, "%s\n", b.Marshal())
	} else {
		_, err = w.Write(b.MarshalPEM())
	}
	return err
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

// wireBundle writes a bundle as the API does.
func wireBundle(b *bundle.Bundle) *spiretypes.Bundle {
	out := &spiretypes.Bundle{
		TrustDomain: b.TrustDomain.Name(), RefreshHint: int64(b.RefreshHint / time.Second), SequenceNumber: b.Sequence,
	}
	for _, a := range b.X509 {
		out.X509Authorities = append(out.X509Authorities, &spiretypes.X509Certificate{Asn1: a.ASN1})
	}
	for _, a := range b.JWT {
		key := &spiretypes.JWTKey{KeyId: a.KeyID, PublicKey: a.PublicKey}
		if !a.ExpiresAt.IsZero() {
			key.ExpiresAt = a.ExpiresAt.Unix()
		}
		out.JwtAuthorities = append(out.JwtAuthorities, key)
	}
	return out
}
