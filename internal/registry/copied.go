package registry

import (
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// The keys of the marks that a copy leaves in the two stores. No registry opens a
// store that has one of them, nor changes it.
const (
	CopyingHere = "/copy/here" // it is being filled
	CopiedAway  = "/copy/away" // it is in another store by now
)

// CopyMark says which other store it is about.
type CopyMark struct {
	Epoch store.Epoch
	Place string
	Begun time.Time
}

// Seal returns the mark as it is stored.
func (m *CopyMark) Seal() ([]byte, error) {
	return seal(&statev1.Copy{Epoch: m.Epoch[:], Place: m.Place, BegunAt: unixOf(m.Begun)}, oldestFormat)
}

// ReadCopyMark reads a stored mark.
func ReadCopyMark(value []byte) (CopyMark, error) {
	payload, err := unseal(value)
	if err != nil {
		return CopyMark{}, err
	}
	return readCopy(payload)
}

func readCopy(payload []byte) (CopyMark, error) {
	var m statev1.Copy
	if err := proto.Unmarshal(payload, &m); err != nil {
		return CopyMark{}, err
	}
	mark := CopyMark{Place: m.Place, Begun: timeOf(m.BegunAt)}
	if copy(mark.Epoch[:], m.Epoch) != len(mark.Epoch) || len(m.Epoch) != len(mark.Epoch) {
		return CopyMark{}, fmt.Errorf("the epoch has %d bytes", len(m.Epoch))
	}
	return mark, nil
}

// copied refuses a store that has a mark, also one that cannot be read.
func (s *state) copied() error {
	at := func(key string) (CopyMark, bool) {
		_, bad := s.bad[key]
		_, name := split(key)
		v, there := s.values[kindCopy][name]
		mark, _ := readCopy(v.payload)
		return mark, there || bad
	}
	if mark, there := at(CopyingHere); there {
		return fault.New(fault.Precondition, "copy_incomplete", "the store is being filled with what is in %s, and that has not been finished", mark.Place).
			Fix("run the same 'plastron server db copy' again: it goes on where it was")
	}
	if mark, there := at(CopiedAway); there {
		return fault.New(fault.Precondition, "store_copied", "the store was copied to %s and is not the trust domain's any more", mark.Place).
			Fix("use the configuration of the copy; if no server ever ran on that, 'plastron server db copy -undo' takes this back")
	}
	return nil
}

// RunningServer returns the id of a server that goes on, if this is the row of one.
func RunningServer(td spiffeid.TrustDomain, key string, value []byte, now time.Time) (id string, ok bool) {
	if k, _ := split(key); k != kindServer {
		return "", false
	}
	payload, err := unseal(value)
	if err != nil {
		return "", false
	}
	s, err := readServer(td, payload)
	return s.ID, err == nil && s.Live(now)
}

// OfServers reports whether a row is what a server says of itself while it runs.
func OfServers(key string) bool {
	k, _ := split(key)
	return k == kindServer || k == kindRoster
}
