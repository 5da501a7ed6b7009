package registry

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/entry"
)

// Entries that fit a process and do not reach its agent, and what would let them.
func TestUnreached(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	old := grant("old", "/spire/agent/b", "/old", "unix:uid:1")
	old.CreatedAt = created.Add(-time.Hour)
	ended := grant("ended", "/spire/agent/b", "/ended", "unix:uid:1")
	ended.ExpiresAt = created.Add(time.Hour)
	stored := grant("stored", "/spire/agent/b", "/stored", "unix:uid:1")
	stored.StoreSVID = true
	update(t, r, func(tx *Tx) error {
		for _, n := range []Node{agent("a", "x:rack:7"), agent("b", "x:rack:8"), agent("c", "x:rack:8", "x:row:1")} {
			if err := tx.PutNode(n); err != nil {
				return err
			}
		}
		for _, e := range []entry.Entry{
			old, ended, stored,
			grant("mine", "/spire/agent/a", "/mine", "unix:uid:1"),
			grant("more", "/spire/agent/b", "/more", "unix:uid:1", "unix:gid:9"),
			grant("alias", "/spire/server", "/rack", "x:rack:8"),
			grant("far", "/spire/server", "/row", "x:rack:8", "x:row:1"),
			grant("below", "/rack", "/below", "unix:uid:2"),
			grant("deep", "/below", "/deep", "unix:uid:1", "unix:gid:1"),
			grant("row", "/row", "/in/row", "unix:uid:1"),
			// A circle of parents ends the climb.
			grant("ring1", "/ring/2", "/ring/1", "unix:uid:3"),
			grant("ring2", "/ring/1", "/ring/2", "unix:uid:1"),
		} {
			if err := tx.PutEntry(e); err != nil {
				return err
			}
		}
		return nil
	})
	names := func(entries []entry.Entry) (out []string) {
		for _, e := range entries {
			out = append(out, e.ID)
		}
		return out
	}
	r.View(func(v *Snapshot) {
		process := sel("unix:uid:1", "unix:gid:1", "unix:never:seen")
		now := created.Add(2 * time.Hour)
		if got, more := v.Unreached(id("/spire/agent/a"), process, now, 9); fmt.Sprint(names(got), more) != "[old deep ring2 row] false" {
			t.Errorf("Unreached(a) = %v, %v", names(got), more)
		}
		if got, more := v.Unreached(id("/spire/agent/a"), process, created, 2); fmt.Sprint(names(got), more) != "[old deep] true" {
			t.Errorf("Unreached(a, 2) = %v, %v", names(got), more)
		}
		if got, _ := v.Unreached(id("/spire/agent/c"), process, created, 9); fmt.Sprint(names(got)) != "[old ended mine ring2]" {
			t.Errorf("Unreached(c) = %v", names(got))
		}
		for _, who := range []string{"/spire/agent/nobody", "/mine"} {
			if got, _ := v.Unreached(id(who), process, now, 9); got != nil {
				t.Errorf("Unreached(%s) = %v", who, names(got))
			}
		}
		for parent, want := range map[string]string{"/rack": "alias x:rack:8", "/below": "alias x:rack:8", "/row": "", "/ring/1": "", "/spire/agent/b": "", "/nowhere": ""} {
			got := ""
			if near, ok := v.NearestAlias(id("/spire/agent/a"), id(parent)); ok {
				got = near.ID + " " + near.Missing.String()
			}
			if got != want {
				t.Errorf("NearestAlias(a, %s) = %q, want %q", parent, got, want)
			}
		}
		for parent, want := range map[string]int{"/rack": 2, "/below": 2, "/row": 1, "/spire/agent/b": 1, "/ring/1": 0, "/nowhere": 0} {
			if n, first := v.Agents(id(parent), 1); n != want || len(first) != min(want, 1) {
				t.Errorf("Agents(%s) = %d, %v, want %d", parent, n, first, want)
			}
		}
	})
}

// What is looked at for one question has a bound, and no question writes: the
// race detector sees two at once.
func TestUnreachedIsBounded(t *testing.T) {
	r := start(t, openStore(t, t.TempDir()))
	update(t, r, func(tx *Tx) error {
		if err := tx.PutNode(agent("a", "x:y:z")); err != nil {
			return err
		}
		for i := range maxClimb + 10 {
			if err := tx.PutEntry(grant(fmt.Sprint("e", i), "/elsewhere", "/many", fmt.Sprint("unix:uid:", i))); err != nil {
				return err
			}
		}
		return tx.PutEntry(grant("under", "/many", "/under", "unix:gid:1"))
	})
	done := make(chan bool)
	for range 2 {
		go r.View(func(v *Snapshot) {
			_, near := v.NearestAlias(id("/spire/agent/a"), id("/many"))
			n, _ := v.Agents(id("/many"), 1)
			done <- near || n > 0
		})
	}
	if first, second := <-done, <-done; first || second {
		t.Error("something reaches what nothing reaches")
	}
}
