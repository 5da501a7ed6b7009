//go:build linux

package fleet_test

import (
	"strings"
	"testing"
	"time"
)

// The checker says yes to histories that may happen and no to those that may not:
// without the latter it would prove nothing. R74, R76.
func TestHistoryChecker(t *testing.T) {
	at := func(from, to int) func(op) op {
		return func(o op) op {
			o.call, o.ret = time.Duration(from)*time.Second, time.Duration(to)*time.Second
			return o
		}
	}
	lost := func(from int) func(op) op {
		return func(o op) op {
			o.call, o.ret, o.outcome, o.rev = time.Duration(from)*time.Second, endless, unknown, 0
			return o
		}
	}
	made := func(hint string, rev uint64) op {
		return op{kind: create, hint: hint, id: "a", rev: rev, got: version{"a", hint, rev}}
	}
	there := func(hint string, rev uint64) op {
		return op{kind: create, id: "a", hint: "mine", outcome: exists, got: version{"a", hint, rev}}
	}
	changed := func(hint string, rev uint64) op {
		return op{kind: update, id: "a", hint: hint, rev: rev, got: version{"a", hint, rev}}
	}
	given := func(o op, expect uint64) op { o.expect = expect; return o }
	gone := func(rev uint64) op { return op{kind: remove, id: "a", rev: rev} }
	missing := func(k kind) op { return op{kind: k, id: "a", hint: "x", outcome: notFound} }
	shown := func(k kind, hint string, rev uint64) op {
		return op{kind: k, id: "a", got: version{"a", hint, rev}}
	}
	on := func(server int, o op) op { o.server = server; return o }

	for _, c := range []struct {
		name string
		ops  []op
		want string // in the error; empty: right
	}{
		{"one after the other", []op{at(0, 1)(made("1", 5)), at(2, 3)(changed("2", 6)), at(4, 5)(there("2", 6)), at(6, 7)(gone(8)),
			at(8, 9)(missing(update)), at(10, 11)(made("3", 9)), at(12, 13)(shown(last, "3", 9))}, ""},
		{"acknowledged and lost", []op{at(0, 1)(made("1", 5)), at(2, 3)(missing(last))}, "not linearizable"},
		{"deleted and back", []op{at(0, 1)(made("1", 5)), at(2, 3)(gone(6)), at(4, 5)(shown(last, "1", 5))}, "not linearizable"},
		{"change lost", []op{at(0, 1)(made("1", 5)), at(2, 3)(changed("2", 6)), at(4, 5)(shown(last, "1", 5))}, "not linearizable"},
		{"made twice", []op{at(0, 2)(made("1", 5)), at(1, 3)(made("2", 6))}, "not linearizable"},
		{"refused after the deletion", []op{at(0, 1)(made("1", 5)), at(2, 3)(gone(6)), at(4, 5)(there("1", 5))}, "not linearizable"},
		{"refused during the deletion", []op{at(0, 1)(made("1", 5)), at(2, 5)(gone(6)), at(3, 6)(there("1", 5))}, ""},
		{"not found after it was made", []op{at(0, 1)(made("1", 5)), at(2, 3)(missing(remove))}, "not linearizable"},
		{"not found while it is made", []op{at(0, 2)(made("1", 5)), at(1, 3)(missing(remove))}, ""},
		{"revision goes back", []op{at(0, 1)(made("1", 5)), at(2, 3)(gone(6)), at(4, 5)(made("2", 6))}, "not linearizable"},
		{"answer of another revision", []op{at(0, 1)(made("1", 5)), at(2, 3)(there("1", 4))}, "not linearizable"},
		{"answer of another id", []op{at(0, 1)(made("1", 5)), at(2, 3)(op{kind: create, outcome: exists, got: version{"b", "1", 5}})}, "not linearizable"},
		{"made under another id", []op{at(0, 1)(op{kind: create, id: "a", hint: "1", rev: 5, got: version{"b", "1", 5}})}, "not linearizable"},

		{"lost answer, made", []op{lost(0)(made("1", 0)), at(2, 3)(there("1", 5)), at(4, 5)(gone(6))}, ""},
		{"lost answer, not made", []op{lost(0)(made("1", 0)), at(2, 3)(made("2", 5)), at(4, 5)(shown(last, "2", 5))}, ""},
		{"lost answer, made late", []op{lost(0)(made("1", 0)), at(2, 3)(missing(remove)), at(4, 5)(shown(last, "1", 9))}, ""},
		{"lost answer, made twice", []op{lost(0)(made("1", 0)), at(2, 3)(there("1", 5)), at(4, 5)(gone(6)), at(6, 7)(there("1", 7))}, "not linearizable"},
		{"lost deletion", []op{at(0, 1)(made("1", 5)), lost(2)(gone(0)), at(4, 5)(missing(last))}, ""},
		{"lost deletion, of the second", []op{at(0, 1)(made("1", 5)), lost(2)(gone(0)), at(4, 5)(gone(6)), at(6, 7)(made("2", 7)), at(8, 9)(missing(last))}, ""},
		{"seen before it was asked for", []op{at(2, 3)(there("1", 5)), lost(4)(made("1", 0))}, "not linearizable"},
		{"lost change of what is gone", []op{at(0, 1)(made("1", 5)), at(2, 3)(gone(6)), lost(4)(changed("2", 0)), at(5, 6)(shown(last, "2", 7))}, "not linearizable"},
		{"promised never, and there", []op{at(0, 1)(op{kind: create, id: "a", hint: "1", outcome: never}), at(2, 3)(shown(last, "1", 5))}, "not linearizable"},

		{"condition holds", []op{at(0, 1)(made("1", 5)), at(2, 3)(given(changed("2", 6), 5))}, ""},
		{"condition does not hold", []op{at(0, 1)(made("1", 5)), at(2, 3)(changed("2", 6)), at(4, 5)(given(changed("3", 7), 5))}, "not linearizable"},
		{"refused though it holds", []op{at(0, 1)(made("1", 5)), at(2, 3)(op{kind: update, id: "a", hint: "2", expect: 5, outcome: stale})}, "not linearizable"},
		{"two changes of one revision", []op{at(0, 1)(made("1", 5)), at(2, 5)(given(changed("2", 6), 5)), at(3, 4)(given(changed("3", 7), 5))}, "not linearizable"},

		{"read at once", []op{at(0, 1)(made("1", 5)), at(2, 3)(shown(read, "1", 5))}, ""},
		{"read of nothing written", []op{at(0, 1)(made("1", 5)), at(2, 3)(shown(read, "2", 6))}, "not written"},
		{"read of another revision", []op{at(0, 1)(made("1", 5)), at(2, 3)(shown(read, "1", 6))}, "not written"},
		{"read before it was written", []op{at(4, 5)(made("1", 5)), at(2, 3)(shown(read, "1", 5))}, "not written"},
		{"promised never, and read", []op{at(0, 1)(op{kind: create, id: "a", hint: "1", outcome: never}), at(2, 3)(shown(read, "1", 5))}, "not written"},
		{"read elsewhere a moment later", []op{at(0, 1)(made("1", 5)), at(2, 3)(on(1, missing(read)))}, ""},
		{"read elsewhere long after", []op{at(0, 1)(made("1", 5)), at(9, 10)(on(1, missing(read)))}, "later"},
		{"old version elsewhere long after", []op{at(0, 1)(made("1", 5)), at(1, 2)(changed("2", 6)), at(9, 10)(on(1, shown(read, "1", 5)))}, "later"},
		{"deleted and elsewhere long after", []op{at(0, 1)(made("1", 5)), at(1, 2)(gone(6)), at(9, 10)(on(1, shown(read, "1", 5)))}, "later"},
		{"own write not shown", []op{at(0, 1)(made("1", 5)), at(2, 3)(missing(read))}, "own write"},
		{"own deletion not shown", []op{at(0, 1)(made("1", 5)), at(1, 2)(gone(6)), at(3, 4)(shown(read, "1", 5))}, "own write"},
		{"server goes back", []op{at(0, 1)(made("1", 5)), at(1, 2)(changed("2", 6)), at(2, 3)(on(1, shown(read, "2", 6))), at(3, 4)(on(1, shown(read, "1", 5)))}, "goes back"},
		{"server forgets", []op{at(0, 1)(made("1", 5)), at(2, 3)(on(1, shown(read, "1", 5))), at(3, 4)(on(1, missing(read)))}, "goes back"},
		{"lost deletion, and read", []op{at(0, 1)(made("1", 5)), lost(2)(gone(0)), at(3, 4)(missing(read))}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := check(c.ops, 5*time.Second)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("check() = %v, want %q", err, c.want)
			}
		})
	}
}
