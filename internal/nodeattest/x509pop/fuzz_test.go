package x509pop

import (
	"context"
	"net/url"
	"strings"
	"testing"
)

func FuzzVerify(f *testing.F) {
	p := newPKI(f)
	v := open(f, &Config{CABundlePath: p.rootPath}, env())
	prover := p.prover(p.leaf(f, nil))
	payload, _ := prover.Payload(f.Context())
	f.Add(payload, []byte(`{"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","r":"AQ==","s":"AQ=="}}`))
	f.Add([]byte(`{"certificates":["AA=="]}`), []byte(`{"rsa_signature":{"nonce":"AA==","signature":"AA=="}}`))
	f.Fuzz(func(t *testing.T, payload, reply []byte) {
		e, err := v.Verify(t.Context(), payload, func(context.Context, []byte) ([]byte, error) { return reply, nil })
		if err == nil {
			t.Errorf("Verify() = %+v for a fixed answer", e) // R26
		}
	})
}

func FuzzChallenge(f *testing.F) {
	prover := &Prover{key: newKey(f)}
	f.Add([]byte(`{"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`))
	f.Add([]byte(`{"rsa_signature":null}`))
	f.Fuzz(func(t *testing.T, question []byte) {
		reply, err := prover.Answer(t.Context(), question)
		if err != nil {
			return
		}
		if _, err := parseECDSAAnswer(reply); err != nil {
			t.Errorf("our own answer %q: %v", reply, err)
		}
	})
}

// FuzzSANPair holds the selector to say the pair and nothing else (R43).
func FuzzSANPair(f *testing.F) {
	f.Add("x509pop://example.org/a/b:c")
	f.Add("x509pop://example.org/a%3Ab/c")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		p, ok := readPair(u)
		if !ok {
			return
		}
		if key, value, _ := strings.Cut(p.key+":"+p.value, ":"); key != p.key || value != p.value || key == "" || value == "" {
			t.Errorf("%q: the selector of %+v reads back as %q and %q", text, p, key, value)
		}
	})
}
