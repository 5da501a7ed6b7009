package sqlite

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/plastron/plastron/internal/store"
)

// mark is what the file position holds: what was acknowledged last, and in which
// file. It is written after a commit is durable and before it is answered, and
// not synced: a power cut may take it back in time, never forward, and only a
// mark that is ahead of the database says something.
type mark struct {
	epoch    store.Epoch
	revision uint64
	file     uint64 // identity of the database file, which a copy does not share
}

const (
	positionName  = "position"
	positionMagic = "plstpos1"
	positionSize  = len(positionMagic) + 16 + 8 + 8 + 4
)

func (m *mark) append(b []byte) []byte {
	b = append(b, positionMagic...)
	b = append(b, m.epoch[:]...)
	b = binary.BigEndian.AppendUint64(b, m.revision)
	b = binary.BigEndian.AppendUint64(b, m.file)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// parseMark returns nil for anything that append did not make.
func parseMark(b []byte) *mark {
	if len(b) != positionSize || !bytes.HasPrefix(b, []byte(positionMagic)) {
		return nil
	}
	var m mark
	rest := b[len(positionMagic):]
	copy(m.epoch[:], rest)
	m.revision = binary.BigEndian.Uint64(rest[16:])
	m.file = binary.BigEndian.Uint64(rest[24:])
	if !bytes.Equal(m.append(nil), b) { // the checksum
		return nil
	}
	return &m
}

// positionFile is the open file position.
type positionFile struct {
	found *mark // what it held when it was opened; nil if nothing that makes sense
	now   mark
	f     *os.File
	buf   []byte
}

func openPosition(dir string) (*positionFile, error) {
	f, err := openPrivate(filepath.Join(dir, positionName))
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(positionSize)+1))
	if err != nil {
		f.Close()
		return nil, err
	}
	return &positionFile{found: parseMark(b), f: f}, nil
}

// settle writes what Open found and makes the file itself durable.
func (p *positionFile) settle(m mark) error {
	p.now = m
	if err := p.f.Truncate(int64(positionSize)); err != nil {
		return err
	}
	if err := p.write(m.revision); err != nil {
		return err
	}
	if err := p.f.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(p.f.Name()))
}

func (p *positionFile) write(revision uint64) error {
	p.now.revision = revision
	p.buf = p.now.append(p.buf[:0])
	_, err := p.f.WriteAt(p.buf, 0)
	return err
}

func (p *positionFile) close() { p.f.Close() }
