package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Since calls f with the records of the trail that were written at a time or later
// and are about what is named: whose line holds one of these strings, as the value
// of a member. It returns when the first record that it could look at was written,
// and how many events are missing since. What is appended meanwhile is left out.
// It reads the file, checks no chain, and holds up nobody who writes.
func (w *Writer) Since(ctx context.Context, from time.Time, about []string, f func(Record) error) (first time.Time, lost uint64, err error) {
	w.mu.Lock()
	path, size, lost := w.cfg.Path, w.size, w.lost
	w.mu.Unlock()
	file, err := os.Open(path)
	if err != nil {
		return first, lost, err
	}
	defer file.Close()
	begin, err := start(file, size, from)
	if err != nil {
		return first, lost, err
	}
	gap := []byte(`,"kind":"` + Gap{}.kind() + `",`)
	wanted := [][]byte{gap}
	for _, one := range about {
		value, err := json.Marshal(one)
		if err != nil {
			return first, lost, err
		}
		wanted = append(wanted, append([]byte{':'}, value...))
	}
	lines := bufio.NewReaderSize(io.NewSectionReader(file, begin, size-begin), MaxRecord)
	for n := 0; ; n++ {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return first, lost, nil
		}
		if err != nil {
			return first, lost, err
		}
		if n%4096 == 0 && ctx.Err() != nil {
			return first, lost, ctx.Err()
		}
		holds := first.IsZero()
		for _, one := range wanted {
			holds = holds || bytes.Contains(line, one)
		}
		if !holds {
			continue
		}
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			return first, lost, fmt.Errorf("record at byte %d or later: %w", begin, err)
		}
		if first.IsZero() {
			first = r.Time
		}
		switch {
		case r.Kind == (Gap{}).kind():
			missing, err := gapOf(r)
			if err != nil {
				return first, lost, err
			}
			lost += missing
		case !r.Time.Before(from):
			if err := f(r); err != nil {
				return first, lost, err
			}
		}
	}
}

// start returns where to begin to read for records from a time on: at one that is
// older, or at the first. Records are in the order of time, but for clocks that
// were set.
func start(file *os.File, size int64, from time.Time) (int64, error) {
	low, high := int64(0), size // a record begins at low that is older, or is the first
	for high-low > 4*MaxRecord {
		middle := low + (high-low)/2
		at, when, err := recordAfter(file, middle, size)
		if err != nil {
			return 0, err
		}
		if at < high && when.Before(from) {
			low = at
		} else {
			high = middle
		}
	}
	return low, nil
}

// recordAfter returns where the first record begins after a byte, and when it was written.
func recordAfter(file *os.File, at, size int64) (int64, time.Time, error) {
	lines := bufio.NewReaderSize(io.NewSectionReader(file, at, size-at), MaxRecord)
	rest, err := lines.ReadSlice('\n')
	if errors.Is(err, io.EOF) {
		return size, time.Time{}, nil
	}
	if err != nil {
		return 0, time.Time{}, err
	}
	at += int64(len(rest))
	line, err := lines.ReadSlice('\n')
	if errors.Is(err, io.EOF) {
		return size, time.Time{}, nil
	}
	if err != nil {
		return 0, time.Time{}, err
	}
	var r Record
	if err := json.Unmarshal(line, &r); err != nil {
		return 0, time.Time{}, fmt.Errorf("record at byte %d: %w", at, err)
	}
	return at, r.Time, nil
}
