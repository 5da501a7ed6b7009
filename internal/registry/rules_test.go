package registry

import (
	"slices"
	"testing"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// A rule is stored beside the entries, is unique by its content, shares no id
// with an entry, and is nowhere among the entries.
func TestRules(t *testing.T) {
	st := openStore(t, t.TempDir())
	r := start(t, st)
	one := rule(t, "r1", "/spire/agent/a", "spiffe://td/u/{a.b}", "u:1")
	update(t, r, func(tx *Tx) error {
		if err := tx.PutNode(agent("a", "n:1")); err != nil {
			return err
		}
		return tx.PutRule(one)
	})
	update(t, r, func(tx *Tx) error { return tx.PutEntry(grant("e1", "/spire/agent/a", "/w", "u:1")) })
	refused := func(kind fault.Kind, reason string, f func(*Tx) error) {
		t.Helper()
		_, err := r.Update(t.Context(), "test", f)
		isFault(t, err, kind, reason)
	}
	twin := one
	twin.ID = "r2"
	refused(fault.Exists, "rule_exists", func(tx *Tx) error { return tx.PutRule(twin) })
	refused(fault.Exists, "rule_id_taken", func(tx *Tx) error { return tx.PutRule(rule(t, "e1", "/spire/agent/a", "spiffe://td/v/{a.b}", "u:1")) })
	refused(fault.Exists, "entry_id_taken", func(tx *Tx) error { return tx.PutEntry(grant("r1", "/spire/agent/a", "/v", "u:1")) })
	refused(fault.Invalid, "entry_is_rule", func(tx *Tx) error { return tx.PutEntry(twin) })
	refused(fault.Invalid, "rule_is_entry", func(tx *Tx) error { return tx.PutRule(grant("x", "/spire/agent/a", "/v", "u:1")) })
	refused(fault.NotFound, "rule_not_found", func(tx *Tx) error { return tx.DeleteRule("e1") })
	refused(fault.NotFound, "entry_not_found", func(tx *Tx) error { return tx.DeleteEntry("r1") })

	check := func(r *Registry) {
		t.Helper()
		r.View(func(v *Snapshot) {
			got, err := v.Rule("r1")
			if err != nil || got.Rule.Template.String() != "spiffe://td/u/{a.b}" || got.Rule.Prefix != "spiffe://td/u/" || !got.Rule.TrustAgent ||
				!got.SPIFFEID.IsZero() || got.Revision == 0 || entry.ContentHash(&got) != entry.ContentHash(&one) {
				t.Errorf("Rule() = %+v, %v", got, err)
			}
			parent, selectors := one.ParentID, &SelectorFilter{Match: MatchExact, Selectors: one.Selectors}
			for _, f := range []Filter{{}, {ParentID: &parent}, {Selectors: selectors}} {
				if list := v.List(f, "", 0); len(list) != 1 || list[0].ID != "e1" || v.Count(f) != 1 {
					t.Errorf("the filter %+v lets through %v, %d", f, list, v.Count(f))
				}
			}
			_, err = v.Entry("r1")
			isFault(t, err, fault.NotFound, "entry_not_found")
			if _, ok := v.AuthorizedEntry(id("/spire/agent/a"), "r1"); ok {
				t.Error("the rule is authorized as an entry")
			}
			if n := len(slices.Collect(v.Authorized(id("/spire/agent/a")))); n != 1 || v.EntryCount() != 1 || v.RuleCount() != 1 {
				t.Errorf("%d authorized entries, %d entries, %d rules", n, v.EntryCount(), v.RuleCount())
			}
			if n := len(slices.Collect(v.AuthorizedGrants(id("/spire/agent/a")))); n != 2 {
				t.Errorf("%d authorized entries and rules", n)
			}
			if n := len(slices.Collect(v.Entries(""))); n != 1 {
				t.Errorf("%d entries", n)
			}
			if rules := slices.Collect(v.Rules("")); len(rules) != 1 || rules[0].ID != "r1" {
				t.Errorf("rules %v", rules)
			}
			if n, first := v.Agents(parent, 10); n != 1 || len(first) != 1 || first[0] != parent {
				t.Errorf("reach %d, %v", n, first)
			}
			if n, first := v.Agents(id("/w"), 0); n != 1 || len(first) != 0 {
				t.Errorf("reach through an entry %d, %v", n, first)
			}
			if n, _ := v.Agents(id("/nowhere"), 10); n != 0 {
				t.Errorf("reach of nothing %d", n)
			}
		})
	}
	check(r)
	check(start(t, st)) // loaded afresh

	// A change keeps the content key, a deletion frees it.
	update(t, r, func(tx *Tx) error {
		same, err := tx.EntryByContent(entry.ContentHash(&one))
		if err != nil || same.ID != "r1" || same.Rule == nil {
			t.Errorf("EntryByContent() = %+v, %v", same, err)
		}
		same.Hint = "h"
		return tx.PutRule(same)
	})
	update(t, r, func(tx *Tx) error {
		if err := tx.DeleteRule("r1"); err != nil {
			return err
		}
		if err := tx.PutRule(twin); err != nil {
			return err
		}
		same, err := tx.EntryByContent(entry.ContentHash(&one))
		if err != nil || same.ID != "r2" {
			t.Errorf("after it moved: %+v, %v", same, err)
		}
		return nil
	})
	update(t, r, func(tx *Tx) error { return tx.PutEntry(grant("r1", "/spire/agent/a", "/v", "u:1")) })
}

// A stored rule is checked like any other row, and harms no other (R79).
func TestBrokenRules(t *testing.T) {
	st := openStore(t, t.TempDir())
	good := rule(t, "good", "/spire/agent/a", "spiffe://td/u/{a.b}", "u:1")
	wide := ruleMessage(&good)
	wide.Id, wide.IdTemplate, wide.IdPrefix = "wide", "spiffe://td/{a.b}", "spiffe://td/"
	untrusted := ruleMessage(&good)
	untrusted.Id, untrusted.Trust = "untrusted", ""
	other := ruleMessage(&good)
	other.Id = "other"
	for name, m := range map[string]*statev1.Rule{"good": ruleMessage(&good), "wide": wide, "untrusted": untrusted, "renamed": other} {
		commitRaw(t, st, store.Put{Key: "/rule/" + name, Value: sealed(t, m)})
	}
	r := start(t, st)
	r.View(func(v *Snapshot) {
		var bad []string
		for key := range v.Unreadable() {
			bad = append(bad, key)
		}
		if !slices.Equal(bad, []string{"/rule/renamed", "/rule/untrusted", "/rule/wide"}) || v.RuleCount() != 1 {
			t.Errorf("unreadable %v, %d rules", bad, v.RuleCount())
		}
	})
	_, err := r.Update(t.Context(), "test", func(tx *Tx) error { return tx.PutRule(rule(t, "wide", "/spire/agent/a", "spiffe://td/v/{a.b}", "u:1")) })
	isFault(t, err, fault.Precondition, "row_unreadable")
	update(t, r, func(tx *Tx) error { return tx.DeleteRule("wide") })
}
