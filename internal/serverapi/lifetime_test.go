package serverapi_test

import (
	"crypto/x509"
	"testing"
	"time"

	issuev1 "github.com/plastron/plastron/api/plastron/issue/v1"
	lifetimev1 "github.com/plastron/plastron/api/plastron/lifetime/v1"
	svidv1 "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc/codes"
)

func (r *rig) explain(req *lifetimev1.ExplainRequest) *lifetimev1.ExplainResponse {
	r.t.Helper()
	got, err := lifetimev1.NewLifetimeClient(r.admin).Explain(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

func leafOf(t *testing.T, chain [][]byte) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// document returns what is said of one kind.
func document(t *testing.T, got *lifetimev1.ExplainResponse, kind string) *lifetimev1.Document {
	t.Helper()
	for _, d := range got.Documents {
		if d.Kind == kind {
			if len(d.Limits) == 0 || d.EndsAt != d.Limits[0].EndsAt {
				t.Errorf("of %s the first limit is not the one that counts: %v", kind, d)
			}
			return d
		}
	}
	t.Fatalf("nothing is said of %s: %v", kind, got)
	return nil
}

// What is explained before and after a signature encloses what was signed, and the
// trail has the limit that was named.
func TestExplainIsWhatIsSigned(t *testing.T) { // R8, R10
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Lifetimes.X509 = 20 * time.Minute }) // authorities live an hour
	agent := r.agent()
	conn := r.connect(&agent)
	for _, c := range []struct {
		name      string
		edit      func(*spiretypes.Entry)
		x509, jwt string // the limits that count
	}{
		{"plain", func(*spiretypes.Entry) {}, "default", "default"},
		{"long", func(e *spiretypes.Entry) { e.X509SvidTtl, e.JwtSvidTtl = 7200, 30 }, "authority_end", "jwt_svid_ttl"},
		{"short", func(e *spiretypes.Entry) { e.X509SvidTtl, e.JwtSvidTtl = 60, 7200 }, "x509_svid_ttl", "authority_end"},
		{"ending", func(e *spiretypes.Entry) { e.ExpiresAt = time.Now().Add(2 * time.Minute).Unix() }, "entry_expiry", "entry_expiry"},
	} {
		e := entryUnder(agent.id, "/"+c.name)
		c.edit(e)
		made := r.create(e)[0]
		before := r.explain(&lifetimev1.ExplainRequest{EntryId: made.Id})
		signed := issueX509(t, conn, made.Id, newCSR(t, newKey(t)))[0]
		token, err := issuev1.NewIssueClient(conn).JWT(t.Context(), &issuev1.JWTRequest{GrantId: made.Id, Audience: []string{"a"}})
		if err != nil || signed.Refusal != nil {
			t.Fatal(err, signed.Refusal)
		}
		after := r.explain(&lifetimev1.ExplainRequest{EntryId: made.Id})
		for _, kind := range []struct {
			name, limit string
			end         int64
		}{{"x509", c.x509, signed.ExpiresAt}, {"jwt", c.jwt, token.ExpiresAt}} {
			from, to := document(t, before, kind.name), document(t, after, kind.name)
			if kind.end < from.EndsAt || kind.end > to.EndsAt {
				t.Errorf("%s %s ends at %d, want between %d and %d as is said", c.name, kind.name, kind.end, from.EndsAt, to.EndsAt)
			}
			if from.Limits[0].Name != kind.limit {
				t.Errorf("%s %s is limited by %s, want %s", c.name, kind.name, from.Limits[0].Name, kind.limit)
			}
		}
		leaf := leafOf(t, signed.CertChain)
		said := r.explain(&lifetimev1.ExplainRequest{Serial: leaf.SerialNumber.String()})
		if i := said.Issued; i.Kind != "x509" || i.SpiffeId != signed.SpiffeId || i.EndsAt != leaf.NotAfter.Unix() || i.Limit != c.x509 ||
			i.EntryId != made.Id || i.Revision != i.RevisionNow || i.Caller != agent.id.String() {
			t.Errorf("%s: on record is %v", c.name, i)
		}
		if len(said.Documents) != 1 || said.Documents[0].Limits[0].Name != c.x509 {
			t.Errorf("%s: signed now it would be %v", c.name, said.Documents)
		}
	}

	// Of all that the server signs, and of what no entry grants.
	all := r.explain(&lifetimev1.ExplainRequest{})
	for _, kind := range []string{"x509", "jwt", "agent", "server", "ca", "downstream"} {
		document(t, all, kind)
	}
	if said := r.explain(&lifetimev1.ExplainRequest{Serial: leafOf(t, agent.cert.Certificate).SerialNumber.String()}); said.Issued.Kind != "agent" ||
		said.Issued.Limit != "default" || len(said.Documents) != 0 {
		t.Errorf("of the agent's certificate is said %v", said)
	}
	csr, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/minted")}, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	mint, err := svidv1.NewSVIDClient(r.admin).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: 77})
	if err != nil {
		t.Fatal(err)
	}
	minted := leafOf(t, mint.Svid.CertChain)
	if said := r.explain(&lifetimev1.ExplainRequest{Serial: minted.SerialNumber.String()}); said.Issued.Limit != "requested" || said.Issued.EntryId != "" {
		t.Errorf("of what was minted is said %v", said)
	}

	client := lifetimev1.NewLifetimeClient(r.admin)
	_, err = client.Explain(t.Context(), &lifetimev1.ExplainRequest{EntryId: "none"})
	wantCode(t, "an entry that is not there", err, codes.NotFound, "entry_not_found")
	_, err = client.Explain(t.Context(), &lifetimev1.ExplainRequest{Serial: "17"})
	wantCode(t, "a serial number of nobody", err, codes.NotFound, "serial_unknown")
	_, err = client.Explain(t.Context(), &lifetimev1.ExplainRequest{Serial: "17", EntryId: "x"})
	wantCode(t, "two questions", err, codes.InvalidArgument, "request_invalid")
}
