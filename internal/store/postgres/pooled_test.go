//go:build linux

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/storetest"
	"github.com/plastron/plastron/test/parts"
)

// Behind a pooler that gives each transaction another session, the contract
// holds, a store beside it that is connected directly included.
func TestPooled(t *testing.T) {
	database(t)
	pooler, err := parts.StartPgbouncer(limited(t), cluster)
	if _, missing := errors.AsType[*parts.MissingError](err); missing && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer pooler.Close()
	t.Run("Contract", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) storetest.Open {
			url := pooler.URL(database(t))
			return func(t *testing.T) store.Store { return open(t, url) }
		})
	})
	t.Run("BesideADirectOne", func(t *testing.T) {
		name := database(t)
		direct, pooled, other := opened(t, cluster.URL(name)), opened(t, pooler.URL(name)), opened(t, pooler.URL(name))
		_, begin := storetest.State(t, direct)
		var wg sync.WaitGroup
		for w := range 60 {
			s := []*postgres.Store{direct, pooled, other}[w%3]
			wg.Go(func() {
				for i := range 5 {
					r := s.Commit(context.Background(), []store.Txn{create(fmt.Sprintf("%d/%d", w, i), "")})[0]
					if r.Err != nil {
						t.Errorf("Commit() = %v", r.Err)
					}
				}
			})
		}
		wg.Wait()
		if rows := agree(t, begin, direct, pooled, other); len(rows) != 300 {
			t.Errorf("%d rows, want 300", len(rows))
		}
		// Nobody commits through it: it learns of the next one by looking.
		_, at := storetest.State(t, pooled)
		commit(t, direct, create("last", ""))
		for b, err := range pooled.Watch(limited(t), at) {
			if err != nil || b.Writes[0].Changes[0].Key != "last" {
				t.Errorf("Watch: %v, %v", b, err)
			}
			break
		}
		await(t, name, "SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()")
	})
}
