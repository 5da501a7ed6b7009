package reason_test

import (
	"errors"
	"regexp"
	"testing"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
)

// R131: sixteen reasons, each with a code, a sentence and a fix of its own.
func TestTable(t *testing.T) {
	code := regexp.MustCompile(`^[a-z]+(_[a-z]+)+$`)
	seen := map[string]bool{}
	for _, r := range reason.All() {
		for _, text := range []string{r.Reason, r.Message, r.Remedy} {
			if text == "" || seen[text] {
				t.Errorf("%s: %q is empty or said twice", r.Reason, text)
			}
			seen[text] = true
		}
		if !code.MatchString(r.Reason) || r.Kind == fault.Internal || reason.Find(r.Reason) != r {
			t.Errorf("%s: a code that is malformed, shown to nobody or not found", r.Reason)
		}
	}
	if n := len(reason.All()); n != 16 {
		t.Errorf("there are %d reasons, want 16", n)
	}
	if reason.Find("nonsense") != nil {
		t.Error("a reason that is not there was found")
	}
}

func TestSay(t *testing.T) {
	said := reason.Say(reason.SelectorMismatch, "grant %s wants 100%% more", "a")
	if said.Message != "grant a wants 100% more" || said.Remedy != reason.SelectorMismatch.Remedy || !errors.Is(said, reason.SelectorMismatch) {
		t.Errorf("Say() = %+v", said)
	}
	if reason.SelectorMismatch.Message == said.Message {
		t.Error("the table was written to")
	}
}
