package svid

import (
	"crypto"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/plastron/plastron/internal/fault"
)

// tower is a PKI that somebody else has: a root, authorities below it, and at its
// foot ours. The functions of a case spoil it.
type tower struct {
	t     *testing.T
	now   time.Time
	certs []*x509.Certificate // root first, ours last
	keys  []crypto.Signer
	edit  func(chain, roots [][]byte) ([][]byte, [][]byte)
}

func newTower(t *testing.T, now time.Time, authorities int) *tower {
	w := &tower{t: t, now: now}
	for i := range authorities {
		w.certs = append(w.certs, &x509.Certificate{
			SerialNumber: big.NewInt(int64(100 + i)), Subject: pkix.Name{Organization: []string{"Example Corp"}, CommonName: fmt.Sprint("CA ", i)},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1, 2, 3, byte(i)},
		})
		w.keys = append(w.keys, newEC(t, elliptic.P256()))
	}
	w.ours().URIs = []*url.URL{spiffeid.RequireTrustDomainFromString("example.org").ID().URL()}
	return w
}

func (w *tower) ours() *x509.Certificate { return w.certs[len(w.certs)-1] }

// build signs the tower. The chain begins with ours and ends below the root.
func (w *tower) build() (chain, roots [][]byte) {
	w.t.Helper()
	parent, key := w.certs[0], w.keys[0]
	for i, c := range w.certs {
		der, err := x509.CreateCertificate(rand.Reader, c, parent, w.keys[i].Public(), key)
		if err != nil {
			w.t.Fatal(err)
		}
		if i == 0 {
			roots = [][]byte{der}
		} else {
			chain = append([][]byte{der}, chain...)
		}
		if parent, err = x509.ParseCertificate(der); err != nil {
			w.t.Fatal(err)
		}
		// What follows is signed whatever this one says of itself.
		free := *parent
		free.KeyUsage, free.IsCA = 0, true
		parent, key = &free, w.keys[i]
	}
	if w.edit != nil {
		return w.edit(chain, roots)
	}
	return chain, roots
}

// Every CA that RFC 5280 allows above us is accepted, and then SVIDs with their
// chains verify by our own verifier, go-spiffe and openssl; what is wrong is
// refused by name (RG32, Q14, R41).
func TestCheckChain(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	unknown := pkix.Extension{Id: []int{1, 2, 3, 4}, Value: []byte{5, 0}}
	critical := unknown
	critical.Critical = true
	for _, c := range []struct {
		name        string
		authorities int // the root and ours included
		edit        func(w *tower)
		reason      string // empty: accepted
		remark      string
		lax         bool // openssl accepts it, but not with -x509_strict
	}{
		{name: "corporate root", authorities: 2},
		{name: "corporate root and intermediate", authorities: 3},
		{name: "the longest chain", authorities: 7},
		{name: "one longer", authorities: 8, reason: "upstream_chain_too_long"},
		{name: "RSA 2048 root", authorities: 3, edit: func(w *tower) { w.keys[0] = newRSA(t, 2048) }},
		{name: "RSA 4096 intermediate", authorities: 3, edit: func(w *tower) { w.keys[1] = newRSA(t, 4096) }},
		{name: "RSA ours", authorities: 3, edit: func(w *tower) { w.keys[2] = newRSA(t, 2048) }},
		{name: "P-384", authorities: 3, edit: func(w *tower) { w.keys[0], w.keys[1] = newEC(t, elliptic.P384()), newEC(t, elliptic.P384()) }},
		{name: "P-521", authorities: 3, edit: func(w *tower) { w.keys[0] = newEC(t, elliptic.P521()) }},
		{name: "path lengths that fit", authorities: 4, edit: func(w *tower) {
			w.certs[0].MaxPathLen, w.certs[1].MaxPathLen, w.certs[2].MaxPathLen = 3, 2, 1
			w.certs[3].MaxPathLenZero = true
		}},
		{name: "root without key usage", authorities: 3, lax: true, edit: func(w *tower) { w.certs[0].KeyUsage = 0 }},
		{name: "intermediate without key usage", authorities: 3, edit: func(w *tower) { w.certs[1].KeyUsage = 0 }, lax: true},
		{name: "ours without a URI name", authorities: 3, edit: func(w *tower) { w.ours().URIs = nil }},
		{name: "extensions nobody has to know", authorities: 3, edit: func(w *tower) {
			for _, c := range w.certs {
				c.ExtraExtensions = []pkix.Extension{unknown}
				c.CRLDistributionPoints, c.OCSPServer = []string{"http://10.0.0.1/crl"}, []string{"http://10.0.0.1/ocsp"} // L33: nobody asks
			}
		}},
		{name: "extended key usage of both", authorities: 3, edit: func(w *tower) {
			w.certs[1].ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}},
		{name: "extended key usage of servers", authorities: 3, remark: "serverAuth or clientAuth", lax: true, edit: func(w *tower) {
			w.certs[1].ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}},
		{name: "digitalSignature", authorities: 3, remark: "digitalSignature", edit: func(w *tower) {
			w.ours().KeyUsage |= x509.KeyUsageDigitalSignature
		}},
		{name: "name constraints on us", authorities: 3, edit: func(w *tower) {
			w.certs[1].PermittedURIDomains, w.certs[1].PermittedDNSDomainsCritical = []string{"example.com", "example.org"}, true
		}},
		{name: "name constraints on hosts", authorities: 3, edit: func(w *tower) {
			w.certs[1].PermittedDNSDomains, w.certs[1].PermittedDNSDomainsCritical = []string{"corp.example"}, true
		}},
		{name: "root at the end of the chain", authorities: 3, edit: func(w *tower) {
			w.edit = func(chain, roots [][]byte) ([][]byte, [][]byte) { return append(chain, roots...), roots }
		}},
		{name: "serial number of the root zero", authorities: 2, edit: func(w *tower) { w.certs[0].SerialNumber = big.NewInt(0) }, lax: true},

		{name: "Q14 no certificate", authorities: 2, reason: "upstream_chain_empty", edit: func(w *tower) { w.edit = func(_, r [][]byte) ([][]byte, [][]byte) { return nil, r } }},
		{name: "no root", authorities: 2, reason: "upstream_chain_empty", edit: func(w *tower) { w.edit = func(c, _ [][]byte) ([][]byte, [][]byte) { return c, nil } }},
		{name: "Q14 shorter chain", authorities: 3, reason: "upstream_root_unrelated", edit: func(w *tower) { w.edit = func(c, r [][]byte) ([][]byte, [][]byte) { return c[:1], r } }},
		{name: "Q14 unrelated root", authorities: 3, reason: "upstream_root_unrelated", edit: func(w *tower) {
			w.edit = func(c, _ [][]byte) ([][]byte, [][]byte) { _, other := newTower(t, now, 2).build(); return c, other }
		}},
		{name: "wrong order", authorities: 4, reason: "upstream_chain_order", edit: func(w *tower) {
			w.edit = func(c, r [][]byte) ([][]byte, [][]byte) { return [][]byte{c[0], c[2], c[1]}, r }
		}},
		{name: "not a certificate", authorities: 2, reason: "upstream_certificate_malformed", edit: func(w *tower) {
			w.edit = func(_, r [][]byte) ([][]byte, [][]byte) { return [][]byte{{1, 2, 3}}, r }
		}},
		{name: "ours is for another key", authorities: 3, reason: "upstream_key_mismatch", edit: func(w *tower) {
			w.edit = func(c, r [][]byte) ([][]byte, [][]byte) { w.keys[2] = newEC(t, elliptic.P256()); return c, r }
		}},
		{name: "ours is of another trust domain", authorities: 3, reason: "upstream_trust_domain_mismatch", edit: func(w *tower) {
			w.ours().URIs = []*url.URL{{Scheme: "spiffe", Host: "other.org"}}
		}},
		{name: "ours has a path", authorities: 3, reason: "upstream_trust_domain_mismatch", edit: func(w *tower) {
			w.ours().URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ca"}}
		}},
		{name: "ours has two names", authorities: 3, reason: "upstream_trust_domain_mismatch", edit: func(w *tower) {
			w.ours().URIs = append(w.ours().URIs, w.ours().URIs[0])
		}},
		{name: "ours is not a CA", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.ours().IsCA = false }},
		{name: "ours without keyCertSign", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.ours().KeyUsage = x509.KeyUsageCRLSign }},
		{name: "ours without key usage", authorities: 3, reason: "upstream_certificate_invalid", edit: func(w *tower) { w.ours().KeyUsage = 0 }},
		{name: "intermediate with CA:FALSE", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.certs[1].IsCA = false }},
		{name: "intermediate without keyCertSign", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.certs[1].KeyUsage = x509.KeyUsageDigitalSignature }},
		{name: "intermediate with a workload's ID", authorities: 3, reason: "upstream_certificate_invalid", edit: func(w *tower) {
			w.certs[1].URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ca"}}
		}},
		{name: "root with CA:FALSE", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.certs[0].IsCA = false }},
		{name: "root without keyCertSign", authorities: 3, reason: "upstream_not_an_authority", edit: func(w *tower) { w.certs[0].KeyUsage = x509.KeyUsageCRLSign }},
		{name: "ours has ended", authorities: 3, reason: "upstream_expired", edit: func(w *tower) { w.ours().NotAfter = now.Add(-time.Second) }},
		{name: "intermediate has ended", authorities: 3, reason: "upstream_expired", edit: func(w *tower) { w.certs[1].NotAfter = now.Add(-time.Second) }},
		{name: "root has ended", authorities: 3, reason: "upstream_expired", edit: func(w *tower) { w.certs[0].NotAfter = now.Add(-time.Second) }},
		{name: "ours has not begun", authorities: 3, reason: "upstream_not_yet_valid", edit: func(w *tower) { w.ours().NotBefore = now.Add(time.Minute) }},
		{name: "path length 0 above us", authorities: 3, reason: "upstream_path_length", edit: func(w *tower) { w.certs[0].MaxPathLenZero = true }},
		{name: "path length 1 with two below", authorities: 4, reason: "upstream_path_length", edit: func(w *tower) { w.certs[0].MaxPathLen = 1 }},
		{name: "name constraints without us", authorities: 3, reason: "upstream_name_constraints", edit: func(w *tower) {
			w.certs[1].PermittedURIDomains, w.certs[1].PermittedDNSDomainsCritical = []string{"example.com"}, true
		}},
		{name: "name constraints for hosts below us", authorities: 3, reason: "upstream_name_constraints", edit: func(w *tower) {
			w.certs[1].PermittedURIDomains = []string{".example.org"}
		}},
		{name: "name constraints for the host above us", authorities: 3, reason: "upstream_name_constraints", edit: func(w *tower) {
			w.certs[1].PermittedURIDomains = []string{"org"} // crypto/x509 would accept it, RFC 5280 does not
		}},
		{name: "name constraints that exclude us", authorities: 3, reason: "upstream_name_constraints", edit: func(w *tower) {
			w.certs[0].ExcludedURIDomains = []string{"example.org"}
		}},
		{name: "L16 critical extension", authorities: 3, reason: "upstream_extension_unknown", edit: func(w *tower) { w.certs[1].ExtraExtensions = []pkix.Extension{critical} }},
		{name: "L22 weak RSA root", authorities: 3, reason: "upstream_key_weak", edit: func(w *tower) { w.keys[0] = newRSA(t, 1024) }},
		{name: "L22 weak RSA intermediate", authorities: 3, reason: "upstream_certificate_invalid", edit: func(w *tower) { w.keys[1] = newRSA(t, 1024) }},
		{name: "Ed25519", authorities: 3, reason: "upstream_key_weak", edit: func(w *tower) { _, w.keys[1], _ = ed25519.GenerateKey(rand.Reader) }},
		{name: "L20 serial number zero", authorities: 3, reason: "upstream_certificate_invalid", edit: func(w *tower) { w.certs[1].SerialNumber = big.NewInt(0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newTower(t, now, c.authorities)
			if c.edit != nil {
				c.edit(w)
			}
			key := w.keys[len(w.keys)-1]
			chain, roots := w.build()
			got, err := CheckChain(chain, roots, ChainRules{
				TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Key: w.keys[len(w.keys)-1].Public(), Ours: true, Now: now,
			})
			if c.reason != "" {
				if fault.ReasonOf(err) != c.reason {
					t.Errorf("CheckChain() = %v, want %s", err, c.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(strings.Join(got.Remarks, "\n"), c.remark) || c.remark == "" && len(got.Remarks) > 0 {
				t.Errorf("remarks %q, want %q", got.Remarks, c.remark)
			}
			if len(got.Certificates) != c.authorities-1 {
				t.Errorf("%d certificates are sent, want %d", len(got.Certificates), c.authorities-1)
			}
			checkBelow(t, openssl, got, key, now, c.lax)
		})
	}
}

// checkBelow issues under a chain that was accepted and has others verify it.
func checkBelow(t *testing.T, openssl string, chain Chain, key crypto.Signer, now time.Time, lax bool) {
	t.Helper()
	issuer, err := NewX509Issuer(append(append([][]byte{}, chain.Certificates...), chain.Root), key)
	if err != nil {
		t.Fatal(err)
	}
	if !issuer.NotAfter().Equal(chain.NotAfter) {
		t.Errorf("the issuer ends at %v, the chain at %v", issuer.NotAfter(), chain.NotAfter)
	}
	leaf := leafOf("spiffe://example.org/a", publicKey(t, newEC(t, elliptic.P256())), now)
	p, err := issuer.Prepare(leaf)
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Issue()
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(chain.Root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyX509(got.Chain, []*x509.Certificate{root}, leaf.ID.TrustDomain(), now); err != nil {
		t.Errorf("VerifyX509: %v", err)
	}
	if _, _, err := x509svid.ParseAndVerify(got.Chain, x509bundle.FromX509Authorities(leaf.ID.TrustDomain(), []*x509.Certificate{root})); err != nil {
		t.Errorf("go-spiffe: %v", err)
	}
	if openssl != "" {
		opensslVerify(t, openssl, chain.Root, got.Chain, !lax)
	}
}

// R8: nothing below lasts longer than what is above, root included; of several
// roots with one key the one that lasts counts.
func TestCheckChainEnds(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	w := newTower(t, now, 3)
	w.certs[0].NotAfter = now.Add(10 * time.Minute)
	chain, roots := w.build()
	rules := ChainRules{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Key: w.keys[2].Public(), Ours: true, Now: now}
	got, err := CheckChain(chain, roots, rules)
	if err != nil || !got.NotAfter.Equal(now.Add(10*time.Minute)) {
		t.Errorf("the chain ends at %v, want the root's end; %v", got.NotAfter, err)
	}
	again := *w.certs[0]
	again.NotAfter, again.SerialNumber = now.Add(20*time.Minute), big.NewInt(7)
	renewed, err := x509.CreateCertificate(rand.Reader, &again, &again, w.keys[0].Public(), w.keys[0])
	if err != nil {
		t.Fatal(err)
	}
	got, err = CheckChain(chain, [][]byte{roots[0], renewed}, rules)
	if err != nil || !got.NotAfter.Equal(now.Add(20*time.Minute)) || got.RootID != "01020300" {
		t.Errorf("with the renewed root: ends at %v under %s, %v", got.NotAfter, got.RootID, err)
	}
}

// R13: what an authority below ours may sign, and how deep.
func TestPrepareAuthority(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	root := newAuthority(t, newEC(t, elliptic.P256()), now)
	issuer, chain := root.issuer, [][]byte(nil)
	for depth := 1; ; depth++ {
		key := newEC(t, elliptic.P256())
		p, err := issuer.PrepareAuthority(Authority{
			TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Key: publicKey(t, key), Unit: fmt.Sprint("DOWNSTREAM-", depth), Constrain: true,
			NotBefore: now.Add(-Backdate), NotAfter: now.Add(1000 * time.Hour),
		})
		if depth == 7 {
			if fault.ReasonOf(err) != "path_length_exhausted" {
				t.Errorf("at depth %d: %v", depth, err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if chain, err = p.Issue(); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Issue(); fault.ReasonOf(err) != "already_issued" {
			t.Errorf("it was signed twice: %v", err)
		}
		c, err := x509.ParseCertificate(chain[0])
		if err != nil {
			t.Fatal(err)
		}
		if c.MaxPathLen != 6-depth || !c.PermittedDNSDomainsCritical || c.PermittedURIDomains[0] != "example.org" || c.NotAfter.After(root.root.NotAfter) {
			t.Errorf("depth %d: path length %d, constraint %v, ends %v", depth, c.MaxPathLen, c.PermittedURIDomains, c.NotAfter)
		}
		checked, err := CheckChain(chain, [][]byte{root.der}, ChainRules{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Key: key.Public(), Ours: true, Now: now})
		if err != nil {
			t.Fatal(err)
		}
		checkBelow(t, openssl, checked, key, now, false)
		if issuer, err = NewX509Issuer(chain, key); err != nil {
			t.Fatal(err)
		}
		// Another trust domain's IDs are outside, for whoever follows RFC 5280.
		foreign, err := issuer.Prepare(leafOf("spiffe://other.org/a", publicKey(t, newEC(t, elliptic.P256())), now))
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := foreign.Issue()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyX509(leaf.Chain, []*x509.Certificate{root.root}, spiffeid.RequireTrustDomainFromString("other.org"), now); err == nil {
			t.Error("an ID of another trust domain passes the name constraint")
		}
	}
}

func TestPrepareAuthorityRefuses(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	root := newAuthority(t, newEC(t, elliptic.P256()), now)
	a := Authority{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), NotBefore: now, NotAfter: now.Add(time.Hour)}
	own := a
	own.Key = publicKey(t, root.issuer.signer)
	if _, err := root.issuer.PrepareAuthority(own); fault.ReasonOf(err) != "public_key_invalid" { // R4
		t.Errorf("an authority's own key: %v", err)
	}
	late := a
	late.Key, late.NotBefore, late.NotAfter = publicKey(t, newEC(t, elliptic.P256())), now.Add(time.Hour), now
	if _, err := root.issuer.PrepareAuthority(late); fault.ReasonOf(err) != "lifetime_empty" {
		t.Errorf("no lifetime: %v", err)
	}
	// T-X509-3: with any name constraint crypto/x509 verifies no such name.
	numbers := a
	numbers.TrustDomain, numbers.Constrain, numbers.Key = spiffeid.RequireTrustDomainFromString("10.0.0.1"), true, publicKey(t, newEC(t, elliptic.P256()))
	p, err := root.issuer.PrepareAuthority(numbers)
	if err != nil || len(p.template.PermittedURIDomains) != 0 {
		t.Errorf("a trust domain of numbers: %v", err)
	}
}
