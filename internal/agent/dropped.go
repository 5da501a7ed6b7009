package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/bundle"
)

const (
	droppedFile   = "dropped.json"
	droppedFormat = 1
	maxDropped    = 4096
)

// dropped is what the trust domain has taken out of its bundle and somebody could
// offer to us again: an older configured bundle, or an older state file that was
// put back, does not make the agent trust it (R55). It lies in a file of its own,
// so that one old file alone does no harm.
//
// What the server itself says later wins. A whole directory that was put back
// cannot be told from one that never learnt more.
type dropped struct {
	mu    sync.Mutex // guards everything below
	until map[string]time.Time
	dirty bool
}

type droppedState struct {
	Format  int
	Dropped map[string]int64 // hex SHA-256 of the certificate, or of the key: Unix seconds of its end
}

// keysOf returns what a bundle holds, each with its end.
func keysOf(b *bundle.Bundle) map[string]time.Time {
	all := map[string]time.Time{}
	if b == nil {
		return all
	}
	for _, a := range b.X509 {
		if cert, err := x509.ParseCertificate(a.ASN1); err == nil {
			all[fingerprint(a.ASN1)] = cert.NotAfter
		}
	}
	for _, a := range b.JWT {
		end := a.ExpiresAt
		if end.IsZero() {
			end = time.Unix(1<<40, 0) // it never ends by itself
		}
		all[fingerprint(a.PublicKey)] = end
	}
	return all
}

func fingerprint(der []byte) string {
	h := sha256.Sum256(der)
	return hex.EncodeToString(h[:])
}

// learn compares what the server says now with what was held before. What has
// ended is remembered too: our clock may be wrong (R107). If there is no room for
// all, what ends first is forgotten.
func (d *dropped) learn(before, now *bundle.Bundle) {
	had, have := keysOf(before), keysOf(now)
	d.mu.Lock()
	defer d.mu.Unlock()
	for key := range have {
		if _, again := d.until[key]; again {
			delete(d.until, key)
			d.dirty = true
		}
		delete(had, key)
	}
	if len(had) == 0 {
		return
	}
	if d.until == nil {
		d.until = map[string]time.Time{}
	}
	maps.Copy(d.until, had)
	d.dirty = true
	if over := len(d.until) - maxDropped; over > 0 {
		byEnd := func(a, b string) int { return d.until[a].Compare(d.until[b]) }
		for _, key := range slices.SortedFunc(maps.Keys(d.until), byEnd)[:over] {
			delete(d.until, key)
		}
	}
}

// without returns the bundle less what was dropped.
func (d *dropped) without(b *bundle.Bundle) *bundle.Bundle {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.until) == 0 {
		return b
	}
	b = b.Clone()
	b.X509 = slices.DeleteFunc(b.X509, func(a bundle.X509Authority) bool { _, gone := d.until[fingerprint(a.ASN1)]; return gone })
	b.JWT = slices.DeleteFunc(b.JWT, func(a bundle.JWTAuthority) bool { _, gone := d.until[fingerprint(a.PublicKey)]; return gone })
	return b
}

func (d *dropped) load(path string) error {
	var s droppedState
	err := readJSON(path, &s)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case s.Format != droppedFormat || len(s.Dropped) > maxDropped:
		return fmt.Errorf("it is of format %d with %d rows", s.Format, len(s.Dropped))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.until = make(map[string]time.Time, len(s.Dropped))
	for key, end := range s.Dropped {
		d.until[key] = time.Unix(end, 0)
	}
	return nil
}

// save writes what has changed since the last save.
func (d *dropped) save(path string) error {
	d.mu.Lock()
	if !d.dirty {
		d.mu.Unlock()
		return nil
	}
	s := droppedState{Format: droppedFormat, Dropped: make(map[string]int64, len(d.until))}
	for key, end := range d.until {
		s.Dropped[key] = end.Unix()
	}
	d.dirty = false
	d.mu.Unlock()
	data, err := json.MarshalIndent(s, "", "\t")
	if err == nil {
		err = writeFile(path, data)
	}
	if err != nil {
		d.mu.Lock()
		d.dirty = true
		d.mu.Unlock()
	}
	return err
}
