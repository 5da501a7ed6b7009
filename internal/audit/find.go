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

	"github.com/plastron/plastron/internal/fault"
)

// Signed is what a trail says of one certificate.
type Signed struct {
	Record    Record
	Issuance  *Issuance // one of the two
	Admission *Admission
}

// Find returns what the trail says of the certificate with a serial number
// (decimal), or fault.NotFound. It reads the file from its beginning, and is for
// the question of a person.
func (w *Writer) Find(ctx context.Context, serial string) (Signed, error) {
	f, err := os.Open(w.cfg.Path)
	if err != nil {
		return Signed{}, fmt.Errorf("open audit trail: %w", err)
	}
	defer f.Close()
	member, err := json.Marshal(serial)
	if err != nil {
		return Signed{}, err
	}
	needle := append([]byte(`"serial":`), member...)
	lines := bufio.NewReaderSize(f, MaxRecord)
	for n := 0; ; n++ {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return Signed{}, fault.New(fault.NotFound, "serial_unknown", "the audit trail of this server holds no certificate with the serial number %s", serial).
				Fix("ask the server that signed it: each has its own trail")
		case err != nil:
			return Signed{}, fmt.Errorf("read audit trail: %w", err)
		case n%1000 == 0 && ctx.Err() != nil:
			return Signed{}, ctx.Err()
		case !bytes.Contains(line, needle):
			continue
		}
		if s, ok := signed(line[:len(line)-1], serial); ok {
			return s, nil
		}
	}
}

// signed reads a record, if it is of that certificate.
func signed(line []byte, serial string) (s Signed, ok bool) {
	r, err := parse(line)
	if err != nil {
		return Signed{}, false // it does not count; Verify says what is wrong with it
	}
	s.Record = r
	switch r.Kind {
	case (Issuance{}).kind():
		s.Issuance = new(Issuance)
		return s, json.Unmarshal(r.Event, s.Issuance) == nil && s.Issuance.Serial == serial
	case (Admission{}).kind():
		s.Admission = new(Admission)
		return s, json.Unmarshal(r.Event, s.Admission) == nil && s.Admission.Serial == serial
	}
	return Signed{}, false
}
