package store_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
)

// R84, R103: what cannot be stored byte for byte is refused before any work.
func TestValidate(t *testing.T) {
	long := strings.Repeat("k", store.MaxKey)
	many := make([]string, store.MaxTxnKeys)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	big := make([]store.Put, 9)
	for i := range big {
		big[i] = store.Put{Key: fmt.Sprint(i), Value: make([]byte, store.MaxValue)}
	}
	for _, tc := range []struct {
		name   string
		txn    store.Txn
		reason string // "" for valid
	}{
		{"empty", store.Txn{}, ""},
		{"longest key", store.Txn{Puts: []store.Put{{Key: long}}, Conditions: []store.Condition{{Key: long}}}, ""},
		{"largest value", store.Txn{Puts: []store.Put{{Key: "a", Value: make([]byte, store.MaxValue)}}}, ""},
		{"any bytes", store.Txn{Puts: []store.Put{{Key: "\x00"}, {Key: "\xff"}, {Key: " "}, {Key: "a"}, {Key: "A"}}}, ""},
		{"condition and put on one key", store.Txn{Conditions: []store.Condition{{Key: "a"}}, Puts: []store.Put{{Key: "a"}}}, ""},
		{"most keys", store.Txn{Deletes: many}, ""},
		{"largest", store.Txn{Puts: append([]store.Put{{Key: "7", Value: make([]byte, store.MaxValue-9)}}, big[:7]...)}, "key_twice"},
		{"empty key put", store.Txn{Puts: []store.Put{{}}}, "key_empty"},
		{"empty key deleted", store.Txn{Deletes: []string{""}}, "key_empty"},
		{"empty key read", store.Txn{Conditions: []store.Condition{{}}}, "key_empty"},
		{"key too long", store.Txn{Puts: []store.Put{{Key: long + "k"}}}, "key_too_long"},
		{"value too large", store.Txn{Puts: []store.Put{{Key: "a", Value: make([]byte, store.MaxValue+1)}}}, "value_too_large"},
		{"put twice", store.Txn{Puts: []store.Put{{Key: "a"}, {Key: "b"}, {Key: "a"}}}, "key_twice"},
		{"put and deleted", store.Txn{Puts: []store.Put{{Key: "a"}}, Deletes: []string{"a"}}, "key_twice"},
		{"deleted twice among many", store.Txn{Deletes: append([]string{"7"}, many[:100]...)}, "key_twice"},
		{"read twice", store.Txn{Conditions: []store.Condition{{Key: "a"}, {Key: "a", Revision: 1}}}, "key_twice"},
		{"too many keys", store.Txn{Deletes: many, Conditions: []store.Condition{{Key: "x"}}}, "too_many_keys"},
		{"too large", store.Txn{Puts: big}, "txn_too_large"},
		{"caller too long", store.Txn{Caller: strings.Repeat("c", store.MaxCaller+1)}, "caller_too_long"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.name == "largest" { // 8 puts that make exactly the limit
				tc.txn.Puts = tc.txn.Puts[:8]
				tc.txn.Puts[0].Value = make([]byte, store.MaxValue-8)
				tc.reason = ""
			}
			err := tc.txn.Validate()
			if tc.reason == "" {
				if err != nil {
					t.Fatalf("Validate() = %v, want nil", err)
				}
				return
			}
			if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != tc.reason {
				t.Fatalf("Validate() = %v (%s), want invalid, %s", err, fault.ReasonOf(err), tc.reason)
			}
		})
	}
}

func TestGroups(t *testing.T) {
	// "a" writes a, "?a" reads it, "-a" deletes it; a space joins keys of one transaction.
	parse := func(s string) store.Txn {
		txn := store.Txn{Caller: s}
		for _, f := range strings.Fields(s) {
			switch f[0] {
			case '?':
				txn.Conditions = append(txn.Conditions, store.Condition{Key: f[1:]})
			case '-':
				txn.Deletes = append(txn.Deletes, f[1:])
			default:
				txn.Puts = append(txn.Puts, store.Put{Key: f})
			}
		}
		return txn
	}
	for _, tc := range []struct {
		in   []string
		want [][]string
	}{
		{nil, nil},
		{[]string{"a"}, [][]string{{"a"}}},
		{[]string{"a", "b", "c"}, [][]string{{"a", "b", "c"}}},
		{[]string{"a", "a"}, [][]string{{"a"}, {"a"}}},
		{[]string{"a", "?a"}, [][]string{{"a"}, {"?a"}}},
		{[]string{"?a b", "a"}, [][]string{{"?a b"}, {"a"}}},
		{[]string{"?a b", "?a c"}, [][]string{{"?a b", "?a c"}}}, // both read a
		{[]string{"?a a", "?a"}, [][]string{{"?a a"}, {"?a"}}},
		{[]string{"a", "-a"}, [][]string{{"a"}, {"-a"}}},
		{[]string{"-a", "?a"}, [][]string{{"-a"}, {"?a"}}},
		{[]string{"a", "b", "a", "c"}, [][]string{{"a", "b"}, {"a", "c"}}},
		{[]string{"", "a", ""}, [][]string{{"", "a", ""}}},
	} {
		var txns []store.Txn
		for _, s := range tc.in {
			txns = append(txns, parse(s))
		}
		var got [][]string
		for _, g := range store.Groups(txns) {
			var names []string
			for i := range g {
				names = append(names, g[i].Caller)
			}
			got = append(got, names)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("Groups(%q): -want +got\n%s", tc.in, diff)
		}
	}
}

// TestGroupsProperty holds the definition against random lists.
func TestGroupsProperty(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 300 {
		txns := make([]store.Txn, r.IntN(400))
		keys := 1 + r.IntN(2000)
		for i := range txns {
			txn := &txns[i]
			txn.Caller = fmt.Sprint(i)
			for range r.IntN(3) {
				txn.Puts = append(txn.Puts, store.Put{Key: fmt.Sprint(r.IntN(keys)), Value: make([]byte, r.IntN(40000))})
				txn.Conditions = append(txn.Conditions, store.Condition{Key: fmt.Sprint(r.IntN(keys))})
			}
			if r.IntN(200) == 0 {
				txn.Puts = append(txn.Puts, store.Put{Key: "big", Value: make([]byte, store.MaxValue)}, store.Put{Key: "big2", Value: make([]byte, 10)})
			}
		}
		next := 0
		for n, g := range store.Groups(txns) {
			size := 0
			writers := map[string]int{} // key to the transaction that writes it
			for i := range g {
				if g[i].Caller != fmt.Sprint(next) {
					t.Fatalf("group %d has transaction %s where %d is due", n, g[i].Caller, next)
				}
				next++
				for _, p := range g[i].Puts {
					size += len(p.Key) + len(p.Value)
					if at, ok := writers[p.Key]; ok && at != i {
						t.Fatalf("group %d writes %q twice", n, p.Key)
					}
					writers[p.Key] = i
				}
				size += len(g[i].Caller)
			}
			for i := range g {
				for _, c := range g[i].Conditions {
					if at, ok := writers[c.Key]; ok && at != i {
						t.Fatalf("group %d reads and writes %q", n, c.Key)
					}
				}
			}
			if len(g) == 0 || len(g) > store.MaxGroup || len(g) > 1 && size > store.MaxGroupSize {
				t.Fatalf("group %d has %d transactions and %d bytes", n, len(g), size)
			}
		}
		if next != len(txns) {
			t.Fatalf("groups hold %d of %d transactions", next, len(txns))
		}
	}
}
