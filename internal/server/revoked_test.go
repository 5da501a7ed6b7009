package server

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
)

// What was revoked is remembered apart from the store, and a file that says
// nothing clear stops the start. R69
func TestRevokedFile(t *testing.T) {
	f := revokedFile(filepath.Join(t.TempDir(), "revoked.json"))
	if got, err := f.read(); err != nil || got != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
	want := []bundle.Revocation{{KeyHash: [32]byte{1}, Until: time.Unix(1800000000, 0).UTC()}, {KeyHash: [32]byte{2}}}
	for range 2 {
		if err := f.write(want); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := f.read(); err != nil || !slices.Equal(got, want) {
		t.Errorf("read() = %v, %v, want %v", got, err, want)
	}
	for _, text := range []string{"", "{", "{}", `[{"key_sha256":"00"}]`, `[{"key":"x"}]`} {
		if err := os.WriteFile(string(f), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.read(); fault.ReasonOf(err) != "revoked_file_invalid" {
			t.Errorf("read() of %q = %v", text, err)
		}
	}
}
