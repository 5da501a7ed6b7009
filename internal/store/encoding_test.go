package store_test

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/store"
)

func examples() map[string][]store.Write {
	return map[string][]store.Write{
		"none":  {},
		"empty": {{Caller: "", Changes: []store.Change{}}},
		"put": {{Caller: "spiffe://example.org/admin", Changes: []store.Change{
			{Key: "/entry/1", Value: []byte("value")}, {Key: "\x00", Value: []byte{}}}}},
		"delete":   {{Caller: "a", Changes: []store.Change{{Key: "/entry/1", Deleted: true}}}},
		"several":  {{Caller: "a", Changes: []store.Change{{Key: "k", Value: []byte{0}}}}, {Caller: "b", Changes: []store.Change{{Key: "l", Deleted: true}}}},
		"long key": {{Caller: "a", Changes: []store.Change{{Key: strings.Repeat("k", store.MaxKey), Value: make([]byte, 300)}}}},
	}
}

func TestEncoding(t *testing.T) {
	for name, writes := range examples() {
		data := store.AppendWrites(nil, writes)
		if n := store.EncodedSize(writes); n < len(data) {
			t.Errorf("%s: EncodedSize() = %d, the encoding has %d", name, n, len(data))
		}
		got, err := store.ParseWrites(data)
		if err != nil {
			t.Errorf("%s: ParseWrites() = %v", name, err)
		}
		if diff := cmp.Diff(writes, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", name, diff)
		}
		for i := range data { // cut short anywhere
			if _, err := store.ParseWrites(data[:i]); err == nil {
				t.Errorf("%s: the first %d of %d bytes were read as a whole row", name, i, len(data))
			}
		}
	}
}

// The largest row that Groups and Validate allow must fit.
func TestEncodingLargest(t *testing.T) {
	w := store.Write{Caller: strings.Repeat("c", store.MaxCaller)}
	for i := range store.MaxTxnKeys {
		key := string(rune(0x10000 + i))
		w.Changes = append(w.Changes, store.Change{Key: key, Value: make([]byte, store.MaxTxnSize/store.MaxTxnKeys-len(key))})
	}
	data := store.AppendWrites(nil, []store.Write{w})
	if _, err := store.ParseWrites(data); err != nil {
		t.Fatalf("ParseWrites(%d bytes) = %v, the limit is %d", len(data), err, store.MaxEncoded)
	}
}

func TestParseWritesRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		data string
		want string
	}{
		{"empty", "", "cut short"},
		{"version 0", "\x00\x00", "version 0"},
		{"version 2", "\x02\x00", "version 2"},
		{"bytes after the end", "\x01\x00\x00", "after the end"},
		{"count not shortest", "\x01\x80\x00", "bad number"},
		{"count overflows", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "bad number"},
		{"more writes than bytes", "\x01\x05\x00\x00", "past the end"},
		{"more writes than a group", "\x01\x41" + strings.Repeat("\x00\x00", 65), "over the limit"},
		{"huge caller", "\x01\x01\xff\xff\xff\xff\x07\x00", "past the end"},
		{"huge change count", "\x01\x01\x00\xff\xff\xff\xff\x07\x00", "past the end"},
		{"operation 0", "\x01\x01\x00\x01\x00\x01a", "unknown operation"},
		{"operation 3", "\x01\x01\x00\x01\x03\x01a", "unknown operation"},
		{"empty key", "\x01\x01\x00\x01\x02\x00\x00", "past the end or over"},
		{"long key", "\x01\x01\x00\x01\x02\x81\x08" + strings.Repeat("k", 1025), "over the limit"},
		{"put without a value", "\x01\x01\x00\x01\x01\x01a", "bad number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, err := store.ParseWrites([]byte(tc.data))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("ParseWrites() = %v, %v, want an error with %q", w, err, tc.want)
			}
		})
	}
	if _, err := store.ParseWrites(make([]byte, store.MaxEncoded+1)); err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("ParseWrites(too long) = %v", err)
	}
}

// FuzzParseWrites: whatever is accepted is the one encoding of what was read,
// and parsing costs no more memory than its input allows (R98).
func FuzzParseWrites(f *testing.F) {
	for _, writes := range examples() {
		f.Add(store.AppendWrites(nil, writes))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		writes, err := store.ParseWrites(data)
		runtime.ReadMemStats(&after)
		if got, limit := after.TotalAlloc-before.TotalAlloc, uint64(100*len(data)+64<<10); got > limit {
			t.Fatalf("parsing %d bytes allocated %d", len(data), got)
		}
		if err != nil {
			return
		}
		if again := store.AppendWrites(nil, writes); !bytes.Equal(again, data) {
			t.Fatalf("read from\n%x\nwritten as\n%x", data, again)
		}
	})
}

func BenchmarkParseWrites(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	var writes []store.Write
	for range 50 {
		key := make([]byte, 40)
		for i := range key {
			key[i] = byte(r.Uint32())
		}
		writes = append(writes, store.Write{Caller: "admin", Changes: []store.Change{
			{Key: string(key), Value: make([]byte, 500)}, {Key: string(key[1:]), Value: key}}})
	}
	data := store.AppendWrites(nil, writes)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := store.ParseWrites(data); err != nil {
			b.Fatal(err)
		}
	}
}
