package entry

import (
	"crypto/sha256"
	"encoding/binary"
)

// ContentHash identifies what must be unique about an entry: parent, SPIFFE ID
// or template, and the exact set of selectors. A template holds a brace, so it
// is no SPIFFE ID. Every part carries its length, so that no two
// contents have one encoding.
func ContentHash(e *Entry) [32]byte {
	b := make([]byte, 0, 256)
	part := func(s string) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	part(e.ParentID.String())
	if e.Rule != nil {
		part(e.Rule.Template.String())
	} else {
		part(e.SPIFFEID.String())
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.Selectors)))
	for _, s := range e.Selectors {
		part(s.Type)
		part(s.Value)
	}
	return sha256.Sum256(b)
}

// Sum adds up hashes without order, so that a set's hash follows a change of
// one member at the cost of that member. Lanes wrap.
//
// Members are hashes of what the server itself wrote; the sum finds divergence,
// it is no proof against someone who can choose members freely.
type Sum [4]uint64

// Add adds a member.
func (s *Sum) Add(h [32]byte) {
	for i := range s {
		s[i] += binary.LittleEndian.Uint64(h[8*i:])
	}
}

// Sub takes a member away.
func (s *Sum) Sub(h [32]byte) {
	for i := range s {
		s[i] -= binary.LittleEndian.Uint64(h[8*i:])
	}
}

// AddSum adds all members of another sum.
func (s *Sum) AddSum(o Sum) {
	for i := range s {
		s[i] += o[i]
	}
}

// Bytes returns the sum as it goes over the wire: four little endian lanes.
func (s Sum) Bytes() [32]byte {
	var b [32]byte
	for i, v := range s {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return b
}
