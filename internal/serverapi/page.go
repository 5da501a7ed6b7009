package serverapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/protobuf/proto"
)

const (
	defaultPage = 1000
	maxToken    = 4 << 10
	checkSize   = 12
	// pieceSize is how many rows are read at a time, so that a long list does not
	// keep writers waiting.
	pieceSize = 1000
)

// cursor is where a list goes on: after the key of the last row that was given.
// Its text carries a check over the list and the filter that it belongs to, so
// that it is refused anywhere else (E36).
type cursor struct {
	list   string
	filter proto.Message
}

func (c cursor) check(key string) []byte {
	h := sha256.New()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c.filter)
	if err != nil {
		return nil
	}
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

// pageSize reads the size that a caller asks for: 0 means everything, and what
// is out of range is brought into it (E35).
func pageSize(asked int32) int {
	switch {
	case asked < 0:
		return defaultPage
	case asked > maxPage:
		return maxPage
	}
	return int(asked)
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
