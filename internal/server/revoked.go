package server

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
)

// revokedFile is where a server remembers which authorities were revoked, apart
// from the store: one that is restored does not know any more (R69).
type revokedFile string

type revokedLine struct {
	KeyHash string `json:"key_sha256"`
	Until   int64  `json:"until"` // Unix seconds; 0: for ever
}

func (f revokedFile) read() (out []bundle.Revocation, err error) {
	text, err := os.ReadFile(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var lines []revokedLine
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&lines); err != nil {
		return nil, f.broken(err)
	}
	for _, l := range lines {
		r := bundle.Revocation{}
		hash, err := hex.DecodeString(l.KeyHash)
		if err != nil || len(hash) != len(r.KeyHash) {
			return nil, f.broken(fmt.Errorf("%q is not a hash", l.KeyHash))
		}
		if r.KeyHash = [32]byte(hash); l.Until != 0 {
			r.Until = time.Unix(l.Until, 0).UTC()
		}
		out = append(out, r)
	}
	return out, nil
}

func (f revokedFile) broken(err error) error {
	return fault.New(fault.Precondition, "revoked_file_invalid", "%q, which names revoked authorities, cannot be read: %v", string(f), err).
		Fix("restore it from a backup of data_dir; or remove it, if the store was not restored since: it holds the same")
}

func (f revokedFile) write(revoked []bundle.Revocation) error {
	lines := make([]revokedLine, len(revoked))
	for i, r := range revoked {
		if lines[i].KeyHash = hex.EncodeToString(r.KeyHash[:]); !r.Until.IsZero() {
			lines[i].Until = r.Until.Unix()
		}
	}
	text, err := json.MarshalIndent(lines, "", " ")
	if err != nil {
		return err
	}
	return writeNew(string(f), string(text)+"\n")
}
