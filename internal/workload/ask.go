package workload

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
)

// Named is an attestor and the name that it has in configuration and logs.
type Named struct {
	Name string
	Attestor
}

// Answer is what one attestor said of a process.
type Answer struct {
	Name string
	Attested
	Took time.Duration
	Err  error
}

// usualWait is how long an attestor may take that is not Patient.
const usualWait = 10 * time.Second

// Patient is an attestor that may have to wait for others, and says for how long.
type Patient interface{ Patience() time.Duration }

// Ask asks all attestors at once and returns their answers in their order. One that
// panics has failed.
func Ask(ctx context.Context, attestors []Named, pid int) []Answer {
	answers := make([]Answer, len(attestors))
	ask := func(i int) {
		began, wait := time.Now(), usualWait
		if p, ok := attestors[i].Attestor.(Patient); ok {
			wait = p.Patience()
		}
		ctx, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		var said Attested
		err := fault.Contain(func() (err error) { said, err = attestors[i].Attest(ctx, pid); return err })
		answers[i] = Answer{Name: attestors[i].Name, Attested: said, Took: time.Since(began), Err: err}
	}
	var wg sync.WaitGroup
	for i := 1; i < len(attestors); i++ {
		wg.Go(func() { ask(i) })
	}
	if len(attestors) > 0 {
		ask(0)
	}
	wg.Wait()
	return answers
}

// Facts puts together what the attestors that answered know. One that failed
// only takes its selectors and facts away (R47).
func Facts(answers []Answer) entry.Facts {
	facts := entry.Facts{Values: map[string]string{}}
	for _, a := range answers {
		if a.Err == nil {
			facts.Selectors = append(facts.Selectors, a.Selectors...)
			for name, value := range a.Attested.Facts {
				if strings.HasPrefix(name, a.Name+".") { // no attestor states another's facts
					facts.Values[name] = value
				}
			}
		}
	}
	slices.SortFunc(facts.Selectors, entry.Selector.Compare)
	facts.Selectors = slices.Compact(facts.Selectors)
	return facts
}
