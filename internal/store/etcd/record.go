package etcd

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// format is the version of everything below the prefix.
const format = 1

// meta is what the key meta says.
type meta struct {
	epoch   store.Epoch
	cluster uint64
}

// metaText is meta as it is stored: readable, for whoever looks with etcdctl.
type metaText struct {
	Format  int    `json:"plastron_store"`
	Epoch   string `json:"epoch"`
	Cluster string `json:"cluster"`
}

func (m meta) text() string {
	b, err := json.Marshal(metaText{format, hex.EncodeToString(m.epoch[:]), fmt.Sprintf("%016x", m.cluster)})
	if err != nil {
		panic(err) // two strings and a number
	}
	return string(b)
}

const maxMeta = 4096

func parseMeta(b []byte, prefix string) (m meta, err error) {
	var t metaText
	if len(b) > maxMeta || json.Unmarshal(b, &t) != nil || t.Format < 1 {
		return m, foreign(prefix)
	}
	if t.Format > format {
		return m, fault.New(fault.Precondition, "schema_newer", "the store under etcd's prefix %q has format %d, this program knows %d", prefix, t.Format, format).
			Fix("run the newer program again")
	}
	epoch, err := hex.DecodeString(t.Epoch)
	if err != nil || len(epoch) != len(m.epoch) {
		return m, corrupt("the key meta has no epoch")
	}
	copy(m.epoch[:], epoch)
	cluster, err := hex.DecodeString(t.Cluster)
	if err != nil || len(cluster) != 8 {
		return m, corrupt("the key meta has no cluster")
	}
	m.cluster = binary.BigEndian.Uint64(cluster)
	return m, nil
}

func foreign(prefix string) error {
	return fault.New(fault.Precondition, "store_foreign", "under etcd's prefix %q there are keys that are not Plastron's", prefix).
		Fix("choose another prefix, or remove them")
}

func corrupt(what string, args ...any) *fault.Error {
	return fault.New(fault.Precondition, "store_corrupt", "the store in etcd is damaged: %s", fmt.Sprintf(what, args...)).
		Fix("restore a backup; nobody but Plastron may write below the prefix")
}

// A record is the value of head: the format, the writer's time in nanoseconds,
// and the encoding of the writes, with an empty value for each put.
const recordHeader = 1 + 8

func newRecord(t time.Time, writes []store.Write) []byte {
	b := make([]byte, 0, recordHeader+store.EncodedSize(writes))
	b = append(b, format)
	b = binary.BigEndian.AppendUint64(b, uint64(t.UnixNano()))
	return store.AppendWrites(b, writes)
}

func parseRecord(b []byte) (time.Time, []store.Write, error) {
	if len(b) < recordHeader {
		return time.Time{}, nil, errors.New("the record is cut short")
	}
	if b[0] != format {
		return time.Time{}, nil, fmt.Errorf("a record of format %d, this program knows %d", b[0], format)
	}
	writes, err := store.ParseWrites(b[recordHeader:])
	return time.Unix(0, int64(binary.BigEndian.Uint64(b[1:]))).UTC(), writes, err
}

// outline is a write without its values.
func outline(w store.Write) store.Write {
	for i := range w.Changes {
		w.Changes[i].Value = nil
	}
	return w
}

// The values of live keys: inline, or a place in a part.
const (
	tagInline = 0
	tagPart   = 1
)

// place is where in a part a value is.
type place struct {
	part        string // 16 bytes
	offset, len uint32
}

func inline(value []byte) string { return "\x00" + string(value) }

func (p place) String() string {
	b := append([]byte{tagPart}, p.part...)
	b = binary.BigEndian.AppendUint32(b, p.offset)
	return string(binary.BigEndian.AppendUint32(b, p.len))
}

// parseValue returns a live key's value, or the place where it is.
func parseValue(b []byte) ([]byte, *place, error) {
	switch {
	case len(b) > 0 && b[0] == tagInline:
		return b[1:len(b):len(b)], nil, nil
	case len(b) == 1+16+8 && b[0] == tagPart:
		return nil, &place{string(b[1:17]), binary.BigEndian.Uint32(b[17:]), binary.BigEndian.Uint32(b[21:])}, nil
	}
	return nil, nil, errors.New("a value of an unknown kind")
}

// of cuts the value out of the part.
func (p place) of(part []byte) ([]byte, error) {
	end := uint64(p.offset) + uint64(p.len)
	if end > uint64(len(part)) {
		return nil, errors.New("a value past the end of its part")
	}
	return part[p.offset:end:end], nil
}
