package serverapi_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	receiptv1 "github.com/plastron/plastron/api/plastron/receipt/v1"
	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// ack acknowledges where the last delta led to.
func (f *follower) ack() {
	f.t.Helper()
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{Position: f.at, Hash: f.hash()}}})
}

// receiptsOf makes a call and returns the receipts in its trailer.
func receiptsOf(t *testing.T, call func(...grpc.CallOption) error) []string {
	t.Helper()
	var trailer metadata.MD
	if err := call(grpc.Trailer(&trailer)); err != nil {
		t.Fatal(err)
	}
	return trailer.Get("plastron-receipt")
}

// createWith makes entries and returns their receipts.
func (r *rig) createWith(entries ...*spiretypes.Entry) []string {
	r.t.Helper()
	return receiptsOf(r.t, func(opts ...grpc.CallOption) error {
		resp, err := entryv1.NewEntryClient(r.admin).BatchCreateEntry(r.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries}, opts...)
		for _, one := range resp.GetResults() {
			if one.Status.Code != 0 {
				r.t.Fatalf("create: %v", one.Status)
			}
		}
		return err
	})
}

// verdict is a receipt in short: "1/3 a:BEHIND@s1".
func verdict(resp *receiptv1.WaitResponse) string {
	text := fmt.Sprintf("%d/%d", resp.InForce, resp.Affected)
	for _, l := range resp.Laggards {
		text += fmt.Sprintf(" %s:%s@%s", l.Agent, l.Reason, l.Server)
	}
	return text
}

// waitFor waits for receipts in the background.
func (r *rig) waitFor(receipts []string, within time.Duration) <-chan string {
	said := make(chan string, 1)
	go func() {
		resp, err := receiptv1.NewReceiptClient(r.admin).Wait(r.t.Context(), &receiptv1.WaitRequest{Receipts: receipts, WithinMs: within.Milliseconds()})
		if err != nil {
			said <- err.Error()
			return
		}
		said <- verdict(resp)
	}()
	return said
}

// lagging is the verdict that some agents lag.
func lagging(inForce string, agents ...string) string {
	slices.Sort(agents)
	return strings.Join(append([]string{inForce}, agents...), " ")
}

func (r *rig) wantReceipt(what string, said <-chan string, want string) {
	r.t.Helper()
	select {
	case got := <-said:
		if got != want {
			r.t.Errorf("%s: %s, want %s", what, got, want)
		}
	case <-time.After(deadline):
		r.t.Fatalf("%s: no answer", what)
	}
}

func TestReceipt(t *testing.T) {
	r := newRig(t)
	prompt, slow, away := r.agent(), r.agent(), r.agent()
	f, g := follow(t, r.connect(&prompt), nil), follow(t, r.connect(&slow), nil)
	f.sync()
	g.sync()
	before := f.at
	made := r.createWith(entryUnder(prompt.id, "/x"), entryUnder(slow.id, "/x"), entryUnder(away.id, "/x"))
	if len(made) != 1 {
		t.Fatalf("%d receipts of one transaction", len(made))
	}
	f.delta()
	g.delta()
	behind, absent := slow.id.String()+":REASON_BEHIND@s1", away.id.String()+":REASON_NOT_ATTACHED@"
	lagging := func(inForce int, agents ...string) string { return lagging(fmt.Sprintf("%d/3", inForce), agents...) }

	// What was said before the change came does not count.
	f.say(&syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{Position: before}}})
	r.wantReceipt("nobody yet", r.waitFor(made, 50*time.Millisecond), lagging(0, prompt.id.String()+":REASON_BEHIND@s1", behind, absent))
	f.ack()
	until(t, "one has it", func() bool {
		return <-r.waitFor(made, 0) == lagging(1, behind, absent)
	})

	// The slow one acknowledges and the absent one comes while somebody waits.
	waiting := r.waitFor(made, deadline)
	g.ack()
	late := follow(t, r.connect(&away), nil)
	late.sync()
	late.ack()
	r.wantReceipt("all", waiting, "3/3")
	r.wantReceipt("all, again", r.waitFor(append(made, made...), 0), "3/3")

	// An agent that joins meanwhile begins with the change: nobody waits for it.
	deleted := receiptsOf(t, func(opts ...grpc.CallOption) error {
		client := entryv1.NewEntryClient(r.admin)
		list, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: wireID(prompt.id.Path())}})
		if err != nil {
			return err
		}
		_, err = client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{list.Entries[0].Id}}, opts...)
		return err
	})
	newcomer := r.agent()
	follow(t, r.connect(&newcomer), nil).sync()
	f.delta()
	r.wantReceipt("not yet deleted", r.waitFor(deleted, 0), "0/1 "+prompt.id.String()+":REASON_BEHIND@s1")
	waiting = r.waitFor(deleted, deadline)
	f.ack()
	r.wantReceipt("deleted", waiting, "1/1")
}

func TestReceiptOfABan(t *testing.T) { // R30
	r := newRig(t)
	for name, act := range map[string]func(context.Context, *spiretypes.SPIFFEID, ...grpc.CallOption) error{
		"ban": func(ctx context.Context, id *spiretypes.SPIFFEID, opts ...grpc.CallOption) error {
			_, err := agentv1.NewAgentClient(r.admin).BanAgent(ctx, &agentv1.BanAgentRequest{Id: id}, opts...)
			return err
		},
		"evict": func(ctx context.Context, id *spiretypes.SPIFFEID, opts ...grpc.CallOption) error {
			_, err := agentv1.NewAgentClient(r.admin).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id}, opts...)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			attached, away := r.agent(), r.agent()
			f := follow(t, r.connect(&attached), nil)
			f.sync()
			var made []string
			for _, h := range []holder{attached, away} {
				made = append(made, receiptsOf(t, func(opts ...grpc.CallOption) error { return act(t.Context(), wireID(h.id.Path()), opts...) })...)
			}
			r.wantReceipt("both are out", r.waitFor(made, deadline), "2/2")
			wantCode(t, "the stream", f.end(), codes.PermissionDenied, "")
		})
	}
	// A change for an agent that is put out afterwards waits for it no longer.
	agent := r.agent()
	f := follow(t, r.connect(&agent), nil)
	f.sync()
	made := r.createWith(entryUnder(agent.id, "/x"))
	f.delta()
	waiting := r.waitFor(made, deadline)
	if _, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}); err != nil {
		t.Fatal(err)
	}
	r.wantReceipt("put out meanwhile", waiting, "1/1")
}

// Every call that changes something says what it changed, and no other does.
func TestWhatHasReceipts(t *testing.T) {
	r := newRig(t)
	entries, bundles := entryv1.NewEntryClient(r.admin), bundlev1.NewBundleClient(r.admin)
	agent := r.agent()
	partner, err := bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	partner.TrustDomain = "partner.test"
	many := func() (all []*spiretypes.Entry) {
		for i := range 401 {
			e := entryUnder(agent.id, fmt.Sprintf("/many/%d", i))
			e.Id = fmt.Sprint("many", i)
			all = append(all, e)
		}
		return all
	}()
	for _, c := range []struct {
		name string
		call func(...grpc.CallOption) error
		want int
	}{
		{"create", func(o ...grpc.CallOption) error {
			_, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: many}, o...)
			return err
		}, 3},
		{"create what is there", func(o ...grpc.CallOption) error {
			_, err := entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: many[:1]}, o...)
			return err
		}, 0},
		{"update", func(o ...grpc.CallOption) error {
			_, err := entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: many[:1]}, o...)
			return err
		}, 1},
		{"list", func(o ...grpc.CallOption) error {
			_, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}, o...)
			return err
		}, 0},
		{"delete", func(o ...grpc.CallOption) error {
			_, err := entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"many0"}}, o...)
			return err
		}, 1},
		{"set a bundle", func(o ...grpc.CallOption) error {
			_, err := bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*spiretypes.Bundle{partner}}, o...)
			return err
		}, 1},
		{"delete a bundle", func(o ...grpc.CallOption) error {
			_, err := bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"partner.test"}}, o...)
			return err
		}, 1},
		{"ban", func(o ...grpc.CallOption) error {
			_, err := agentv1.NewAgentClient(r.admin).BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(agent.id.Path())}, o...)
			return err
		}, 1},
		{"forget", func(o ...grpc.CallOption) error {
			_, err := agentv1.NewAgentClient(r.admin).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(agent.id.Path())}, o...)
			return err
		}, 1},
	} {
		got := receiptsOf(t, c.call)
		if len(got) != c.want {
			t.Errorf("%s: receipts %v, want %d", c.name, got, c.want)
		}
	}
	// Agents are told nothing of this.
	other := r.agent()
	if got := receiptsOf(t, func(o ...grpc.CallOption) error {
		_, err := agentv1.NewAgentClient(r.connect(&other)).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, newKey(t))}}, o...)
		return err
	}); len(got) != 0 {
		t.Errorf("an agent's renewal has receipts %v", got)
	}
}

func TestReceiptRefuses(t *testing.T) {
	r := newRig(t)
	client := receiptv1.NewReceiptClient(r.admin)
	for name, c := range map[string]struct {
		req    *receiptv1.WaitRequest
		code   codes.Code
		reason string
	}{
		"no receipt":       {&receiptv1.WaitRequest{Receipts: []string{"x"}}, codes.InvalidArgument, "receipt_invalid"},
		"another life":     {&receiptv1.WaitRequest{Receipts: []string{registry.Committed{Position: store.Position{Epoch: store.NewEpoch(), Revision: 1}}.String()}}, codes.FailedPrecondition, "receipt_unknown"},
		"negative":         {&receiptv1.WaitRequest{WithinMs: -1}, codes.InvalidArgument, "wait_invalid"},
		"too long":         {&receiptv1.WaitRequest{WithinMs: 1 << 62}, codes.InvalidArgument, "wait_invalid"},
		"too many of them": {&receiptv1.WaitRequest{Receipts: make([]string, 10_001)}, codes.InvalidArgument, "batch_too_large"},
	} {
		_, err := client.Wait(t.Context(), c.req)
		wantCode(t, name, err, c.code, c.reason)
	}
	resp, err := client.Wait(t.Context(), &receiptv1.WaitRequest{WithinMs: 60_000})
	if err != nil || verdict(resp) != "0/0" {
		t.Errorf("nothing to wait for: %v, %v", resp, err)
	}
	// A server that stops does not keep anybody waiting.
	away := r.agent()
	waiting := r.waitFor(r.createWith(entryUnder(away.id, "/x")), deadline)
	until(t, "somebody waits", func() bool { return r.api.Waiting() == 1 })
	r.stop()
	select {
	case said := <-waiting:
		if said == "" {
			t.Error("an answer, want a refusal")
		}
	case <-time.After(deadline):
		t.Error("still waiting")
	}
}
