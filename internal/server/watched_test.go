package server

import (
	"context"
	"iter"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// failing is a store that answers each call with an error, or with nothing.
type failing struct {
	store.Store
	err error
}

func (f *failing) Load(context.Context, func(string, uint64, []byte) error) (store.Position, error) {
	return store.Position{}, f.err
}

func (f *failing) Watch(context.Context, store.Position) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		if f.err != nil {
			yield(store.Batch{}, f.err)
		}
	}
}

// A damaged store is shown until it could be loaded afresh, by whichever call it
// comes to light.
func TestDamageIsShown(t *testing.T) {
	f := &failing{}
	w := &watched{Store: f}
	load := func() { w.Load(t.Context(), nil) }
	watch := func() {
		for range w.Watch(t.Context(), store.Position{}) {
		}
	}
	shows := func(want string) {
		t.Helper()
		err := w.healthy()
		if (err == nil) != (want == "") || err != nil && (fault.ReasonOf(err) != want || fault.KindOf(err) != fault.Unavailable) {
			t.Errorf("healthy() = %v, want %q", err, want)
		}
	}
	damaged := fault.New(fault.Precondition, "store_corrupt", "it is damaged").Fix("restore a backup")
	for _, find := range []func(){load, watch} {
		f.err = fault.New(fault.Precondition, "compacted", "others go on")
		find()
		shows("")
		f.err = damaged
		find()
		shows("store_corrupt")
		f.err = nil
		watch() // goes on from where it stood, which proves nothing
		shows("store_corrupt")
		load()
		shows("")
	}
}
