package workloadapi_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// R58: while authorities come, sign, are doubted and go, each message is whole:
// what it holds verifies by what it holds, and its key is the certificate's.
func TestMessagesAreWhole(t *testing.T) {
	r := newRig(t)
	r.grant("a", "/a")
	r.grant("b", "/b")
	client := r.client()
	s, err := client.FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *workload.X509SVIDResponse {
		t.Helper()
		m, err := s.Recv()
		for status.Code(err) == codes.Unavailable { // between the end of one SVID and the next
			if s, err = client.FetchX509SVID(r.ctx(), &workload.X509SVIDRequest{}); err == nil {
				m, err = s.Recv()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(m.GetSvids()) == 0 {
			t.Fatal("an empty message")
		}
		for _, one := range m.GetSvids() {
			verify(t, one)
		}
		return m
	}
	first := next()
	for range 5 {
		for _, change := range []func(){r.server.Rotate, r.server.RotateUnpublished, r.server.Publish, r.server.Taint, r.server.Revoke} {
			change()
		}
		// The last of them has revoked what signed the certificates of the message before.
		for before := first.GetSvids()[0].GetX509Svid(); bytes.Equal(first.GetSvids()[0].GetX509Svid(), before); {
			first = next()
		}
	}
}

func verify(t *testing.T, one *workload.X509SVID) {
	t.Helper()
	chain, err := x509.ParseCertificates(one.GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	authorities, err := x509.ParseCertificates(one.GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, a := range authorities {
		roots.AddCert(a)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("%s does not verify by its message's bundle: %v", one.GetSpiffeId(), err)
	}
	key, err := x509.ParsePKCS8PrivateKey(one.GetX509SvidKey())
	if err != nil {
		t.Fatal(err)
	}
	public, ok := key.(crypto.Signer).Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(chain[0].PublicKey) {
		t.Errorf("the key of %s is another's", one.GetSpiffeId())
	}
}
