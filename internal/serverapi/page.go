package serverapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"google.golang.org/protobuf/proto"
)

const (
	defaultPage = 1000
	maxToken    = 4 << 10
	checkSize   = 12
	// pieceSize is how many rows are read at a time, so that a long list does not
	// keep writers waiting.
	pieceSize = 1000
	// pageBytes keeps a page below the 4 MiB that gRPC clients accept by default.
	pageBytes = 4<<20 - 64<<10
)

// cursor is where a list goes on: after the key of the last row that was given.
// Its text carries a check over the list, the filter and the store that it
// belongs to, so that it is refused anywhere else (E36).
type cursor struct {
	list   string
	filter proto.Message
	epoch  store.Epoch
}

func (s *Server) cursor(list string, filter proto.Message) cursor {
	c := cursor{list: list, filter: filter}
	s.cfg.Registry.View(func(snap *registry.Snapshot) { c.epoch = snap.Position().Epoch })
	return c
}

func (c cursor) check(key string) []byte {
	h := sha256.New()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c.filter)
	if err != nil {
		return nil
	}
	h.Write(c.epoch[:])
	h.Write([]byte(c.list))
	h.Write([]byte{0})
	h.Write(b)
	h.Write([]byte(key))
	return h.Sum(nil)[:checkSize]
}

func (c cursor) token(key string) string {
	return base64.RawURLEncoding.EncodeToString(append(c.check(key), key...))
}

func (c cursor) key(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	if len(token) <= maxToken {
		b, err := base64.RawURLEncoding.DecodeString(token)
		if err == nil && len(b) > checkSize && subtle.ConstantTimeCompare(b[:checkSize], c.check(string(b[checkSize:]))) == 1 {
			return string(b[checkSize:]), nil
		}
	}
	return "", fault.New(fault.Invalid, "page_token_invalid", "the page token does not belong to this list").
		Fix("list again from the start, with the same filter on each page")
}

// page is what one answer of a list holds so far.
type page struct {
	limit int // rows; 0: everything
	rows  int
	bytes sized
}

// newPage reads the size that a caller asks for: 0 means everything, and what
// is out of range is brought into it (E35).
func newPage(asked int32) page {
	switch {
	case asked < 0:
		return page{limit: defaultPage}
	case asked > maxPage:
		return page{limit: maxPage}
	}
	return page{limit: int(asked)}
}

// take reports whether a row still belongs to this answer. A page of large rows
// ends early; an answer that must hold everything is refused instead (D6).
func (p *page) take(row proto.Message) (bool, error) {
	if p.limit > 0 && p.rows > 0 && (p.rows == p.limit || int(p.bytes)+proto.Size(row) > pageBytes) {
		return false, nil
	}
	p.rows++
	return true, p.bytes.add(row)
}

// piece is how many rows are worth reading at once: one more than are left shows
// whether there is another page.
func (p *page) piece() int {
	if p.limit == 0 {
		return pieceSize
	}
	return min(pieceSize, p.limit-p.rows+1)
}

// sized adds up the bytes of an answer and refuses one that is too large,
// rather than cutting it (decision D6).
type sized int

func (s *sized) add(m proto.Message) error {
	*s += sized(proto.Size(m) + 8)
	if *s > maxAnswer-1024 {
		return fault.New(fault.Exhausted, "answer_too_large", "the answer would be larger than %d MiB", maxAnswer>>20).
			Fix("ask in pages: set page_size")
	}
	return nil
}
