package audit

import "time"

// BreakFile makes the next write fail, as a disk that went away does.
func (w *Writer) BreakFile() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.file.Close()
}

// RetryNow lets the next Append reopen the file without waiting.
func (w *Writer) RetryNow() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.retryAt = time.Time{}
}

// Durable returns the highest sequence number that was synced.
func (w *Writer) Durable() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.synced
}
