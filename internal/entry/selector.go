package entry

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/plastron/plastron/internal/fault"
)

// ParseSelector reads the form "type:value". The first colon ends the type; the
// value may hold more of them.
func ParseSelector(s string) (Selector, error) {
	if len(s) > MaxSelectorType+1+MaxSelectorValue {
		return Selector{}, fault.New(fault.Invalid, "selector_invalid",
			"the selector is %d bytes long, the limit is %d", len(s), MaxSelectorType+1+MaxSelectorValue)
	}
	typ, value, found := strings.Cut(s, ":")
	if !found {
		return Selector{}, fault.New(fault.Invalid, "selector_invalid", "%.100q is not a selector", s).
			Fix("write it as TYPE:VALUE, for example unix:uid:1000")
	}
	sel := Selector{Type: typ, Value: value}
	return sel, sel.check()
}

// Compare orders selectors by type, then by value.
func (s Selector) Compare(o Selector) int {
	if c := strings.Compare(s.Type, o.Type); c != 0 {
		return c
	}
	return strings.Compare(s.Value, o.Value)
}

// NormalizeSelectors returns the selectors sorted and without duplicates, or
// the first fault it finds. At least one is asked for; the argument is not changed.
func NormalizeSelectors(sels []Selector) ([]Selector, error) {
	switch {
	case len(sels) == 0:
		return nil, fault.New(fault.Invalid, "selectors_missing", "there is no selector").
			Fix("name at least one, for example unix:uid:1000")
	case len(sels) > MaxSelectors:
		return nil, fault.New(fault.Invalid, "selectors_too_many", "there are %d selectors, the limit is %d", len(sels), MaxSelectors)
	}
	size := 0
	for _, s := range sels {
		if err := s.check(); err != nil {
			return nil, err
		}
		size += len(s.Type) + len(s.Value)
	}
	if size > MaxSelectorsSize {
		return nil, fault.New(fault.Invalid, "selectors_too_large",
			"the selectors are %d bytes long together, the limit is %d", size, MaxSelectorsSize)
	}
	out := slices.Clone(sels)
	slices.SortFunc(out, Selector.Compare)
	return slices.Compact(out), nil
}

func (s Selector) check() error {
	switch {
	case s.Type == "":
		return fault.New(fault.Invalid, "selector_invalid", "the selector has no type").Fix("write it as TYPE:VALUE")
	case len(s.Type) > MaxSelectorType:
		return fault.New(fault.Invalid, "selector_invalid",
			"the selector's type is %d bytes long, the limit is %d", len(s.Type), MaxSelectorType)
	case strings.ContainsFunc(s.Type, notTypeRune):
		return fault.New(fault.Invalid, "selector_invalid", "the selector type %q holds a character that a type cannot hold", s.Type).
			Fix("use lower case letters, digits, '_', '-' and '.'")
	case s.Value == "":
		return fault.New(fault.Invalid, "selector_invalid", "the selector of type %q has no value", s.Type).Fix("write it as TYPE:VALUE")
	case len(s.Value) > MaxSelectorValue:
		return fault.New(fault.Invalid, "selector_invalid",
			"the value of the selector of type %q is %d bytes long, the limit is %d", s.Type, len(s.Value), MaxSelectorValue)
	case !utf8.ValidString(s.Value):
		return fault.New(fault.Invalid, "selector_invalid", "the value of the selector of type %q is not UTF-8", s.Type)
	case strings.IndexByte(s.Value, 0) >= 0:
		return fault.New(fault.Invalid, "selector_invalid", "the value of the selector of type %q holds a zero byte", s.Type)
	}
	return nil
}

func notTypeRune(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' && r != '-' && r != '.'
}

// Subset reports whether have holds every selector of required. Both are
// sorted and without duplicates.
func Subset(required, have []Selector) bool {
	return firstMissing(required, have) == len(required)
}

// firstMissing returns the index of the first selector of required that have
// lacks, or len(required). Both are sorted. How many there are in have may be for
// whoever is attested to decide, so not all of them are looked at (R103).
func firstMissing(required, have []Selector) int {
	for i, s := range required {
		at, found := slices.BinarySearchFunc(have, s, Selector.Compare)
		if !found {
			return i
		}
		have = have[at:]
	}
	return len(required)
}
