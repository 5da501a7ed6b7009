package registry

import (
	"context"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// Format is the newest envelope format that this version reads and writes.
const Format = 1

const oldestFormat = 1

// readerOf returns the oldest format whose readers understand a row of a format:
// less than the format itself if all that is new in it may be passed over. A row
// of the new format is never written before the row /format says so, and that
// says so once every server that lives can read it (R82, R125).
func readerOf(format int) int { return [Format + 1]int{1: 1}[format] }

// newerFormat is the reason for which a version is of no use for a store.
const newerFormat = "schema_newer"

// raiseEvery is how often it is looked whether a newer format can be written.
const raiseEvery = 2 * time.Second

// readFormat returns what the row says; it is never less than the oldest format.
func readFormat(payload []byte) (written, reader int, err error) {
	var m statev1.Format
	if err := proto.Unmarshal(payload, &m); err != nil {
		return oldestFormat, oldestFormat, err
	}
	const most = 1 << 16
	if m.Written == 0 || m.Reader == 0 || m.Reader > m.Written || m.Written > most {
		return oldestFormat, oldestFormat, fmt.Errorf("formats %d and %d", m.Written, m.Reader)
	}
	return int(m.Written), int(m.Reader), nil
}

// formatChanged takes note of the row /format.
func (s *state) formatChanged() {
	written, reader, _ := readFormat(s.values[kindFormat][""].payload) // it was read once, or is absent
	s.format, s.reader = min(written, Format), reader
}

// newer refuses a store that this version does not understand.
func (s *state) newer() error {
	if s.reader <= Format {
		return nil
	}
	return fault.New(fault.Precondition, newerFormat, "the store is written in format %d, and this version reads up to %d", s.reader, Format).
		Fix("run the newer version of Plastron that wrote it")
}

// formatFor is the newest of our formats that every server that lives can read.
// One whose row does not say what it reads, or cannot be read, reads the oldest.
func formatFor(servers []Server, unreadable int, newest int, readerOf func(format int) int, now time.Time) int {
	reads := newest
	if unreadable > 0 {
		reads = oldestFormat
	}
	for _, s := range servers {
		if s.Live(now) {
			reads = min(reads, max(s.Reads, oldestFormat))
		}
	}
	format := newest
	for readerOf(format) > reads {
		format--
	}
	return format
}

// wanted is formatFor of the servers that are known.
func (s *state) wanted(now time.Time) int {
	unreadable := 0
	for key := range s.bad {
		if k, _ := split(key); k == kindServer {
			unreadable++
		}
	}
	return formatFor((&Snapshot{s}).Servers(), unreadable, Format, readerOf, now)
}

// RaiseFormat has rows written in the newest format that this version knows, as
// soon as every server that lives can read it, and returns when that is so. Then
// there is no way back to a version that cannot.
func (r *Registry) RaiseFormat(ctx context.Context) error {
	for {
		var now, wanted int
		r.View(func(v *Snapshot) { now, wanted = v.s.format, v.s.wanted(time.Now()) })
		if now >= Format {
			return nil
		}
		if wanted > now {
			if err := r.raise(ctx); err != nil {
				r.log.WarnContext(ctx, "rows are not written in a newer format yet", "err", err)
			}
		}
		select {
		case <-time.After(raiseEvery):
		case <-ctx.Done():
			return nil
		case <-r.stopped:
			return nil
		}
	}
}

// raise writes the row. A server that changed its row meanwhile is asked again.
func (r *Registry) raise(ctx context.Context) error {
	to := 0
	_, err := r.Update(ctx, "registry", func(tx *Tx) error {
		tx.read(prefixOf(kindFormat))
		for name := range tx.s.values[kindServer] {
			tx.read(keyOf(kindServer, name))
		}
		if to = tx.s.wanted(time.Now()); to <= tx.s.format {
			return nil
		}
		reader := max(readerOf(to), tx.s.reader)
		return tx.put(kindFormat, "", &statev1.Format{Written: uint32(to), Reader: uint32(reader)})
	})
	if err == nil {
		r.log.InfoContext(ctx, "rows are written in a newer format from now on", "format", to)
	}
	return err
}
