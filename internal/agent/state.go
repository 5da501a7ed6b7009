package agent

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/svid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Names of the keys of the agent's own SVID; they alternate, so that the old
// key stays until the new SVID is durable.
const (
	keyA = "agent-svid-A"
	keyB = "agent-svid-B"
)

const (
	stateFile   = "agent.json"
	lockFile    = "agent.lock"
	maxState    = 4 << 20 // bytes
	stateFormat = 1
)

// credential is an SVID of the agent's own with its key.
type credential struct {
	id        spiffeid.ID
	keyID     string
	key       crypto.Signer
	chain     [][]byte
	serial    string // decimal
	notBefore time.Time
	expiresAt time.Time
	reattest  bool // it is renewed by attesting again
}

// newCredential verifies a chain that the server gave for our key (R36).
func newCredential(td spiffeid.TrustDomain, roots []*x509.Certificate, keyID string, key crypto.Signer, chain [][]byte, now time.Time) (*credential, error) {
	id, err := svid.VerifyX509(chain, roots, td, now)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fault.New(fault.Invalid, "svid_wrong_key", "the agent's SVID is for another key")
	}
	return &credential{id: id, keyID: keyID, key: key, chain: chain, serial: leaf.SerialNumber.String(),
		notBefore: leaf.NotBefore, expiresAt: leaf.NotAfter}, nil
}

// lastMoment returns a time at which a chain was good, whatever the clock shows.
func lastMoment(chain [][]byte) time.Time {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return time.Time{} // newCredential says what is wrong with it
	}
	return leaf.NotAfter.Add(-time.Second)
}

// own is what decisions need to know of it.
func (c *credential) own() *agentid.Own {
	return &agentid.Own{ID: c.id, KeyID: c.keyID, Serial: c.serial, NotBefore: c.notBefore, NotAfter: c.expiresAt, Repeatable: c.reattest}
}

// standing says how the authority of the SVID stands in a bundle.
func (c *credential) standing(b *bundle.Bundle) agentid.Standing {
	if c == nil {
		return agentid.Held
	}
	at := lastMoment(c.chain)
	if _, err := svid.VerifyX509(c.chain, b.Roots(), b.TrustDomain, at); err != nil {
		return agentid.Gone
	}
	untainted := b.Clone()
	untainted.X509 = slices.DeleteFunc(untainted.X509, func(a bundle.X509Authority) bool { return a.Tainted })
	if _, err := svid.VerifyX509(c.chain, untainted.Roots(), b.TrustDomain, at); err != nil {
		return agentid.Tainted
	}
	return agentid.Held
}

// state is what the agent's file holds: nothing secret, but whoever changes the
// bundle makes this agent trust a false server.
type state struct {
	Format      int
	TrustDomain string
	KeyID       string          `json:",omitempty"` // of the SVID's key in the keeper
	SVID        [][]byte        `json:",omitempty"` // DER, leaf first
	CanReattest bool            `json:",omitempty"`
	Bundle      json.RawMessage `json:",omitempty"` // SPIFFE bundle document
}

// dataDir is the agent's own directory, locked against a second agent (R61).
type dataDir struct {
	path    string
	lock    *os.File
	log     *slog.Logger
	dropped *dropped
}

func openDataDir(path string, log *slog.Logger) (*dataDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fault.New(fault.Precondition, "data_dir_unusable", "the data directory %q cannot be made", path).Because(err)
	}
	if err := checkDir(path); err != nil {
		return nil, fault.New(fault.Precondition, "data_dir_unsafe", "others may write to the data directory %q or replace it: %v", path, err). // F10
																			Fix("chmod go-w it, and let it belong to the agent's user").Because(err)
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.New(fault.Precondition, "data_dir_unusable", "the data directory %q cannot be written", path).Because(err)
	}
	if err := lockExclusive(lock); err != nil {
		lock.Close()
		return nil, fault.New(fault.Precondition, "data_dir_in_use", "another agent uses the data directory %q", path). // F13
																Fix("stop it, or choose another data_dir").Because(err)
	}
	return &dataDir{path: path, lock: lock, log: log, dropped: new(dropped)}, nil
}

// Close lets go of the directory.
func (d *dataDir) Close() error { return d.lock.Close() }

// load returns what an earlier run has stored for this trust domain. A file that
// cannot be read is set aside, so that nobody has to come and remove it (R54).
func (d *dataDir) load(td spiffeid.TrustDomain) (state, *bundle.Bundle) {
	if err := d.dropped.load(filepath.Join(d.path, droppedFile)); err != nil {
		d.setAside(droppedFile, err)
	}
	s, b, err := readState(filepath.Join(d.path, stateFile), td)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return state{}, nil
	case err != nil:
		d.setAside(stateFile, err)
		return state{}, nil
	}
	// The file may be an older one that was put back (R55).
	if b = d.dropped.without(b); len(b.X509) == 0 {
		return state{}, nil
	}
	return s, b
}

func (d *dataDir) setAside(name string, err error) {
	path := filepath.Join(d.path, name)
	aside := fmt.Sprintf("%s.%d.bad", path, time.Now().Unix())
	d.log.Warn("stored state is not usable and was set aside", "dir", aside, "err", errors.Join(err, os.Rename(path, aside)))
}

// readJSON reads a file of ours into v.
func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxState+1))
	switch {
	case err != nil:
		return err
	case len(data) > maxState:
		return errors.New("it is too large")
	}
	return json.Unmarshal(data, v)
}

func readState(path string, td spiffeid.TrustDomain) (state, *bundle.Bundle, error) {
	var s state
	if err := readJSON(path, &s); err != nil {
		return state{}, nil, err
	}
	if s.Format != stateFormat || s.TrustDomain != td.Name() {
		return state{}, nil, fmt.Errorf("it is of format %d for the trust domain %q", s.Format, s.TrustDomain)
	}
	b, err := bundle.Parse(td, s.Bundle)
	if err != nil {
		return state{}, nil, err
	}
	return s, b, nil
}

// save replaces the stored state: at every moment the file is the whole old or
// the whole new one, and when save returns the new one is durable.
func (d *dataDir) save(td spiffeid.TrustDomain, own *credential, b *bundle.Bundle) error {
	s := state{Format: stateFormat, TrustDomain: td.Name()}
	if own != nil {
		s.KeyID, s.SVID, s.CanReattest = own.keyID, own.chain, own.reattest
	}
	if b != nil {
		s.Bundle = b.Marshal()
	}
	data, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	// First what is no longer trusted: a stop between the two costs at most a root
	// that the server tells again.
	err = d.dropped.save(filepath.Join(d.path, droppedFile))
	if err == nil {
		err = writeFile(filepath.Join(d.path, stateFile), data)
	}
	if err != nil {
		return fault.New(fault.Unavailable, "state_not_stored", "the agent's state could not be written").
			Fix("see that %s is writable and not full", d.path).Because(err)
	}
	return nil
}

func writeFile(path string, data []byte) error {
	temp := path + ".new"
	// A rest of an earlier attempt is ours: the directory is.
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
