package mirror

import (
	"fmt"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/entry"
)

// Whatever is known of a caller, what it is remembered by is short (R98), and no
// other's.
func TestGroupKey(t *testing.T) {
	large := strings.Repeat("x", 1<<20)
	seen := map[string]string{}
	for _, f := range []entry.Facts{
		{}, {Selectors: []entry.Selector{{Type: "a", Value: "b"}}}, {Selectors: []entry.Selector{{Type: "ab", Value: ""}}},
		{Selectors: []entry.Selector{{Type: "a", Value: "b"}, {Type: "c", Value: "d"}}}, {Values: map[string]string{"a": "b"}}, {Values: map[string]string{"a": "b", "c": "d"}},
		{Selectors: []entry.Selector{{Type: "a", Value: "b"}}, Values: map[string]string{"c": "d"}}, {Selectors: []entry.Selector{{Type: "a", Value: large}}}, {Values: map[string]string{"a": large}},
	} {
		key, text := groupKey(f), fmt.Sprintf("%.100s", fmt.Sprint(f))
		if was, again := seen[key]; again || len(key) > 64 {
			t.Errorf("%s has a key of %d bytes, as %q", text, len(key), was)
		}
		seen[key] = text
	}
}
