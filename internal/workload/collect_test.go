package workload

import (
	"fmt"
	"strings"
	"testing"
)

// R98: whoever starts a process may decide how much there is to say of it, but not
// how much is kept.
func TestCollectorIsBounded(t *testing.T) {
	for name, say := range map[string]func(*Collector, int) error{
		"selectors": func(c *Collector, i int) error { return c.Add("label", fmt.Sprintf("%01000d", i)) },
		"facts":     func(c *Collector, i int) error { return c.Fact(fmt.Sprintf("f%d", i), strings.Repeat("x", 1000)) },
		"omissions": func(c *Collector, i int) error { c.Omit("label", fmt.Errorf("%01000d", i)); return nil },
	} {
		c := Collector{Type: "x"}
		for i := range 1000 {
			if err := say(&c, i); err != nil {
				t.Fatal(err)
			}
		}
		said := c.Attested()
		if n := len(said.Selectors) + len(said.Facts) + len(said.Omitted); n < 100 || n > MaxSaid/1000+1 {
			t.Errorf("%s: %d are kept", name, n)
		}
		if last := said.Omitted[len(said.Omitted)-1]; last != "x: there is more than 256 KiB to say; what follows is left out" {
			t.Errorf("%s: %q does not say so", name, last)
		}
	}
}
