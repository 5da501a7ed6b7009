package store

import (
	"encoding/binary"
	"fmt"
)

// The bytes of a log row, the same in every engine that keeps its own log:
//
//	version   1 byte, 1
//	writes    count, then for each
//	  caller  bytes
//	  changes count, then for each
//	    op    1 byte: 1 put, 2 delete
//	    key   bytes
//	    value bytes (puts only)
//
// A count is an unsigned varint in its shortest form; bytes are a count and that
// many bytes. Nothing follows. Every sequence of writes has exactly one encoding
// and every other byte string is refused: a row that was damaged or made by a
// newer version must stop the reader, never be read as something else.
const (
	encodingVersion = 1
	opPut           = 1
	opDelete        = 2
)

// MaxEncoded bounds the encoding of one group: its bytes and the counts around
// them. Longer rows are refused before they are parsed.
const MaxEncoded = MaxTxnSize + MaxTxnKeys*16 + MaxGroup*16 + 16

// AppendWrites appends the encoding of writes to dst.
func AppendWrites(dst []byte, writes []Write) []byte {
	dst = append(dst, encodingVersion)
	dst = binary.AppendUvarint(dst, uint64(len(writes)))
	for i := range writes {
		dst = appendBytes(dst, writes[i].Caller)
		dst = binary.AppendUvarint(dst, uint64(len(writes[i].Changes)))
		for j := range writes[i].Changes {
			c := &writes[i].Changes[j]
			if c.Deleted {
				dst = append(dst, opDelete)
				dst = appendBytes(dst, c.Key)
				continue
			}
			dst = append(dst, opPut)
			dst = appendBytes(dst, c.Key)
			dst = appendBytes(dst, c.Value)
		}
	}
	return dst
}

// EncodedSize is the number of bytes that AppendWrites will append, or a few more.
func EncodedSize(writes []Write) int {
	n := 1 + binary.MaxVarintLen32
	for i := range writes {
		n += 2*binary.MaxVarintLen32 + len(writes[i].Caller)
		for j := range writes[i].Changes {
			c := &writes[i].Changes[j]
			n += 1 + 2*binary.MaxVarintLen32 + len(c.Key) + len(c.Value)
		}
	}
	return n
}

// ParseWrites is the inverse of AppendWrites. The values in the result share
// data's memory. It allocates no more than a small multiple of len(data),
// whatever data claims.
func ParseWrites(data []byte) ([]Write, error) {
	if len(data) > MaxEncoded {
		return nil, fmt.Errorf("log row of %d bytes, the limit is %d", len(data), MaxEncoded)
	}
	d := decoder{rest: data}
	if v := d.byte(); d.err == nil && v != encodingVersion {
		return nil, fmt.Errorf("log row of version %d, this program reads version %d", v, encodingVersion)
	}
	writes := make([]Write, 0, d.count(2, MaxGroup))
	for range cap(writes) {
		w := Write{Caller: string(d.bytes(0, MaxCaller))}
		w.Changes = make([]Change, 0, d.count(3, MaxTxnKeys))
		for range cap(w.Changes) {
			var c Change
			switch op := d.byte(); {
			case op == opPut:
				c.Key = string(d.bytes(1, MaxKey))
				c.Value = d.bytes(0, MaxValue)
			case op == opDelete:
				c.Key = string(d.bytes(1, MaxKey))
				c.Deleted = true
			default:
				d.fail("unknown operation")
			}
			if d.err != nil {
				return nil, d.err
			}
			w.Changes = append(w.Changes, c)
		}
		writes = append(writes, w)
	}
	if d.err == nil && len(d.rest) > 0 {
		d.fail("bytes after the end")
	}
	if d.err != nil {
		return nil, d.err
	}
	return writes, nil
}

func appendBytes[T string | []byte](dst []byte, b T) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(b)))
	return append(dst, b...)
}

// decoder reads from the front of rest; after the first fault it returns zeros.
type decoder struct {
	rest []byte
	err  error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("log row: %s, %d bytes before its end", what, len(d.rest))
	}
	d.rest = nil
}

func (d *decoder) byte() byte {
	if len(d.rest) == 0 {
		d.fail("cut short")
		return 0
	}
	b := d.rest[0]
	d.rest = d.rest[1:]
	return b
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 || n > 1 && d.rest[n-1] == 0 { // a last byte of 0 adds nothing: not the shortest form
		d.fail("bad number")
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

// count reads a number of items of at least size bytes each. It fails when the
// rest cannot hold them, so that the caller may allocate for them.
func (d *decoder) count(size, limit int) int {
	n := d.uvarint()
	if n > uint64(limit) || n > uint64(len(d.rest)/size) {
		d.fail("a count past the end or over the limit")
		return 0
	}
	return int(n)
}

// bytes reads a byte string of least to limit bytes; never nil unless it fails.
func (d *decoder) bytes(least, limit int) []byte {
	n := d.uvarint()
	if d.err != nil {
		return nil
	}
	if n < uint64(least) || n > uint64(limit) || n > uint64(len(d.rest)) {
		d.fail("a length past the end or over the limit")
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}
