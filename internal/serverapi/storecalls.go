package serverapi

import (
	"context"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	storev1 "github.com/plastron/plastron/api/plastron/store/v1"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/upkeep"
)

// maxDefects is how many are named in one answer.
const maxDefects = 10_000

// storeCalls is plastron.store.v1.Store.
type storeCalls struct {
	storev1.UnsafeStoreServer
	server *Server
}

// Check proves the store.
func (a storeCalls) Check(ctx context.Context, req *storev1.CheckRequest) (*storev1.CheckReply, error) {
	repairer := ""
	if req.Repair {
		repairer = callerFrom(ctx).name()
	}
	r, err := a.server.cfg.Upkeep.Check(ctx, repairer)
	if err != nil {
		return nil, err
	}
	return CheckReply(r), nil
}

// CheckReply is a report on the wire. It is what a check without a server prints, too.
func CheckReply(r *upkeep.Report) *storev1.CheckReply {
	named := r.Defects[:min(len(r.Defects), maxDefects)]
	return &storev1.CheckReply{
		Position: storePosition(r.At), Engine: r.Engine, Rows: r.Rows, Batches: r.Batches, Records: r.Records,
		Defects: wireDefects(named), More: uint64(len(r.Defects) - len(named)), Faults: uint64(r.Faults()),
		Repaired: wireDefects(r.Repaired[:min(len(r.Repaired), maxDefects)]),
	}
}

func wireDefects(defects []registry.Defect) (out []*storev1.Defect) {
	for _, d := range defects {
		out = append(out, &storev1.Defect{Code: d.Code, Key: printable(d.Key), Found: printable(d.Found), Fix: d.Fix, Remark: d.Remark, Repairable: d.Repair})
	}
	return out
}

// Stats measures the store.
func (a storeCalls) Stats(ctx context.Context, _ *storev1.StatsRequest) (*storev1.StoreStats, error) {
	s, err := a.server.cfg.Upkeep.Stats(ctx)
	if err != nil {
		return nil, err
	}
	out := StoreStats(s)
	out.Commits, out.StartedAt = a.server.cfg.About.Commits(), a.server.cfg.About.Started.Unix()
	return out, nil
}

// StoreStats is a measurement on the wire, and as it is printed without a server.
func StoreStats(s upkeep.Stats) *storev1.StoreStats {
	out := &storev1.StoreStats{
		Engine: s.Engine, Bytes: uint64(s.Bytes), Begin: storePosition(s.Begin), End: storePosition(s.End),
		Batches: s.Batches, Oldest: rpc.Unix(s.Oldest),
	}
	for _, name := range slices.Sorted(maps.Keys(s.Kinds)) {
		out.Kinds = append(out.Kinds, &storev1.Kind{Name: name, Rows: s.Kinds[name].Rows, Bytes: s.Kinds[name].Bytes})
	}
	return out
}

// Compact drops what of the log is old.
func (a storeCalls) Compact(ctx context.Context, req *storev1.CompactRequest) (*storev1.CompactReply, error) {
	if req.AgeSeconds < 0 || req.AgeSeconds > int64(maxLogAge/time.Second) {
		return nil, fault.New(fault.Invalid, "age_invalid", "the age must be between 0 and %s", maxLogAge)
	}
	at, err := a.server.cfg.Upkeep.Compact(ctx, req.Keep, time.Duration(req.AgeSeconds)*time.Second)
	if err != nil {
		return nil, err
	}
	return &storev1.CompactReply{Begin: storePosition(at)}, nil
}

// printable shows a row's key as it is, or quoted: keys are any bytes.
func printable(s string) string {
	if strings.ContainsFunc(strings.ToValidUTF8(s, "\x00"), func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

const maxLogAge = 10 * 365 * 24 * time.Hour

func storePosition(p store.Position) *storev1.Position {
	return &storev1.Position{Epoch: hex.EncodeToString(p.Epoch[:]), Revision: p.Revision}
}
