package registry

import (
	"context"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// A format is written once every server that lives can read it, and not before (R82).
func TestFormatFor(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	reads := func(format int) Server {
		return Server{Reads: format, Lease: time.Hour, BeatAt: now.Add(-9 * time.Second)}
	}
	dead, stopped, alone := reads(1), reads(1), reads(1)
	dead.BeatAt = now.Add(-2 * time.Minute)
	stopped.Stopped = true
	alone.Lease, alone.BeatAt = 0, now.Add(-time.Hour)
	// Readers of 1 understand 2, and readers of 3 are the first to understand 3.
	readers := func(format int) int { return [...]int{1: 1, 2: 1, 3: 3, 4: 3}[format] }
	for name, c := range map[string]struct {
		servers    []Server
		unreadable int
		want       int
	}{
		"nobody":                          {nil, 0, 4},
		"all new":                         {[]Server{reads(4), reads(4)}, 0, 4},
		"newer ones too":                  {[]Server{reads(4), reads(9)}, 0, 4},
		"one before":                      {[]Server{reads(4), reads(3)}, 0, 4},
		"one before what it understands":  {[]Server{reads(4), reads(2)}, 0, 2},
		"an old one":                      {[]Server{reads(1), reads(4)}, 0, 2},
		"one that never said":             {[]Server{reads(0), reads(4)}, 0, 2},
		"an old one that is gone":         {[]Server{dead, reads(4)}, 0, 4},
		"an old one that stopped":         {[]Server{stopped, reads(4)}, 0, 4},
		"the only one of its store, old":  {[]Server{alone}, 0, 2},
		"one whose row cannot be read":    {[]Server{reads(4)}, 1, 2},
		"one whose clock is a bit behind": {[]Server{{Reads: 1, Lease: time.Hour, BeatAt: now.Add(-40 * time.Second)}}, 0, 2},
	} {
		if got := formatFor(c.servers, c.unreadable, 4, readers, now); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	for format := oldestFormat; format <= Format; format++ {
		if r := readerOf(format); r < oldestFormat || r > format {
			t.Errorf("readers of %d understand format %d", r, format)
		}
	}
}

// A version that is too old for what is stored neither starts nor goes on, and
// what it can pass over is no obstacle (R82).
func TestStoreOfNewerFormat(t *testing.T) {
	row := func(written, reader uint32) store.Put {
		return store.Put{Key: "/format", Value: sealed(t, &statev1.Format{Written: written, Reader: reader})}
	}
	st := openStore(t, t.TempDir())
	r, err := Open(t.Context(), st, td, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Run(context.Background()) }()
	update(t, r, func(tx *Tx) error { return tx.PutEntry(grant("e", "/spire/agent/a", "/e", "u:1")) })

	commitRaw(t, st, row(Format+1, Format))
	update(t, r, func(tx *Tx) error { return tx.PutEntry(grant("f", "/spire/agent/a", "/f", "u:1")) })
	if payload, err := unseal(stored(t, st, "/entry/f")); err != nil || len(payload) == 0 {
		t.Errorf("a row of ours beside newer ones: %v", err)
	}
	if _, err := Open(t.Context(), st, td, quiet()); err != nil {
		t.Errorf("a newer format that we understand: %v", err)
	}

	commitRaw(t, st, row(Format+1, Format+1))
	select {
	case err := <-ended:
		isFault(t, err, fault.Precondition, "schema_newer")
	case <-time.After(20 * time.Second):
		t.Fatal("the registry goes on")
	}
	_, err = r.Update(t.Context(), "test", func(tx *Tx) error { return tx.DeleteEntry("e") })
	isFault(t, err, fault.Unavailable, "registry_stopped")
	before, _ := st.Load(t.Context(), func(string, uint64, []byte) error { return nil })
	_, err = Open(t.Context(), st, td, quiet())
	isFault(t, err, fault.Precondition, "schema_newer")
	if after, _ := st.Load(t.Context(), func(string, uint64, []byte) error { return nil }); after != before {
		t.Errorf("the refusal has written something: %v, was %v", after, before)
	}
}

// Who looks at a store from outside is told whether this version could use it.
func TestReadable(t *testing.T) {
	format := func(written, reader uint32) []byte {
		return sealed(t, &statev1.Format{Written: written, Reader: reader})
	}
	for name, c := range map[string]struct {
		value  []byte
		reason string
	}{
		"ours":                 {format(Format, Format), ""},
		"newer, readable":      {format(Format+1, Format), ""},
		"newer":                {format(Format+1, Format+1), newerFormat},
		"a row that is broken": {[]byte("x"), ""},
	} {
		err := Readable(Marks()[1], c.value)
		if c.reason == "" && err != nil || c.reason != "" && fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Readable(Marks()[0], format(Format+1, Format+1)); err != nil {
		t.Errorf("another row: %v", err)
	}
}
