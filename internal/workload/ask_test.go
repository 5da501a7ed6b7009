package workload

import (
	"context"
	"testing"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
)

type attestor func() (Attested, error)

func (a attestor) Attest(context.Context, int) (Attested, error) { return a() }

// An attestor that panics, in whichever place, has failed; the others are heard (R47, R99).
func TestAttestorPanics(t *testing.T) {
	knows := attestor(func() (Attested, error) {
		return Attested{Selectors: []entry.Selector{{Type: "a", Value: "b"}}}, nil
	})
	panics := attestor(func() (Attested, error) { panic("a bug") })
	for bad := range 3 {
		asked := []Named{{"0", knows}, {"1", knows}, {"2", knows}}
		asked[bad].Attestor = panics
		answers := Ask(t.Context(), asked, 1)
		for i, a := range answers {
			if failed := fault.ReasonOf(a.Err) == fault.Panicked; failed != (i == bad) || !failed && a.Err != nil || failed == (len(a.Selectors) > 0) {
				t.Errorf("%d panics: %+v", bad, a)
			}
		}
		if got := Facts(answers).Selectors; len(got) != 1 {
			t.Errorf("%d panics: %v", bad, got)
		}
	}
}
