package serverapi_test

import (
	"bytes"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	authorityv1 "github.com/plastron/plastron/api/plastron/authority/v1"
	bundlev1 "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/registry"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wants checks the code and the reason of a refusal.
func wants(t *testing.T, what string, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reasonOf(err) != reason {
		t.Errorf("%s: %v (%s), want %v %s", what, err, reasonOf(err), code, reason)
	}
}

func (r *rig) bundle() (b *bundle.Bundle) {
	r.t.Helper()
	var err error
	r.registry.View(func(s *registry.Snapshot) { b, err = s.Bundle(td) })
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// The whole life of an X.509 authority by SPIRE's calls (spire-interop §8.5), and
// what each refuses. R69
func TestLocalX509Authority(t *testing.T) {
	r := newRig(t)
	c, ctx := localauthorityv1.NewLocalAuthorityClient(r.admin), t.Context()
	show := func() *localauthorityv1.GetX509AuthorityStateResponse {
		t.Helper()
		s, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := show()
	if first.Active.GetAuthorityId() == "" || first.Active.ExpiresAt == 0 || first.Prepared != nil || first.Old != nil {
		t.Fatalf("at first: %v", first)
	}
	oldID := first.Active.AuthorityId

	dropped, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{}) // in its place
	if err != nil {
		t.Fatal(err)
	}
	newID := prepared.PreparedAuthority.AuthorityId
	if s := show(); s.Prepared.GetAuthorityId() != newID || s.Active.AuthorityId != oldID || newID == dropped.PreparedAuthority.AuthorityId {
		t.Errorf("after two calls of prepare: %v", s)
	}
	if n := len(r.bundle().X509); n != 2 {
		t.Errorf("the bundle holds %d authorities, want 2", n)
	}

	activate := func(id string) error {
		_, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return err
	}
	taint := func(id string) error {
		_, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
		return err
	}
	revoke := func(id string) error {
		_, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return err
	}
	for name, f := range map[string]func(string) error{"activate": activate, "taint": taint, "revoke": revoke} {
		wants(t, name+" nothing", f(""), codes.InvalidArgument, "authority_id_missing")
		wants(t, name+" the unknown", f(dropped.PreparedAuthority.AuthorityId), codes.InvalidArgument, "authority_unknown")
	}
	wants(t, "taint the active one", taint(oldID), codes.InvalidArgument, "authority_in_use")
	wants(t, "taint the prepared one", taint(newID), codes.InvalidArgument, "authority_in_use")
	wants(t, "revoke the active one", revoke(oldID), codes.InvalidArgument, "authority_in_use")

	if err := activate(newID); err != nil {
		t.Fatal(err)
	}
	if s := show(); s.Active.AuthorityId != newID || s.Old.GetAuthorityId() != oldID || s.Prepared != nil {
		t.Errorf("after activate: %v", s)
	}
	wants(t, "activate the old one", activate(oldID), codes.FailedPrecondition, "authority_not_prepared")
	wants(t, "revoke the untainted", revoke(oldID), codes.FailedPrecondition, "authority_not_tainted")
	for range 2 { // the second changes nothing
		if err := taint(oldID); err != nil {
			t.Fatal(err)
		}
	}
	if b := r.bundle(); !b.X509[0].Tainted || b.X509[1].Tainted {
		t.Errorf("after taint: %+v", b.X509)
	}
	root := r.bundle().X509[0].ASN1
	if err := revoke(oldID); err != nil {
		t.Fatal(err)
	}
	if s := show(); s.Active.AuthorityId != newID || s.Old != nil {
		t.Errorf("after revoke: %v", s)
	}
	if b := r.bundle(); len(b.X509) != 1 || bytes.Equal(b.X509[0].ASN1, root) {
		t.Errorf("after revoke: %+v", b.X509)
	}
	wants(t, "revoke again", revoke(oldID), codes.InvalidArgument, "authority_unknown")

	// It does not come back.
	_, err = bundlev1.NewBundleClient(r.admin).AppendBundle(ctx, &bundlev1.AppendBundleRequest{
		X509Authorities: []*spiretypes.X509Certificate{{Asn1: root}},
	})
	wants(t, "append the revoked", err, codes.FailedPrecondition, "authority_revoked")

	_, err = c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: newID})
	wants(t, "taint upstream", err, codes.FailedPrecondition, "upstream_not_configured")
	_, err = c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: newID})
	wants(t, "revoke upstream", err, codes.FailedPrecondition, "upstream_not_configured")
	_, err = c.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("PrepareWITAuthority() = %v", err)
	}
}

// The same for JWT keys, of which one may be revoked that is none of this server's.
func TestLocalJWTAuthority(t *testing.T) {
	r := newRig(t)
	c, ctx := localauthorityv1.NewLocalAuthorityClient(r.admin), t.Context()
	first, err := c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: prepared.PreparedAuthority.AuthorityId}); err != nil {
		t.Fatal(err)
	}
	old := first.Active.AuthorityId
	if _, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(r.bundle().JWT, func(a bundle.JWTAuthority) bool { return a.KeyID == old }); i < 0 || !r.bundle().JWT[i].Tainted {
		t.Errorf("after taint: %+v", r.bundle().JWT)
	}
	if _, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	if n := len(r.bundle().JWT); n != 1 {
		t.Errorf("after revoke %d keys", n)
	}
	foreign := &spiretypes.JWTKey{KeyId: "foreign", PublicKey: r.bundle().JWT[0].PublicKey}
	if _, err := bundlev1.NewBundleClient(r.admin).AppendBundle(ctx, &bundlev1.AppendBundleRequest{JwtAuthorities: []*spiretypes.JWTKey{foreign}}); err != nil {
		t.Fatal(err)
	}
	_, err = c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: "foreign"})
	wants(t, "revoke a foreign key", err, codes.FailedPrecondition, "authority_not_tainted")
	_, err = c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: "foreign"})
	wants(t, "taint a foreign key", err, codes.InvalidArgument, "authority_unknown")
}

func TestRotateAndStatus(t *testing.T) {
	r := newRig(t)
	c, ctx := authorityv1.NewAuthorityClient(r.admin), t.Context()
	before, err := c.Status(ctx, &authorityv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(before.Lines) != 2 || before.Lines[0].Kind != "jwt" || before.Lines[1].Kind != "x509" || !before.Lines[1].Answers || before.Lines[1].Server != "s1" {
		t.Fatalf("status: %v", before)
	}
	line := before.Lines[1]
	if len(line.Keys) != 1 || line.Keys[0].State != "active" || !line.Keys[0].Published || line.Next != "intend" || line.NextAt == 0 {
		t.Errorf("status: %v", line)
	}
	rotated, err := c.Rotate(ctx, &authorityv1.RotateRequest{Kind: "x509", Force: true})
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := r.authority.X509(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if id := rotated.Active.AuthorityId; id == line.Keys[0].AuthorityId || id != issuer.AuthorityID() {
		t.Errorf("rotated to %v, was %v, signs %v", id, line.Keys[0].AuthorityId, issuer.AuthorityID())
	}
	after, err := c.Status(ctx, &authorityv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if keys := after.Lines[1].Keys; len(keys) != 2 || keys[0].State != "old" || keys[0].RetiredAt == 0 || keys[1].ActivatedAt == 0 {
		t.Errorf("status after rotation: %v", keys)
	}
	_, err = c.Rotate(ctx, &authorityv1.RotateRequest{Kind: "wit"})
	wants(t, "rotate an unknown kind", err, codes.InvalidArgument, "authority_kind_invalid")
	_, err = c.Rotate(ctx, &authorityv1.RotateRequest{Kind: "x509", AuthorityId: hex.EncodeToString([]byte("x"))})
	wants(t, "rotate to an unknown key", err, codes.InvalidArgument, "authority_unknown")
	_, err = c.Rotate(ctx, &authorityv1.RotateRequest{Kind: "x509", WithinMs: 1 << 40})
	wants(t, "wait for ever", err, codes.InvalidArgument, "wait_invalid")
}
