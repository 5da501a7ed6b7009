package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
)

// mintTTL reads -ttl, which the API takes in seconds, 0 for the server's default.
func mintTTL(c *cobra.Command, ttl time.Duration) (int32, error) {
	seconds := math.Ceil(ttl.Seconds())
	if seconds < 0 || seconds > math.MaxInt32 {
		return 0, usage(c, "-ttl must be from 0 to %s", math.MaxInt32*time.Second)
	}
	return int32(seconds), nil
}

// checkDir finds a directory of -write that does not exist before anything is signed.
func checkDir(c *cobra.Command, dir string) error {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return usage(c, "-write: there is no directory %s", dir)
	}
	return nil
}

// noteCapped says that a credential ends before the time that was asked for, as it
// does when the key that signed it ends.
func noteCapped(w io.Writer, what string, expires int64, asked time.Time, ttl time.Duration) {
	if end := time.Unix(expires, 0).UTC(); ttl > 0 && end.Before(asked.Add(ttl).Truncate(time.Second)) {
		fmt.Fprintf(w, "Note: the %s ends at %s, before the -ttl is over\n", what, end.Format(time.RFC3339))
	}
}

func (p *program) mintX509Command() *cobra.Command {
	c := &cobra.Command{Use: "mint", Short: "Sign an X.509-SVID for a new key, without an entry"}
	var id, dir string
	var ttl time.Duration
	var dns []string
	c.Flags().StringVar(&id, "spiffeID", "", "SPIFFE `ID` in the X.509-SVID")
	c.Flags().DurationVar(&ttl, "ttl", 0, "`TIME` that it lives; otherwise the server's default")
	c.Flags().StringArrayVar(&dns, "dns", nil, "DNS `NAME` in it; may be given more than once, the first is the common name")
	c.Flags().StringVar(&dir, "write", "", "`DIR` to write svid.pem, key.pem and bundle.pem to, instead of printing them")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if id == "" {
			return usage(c, "-spiffeID is required")
		}
		wire, err := wireID("-spiffeID", id)
		if err != nil {
			return err
		}
		seconds, err := mintTTL(c, ttl)
		if err != nil {
			return err
		}
		if err := checkDir(c, dir); dir != "" && err != nil {
			return err
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			URIs: []*url.URL{{Scheme: "spiffe", Host: wire.GetTrustDomain(), Path: wire.GetPath()}}, DNSNames: dns,
		}, key)
		if err != nil { // such as a DNS name that is not ASCII
			return fault.New(fault.Invalid, "csr_malformed", "the certificate request cannot be made: %v", err)
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		asked := time.Now()
		reply, err := svidv1.NewSVIDClient(conn).MintX509SVID(c.Context(), &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: seconds})
		if err != nil {
			return peer.fault(err)
		}
		wireRoots, err := bundlev1.NewBundleClient(conn).GetBundle(c.Context(), &bundlev1.GetBundleRequest{})
		if err != nil {
			return peer.fault(err)
		}
		roots, err := bundleOf(wireRoots)
		if err != nil {
			return err
		}
		noteCapped(p.stderr, "X509-SVID", reply.GetSvid().GetExpiresAt(), asked, ttl)
		return minted{reply.GetSvid().GetCertChain(), key, roots}.put(p.stdout, dir, *out)
	}
	return c
}

// minted is an X.509-SVID with its key and what it can be verified by.
type minted struct {
	chain [][]byte // DER, the leaf first
	key   *ecdsa.PrivateKey
	roots *bundle.Bundle
}

// put writes it to a directory or else prints it, in one of SPIRE's forms.
func (m minted) put(w io.Writer, dir string, out format) error {
	key, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		return err
	}
	if out == asJSON && dir == "" {
		text := struct {
			Chain [][]byte `json:"x509_svid"`
			Key   []byte   `json:"private_key"`
			Roots [][]byte `json:"root_cas"`
		}{Chain: m.chain, Key: key}
		for _, a := range m.roots.X509 {
			text.Roots = append(text.Roots, a.ASN1)
		}
		return json.NewEncoder(w).Encode(text)
	}
	var chain []byte
	for _, der := range m.chain {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	for _, part := range []struct {
		title, file string
		mode        os.FileMode
		content     []byte
	}{
		{"X509-SVID", "svid.pem", 0o644, chain},
		{"Private key", "key.pem", 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})},
		{"Root CAs", "bundle.pem", 0o644, m.roots.MarshalPEM()},
	} {
		if dir == "" {
			_, err = fmt.Fprintf(w, "%s:\n%s\n", part.title, part.content)
		} else if err = replaceFile(filepath.Join(dir, part.file), part.content, part.mode); err == nil {
			_, err = fmt.Fprintf(w, "%s written to %s\n", part.title, filepath.Join(dir, part.file))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *program) mintJWTCommand() *cobra.Command {
	c := &cobra.Command{Use: "mint", Short: "Sign a JWT-SVID, without an entry"}
	var id, path string
	var ttl time.Duration
	var audience []string
	c.Flags().StringVar(&id, "spiffeID", "", "SPIFFE `ID` in the JWT-SVID")
	c.Flags().StringArrayVar(&audience, "audience", nil, "`NAME` of one who shall accept the token; may be given more than once")
	c.Flags().DurationVar(&ttl, "ttl", 0, "`TIME` that it lives; otherwise the server's default")
	c.Flags().StringVar(&path, "write", "", "`FILE` to write the token to, for this user only, instead of printing it")
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		switch {
		case id == "":
			return usage(c, "-spiffeID is required")
		case len(audience) == 0:
			return usage(c, "-audience is required")
		}
		request := &svidv1.MintJWTSVIDRequest{Audience: audience}
		var err error
		if request.Id, err = wireID("-spiffeID", id); err != nil {
			return err
		}
		if request.Ttl, err = mintTTL(c, ttl); err != nil {
			return err
		}
		if err := checkDir(c, filepath.Dir(path)); err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		asked := time.Now()
		reply, err := svidv1.NewSVIDClient(conn).MintJWTSVID(c.Context(), request)
		if err != nil {
			return peer.fault(err)
		}
		noteCapped(p.stderr, "JWT-SVID", reply.GetSvid().GetExpiresAt(), asked, ttl)
		switch {
		case path != "":
			if err := replaceFile(path, []byte(reply.GetSvid().GetToken()), 0o600); err != nil {
				return err
			}
			_, err = fmt.Fprintf(p.stdout, "JWT-SVID written to %s\n", path)
		case *out == asJSON:
			err = printJSON(p.stdout, reply)
		default:
			_, err = fmt.Fprintln(p.stdout, reply.GetSvid().GetToken())
		}
		return err
	}
	return c
}
