package main

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
)

// changedEntry is a server whose one entry others change too: each of the first
// conflicts updates comes too late.
type changedEntry struct {
	entryv1.UnimplementedEntryServer
	conflicts int
	reads     int
	revision  int64
	got       *entryv1.BatchUpdateEntryRequest
}

func (s *changedEntry) GetEntry(context.Context, *entryv1.GetEntryRequest) (*spiretypes.Entry, error) {
	s.reads++
	return &spiretypes.Entry{Id: "a", RevisionNumber: s.revision,
		AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}}, nil
}

func (s *changedEntry) BatchUpdateEntry(_ context.Context, r *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	s.got = r
	st := &spiretypes.Status{}
	if s.conflicts > 0 {
		s.conflicts--
		s.revision++
		st = &spiretypes.Status{Code: int32(codes.Aborted), Message: "too late"}
	}
	return &entryv1.BatchUpdateEntryResponse{Results: []*entryv1.BatchUpdateEntryResponse_Result{{Status: st, Entry: &spiretypes.Entry{Id: "a"}}}}, nil
}

// TestUpdateMask: what is sent is what the flags say, and nothing else.
func TestUpdateMask(t *testing.T) {
	for _, tt := range []struct {
		flags string
		entry *spiretypes.Entry
		mask  *spiretypes.EntryMask
	}{
		{"-hint x", &spiretypes.Entry{Hint: "x"}, &spiretypes.EntryMask{Hint: true}},
		{"-hint= -entryExpiry 0", &spiretypes.Entry{}, &spiretypes.EntryMask{Hint: true, ExpiresAt: true}},
		{"-admin=false -downstream", &spiretypes.Entry{Downstream: true}, &spiretypes.EntryMask{Admin: true, Downstream: true}},
		{"-dns= -federatesWith=", &spiretypes.Entry{}, &spiretypes.EntryMask{DnsNames: true, FederatesWith: true}},
		{"-x509SVIDTTL 60 -jwtSVIDTTL 0 -storeSVID=false", &spiretypes.Entry{X509SvidTtl: 60}, &spiretypes.EntryMask{X509SvidTtl: true, JwtSvidTtl: true, StoreSvid: true}},
		{"-spiffeID spiffe://a.test/x -parentID spiffe://a.test/p -selector a:b", &spiretypes.Entry{
			SpiffeId: &spiretypes.SPIFFEID{TrustDomain: "a.test", Path: "/x"}, ParentId: &spiretypes.SPIFFEID{TrustDomain: "a.test", Path: "/p"},
			Selectors: []*spiretypes.Selector{{Type: "a", Value: "b"}},
		}, &spiretypes.EntryMask{SpiffeId: true, ParentId: true, Selectors: true}},
		{"-disableX509SVIDPrefetch=false -jwtSVIDIncludeJTI=false", &spiretypes.Entry{}, &spiretypes.EntryMask{AdditionalAttributes: true}},
		{"-disableX509SVIDPrefetch", &spiretypes.Entry{RevisionNumber: 7, AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true,
		}}, &spiretypes.EntryMask{AdditionalAttributes: true, RevisionNumber: true}},
		{"-jwtSVIDIncludeJTI=false -hint x", &spiretypes.Entry{RevisionNumber: 7, Hint: "x", AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{}},
			&spiretypes.EntryMask{AdditionalAttributes: true, RevisionNumber: true, Hint: true}},
	} {
		fake := &changedEntry{revision: 7}
		path := serve(t, func(s *grpc.Server) { entryv1.RegisterEntryServer(s, fake) })
		code, _, stderr := call(t, append([]string{"server", "entry", "update", "-socketPath", path, "-entryID", "a"}, strings.Fields(tt.flags)...)...)
		if code != exitOK || stderr != "" {
			t.Errorf("%s: exit %d, %s", tt.flags, code, stderr)
			continue
		}
		tt.entry.Id = "a"
		want := &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{tt.entry}, InputMask: tt.mask}
		if diff := cmp.Diff(want, fake.got, protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.flags, diff)
		}
	}
}

// E28: an attribute that was read is not written over what somebody else wrote since.
func TestUpdateConflict(t *testing.T) {
	for _, tt := range []struct{ conflicts, reads, code int }{{2, 3, exitOK}, {updateTries, updateTries, exitFailed}} {
		fake := &changedEntry{revision: 7, conflicts: tt.conflicts}
		path := serve(t, func(s *grpc.Server) { entryv1.RegisterEntryServer(s, fake) })
		code, _, stderr := call(t, "server", "entry", "update", "-socketPath", path, "-entryID", "a", "-disableX509SVIDPrefetch")
		if code != tt.code || fake.reads != tt.reads || fake.got.GetEntries()[0].GetRevisionNumber() != int64(6+tt.reads) {
			t.Errorf("%d conflicts: exit %d after %d reads, sent %v; %s", tt.conflicts, code, fake.reads, fake.got, stderr)
		}
		if failed := strings.Contains(stderr, `Failed to update entry with ID a (code: Aborted, msg: "too late")`); failed != (tt.code == exitFailed) {
			t.Errorf("%d conflicts: %s", tt.conflicts, stderr)
		}
	}
}
