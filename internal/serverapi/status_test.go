package serverapi_test

import (
	"strings"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
)

func TestServerStatus(t *testing.T) {
	sick := fault.New(fault.Unavailable, "sick", "it is not well").Because(fault.New(fault.Internal, "secret", "hidden"))
	var health, broken error
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) {
		c.Health = func() error { return health }
		whole := c.About.CheckStore
		c.About.CheckStore = func() error {
			if broken != nil {
				return broken
			}
			return whole()
		}
	})
	client := statusv1.NewServerClient(r.admin)
	status := func(check bool) *statusv1.ServerStatus {
		t.Helper()
		got, err := client.Status(t.Context(), &statusv1.ServerStatusRequest{CheckStore: check})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	fresh := status(true)
	if fresh.Id != "s1" || fresh.Version != "test" || fresh.TrustDomain != td.Name() || fresh.Entries != 0 || fresh.Agents != 0 ||
		fresh.Store.Bytes == 0 || !fresh.Store.Checked || fresh.Store.Fault != nil || fresh.Unhealthy != nil ||
		len(fresh.Position.Epoch) != 32 || len(fresh.Digest) != 64 || fresh.Bundle.Sequence == 0 || fresh.Bundle.ExpiresAt == 0 ||
		fresh.CertificateExpiresAt == 0 || fresh.Bundles != 1 {
		t.Errorf("fresh: %v", fresh)
	}
	states := map[string]string{}
	for _, a := range fresh.Authorities {
		states[a.Kind] = a.State
		if a.ExpiresAt <= time.Now().Unix() || a.AuthorityId == "" {
			t.Errorf("authority %v", a)
		}
	}
	if states["x509"] != "active" || states["jwt"] != "active" {
		t.Errorf("authorities %v", states)
	}

	// One agent is in step and its clock goes wrong, one has not acknowledged anything.
	good, lagging := r.agent(), r.agent()
	r.token()
	r.create(entryUnder(good.id, "/one"), entryUnder(good.id, "/two"))
	f := follow(t, r.connect(&good), nil)
	d := f.sync()
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{Position: d.Position, Hash: d.Hash, BundleSequence: fresh.Bundle.Sequence}}})
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Status{Status: &syncv1.Status{Clock: time.Now().Add(-time.Hour).UnixMilli()}}})
	follow(t, r.connect(&lagging), nil).sync()
	until(t, "both are told of", func() bool {
		a := status(false).Attached
		return a.Agents == 2 && a.Clocks == 1 && len(a.Laggards) == 1
	})
	got := status(false)
	if got.Entries != 2 || got.Agents != 2 || got.JoinTokens != 1 || got.Position.Revision <= fresh.Position.Revision || got.Digest == fresh.Digest || got.Store.Checked {
		t.Errorf("%v", got)
	}
	if a := got.Attached; a.Laggards[0] != lagging.id.String() || a.ClockAgent != good.id.String() || a.ClockAheadMs > -3590_000 || a.ClockAheadMs < -3610_000 {
		t.Errorf("%v", a)
	}

	health, broken = sick, fault.New(fault.Precondition, "store_corrupt", "it is damaged")
	if got := status(true); got.Unhealthy.GetReason() != "sick" || strings.Contains(got.Unhealthy.GetMessage(), "hidden") || got.Store.Fault.GetReason() != "store_corrupt" {
		t.Errorf("%v, %v", got.Unhealthy, got.Store)
	}
	list, err := client.List(t.Context(), &statusv1.ListRequest{})
	if err != nil || len(list.Servers) != 1 || list.Servers[0].Id != "s1" {
		t.Errorf("List() = %v, %v", list, err)
	}
}
