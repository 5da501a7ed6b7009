package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/reason"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// report prints an error as a person wants it: what happened and why, then what
// to do. Causes that are meant for logs are left out.
func (p *program) report(err error) {
	for _, one := range flatten(err) {
		text, remedy := fault.Words(one)
		fmt.Fprintf(p.stderr, "Error: %s\n", text)
		if remedy != "" {
			fmt.Fprintf(p.stderr, "  Fix: %s\n", remedy)
		}
	}
}

// flatten takes joined errors apart.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, one := range joined.Unwrap() {
		all = append(all, flatten(one)...)
	}
	return all
}

// withCauses puts the causes of faults into their sentences. It is for programs
// and commands that open a store themselves: no log tells why they end, and their
// operator may know all of it.
func withCauses(err error) error {
	var all []error
	for _, one := range flatten(err) {
		f, ok := errors.AsType[*fault.Error](one)
		if !ok {
			all = append(all, one)
			continue
		}
		text, remedy := fault.Words(one)
		cause := f.Err
		for {
			inner, ok := errors.AsType[*fault.Error](cause)
			if !ok || !strings.Contains(text, inner.Message) {
				break
			}
			cause = inner.Err // it is said already
		}
		if cause == nil || strings.Contains(text, cause.Error()) {
			all = append(all, one)
			continue
		}
		line := strings.Join(strings.Fields(cause.Error()), " ") // some are of several lines
		all = append(all, fault.New(f.Kind, f.Reason, "%s: %s", text, line).Fix("%s", remedy))
	}
	return errors.Join(all...)
}

// about names the flag or key that an error is about.
func about(name string, err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		named := *f
		named.Message = name + ": " + f.Message
		return &named
	}
	return fmt.Errorf("%s: %w", name, err)
}

// peer is the other end of a call, for errors.
type peer struct {
	name   string // "the server at /tmp/…"
	path   string
	absent string // what to do when nobody answers
	denied string // what to do when the caller is refused; may be empty
}

// fault turns the outcome of a call into words. A status that the other end
// chose keeps the other end's sentence; what the library made up is replaced.
func (at peer) fault(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return fault.New(fault.Unavailable, "interrupted", "interrupted")
	}
	s, ok := status.FromError(err)
	if !ok {
		if errors.Is(err, context.DeadlineExceeded) {
			return at.silent()
		}
		return fault.New(fault.Unavailable, "call_failed", "%s: %v", at.name, err)
	}
	chosen := len(s.Details()) > 0 // our server and agent say why in details; the library does not
	text, fix := s.Message(), ""
	if row := rowOf(s); row != nil {
		text, _ = strings.CutSuffix(text, "; "+row.Remedy)
		fix = row.Remedy
	}
	switch s.Code() {
	case codes.Unavailable:
		if !chosen {
			return fault.New(fault.Unavailable, "unavailable", "%s went away during the call", at.name).Fix("%s", at.absent)
		}
		return fault.New(fault.Unavailable, "unavailable", "%s cannot do this now: %s", at.name, text).Fix("%s", fix)
	case codes.DeadlineExceeded:
		return at.silent()
	case codes.Canceled:
		return fault.New(fault.Unavailable, "interrupted", "interrupted")
	case codes.Unimplemented:
		return fault.New(fault.Unsupported, "unsupported", "%s does not offer this: %s", at.name, s.Message())
	case codes.PermissionDenied, codes.Unauthenticated:
		return fault.New(fault.Denied, "denied", "%s refused: %s", at.name, text).Fix("%s", cmp.Or(fix, at.denied))
	case codes.Internal, codes.Unknown:
		return fault.New(fault.Internal, "internal", "%s failed: %s", at.name, s.Message())
	}
	return fault.New(fault.Invalid, "refused", "%s", text).Fix("%s", fix)
}

// rowOf returns the row of the table of reasons that a status names, or nil.
func rowOf(s *status.Status) *fault.Error {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return reason.Find(info.GetReason())
		}
	}
	return nil
}

func (at peer) silent() error {
	return fault.New(fault.Unavailable, "timeout", "%s did not answer in time", at.name).
		Fix("try again, or wait longer with -timeout if the command has it")
}
