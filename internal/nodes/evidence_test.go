package nodes_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"log/slog"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// says is an attestor that yields what it is told to.
type says struct{ evidence nodeattest.Evidence }

func (s says) Verify(context.Context, []byte, nodeattest.Challenger) (nodeattest.Evidence, error) {
	return s.evidence, nil
}

// Whatever an attestor yields, the agent's ID lies where the attestor may put it.
func TestEvidenceStaysInItsPlace(t *testing.T) { // R24
	log := slog.New(slog.DiscardHandler)
	st, err := sqlite.Config{Dir: t.TempDir()}.Open(t.Context(), log)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	td := spiffeid.RequireTrustDomainFromString("td")
	reg, err := registry.Open(t.Context(), st, td, log)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := svid.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	const good, refused = "asked_to_sign", "evidence_invalid"
	for id, c := range map[string]struct {
		evidence nodeattest.Evidence
		reason   string
	}{
		"inside":                         {nodeattest.Evidence{Path: "/a"}, good},
		"A43 empty":                      {nodeattest.Evidence{}, refused},
		"A43 no slash":                   {nodeattest.Evidence{Path: "x/a"}, refused},
		"A43 dots":                       {nodeattest.Evidence{Path: "/../other/a"}, refused},
		"outside":                        {nodeattest.Evidence{Path: "/cn/a", Outside: true}, good},
		"outside, its own":               {nodeattest.Evidence{Path: "/this/a", Outside: true}, good},
		"outside, another's":             {nodeattest.Evidence{Path: "/other/a", Outside: true}, refused},
		"outside, another's name itself": {nodeattest.Evidence{Path: "/other", Outside: true}, refused},
		"outside, a token's":             {nodeattest.Evidence{Path: "/join_token/a", Outside: true}, refused},
		"outside, empty":                 {nodeattest.Evidence{Outside: true}, refused},
		"outside, no slash":              {nodeattest.Evidence{Path: "x/a", Outside: true}, refused},
		"outside, dots":                  {nodeattest.Evidence{Path: "/../server", Outside: true}, refused},
		"A44 selector of another's type": {nodeattest.Evidence{Path: "/a", Selectors: []entry.Selector{{Type: "other", Value: "x"}}}, refused},
	} {
		t.Run(id, func(t *testing.T) {
			e := nodes.New(nodes.Config{
				TrustDomain: td, Registry: reg, Log: log, Lifetimes: lifetime.Set{Agent: time.Hour},
				Verifiers: map[string]nodeattest.Verifier{"this": says{c.evidence}, "other": says{}},
				Issuer:    func(time.Time) (*svid.X509Issuer, error) { return nil, fault.New(fault.Unavailable, good, "no") },
			})
			_, err := e.Attest(t.Context(), nodes.Attestation{Type: "this", Payload: []byte("x"), CSR: csr}, nil)
			if fault.ReasonOf(err) != c.reason {
				t.Errorf("Attest() = %v, want %s", err, c.reason)
			}
		})
	}
}
