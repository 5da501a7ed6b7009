package serverapi_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/serverapi"
)

func TestGate(t *testing.T) { // R17, R100
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	g := serverapi.NewGate(1, 3, 100)
	in := func(caller string, at time.Time) error {
		leave, err := g.Enter(caller, at)
		if err == nil {
			leave()
		}
		return err
	}
	for range 3 {
		if err := in("a", now); err != nil {
			t.Fatal(err)
		}
	}
	if err := in("a", now); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("the fourth: %v, want exhausted", err)
	}
	if err := in("b", now); err != nil {
		t.Errorf("another caller: %v", err)
	}
	if err := in("a", now.Add(time.Second)); err != nil {
		t.Errorf("a second later: %v", err)
	}
	if err := in("a", now.Add(time.Second)); err == nil {
		t.Error("one a second means one")
	}
}

func TestGateWidth(t *testing.T) { // R17: bounded, and refused rather than waiting
	g := serverapi.NewGate(0, 0, 2)
	now := time.Now()
	first, err := g.Enter("a", now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Enter("b", now); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Enter("c", now); fault.KindOf(err) != fault.Exhausted {
		t.Errorf("a third at once: %v, want exhausted", err)
	}
	first()
	if _, err := g.Enter("c", now); err != nil {
		t.Errorf("after one left: %v", err)
	}
}

func TestGateTableIsBounded(t *testing.T) { // R98, R106
	g := serverapi.NewGate(1, 2, 1)
	now := time.Now()
	for i := range serverapi.MaxBuckets + 1000 {
		if leave, err := g.Enter(fmt.Sprint(i), now); err == nil {
			leave()
		}
	}
	if n := g.Buckets(); n > serverapi.MaxBuckets {
		t.Errorf("%d buckets, the limit is %d", n, serverapi.MaxBuckets)
	}
	// Who fills up again makes room.
	if leave, err := g.Enter("late", now.Add(time.Minute)); err != nil {
		t.Error(err)
	} else {
		leave()
	}
	if n := g.Buckets(); n != 1 {
		t.Errorf("%d buckets after a quiet minute, want 1", n)
	}
}

func TestAddressKey(t *testing.T) { // R100
	for address, want := range map[string]string{
		"192.0.2.7:1234":              "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:1":    "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::1]:9999": "2001:db8:1:2::/64",
		"[::ffff:192.0.2.7]:1":        "192.0.2.7",
		"[fe80::1%eth0]:1":            "fe80::/64",
		"local":                       "local",
	} {
		if got := serverapi.AddressKey(address); got != want {
			t.Errorf("AddressKey(%q) = %q, want %q", address, got, want)
		}
	}
}
