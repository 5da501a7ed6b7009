package workload

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/plastron/plastron/internal/entry"
)

// Collector collects what an attestor learns of a process. What cannot be had is
// left out and named; it never turns into something else.
//
// What is said of a process is bounded, for it is kept for each that calls, and
// who starts processes may decide how much there is: what comes too late is left
// out (R98).
type Collector struct {
	Type string // of the selectors; facts are named "TYPE.name"
	said Attested
	size int // of all of it, in bytes
}

// MaxSaid is how many bytes an attestor says of a process.
const MaxSaid = 256 << 10

// Add adds the selector key:value. The key is the attestor's own word, or ends in
// a part that holds no colon, so whatever the value is, it cannot pass for
// another fact (R43, E44); values that a selector cannot hold, or that would not
// read as one line, are refused.
func (c *Collector) Add(key, value string) error {
	if err := check(key, value); err != nil {
		return err
	}
	if c.fits(len(key) + 1 + len(value)) {
		c.said.Selectors = append(c.said.Selectors, entry.Selector{Type: c.Type, Value: key + ":" + value})
	}
	return nil
}

// Fact adds a fact for rules, with the same limits.
func (c *Collector) Fact(name, value string) error {
	if err := check(name, value); err != nil {
		return err
	}
	if c.said.Facts == nil {
		c.said.Facts = map[string]string{}
	}
	if c.fits(len(name) + len(value)) {
		c.said.Facts[c.Type+"."+name] = value
	}
	return nil
}

// Omit says that what key stands for is left out, and why. A nil err says nothing.
func (c *Collector) Omit(key string, err error) {
	if err == nil {
		return
	}
	if why := fmt.Sprintf("%s:%s is left out: %v", c.Type, key, err); c.fits(len(why)) {
		c.said.Omitted = append(c.said.Omitted, why)
	}
}

// fits counts what is to be said next. Once there is no room for something, there
// is none for what follows.
func (c *Collector) fits(bytes int) bool {
	if c.size > MaxSaid {
		return false
	}
	if c.size += bytes; c.size > MaxSaid {
		c.said.Omitted = append(c.said.Omitted, fmt.Sprintf("%s: there is more than %d KiB to say; what follows is left out", c.Type, MaxSaid>>10))
		return false
	}
	return true
}

// Attested returns what was collected, in order and each selector once.
func (c *Collector) Attested() Attested {
	slices.SortFunc(c.said.Selectors, entry.Selector.Compare)
	c.said.Selectors = slices.Compact(c.said.Selectors)
	return c.said
}

func check(key, value string) error {
	switch {
	case value == "":
		return errors.New("it is empty")
	case len(key)+1+len(value) > entry.MaxSelectorValue:
		return errors.New("it is too long")
	case !utf8.ValidString(value), strings.ContainsFunc(value, unicode.IsControl):
		return errors.New("it holds control characters or is not UTF-8")
	}
	return nil
}
