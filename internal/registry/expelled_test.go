package registry

import (
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// What a server that is expelled says does not count, whatever is written in its name. R69
func TestExpelled(t *testing.T) {
	st := openStore(t, t.TempDir())
	r := start(t, st)
	now := time.Now().UTC().Truncate(time.Second)
	x := Expulsion{Server: "bad", Caller: "op", At: now, RevokeAt: now.Add(time.Minute)}
	write := func() {
		update(t, r, func(tx *Tx) error {
			for _, name := range []string{"good", "bad"} {
				if err := tx.PutServer(Server{ID: name, Instance: []byte("i"), Beat: 1, BeatAt: now, Lease: time.Hour}); err != nil {
					return err
				}
				if err := tx.PutRoster(name, []uint64{AgentHash(id("/spire/agent/" + name))}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	write()
	update(t, r, func(tx *Tx) error {
		if err := tx.StillIn("bad"); err != nil {
			t.Errorf("before: %v", err)
		}
		if err := tx.Expel(x); err != nil {
			return err
		}
		if err := tx.StillIn("bad"); fault.ReasonOf(err) != "server_expelled" {
			t.Errorf("in the same transaction: %v", err)
		}
		return nil
	})
	write() // in its name, all the same
	check := func(what string, r *Registry) {
		t.Helper()
		r.View(func(v *Snapshot) {
			if servers := v.Servers(); len(servers) != 1 || servers[0].ID != "good" {
				t.Errorf("%s: servers %v", what, servers)
			}
			if _, attached := v.Attachments(now).Of(id("/spire/agent/bad")); attached {
				t.Errorf("%s: its roster counts", what)
			}
			if _, attached := v.Attachments(now).Of(id("/spire/agent/good")); !attached {
				t.Errorf("%s: the other's roster does not count", what)
			}
		})
		if _, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.StillIn("bad") }); fault.ReasonOf(err) != "server_expelled" {
			t.Errorf("%s: StillIn() = %v", what, err)
		}
		if _, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.StillIn("good") }); err != nil {
			t.Errorf("%s: StillIn() = %v", what, err)
		}
	}
	check("expelled", r)
	r.View(func(v *Snapshot) {
		if got := v.Expelled(); len(got) != 1 || got[0] != x {
			t.Errorf("Expelled() = %+v, want %+v", got, x)
		}
	})
	// A row that is damaged expels too.
	for _, result := range st.Commit(t.Context(), []store.Txn{{Caller: "disk", Puts: []store.Put{{Key: "/expelled/bad", Value: []byte("?")}}}}) {
		if result.Err != nil {
			t.Fatal(result.Err)
		}
		if err := r.Reach(t.Context(), result.Position); err != nil {
			t.Fatal(err)
		}
	}
	check("damaged", r)
}
