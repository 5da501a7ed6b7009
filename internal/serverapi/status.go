package serverapi

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/store"
)

// About is what a server says of itself besides what it holds.
type About struct {
	ServerID, Version, DataDir, SocketPath string
	StoreKind                              string
	StoreDir, StoreAddress                 string        // where it is: here, or elsewhere
	StoreSize                              func() int64  // nil: it cannot tell
	StoreHealth                            func() error  // nil: its last write went well
	CheckStore                             func() error  // reads all of it; nil: it cannot
	Commits                                func() uint64 // transactions that this server has written
	Started                                time.Time
}

// statuses is plastron.status.v1.Server.
type statuses struct {
	statusv1.UnsafeServerServer
	server *Server
}

// Status says how this server is doing.
func (a statuses) Status(_ context.Context, req *statusv1.ServerStatusRequest) (*statusv1.ServerStatus, error) {
	out := a.server.status(req.GetCheckStore(), time.Now())
	if a.server.cfg.Lacking != nil {
		for _, err := range a.server.cfg.Lacking() {
			out.Degraded = append(out.Degraded, writeFault(err))
		}
	}
	return out, nil
}

func (s *Server) status(checkStore bool, now time.Time) *statusv1.ServerStatus {
	about := s.cfg.About
	out := &statusv1.ServerStatus{
		Id: about.ServerID, Version: about.Version, TrustDomain: s.cfg.TrustDomain.Name(),
		StartedAt: about.Started.Unix(), ClockMs: now.UnixMilli(), Addresses: s.cfg.Addresses,
		Store:   &statusv1.Store{Kind: about.StoreKind, Dir: about.StoreDir, Address: about.StoreAddress},
		DataDir: about.DataDir, SocketPath: about.SocketPath,
		Unhealthy: writeFault(s.cfg.Health()),
	}
	if about.StoreSize != nil {
		out.Store.Bytes = uint64(about.StoreSize())
	}
	if own, err := s.cfg.Certificate(); err == nil {
		if leaf, err := x509.ParseCertificate(own.Certificate[0]); err == nil {
			out.CertificateIssuedAt, out.CertificateExpiresAt = leaf.NotBefore.Unix(), leaf.NotAfter.Unix()
		}
	}
	sequence := s.describe(out, now)
	out.Attached = s.attached(sequence, now)
	err := about.StoreHealth()
	if err == nil && checkStore && about.CheckStore != nil {
		err = about.CheckStore()
		out.Store.Checked = fault.ReasonOf(err) != "check_under_way"
	}
	out.Store.Fault = writeFault(err)
	return out
}

// describe fills in what the registry holds and returns the bundle's sequence number.
func (s *Server) describe(out *statusv1.ServerStatus, now time.Time) (sequence uint64) {
	s.cfg.Registry.View(func(snap *registry.Snapshot) {
		digest := snap.Digest()
		out.Position, out.Digest = statusPosition(snap.Position()), hex.EncodeToString(digest[:])
		out.Entries, out.Rules = uint64(snap.EntryCount()), uint64(snap.RuleCount())
		out.Agents = uint64(snap.NodeCount())
		for b := range snap.Bundles() {
			out.Bundles++
			if b.TrustDomain == s.cfg.TrustDomain {
				sequence = b.Sequence
				out.Bundle = describeBundle(b)
			}
		}
		for t := range snap.Tokens() {
			if len(t.Consumer) == 0 && now.Before(t.ExpiresAt) && t.Epoch == snap.Position().Epoch { // R21
				out.JoinTokens++
			}
		}
		for range snap.Unreadable() {
			out.Unreadable++
		}
		out.Authorities = describeAuthorities(snap, s.cfg.About.ServerID)
	})
	return sequence
}

func describeBundle(b *bundle.Bundle) *statusv1.Bundle {
	out := &statusv1.Bundle{Sequence: b.Sequence, X509Authorities: uint32(len(b.X509)), JwtAuthorities: uint32(len(b.JWT))}
	for _, a := range b.X509 {
		if a.Tainted {
			out.Tainted++
		}
	}
	for _, root := range b.Roots() {
		out.ExpiresAt = max(out.ExpiresAt, root.NotAfter.Unix())
	}
	for _, a := range b.JWT {
		if a.Tainted {
			out.Tainted++
		}
	}
	return out
}

func describeAuthorities(snap *registry.Snapshot, server string) (out []*statusv1.Authority) {
	for _, a := range snap.Authorities(server) {
		for _, slot := range a.Slots {
			out = append(out, describeSlot(a.Kind, slot))
		}
	}
	return out
}

func describeSlot(kind string, slot registry.Slot) *statusv1.Authority {
	states := map[registry.SlotState]string{
		registry.SlotIntended: "intended", registry.SlotPrepared: "prepared", registry.SlotActive: "active", registry.SlotOld: "old",
	}
	return &statusv1.Authority{
		Kind: kind, Slot: slot.Name, State: states[slot.State], AuthorityId: slot.AuthorityID,
		NotBefore: rpc.Unix(slot.NotBefore), ExpiresAt: rpc.Unix(slot.NotAfter),
	}
}

// attached says which agents follow here, how far they are and what their clocks say.
func (s *Server) attached(sequence uint64, now time.Time) *statusv1.Attached {
	_, laggards := s.Acknowledged(sequence)
	out := &statusv1.Attached{}
	for _, id := range slices.Compact(laggards) {
		out.Laggards = append(out.Laggards, id.String())
	}
	var furthest time.Duration
	s.followers.mu.Lock()
	defer s.followers.mu.Unlock()
	out.Agents = uint32(len(s.followers.byAgent))
	for id, rows := range s.followers.byAgent {
		row := rows[len(rows)-1] // the one that it uses
		if !row.clockKnown {
			continue
		}
		out.Clocks++
		if out.ClockAgent == "" || row.ahead.Abs() > furthest || row.ahead.Abs() == furthest && strings.Compare(id.String(), out.ClockAgent) < 0 {
			furthest = row.ahead.Abs()
			out.ClockAgent, out.ClockAheadMs = id.String(), row.ahead.Milliseconds()
		}
	}
	return out
}

func statusPosition(p store.Position) *statusv1.Position {
	return &statusv1.Position{Epoch: hex.EncodeToString(p.Epoch[:]), Revision: p.Revision}
}

func writeFault(err error) *statusv1.Fault {
	if err == nil {
		return nil
	}
	return &statusv1.Fault{Reason: fault.ReasonOf(err), Message: rpc.Text(err)}
}
