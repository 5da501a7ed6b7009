package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
)

// The Workload API commands speak the raw protocol: they show what the agent
// says, not what a library makes of it.

// contextWithTimeout bounds a command's call.
func contextWithTimeout(c *cobra.Command, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), timeout)
}

// withHeader marks a call as one that is not forged by a confused proxy
// (Workload Endpoint section 6.2).
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func (p *program) fetchCommand() *cobra.Command {
	c := p.fetchX509Command("fetch", "Fetch the identities of this process; alone it fetches X.509-SVIDs")
	c.AddCommand(p.fetchX509Command("x509", "Fetch the X.509-SVIDs of this process"), p.fetchJWTCommand())
	return c
}

func (p *program) fetchX509Command(name, short string) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short}
	var timeout time.Duration
	var dir string
	var silent bool
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "`TIME` to wait for an answer")
	c.Flags().StringVar(&dir, "write", "", "`DIR` to write svid.N.pem, svid.N.key and bundle.N.pem to")
	c.Flags().BoolVar(&silent, "silent", false, "print nothing")
	at, out := agentSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := contextWithTimeout(c, timeout)
		defer cancel()
		start := time.Now()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
		if err != nil {
			return peer.fault(err)
		}
		reply, err := stream.Recv()
		if err != nil {
			return peer.fault(err)
		}
		if !silent {
			if *out == asJSON {
				err = printJSON(p.stdout, reply)
			} else {
				err = printX509(p.stdout, reply, time.Since(start))
			}
			if err != nil {
				return err
			}
		}
		if dir == "" {
			return nil
		}
		log := p.stdout
		if silent || *out == asJSON {
			log = io.Discard
		}
		return writeX509(log, dir, reply)
	}
	return c
}

func (p *program) watchCommand() *cobra.Command {
	c := &cobra.Command{Use: "watch", Short: "Print the X.509-SVIDs of this process whenever they change"}
	at := agentSocketFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		start := time.Now()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(c.Context()), &workload.X509SVIDRequest{})
		if err != nil {
			return peer.fault(err)
		}
		for {
			reply, err := stream.Recv()
			if c.Context().Err() != nil {
				return nil // asked to stop
			}
			if errors.Is(err, io.EOF) {
				return fault.New(fault.Unavailable, "closed", "%s ended the stream", peer.name)
			}
			if err != nil {
				return peer.fault(err)
			}
			if err := printX509(p.stdout, reply, time.Since(start)); err != nil {
				return err
			}
			start = time.Now()
		}
	}
	return c
}

func (p *program) fetchJWTCommand() *cobra.Command {
	c := &cobra.Command{Use: "jwt", Short: "Fetch a JWT-SVID for an audience"}
	var timeout time.Duration
	var id string
	var audience []string
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "`TIME` to wait for an answer")
	c.Flags().StringSliceVar(&audience, "audience", nil, "`NAMES` of those who shall accept the token, separated by commas; may be given more than once")
	c.Flags().StringVar(&id, "spiffeID", "", "SPIFFE `ID` to fetch; otherwise all of this process")
	at, out := agentSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if len(audience) == 0 {
			return usage(c, "-audience is required")
		}
		if id != "" {
			if _, err := wireID("-spiffeID", id); err != nil {
				return err
			}
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := contextWithTimeout(c, timeout)
		defer cancel()
		client := workload.NewSpiffeWorkloadAPIClient(conn)
		stream, err := client.FetchJWTBundles(withHeader(ctx), &workload.JWTBundlesRequest{})
		if err != nil {
			return peer.fault(err)
		}
		bundles, err := stream.Recv()
		if err != nil {
			return peer.fault(err)
		}
		svids, err := client.FetchJWTSVID(withHeader(ctx), &workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, svids, bundles)
		}
		for _, svid := range svids.GetSvids() {
			fmt.Fprintf(p.stdout, "token(%s):\n\t%s\n", svid.GetSpiffeId(), svid.GetSvid())
			if svid.GetHint() != "" {
				fmt.Fprintf(p.stdout, "hint(%s):\n\t%s\n", svid.GetSpiffeId(), svid.GetHint())
			}
		}
		for _, td := range sortedKeys(bundles.GetBundles()) {
			fmt.Fprintf(p.stdout, "bundle(%s):\n\t%s\n", td, bundles.GetBundles()[td])
		}
		return nil
	}
	return c
}

func (p *program) validateJWTCommand() *cobra.Command {
	c := &cobra.Command{Use: "jwt", Short: "Check a JWT-SVID as its audience would"}
	var timeout time.Duration
	var audience, token string
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "`TIME` to wait for an answer")
	c.Flags().StringVar(&audience, "audience", "", "`NAME` the token must be meant for")
	c.Flags().StringVar(&token, "svid", "", "the `TOKEN`")
	at, out := agentSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if audience == "" {
			return usage(c, "-audience is required")
		}
		if token == "" {
			return usage(c, "-svid is required")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := contextWithTimeout(c, timeout)
		defer cancel()
		reply, err := workload.NewSpiffeWorkloadAPIClient(conn).ValidateJWTSVID(withHeader(ctx),
			&workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
		if err != nil {
			err = peer.fault(err)
			if fault.KindOf(err) == fault.Invalid {
				return about("SVID is not valid", err)
			}
			return err
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		claims, err := protojson.Marshal(reply.GetClaims())
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(p.stdout, "SVID is valid.\nSPIFFE ID : %s\nClaims    : %s\n", reply.GetSpiffeId(), claims)
		return err
	}
	return c
}

// printX509 prints an answer of the Workload API in SPIRE's form.
func printX509(w io.Writer, reply *workload.X509SVIDResponse, took time.Duration) error {
	fmt.Fprintf(w, "Received %s after %s\n", plural(len(reply.GetSvids()), "svid", "svids"), took)
	for _, svid := range reply.GetSvids() {
		chain, err := certificates(svid.GetSpiffeId(), svid.GetX509Svid())
		if err != nil {
			return err
		}
		authorities, err := certificates(svid.GetSpiffeId(), svid.GetBundle())
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "\nSPIFFE ID:\t\t%s\n", svid.GetSpiffeId())
		if svid.GetHint() != "" {
			fmt.Fprintf(w, "Hint:\t\t\t%s\n", svid.GetHint())
		}
		printValidity(w, "SVID", chain[:1], false)
		printValidity(w, "Intermediate", chain[1:], true)
		printValidity(w, "CA", authorities, true)
		for _, td := range sortedKeys(reply.GetFederatedBundles()) {
			foreign, err := certificates(td, reply.GetFederatedBundles()[td])
			if err != nil {
				return err
			}
			printValidity(w, "["+td+"] CA", foreign, true)
		}
	}
	fmt.Fprintln(w)
	return nil
}

func printValidity(w io.Writer, label string, certs []*x509.Certificate, numbered bool) {
	for i, cert := range certs {
		name := label
		if numbered {
			name = fmt.Sprintf("%s #%d", label, i+1)
		}
		fmt.Fprintf(w, "%s Valid After:\t%v\n%s Valid Until:\t%v\n", name, cert.NotBefore, name, cert.NotAfter)
	}
}

// certificates parses concatenated DER; there is at least one.
func certificates(owner string, der []byte) ([]*x509.Certificate, error) {
	certs, err := x509.ParseCertificates(der)
	if err == nil && len(certs) == 0 {
		err = errors.New("there is none")
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "certificate_invalid", "the certificates of %s cannot be read: %v", owner, err)
	}
	return certs, nil
}

// writeX509 writes what fetch -write promises. The key is for its owner only,
// however the file was before.
func writeX509(log io.Writer, dir string, reply *workload.X509SVIDResponse) error {
	write := func(what string, i int, name string, mode os.FileMode, content []byte) error {
		path := filepath.Join(dir, name)
		fmt.Fprintf(log, "Writing %s #%d to file %s.\n", what, i, path)
		return replaceFile(path, content, mode)
	}
	for i, svid := range reply.GetSvids() {
		chain, err := certificates(svid.GetSpiffeId(), svid.GetX509Svid())
		if err != nil {
			return err
		}
		authorities, err := certificates(svid.GetSpiffeId(), svid.GetBundle())
		if err != nil {
			return err
		}
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: svid.GetX509SvidKey()})
		if err := errors.Join(
			write("SVID", i, fmt.Sprintf("svid.%d.pem", i), 0o644, pemOf(chain)),
			write("key", i, fmt.Sprintf("svid.%d.key", i), 0o600, key),
			write("bundle", i, fmt.Sprintf("bundle.%d.pem", i), 0o644, pemOf(authorities)),
		); err != nil {
			return err
		}
	}
	for i, td := range sortedKeys(reply.GetFederatedBundles()) {
		foreign, err := certificates(td, reply.GetFederatedBundles()[td])
		if err != nil {
			return err
		}
		name := fmt.Sprintf("federated_bundle.%d.%d.pem", 0, i)
		if err := write("federated bundle of "+strings.TrimPrefix(td, "spiffe://"), i, name, 0o644, pemOf(foreign)); err != nil {
			return err
		}
	}
	return nil
}

func pemOf(certs []*x509.Certificate) []byte {
	var text []byte
	for _, cert := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return text
}

// replaceFile writes a file so that a reader sees the old one or the new one.
func replaceFile(path string, content []byte, mode os.FileMode) error {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return fault.New(fault.Invalid, "write_failed", "%v", err).Fix("name an existing directory that you may write to")
	}
	_, err = file.Write(content)
	err = errors.Join(err, file.Chmod(mode), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		os.Remove(file.Name())
		return fault.New(fault.Invalid, "write_failed", "%v", err)
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
