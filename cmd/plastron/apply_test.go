package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// halfway is a server on which somebody changes something after the first group.
type halfway struct {
	applyv1.UnimplementedApplyServer
	calls []string
}

func (h *halfway) List(context.Context, *applyv1.ListRequest) (*applyv1.ListResponse, error) {
	return &applyv1.ListResponse{}, nil
}

func (h *halfway) Apply(_ context.Context, req *applyv1.ApplyRequest) (*applyv1.ApplyResponse, error) {
	h.calls = append(h.calls, fmt.Sprintf("%v:%d", req.DryRun, len(req.Items)))
	if len(h.calls) == 4 {
		return nil, status.Error(codes.Aborted, "item 1 is not as it was planned")
	}
	reply := &applyv1.ApplyResponse{}
	for range req.Items {
		reply.Outcomes = append(reply.Outcomes, &applyv1.Outcome{Action: applyv1.Outcome_ACTION_CREATE})
	}
	return reply, nil
}

func TestApplyStopsHalfway(t *testing.T) {
	h := &halfway{}
	path := serve(t, func(s *grpc.Server) { applyv1.RegisterApplyServer(s, h) })
	var file strings.Builder
	file.WriteString("entries:\n")
	for i := range 600 {
		fmt.Fprintf(&file, "- {spiffe_id: spiffe://td/%d, parent_id: spiffe://td/p, selectors: [a:b]}\n", i)
	}
	var stdout, stderr bytes.Buffer
	status := run(t.Context(), []string{"plastron", "server", "apply", "-f", "-", "-owner", "o", "-output", "json", "-socketPath", path},
		strings.NewReader(file.String()), &stdout, &stderr)
	if status != exitFailed || !strings.Contains(stderr.String(), "500 of 600 changes are made: item 1 is not as it was planned") {
		t.Errorf("status %d, errors %s", status, stderr.String())
	}
	var doc applyDocument
	if err := json.Unmarshal(stdout.Bytes(), &doc); err != nil || doc.Done != 500 || doc.Create != 600 {
		t.Errorf("%v, done %d of %d", err, doc.Done, doc.Create)
	}
	if got := fmt.Sprint(h.calls); got != "[true:500 true:100 false:500 false:100]" {
		t.Errorf("calls %s", got)
	}
}
