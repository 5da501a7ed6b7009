package registry

import (
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/entry"
	"google.golang.org/protobuf/proto"
)

// grantBody is an entry or a rule as agents get it; the state hash is over these bytes.
func grantBody(e *entry.Entry) []byte {
	g := &syncv1.Grant{
		Id: e.ID, Revision: e.Revision, ParentId: e.ParentID.String(),
		FederatesWith: names(e.FederatesWith), X509SvidTtl: int32(e.X509TTL / time.Second), JwtSvidTtl: int32(e.JWTTL / time.Second),
		DnsNames: e.DNSNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream, StoreSvid: e.StoreSVID,
		DisableX509SvidPrefetch: e.DisableX509Prefetch, JwtSvidIncludeJti: e.JWTIncludeJTI,
		CreatedAt: unixOf(e.CreatedAt), ExpiresAt: unixOf(e.ExpiresAt),
	}
	if e.Rule == nil {
		g.SpiffeId = e.SPIFFEID.String()
	} else {
		g.IdTemplate, g.IdPrefix, g.Trust = e.Rule.Template.String(), e.Rule.Prefix, e.Rule.Trust()
	}
	for _, s := range e.Selectors {
		g.Selectors = append(g.Selectors, &syncv1.Selector{Type: s.Type, Value: s.Value})
	}
	return marshalBody(&syncv1.Body{Body: &syncv1.Body_Grant{Grant: g}})
}

func bundleBody(b *bundle.Bundle) []byte {
	m := &syncv1.Bundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, a := range b.X509 {
		m.X509Authorities = append(m.X509Authorities, &syncv1.X509Authority{Asn1: a.ASN1, Tainted: a.Tainted})
	}
	for _, a := range b.JWT {
		m.JwtAuthorities = append(m.JwtAuthorities, &syncv1.JWTAuthority{
			KeyId: a.KeyID, PublicKey: a.PublicKey, ExpiresAt: unixOf(a.ExpiresAt), Tainted: a.Tainted})
	}
	return marshalBody(&syncv1.Body{Body: &syncv1.Body_Bundle{Bundle: m}})
}

func removedBody(item Item) []byte {
	if item.Kind == ItemBundle {
		return marshalBody(&syncv1.Body{Body: &syncv1.Body_BundleRemoved{BundleRemoved: item.ID}})
	}
	return marshalBody(&syncv1.Body{Body: &syncv1.Body_GrantRemoved{GrantRemoved: item.ID}})
}

// marshalBody is deterministic, so that the same state has the same hash on
// every server of this version.
func marshalBody(b *syncv1.Body) []byte {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(b)
	if err != nil {
		panic("registry: marshal a body whose strings were checked: " + err.Error())
	}
	return raw
}
