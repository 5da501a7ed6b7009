package jointoken_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/attesttest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
)

func TestContract(t *testing.T) {
	attesttest.Run(t, func(t *testing.T) attesttest.Pair {
		v, err := new(jointoken.Config).Open(t.Context(), nodeattest.Env{})
		if err != nil {
			t.Fatal(err)
		}
		return attesttest.Pair{Name: jointoken.Name, Verifier: v, Prover: jointoken.Prover{Token: jointoken.Generate()}}
	})
}

func TestMalformedTokens(t *testing.T) {
	for id, text := range map[string]string{
		"K7 leading space":    " 3ZJ5TQZ2W6Q5V4YB2K7D3C2RFA",
		"K7 trailing newline": "3ZJ5TQZ2W6Q5V4YB2K7D3C2RFA\n",
		"K7 tab":              "3ZJ5TQZ2W6Q5\tV4YB2K7D3C2RFA",
		"K8 empty":            "",
		"K8 256 bytes":        strings.Repeat("a", 256),
		"K8 10 MiB":           strings.Repeat("a", 10<<20),
		"K10 NUL":             "3ZJ5TQZ2W6Q5V4YB\x002K7D3C2RFA",
		"K10 emoji":           "3ZJ5TQZ2W6Q5V4YB2K7D3C2RFA😀",
		"K10 invalid UTF-8":   "3ZJ5TQZ2W6Q5V4YB2K7D3C2RFA\xff",
	} {
		t.Run(id, func(t *testing.T) {
			if _, err := jointoken.Parse(text); fault.KindOf(err) != fault.Invalid {
				t.Errorf("Parse() = %v, want fault.Invalid", err)
			}
			v, _ := new(jointoken.Config).Open(t.Context(), nodeattest.Env{})
			if _, err := v.Verify(t.Context(), []byte(text), nil); fault.KindOf(err) != fault.Invalid {
				t.Errorf("Verify() = %v, want fault.Invalid", err)
			}
		})
	}
}

func TestPathNeverHoldsTheToken(t *testing.T) { // R22
	for id, text := range map[string]string{
		"K9 dots":    "../../x",
		"K9 slash":   "a/b",
		"K9 percent": "%2e%2e",
		"K11 SQL":    "';DROP_TABLE_tokens;--",
		"ordinary":   jointoken.Generate().Reveal(),
	} {
		t.Run(id, func(t *testing.T) {
			token, err := jointoken.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			if p := token.Path(); len(p) != 33 || strings.Trim(p[1:], "0123456789abcdef") != "" || p[0] != '/' {
				t.Errorf("Path() = %q, want a slash and 32 hex digits", p)
			}
			if bytes.Contains(token.Hash(), []byte(text)) {
				t.Error("the hash holds the token")
			}
		})
	}
}

func TestChosenTokens(t *testing.T) {
	for _, text := range []string{"1234", "password", "correct-horse-battery", // K12
		strings.Repeat("a", 200), strings.Repeat("abc", 60), strings.Repeat("0123456789", 10), strings.Repeat("deadbeef", 20),
		"abcdefghijklmnopqrstuvwxyz0123456789", "2026-11-22", "00000000-0000-4000-8000-000000000000",
		"550e8400-e29b-41d4-a716"} {
		if _, err := jointoken.Choose(text); fault.ReasonOf(err) != "join_token_weak" {
			t.Errorf("Choose(%q) = %v, want join_token_weak", text, err)
		}
	}
	random := rand.NewChaCha8([32]byte{}) // always the same: of random UUIDs one in a million looks like a pattern, and is refused
	for range 10_000 {
		id, err := uuid.NewRandomFromReader(random)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := jointoken.Choose(id.String()); err != nil {
			t.Fatalf("a random UUID: %v", err)
		}
	}
}

func TestTokenPrintsAsItsName(t *testing.T) { // R112
	token := jointoken.Generate()
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("token", "token", token, "holder", struct{ T jointoken.Token }{token})
	for _, s := range []string{fmt.Sprint(token), fmt.Sprintf("%v %+v %#v %s %q", token, token, token, token, token),
		fmt.Sprintf("%v %+v %#v", struct{ T jointoken.Token }{token}, &token, []jointoken.Token{token}), log.String()} {
		if strings.Contains(s, token.Reveal()) {
			t.Errorf("%q holds the token", s)
		}
	}
}

func FuzzVerify(f *testing.F) {
	v, _ := new(jointoken.Config).Open(f.Context(), nodeattest.Env{})
	f.Add([]byte("3ZJ5TQZ2W6Q5V4YB2K7D3C2RFA"))
	f.Add([]byte("../../x"))
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := v.Verify(t.Context(), payload, nil)
		if err == nil && (len(e.Path) != 33 || len(e.OneTime) != 32 || !e.FirstUse) {
			t.Errorf("Verify(%q) = %+v", payload, e)
		}
	})
}
