package server

import (
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/servers"
	"github.com/plastron/plastron/internal/store"
)

// recordBatches turns what was committed into audit events. The log is where
// they come from, so the trail names exactly what took effect and who asked.
func recordBatches(trail *audit.Writer) func(store.Batch) {
	return func(b store.Batch) {
		var events []audit.Event
		position := b.Position.String()
		for _, w := range b.Writes {
			// What keeps contents unique says nothing that the entry beside it does
			// not, but a repair writes it alone.
			content := func(c store.Change) bool { return strings.HasPrefix(c.Key, "/entry-content/") }
			alone := !slices.ContainsFunc(w.Changes, func(c store.Change) bool { return !content(c) })
			for _, c := range w.Changes {
				beat := w.Caller == servers.Caller && (strings.HasPrefix(c.Key, "/server/") || strings.HasPrefix(c.Key, "/roster/"))
				if beat || content(c) && !alone { // of a server's life, who took its identity and who ended is on record
					continue
				}
				change := audit.Change{Caller: w.Caller, Position: position, Key: c.Key, Deleted: c.Deleted}
				if !c.Deleted {
					change.Value = sha256.Sum256(c.Value)
				}
				if strings.HasPrefix(c.Key, "/authority/") || strings.HasPrefix(c.Key, "/bundle/") {
					events = append(events, audit.AuthorityAct(change))
				} else {
					events = append(events, change)
				}
			}
		}
		if len(events) > 0 {
			trail.Note(events...)
		}
	}
}
