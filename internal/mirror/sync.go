package mirror

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
)

// serverBehind is the reason to leave a server for one that has more.
const serverBehind = "server_behind"

// behindMost is how long a server that is behind is not followed.
const behindMost = time.Minute

// inventory is what the server says it has for us, as far as it has come.
type inventory struct {
	grants, bundles map[string]uint64 // fingerprints
	complete        bool
}

// hello opens the conversation with where we stand.
func (m *machine) hello(fx *effects) {
	m.hangUp()
	m.online = true
	m.signFailures, m.signNotYet = 0, time.Time{} // the server is back: sign now
	h := &syncv1.Hello{Version: protocolVersion, Capabilities: []string{capabilityRules}, AgentVersion: m.version, Position: m.position, BundleSequence: m.stats().BundleSequence}
	if m.synced {
		sum := m.sum.Bytes()
		h.Hash = sum[:]
	}
	fx.send = append(fx.send, &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: h}})
}

func (m *machine) receive(msg *syncv1.ServerMessage, ev event, dirty map[*group]bool, fx *effects) {
	if !m.online {
		return // a late message of a stream that was given up
	}
	m.ledger.hear(msg, ev.now)
	if m.behind(msg, ev.now) {
		m.giveUp(serverBehind, fx)
		return
	}
	switch msg := msg.GetMessage().(type) {
	case *syncv1.ServerMessage_Current:
		if !m.synced || !m.agrees(msg.Current.GetHash()) {
			m.giveUp("state_differs", fx)
			return
		}
		m.position = msg.Current.GetPosition()
		m.acknowledge(ev.now, fx)
	case *syncv1.ServerMessage_Inventory:
		m.takeInventory(msg.Inventory, fx)
	case *syncv1.ServerMessage_Delta:
		m.takeDelta(msg.Delta, ev, dirty, fx)
	case *syncv1.ServerMessage_Directive:
		fx.directives = append(fx.directives, msg.Directive)
	}
}

// behind reports whether the server stands before what was acknowledged to
// another: what was taken away since would come back. It is left for as long as a
// server may serve without its store (R77). One that still says so then was
// restored, and is right.
func (m *machine) behind(msg *syncv1.ServerMessage, now time.Time) bool {
	var at *syncv1.Position
	switch msg := msg.GetMessage().(type) {
	case *syncv1.ServerMessage_Current:
		at = msg.Current.GetPosition()
	case *syncv1.ServerMessage_Inventory:
		at = msg.Inventory.GetPosition()
	case *syncv1.ServerMessage_Delta:
		at = msg.Delta.GetPosition()
	default:
		return false
	}
	if !m.synced || string(at.GetEpoch()) != string(m.position.GetEpoch()) || at.GetRevision() >= m.position.GetRevision() {
		m.behindSince = time.Time{}
		return false
	}
	if m.behindSince.IsZero() || now.Before(m.behindSince) {
		m.behindSince = now
	}
	return now.Sub(m.behindSince) < behindMost
}

// giveUp asks for a new stream; the greeting then leads to an inventory. What
// is held stays in use meanwhile.
func (m *machine) giveUp(reason string, fx *effects) {
	m.hangUp()
	fx.resync = reason
	fx.notes = append(fx.notes, note{message: "sync starts over", reason: reason})
}

// hangUp forgets what belongs to one stream.
func (m *machine) hangUp() {
	m.online, m.following, m.inventory, m.parts, m.partsSize = false, false, nil, nil, 0
}

func (m *machine) agrees(hash []byte) bool {
	sum := m.sum.Bytes()
	return string(sum[:]) == string(hash)
}

func (m *machine) acknowledge(now time.Time, fx *effects) {
	if !m.following { // it may be another server, which knows nothing yet
		m.statusAt, m.toldAt, m.told = time.Time{}, time.Time{}, [2]end{}
	}
	m.following, m.ledger.acknowledged = true, now
	sum := m.sum.Bytes()
	fx.send = append(fx.send, &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Ack{Ack: &syncv1.Ack{
		Position: m.position, Hash: sum[:], BundleSequence: m.stats().BundleSequence}}})
}

// takeInventory collects the parts and answers the last with what differs.
func (m *machine) takeInventory(inv *syncv1.Inventory, fx *effects) {
	if m.inventory == nil || m.inventory.complete {
		m.inventory = &inventory{grants: map[string]uint64{}, bundles: map[string]uint64{}}
		m.parts, m.partsSize = nil, 0
	}
	for _, item := range inv.GetItems() {
		switch item.GetKind() {
		case syncv1.Item_KIND_GRANT:
			m.inventory.grants[item.GetId()] = item.GetFingerprint()
		case syncv1.Item_KIND_BUNDLE:
			m.inventory.bundles[item.GetId()] = item.GetFingerprint()
		}
	}
	if len(m.inventory.grants)+len(m.inventory.bundles) > maxItems {
		m.giveUp("inventory_too_large", fx)
		return
	}
	if inv.GetMore() {
		return
	}
	m.inventory.complete = true
	w := &syncv1.Want{}
	for _, id := range slices.Sorted(maps.Keys(m.inventory.grants)) {
		if g := m.grants[id]; g == nil || fingerprint(g.hash) != m.inventory.grants[id] {
			w.GrantIds = append(w.GrantIds, id)
		}
	}
	for _, td := range slices.Sorted(maps.Keys(m.inventory.bundles)) {
		if b := m.bundles[td]; b == nil || fingerprint(b.hash) != m.inventory.bundles[td] {
			w.TrustDomains = append(w.TrustDomains, td)
		}
	}
	fx.send = append(fx.send, &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Want{Want: w}})
}

// takeDelta collects the parts and applies the whole, or nothing.
func (m *machine) takeDelta(d *syncv1.Delta, ev event, dirty map[*group]bool, fx *effects) {
	closing := m.inventory != nil && m.inventory.complete
	if !closing && (m.inventory != nil || !samePosition(d.GetPrevious(), m.position)) {
		m.giveUp("gap", fx) // it does not lead from where we stand
		return
	}
	for _, b := range d.GetBodies() {
		m.partsSize += len(b)
	}
	if m.partsSize > maxPending {
		m.giveUp("delta_too_large", fx)
		return
	}
	m.parts = append(m.parts, d.GetBodies()...)
	if d.GetMore() {
		return
	}
	c := m.stage(m.parts, fx)
	if closing {
		m.stageUnlisted(c)
	}
	inv := m.inventory
	m.inventory, m.parts, m.partsSize = nil, nil, 0
	if sum := c.sum.Bytes(); string(sum[:]) != string(d.GetHash()) {
		m.giveUp("state_differs", fx)
		return
	}
	if had := len(m.grants); inv != nil && had >= 4 && c.gone*2 > had { // R60
		fx.notes = append(fx.notes, note{message: "more than half of all grants went away at once", count: c.gone})
	}
	m.position = d.GetPosition()
	m.commit(c, ev, dirty, fx)
	m.synced = true
	m.acknowledge(ev.now, fx)
}

func samePosition(a, b *syncv1.Position) bool {
	return a != nil && b != nil && string(a.GetEpoch()) == string(b.GetEpoch()) && a.GetRevision() == b.GetRevision()
}

// fingerprint is how an inventory names a body.
func fingerprint(hash [sha256.Size]byte) uint64 { return binary.BigEndian.Uint64(hash[:]) }
