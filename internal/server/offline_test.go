package server

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/upkeep"
)

// R126: a store whose server is stopped is checked and repaired as one that runs,
// and the repair is on record.
func TestOfflineRepair(t *testing.T) {
	cfg := Default()
	cfg.Server.DataDir = filepath.Join(t.TempDir(), "data")
	if err := cfg.Server.TrustDomain.UnmarshalText([]byte("a.test")); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	none := Offline(t.Context(), cfg, log, func(*upkeep.Upkeep) error { return nil })
	if _, err := os.Stat(cfg.Server.DataDir); fault.ReasonOf(none) != "store_not_found" || err == nil {
		t.Fatalf("no store: %v, and data_dir: %v", none, err)
	}
	seed := func(txn store.Txn) {
		t.Helper()
		st, err := sqlite.Config{Dir: cfg.Server.DataDir}.Open(t.Context(), log)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		if res := st.Commit(t.Context(), []store.Txn{txn})[0]; res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	orphan := "/entry-content/" + strings.Repeat("ab", 32)
	if err := os.Mkdir(cfg.Server.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	seed(store.Txn{Puts: []store.Put{{Key: orphan, Value: []byte{8, 1, 16, 1}}}})

	check := func(open func(context.Context, Config, *slog.Logger, func(*upkeep.Upkeep) error) error, repairer string) (r *upkeep.Report) {
		t.Helper()
		err := open(t.Context(), cfg, log, func(u *upkeep.Upkeep) (err error) {
			r, err = u.Check(t.Context(), repairer)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := check(Offline, ""); r.Faults() != 2 { // and the store is nobody's yet
		t.Fatalf("%+v", r)
	}
	if r := check(OfflineRepair, "operator"); r.Faults() != 0 || len(r.Repaired) != 1 {
		t.Fatalf("%+v", r)
	}
	if r := check(Offline, ""); r.Faults() != 0 || r.Records < 2 {
		t.Fatalf("%+v", r)
	}
	record, err := os.ReadFile(filepath.Join(cfg.Server.DataDir, "audit.log"))
	if err != nil || !bytes.Contains(record, []byte(orphan)) || !bytes.Contains(record, []byte(`operator`)) {
		t.Errorf("on record: %s, %v", record, err)
	}
}
