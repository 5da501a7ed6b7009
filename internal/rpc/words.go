package rpc

import (
	"time"

	whyv1 "github.com/plastron/plastron/api/plastron/why/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
)

// Unix is a time on the wire: 0 if there is none.
func Unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// Reason is why somebody gets no identity, or nil.
func Reason(r *fault.Error) *whyv1.Reason {
	if r == nil {
		return nil
	}
	return &whyv1.Reason{Code: r.Reason, Message: r.Message, Fix: r.Remedy}
}

// Selector is a selector on the wire.
func Selector(s entry.Selector) *whyv1.Selector {
	return &whyv1.Selector{Type: s.Type, Value: s.Value}
}

// Selectors are selectors on the wire.
func Selectors(in []entry.Selector) (out []*whyv1.Selector) {
	for _, s := range in {
		out = append(out, Selector(s))
	}
	return out
}
