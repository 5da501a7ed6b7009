package audit

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/plastron/plastron/internal/fault"
)

// Summary is what Verify found.
type Summary struct {
	Records uint64
	Last    Hash   // hash of the last record
	Lost    uint64 // events that gaps say are missing
	Torn    int64  // bytes after the last complete record
}

// Verify reads a whole trail and checks every number, every link and every
// record's form. A torn last line is reported, not an error: a crash leaves one.
// fault.Precondition, "audit_broken": the trail was changed.
func Verify(path string) (Summary, error) {
	f, err := os.Open(path)
	if err != nil {
		return Summary{}, err
	}
	defer f.Close()
	var s Summary
	var server string
	lines := bufio.NewReaderSize(f, MaxRecord)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			s.Torn = int64(len(line))
			return s, nil
		case errors.Is(err, bufio.ErrBufferFull):
			return s, broken(s.Records+1, "the line is longer than %d bytes", MaxRecord)
		case err != nil:
			return s, err
		}
		line = line[:len(line)-1]
		r, err := parse(line)
		switch {
		case err != nil:
			return s, broken(s.Records+1, "%v", err)
		case r.Sequence != s.Records+1:
			return s, broken(s.Records+1, "its number is %d", r.Sequence)
		case r.Previous != s.Last:
			return s, broken(r.Sequence, "it does not follow the record before it")
		case r.Sequence > 1 && r.Server != server:
			return s, broken(r.Sequence, "it is another server's")
		}
		if r.Kind == (Gap{}).kind() {
			lost, err := gapOf(r)
			if err != nil {
				return s, broken(r.Sequence, "%v", err)
			}
			s.Lost += lost
		}
		server = r.Server
		s.Records, s.Last = r.Sequence, sha256.Sum256(line)
	}
}

func broken(record uint64, format string, args ...any) error {
	return fault.New(fault.Precondition, "audit_broken", "the audit trail is broken at record %d: %s",
		record, fmt.Sprintf(format, args...))
}
