package serverapi_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
)

// partner is a trust domain of others: a root, and an operator of theirs.
func partner(t *testing.T, admin spiffeid.ID) (root []byte, h holder) {
	t.Helper()
	ca, key := newKey(t), newKey(t)
	now := time.Now()
	root, err := svid.SelfSignedCA(admin.TrustDomain(), ca, now.Add(-time.Hour), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := svid.NewX509Issuer([][]byte{root}, ca)
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := issuer.Prepare(svid.Leaf{ID: admin, Key: publicKey(t, key), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := prepared.Issue()
	if err != nil {
		t.Fatal(err)
	}
	return root, holder{admin, tls.Certificate{Certificate: issued.Chain, PrivateKey: key}, key}
}

func publicKey(t *testing.T, key *ecdsa.PrivateKey) svid.PublicKey {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public, err := svid.ParsePublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// A foreign bundle that was deleted and comes back with other keys and the same
// sequence number is another bundle: what the old keys signed is refused, on
// connections that are open too (R69, R124).
func TestReplacedForeignBundleEndsTrustInItsOldKeys(t *testing.T) {
	admin := spiffeid.RequireFromString("spiffe://partner.org/operator")
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Admins = []spiffeid.ID{admin} })
	bundles := bundlev1.NewBundleClient(r.admin)
	set := func(root []byte) {
		t.Helper()
		resp, err := bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*spiretypes.Bundle{
			{TrustDomain: "partner.org", X509Authorities: []*spiretypes.X509Certificate{{Asn1: root}}},
		}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatal(err, resp)
		}
	}
	before, old := partner(t, admin)
	set(before)
	conn := r.connect(&old)
	if _, err := entryv1.NewEntryClient(conn).CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Fatalf("a foreign admin: %v", err)
	}
	resp, err := bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"partner.org"}})
	if err != nil || resp.Results[0].Status.Code != 0 {
		t.Fatal(err, resp)
	}
	after, fresh := partner(t, admin)
	set(after)
	_, err = entryv1.NewEntryClient(conn).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	wantCode(t, "an admin of the old keys", err, codes.Unauthenticated, "")
	if _, err := entryv1.NewEntryClient(r.connect(&old)).CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err == nil {
		t.Error("an admin of the old keys on a new connection is let in")
	}
	if _, err := entryv1.NewEntryClient(r.connect(&fresh)).CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Errorf("an admin of the new keys: %v", err)
	}
}
