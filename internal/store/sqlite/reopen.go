package sqlite

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// reopen replaces the connections after a failure, so that nothing is built on
// a page that a failed sync may have left unwritten (R81). The caller holds
// writing. On success the store works again and the fate of the pending row is
// settled; on failure it stays broken and the next use tries again.
//
//  1. Close the connections. SQLite copies the WAL, as far as it was committed,
//     into the database; each of those frames was synced by its own commit.
//  2. Write what is left of the WAL to a new file, sync it and put it in place:
//     what is read from here on is on the disk, or the sync fails again.
//  3. Open, and see where the log ends.
func (s *Store) reopen() error {
	s.files.Lock()
	defer s.files.Unlock()
	if err := s.reopenFiles(); err != nil {
		s.disconnect()
		s.broken = err
		return unusable(err)
	}
	s.broken = nil
	s.log.Warn("store reopened", "dir", s.dir, "revision", s.head)
	return nil
}

func (s *Store) reopenFiles() error {
	s.disconnect()
	if err := rewriteWAL(filepath.Join(s.dir, databaseName+"-wal")); err != nil {
		return err
	}
	if err := s.connect(); err != nil {
		return err
	}
	m, err := readMeta(s.writer.conn)
	if err != nil {
		return err
	}
	if err := s.writer.prepareStatements(); err != nil {
		return err
	}
	s.mu.Lock() // a fold or compaction may have failed after it was written
	s.folded, s.compacted = m.folded, m.compacted
	s.mu.Unlock()
	return s.resolve(m)
}

// unusable tells a caller that the store does not work now, whatever the cause.
func unusable(err error) error {
	reason := "store_unavailable"
	if f, ok := errors.AsType[*fault.Error](err); ok {
		reason = f.Reason
	}
	return fault.New(fault.Unavailable, reason, "the store cannot be used").
		Fix("see to the failure named in the server's log; the next use tries again").Because(err)
}

// ready returns why the open files may not be used. The caller holds writing.
func (s *Store) ready() error {
	if s.broken == nil && s.writer == nil {
		return store.Closed()
	}
	return s.broken
}

// fail marks the open files as not to be used, after a failure outside a commit,
// unless opening them again would not help. A full disk is no failure of theirs:
// what SQLite could not write it has rolled back.
func (s *Store) fail(err error) {
	switch fault.ReasonOf(err) {
	case "disk_full", "busy", "closed", "store_corrupt":
		return
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.broken == nil {
		s.broken = err
	}
}

// rewriteWAL replaces the WAL by a synced copy of itself.
func rewriteWAL(path string) error {
	old, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer old.Close()
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	// Bare, so that the bytes are read and written and not cloned in the disk.
	_, err = io.Copy(struct{ io.Writer }{f}, struct{ io.Reader }{old})
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
		return err
	}
	return syncDir(filepath.Dir(path))
}
