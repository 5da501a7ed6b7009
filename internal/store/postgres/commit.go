package postgres

import (
	"context"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// Commit implements store.Store. What was not yet sent when ctx ends is not written.
func (s *Store) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	return s.queue.Commit(ctx, txns)
}

func unknown(cause error) error {
	return fault.New(fault.Unavailable, "outcome_unknown", "the database did not answer while the change was written").
		Fix("look whether it is there before trying again").Because(cause)
}

// commitGroup sends the transactions of one group whose callers still wait, and
// answers them. It returns an error when the database does not answer.
func (s *Store) commitGroup(all []store.Pending) error {
	var live []store.Txn
	var to []*store.Pending
	for i := range all {
		if err := all[i].Given(); err != nil {
			all[i].Answer(store.Position{}, err)
			continue
		}
		live = append(live, *all[i].Txn)
		to = append(to, &all[i])
	}
	if len(live) == 0 {
		return nil
	}
	g := newGroup(live)
	err := s.write(g)
	for i := range live {
		if err != nil {
			to[i].Answer(g.at, err)
		} else {
			to[i].Answer(g.results[i].Position, g.results[i].Err)
		}
	}
	switch fault.ReasonOf(err) {
	case "":
		wake(s.wakeFollow) // for those whom no notification reaches
	case "database_unreachable":
		return err
	case "outcome_unknown":
		return fault.New(fault.Unavailable, "database_unreachable", "the database does not answer; nothing was written").
			Fix("see whether it runs and can be reached").Because(err)
	}
	return nil
}
