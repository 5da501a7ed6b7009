package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
)

func (p *program) bundleCountCommand() *cobra.Command {
	c := &cobra.Command{Use: "count", Short: "Count the bundles, the server's own included"}
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := bundlev1.NewBundleClient(conn).CountBundles(c.Context(), &bundlev1.CountBundlesRequest{})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		_, err = fmt.Fprintln(p.stdout, plural(int(reply.GetCount()), "bundle", "bundles"))
		return err
	}
	return c
}

func (p *program) bundleListCommand() *cobra.Command {
	c := &cobra.Command{Use: "list", Short: "Print the bundles of other trust domains, or of one"}
	var id string
	c.Flags().StringVar(&id, "id", "", "`TRUST DOMAIN` whose bundle alone is printed")
	form, at, out := bundleFormFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		one := &bundlev1.GetFederatedBundleRequest{}
		if id != "" {
			td, err := trustDomain("-id", id)
			if err != nil {
				return err
			}
			one.TrustDomain = td.Name()
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := bundlev1.NewBundleClient(conn)
		if id != "" {
			reply, err := client.GetFederatedBundle(c.Context(), one)
			if err != nil {
				return peer.fault(err)
			}
			if *out == asJSON {
				return printJSON(p.stdout, reply)
			}
			return printBundle(p.stdout, reply, *form)
		}
		found := &bundlev1.ListFederatedBundlesResponse{}
		request := &bundlev1.ListFederatedBundlesRequest{PageSize: 500}
		for {
			page, err := client.ListFederatedBundles(c.Context(), request)
			if err != nil {
				return peer.fault(err)
			}
			found.Bundles = append(found.Bundles, page.GetBundles()...)
			if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
				break
			}
		}
		if *out == asJSON {
			return printJSON(p.stdout, found)
		}
		for i, b := range found.GetBundles() {
			if i > 0 {
				fmt.Fprintln(p.stdout)
			}
			stars := strings.Repeat("*", 40)
			fmt.Fprintf(p.stdout, "%s\n* %s\n%s\n", stars, b.GetTrustDomain(), stars)
			if err := printBundle(p.stdout, b, *form); err != nil {
				return err
			}
		}
		return nil
	}
	return c
}

func (p *program) bundleSetCommand() *cobra.Command {
	c := &cobra.Command{Use: "set", Short: "Add or replace the bundle of another trust domain",
		Long: `Adds the bundle of another trust domain, or replaces it as a whole. PEM holds
certificates only: if a bundle that has keys for JWT-SVIDs is replaced by PEM,
those keys go.`,
	}
	var id, path string
	c.Flags().StringVar(&id, "id", "", "`TRUST DOMAIN` of the bundle")
	c.Flags().StringVar(&path, "path", "", "`FILE` with the bundle; otherwise it is read from the standard input")
	form, wait, at, out := bundleFormFlag(c.Flags()), waitFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if id == "" {
			return usage(c, "-id is required")
		}
		td, err := trustDomain("-id", id)
		if err != nil {
			return err
		}
		b, err := readBundle(path, p.stdin, td, *form)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := bundlev1.NewBundleClient(wait.over(conn)).BatchSetFederatedBundle(c.Context(), &bundlev1.BatchSetFederatedBundleRequest{
			Bundle: []*spiretypes.Bundle{wireBundle(b)},
		})
		if err != nil {
			return peer.fault(err)
		}
		for _, r := range reply.GetResults() {
			if err := refused(r.GetStatus(), "the bundle of %s was not set", td.Name()); err != nil {
				return err
			}
		}
		if *out == asJSON {
			err = printJSON(p.stdout, reply)
		} else {
			_, err = fmt.Fprintln(p.stdout, "bundle set.")
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// readBundle reads a bundle file, or the standard input without one. A bundle
// without any key would end all trust in the other side, and no file that somebody
// meant to set says so.
func readBundle(path string, stdin io.Reader, td spiffeid.TrustDomain, form bundleForm) (*bundle.Bundle, error) {
	src, err := readSmall(path, stdin, bundle.MaxDocument)
	if err != nil {
		return nil, err
	}
	if form == pemForm {
		certs, err := bundle.ParsePEM(src)
		if err != nil {
			return nil, err
		}
		b := &bundle.Bundle{TrustDomain: td}
		for _, der := range certs {
			b.X509 = append(b.X509, bundle.X509Authority{ASN1: der})
		}
		return b, nil
	}
	b, err := bundle.Parse(td, src)
	if err == nil && len(b.X509)+len(b.JWT) == 0 {
		err = fault.New(fault.Invalid, "bundle_empty", "the bundle has no key that can be used").
			Fix("to end the trust in %s: plastron server bundle delete -id %s", td.Name(), td.Name())
	}
	return b, err
}

func (p *program) bundleDeleteCommand() *cobra.Command {
	c := &cobra.Command{Use: "delete", Short: "Delete the bundle of another trust domain"}
	var id, mode string
	modes := []string{"restrict", "delete", "dissociate"}
	c.Flags().StringVar(&id, "id", "", "`TRUST DOMAIN` of the bundle")
	c.Flags().StringVar(&mode, "mode", modes[0], "`MODE` for entries that federate with it: restrict refuses if there are any, delete deletes them too, dissociate ends their federation with it")
	wait, at, out := waitFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if id == "" {
			return usage(c, "-id is required")
		}
		td, err := trustDomain("-id", id)
		if err != nil {
			return err
		}
		if !slices.Contains(modes, mode) {
			return usage(c, "the value %q of -mode is none of %s", mode, strings.Join(modes, ", "))
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := bundlev1.NewBundleClient(wait.over(conn)).BatchDeleteFederatedBundle(c.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{
			TrustDomains: []string{td.Name()},
			Mode:         bundlev1.BatchDeleteFederatedBundleRequest_Mode(bundlev1.BatchDeleteFederatedBundleRequest_Mode_value[strings.ToUpper(mode)]),
		})
		if err != nil {
			return peer.fault(err)
		}
		for _, r := range reply.GetResults() {
			if err := refused(r.GetStatus(), "the bundle of %s was not deleted", td.Name()); err != nil {
				return err
			}
		}
		if *out == asJSON {
			err = printJSON(p.stdout, reply)
		} else {
			_, err = fmt.Fprintln(p.stdout, "bundle deleted.")
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// refused turns the outcome of the one item of a batch into an error.
func refused(s *spiretypes.Status, format string, args ...any) error {
	if s.GetCode() == int32(codes.OK) {
		return nil
	}
	return fault.New(fault.Invalid, "refused", "%s (code: %s): %s", fmt.Sprintf(format, args...), codes.Code(s.GetCode()), s.GetMessage())
}

// trustDomain reads the trust domain of a flag, with or without the scheme, as SPIRE does.
func trustDomain(flag, text string) (spiffeid.TrustDomain, error) {
	td, err := identity.ParseTrustDomain(strings.TrimPrefix(text, "spiffe://"))
	if err != nil {
		return td, about(flag, err)
	}
	return td, nil
}
