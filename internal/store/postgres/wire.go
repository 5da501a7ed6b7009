package postgres

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Types of PostgreSQL, by the ids that its protocol uses.
const (
	oidBytea      = 17
	oidInt8       = 20
	oidText       = 25
	oidByteaArray = 1001
	oidInt8Array  = 1016
)

// param is a parameter in binary format.
type param struct {
	oid   uint32
	value []byte
}

func bytesParam(b []byte) param    { return param{oidBytea, b} }
func textParam(s string) param     { return param{oidText, []byte(s)} }
func numberParam(n int64) param    { return param{oidInt8, binary.BigEndian.AppendUint64(nil, uint64(n))} }
func revisionParam(n uint64) param { return numberParam(signed(n)) }

// signed returns a revision as the database counts, -1 for what it never reaches.
func signed(n uint64) int64 {
	if n > math.MaxInt64 {
		return -1
	}
	return int64(n)
}

func numbersParam(numbers []int64) param {
	b := arrayHeader(oidInt8, len(numbers), 12*len(numbers))
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint32(b, 8)
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	return param{oidInt8Array, b}
}

func listParam[T string | []byte](list []T) param {
	size := 0
	for _, e := range list {
		size += 4 + len(e)
	}
	b := arrayHeader(oidBytea, len(list), size)
	for _, e := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(len(e)))
		b = append(b, e...)
	}
	return param{oidByteaArray, b}
}

func arrayHeader(oid uint32, n, size int) []byte {
	b := make([]byte, 0, 20+size)
	if n == 0 {
		return append(binary.BigEndian.AppendUint32(b, 0), 0, 0, 0, 0, byte(oid>>24), byte(oid>>16), byte(oid>>8), byte(oid))
	}
	for _, v := range []uint32{1, 0, oid, uint32(n), 1} { // dimensions, no nulls, type, length, first index
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func split(params []param) (values [][]byte, oids []uint32, formats []int16) {
	for _, p := range params {
		if p.value == nil {
			p.value = []byte{}
		}
		values = append(values, p.value)
		oids = append(oids, p.oid)
		formats = append(formats, 1)
	}
	return values, oids, formats
}

// number reads a bigint; null is 0.
func number(b []byte) (int64, error) {
	switch len(b) {
	case 0:
		return 0, nil
	case 8:
		return int64(binary.BigEndian.Uint64(b)), nil
	}
	return 0, fmt.Errorf("the database answers a number of %d bytes", len(b))
}

// numbers reads bigints from a row.
func numbers(columns [][]byte, to ...*int64) error {
	if len(columns) < len(to) {
		return fmt.Errorf("the database answers %d columns, expected %d", len(columns), len(to))
	}
	for i := range to {
		var err error
		if *to[i], err = number(columns[i]); err != nil {
			return err
		}
	}
	return nil
}

// int64Of reads one column of the only row.
func int64Of(rows [][][]byte, column int) (int64, error) {
	if len(rows) != 1 || len(rows[0]) <= column {
		return 0, fmt.Errorf("the database answers %d rows, expected one", len(rows))
	}
	return number(rows[0][column])
}
