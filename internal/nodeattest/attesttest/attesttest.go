// Package attesttest is the contract that every node attestor keeps: what a
// payload from anyone on the network may and may not cause.
package attesttest

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Pair is an attestor's two halves, set up so that the proof holds.
type Pair struct {
	Name     string
	Verifier nodeattest.Verifier
	Prover   nodeattest.Prover
}

// Run checks the contract. open is called for each case.
func Run(t *testing.T, open func(t *testing.T) Pair) {
	t.Run("a good proof", func(t *testing.T) {
		p := open(t)
		e, err := attest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		checkEvidence(t, p.Name, e)
		again, err := attest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if again.Path != e.Path {
			t.Errorf("the same node has path %q, then %q", e.Path, again.Path)
		}
	})
	t.Run("bad payloads", func(t *testing.T) {
		p := open(t)
		payloads := map[string][]byte{
			"empty":              nil,
			"A3 1 MiB + 1":       bytes.Repeat([]byte("a"), nodeattest.MaxPayload+1),
			"A3 deep":            []byte(strings.Repeat("[", 100_000)),
			"zero bytes":         make([]byte, 64),
			"invalid UTF-8":      {0xff, 0xfe, 0xfd},
			"newline":            []byte("a\nb"),
			"a path":             []byte("../../x\x00"),
			"truncated UTF-8":    []byte("caf\xc3"),
			"a lone JSON object": []byte("{}\n"),
		}
		for name, payload := range payloads {
			t.Run(name, func(t *testing.T) {
				e, err := p.Verifier.Verify(t.Context(), payload, refuse)
				if err == nil {
					t.Fatalf("Verify() = %+v, want a refusal", e)
				}
				if k := fault.KindOf(err); k != fault.Invalid && k != fault.Denied {
					t.Errorf("Verify() = %v (%v), want invalid or denied", err, k)
				}
				if len(payload) >= 32 && len(payload) < 1<<16 && strings.Contains(err.Error(), string(payload)) {
					t.Errorf("the error repeats the payload: %v", err) // R104
				}
			})
		}
	})
	t.Run("facts", func(t *testing.T) {
		p := open(t)
		checker, ok := p.Verifier.(nodeattest.FactChecker)
		if !ok {
			return
		}
		for _, fact := range []string{"", "unix.uid", "k8s.container", p.Name + ".x"} {
			if checker.Checks(fact) && !entry.Verifiable(fact) {
				t.Errorf("it says that it can find out %q, which no server can", fact)
			}
		}
		e, err := attest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		for name, facts := range map[string]map[string]string{
			"none": nil, "a path": {entry.FactNamespace: "../..", entry.FactPod: "..", entry.FactPodUID: "/"},
			"nothing that is there": {entry.FactNamespace: "a", entry.FactPod: "b", entry.FactPodUID: "c"},
		} {
			for _, node := range [][]entry.Selector{nil, e.Selectors, {{Type: "other", Value: "x"}}} {
				seen, err := checker.Look(t.Context(), node, facts)
				switch fault.KindOf(err) {
				case fault.Denied, fault.Precondition, fault.Unavailable:
				default:
					t.Errorf("Look(%s) = %+v, %v, want a refusal", name, seen, err)
				}
			}
		}
	})
	t.Run("a caller that has gone", func(t *testing.T) {
		p := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			attest(ctx, p)
		}()
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			t.Error("the conversation outlives its caller") // A45
		}
	})
}

func attest(ctx context.Context, p Pair) (nodeattest.Evidence, error) {
	payload, err := p.Prover.Payload(ctx)
	if err != nil {
		return nodeattest.Evidence{}, err
	}
	return p.Verifier.Verify(ctx, payload, p.Prover.Answer)
}

func refuse(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the node does not answer")
}

func checkEvidence(t *testing.T, name string, e nodeattest.Evidence) {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("td")
	if _, err := spiffeid.FromPath(td, "/spire/agent/"+name+e.Path); err != nil || !strings.HasPrefix(e.Path, "/") {
		t.Errorf("path %q is no SPIFFE path: %v", e.Path, err) // A43, R24
	}
	for _, s := range e.Selectors {
		if s.Type != name {
			t.Errorf("selector %v is another attestor's", s) // A44
		}
	}
	if e.FirstUse && e.CanReattest {
		t.Error("a proof for the first node only cannot be shown again")
	}
}
