package sds

import (
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"hash"
	"slices"
	"strings"

	"github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/reason"
	"google.golang.org/protobuf/types/known/anypb"
)

// Names are the resource names that stand for something without saying what.
type Names struct {
	SVID       string // the first identity
	Bundle     string // the own trust domain's bundle
	AllBundles string // that, and those of all trust domains that the caller's grants name
}

// Names that are SPIRE's, and Istio's.
const (
	DefaultSVIDName       = "default"
	DefaultBundleName     = "ROOTCA"
	DefaultAllBundlesName = "ALL"
)

// Check says whether the names can be told apart.
func (n Names) Check() error {
	all := []string{n.SVID, n.Bundle, n.AllBundles}
	slices.Sort(all)
	switch {
	case all[0] == "":
		return fault.New(fault.Invalid, "name_invalid", "a default name is empty").Fix(`"null" is a name that nobody asks for`)
	case len(slices.Compact(all)) < 3:
		return fault.New(fault.Invalid, "name_invalid", "two of the default names are equal").Fix(`"null" is a name that nobody asks for`)
	case slices.ContainsFunc(all, func(name string) bool { return strings.HasPrefix(name, "spiffe://") }):
		return fault.New(fault.Invalid, "name_invalid", "a default name looks like a SPIFFE ID")
	}
	return nil
}

// validator is the name of Envoy's validator for SPIFFE.
const validator = "envoy.tls.cert_validator.spiffe"

// Why a name stands for nothing. The first is the one answer for what is
// another's or nobody's (R12).
var (
	errUnknown = fault.New(fault.Invalid, "secret_unknown", "the name is none of this process's identities, and no bundle that it may have").
			Fix("give the process an identity of this name, or ask for one that it has; 'plastron agent why PID' lists them")
	errPlain = fault.New(fault.Invalid, "validator_needed", "the bundles of several trust domains cannot be told apart without Envoy's validator for SPIFFE").
			Fix("ask for one trust domain's, or take disable_spiffe_cert_validation away")
)

// secret is what one name stands for: an SVID, or the bundles of some trust domains.
type secret struct {
	name    string
	svid    *mirror.Identity
	bundles []mirror.Bundle
}

// missing is a name that stands for nothing.
type missing struct {
	name string
	why  *fault.Error
}

// resolve says what names stand for, in their order; without names, everything
// that there is. Bundles are those that the caller may have, the own first.
func resolve(names []string, as Names, v mirror.View, bundles []mirror.Bundle, plain bool) (found []secret, lost []missing) {
	if len(names) == 0 {
		return everything(v, bundles), nil
	}
	for _, name := range names {
		if s, why := find(name, as, v, bundles, plain); why == nil {
			found = append(found, s)
		} else {
			lost = append(lost, missing{name, why})
		}
	}
	return found, lost
}

func everything(v mirror.View, bundles []mirror.Bundle) (found []secret) {
	for _, b := range bundles {
		if len(b.X509) > 0 {
			found = append(found, secret{name: b.TrustDomain.IDString(), bundles: []mirror.Bundle{b}})
		}
	}
	seen := map[string]bool{}
	for i := range v.Identities {
		if name := v.Identities[i].ID.String(); !seen[name] { // two grants may give one identity
			seen[name] = true
			found = append(found, secret{name: name, svid: &v.Identities[i]})
		}
	}
	return found
}

func find(name string, as Names, v mirror.View, bundles []mirror.Bundle, plain bool) (secret, *fault.Error) {
	if as.isBundle(name) {
		given, why := as.bundles(name, v, bundles, plain)
		return secret{name: name, bundles: given}, why
	}
	is := func(i mirror.Identity) bool { return i.ID.String() == name }
	switch {
	case name == as.SVID:
		is = func(mirror.Identity) bool { return true } // the first
	case !strings.HasPrefix(name, "spiffe://"):
		is = func(i mirror.Identity) bool { return i.Hint == name }
	}
	if i := slices.IndexFunc(v.Identities, is); i >= 0 {
		return secret{name: name, svid: &v.Identities[i]}, nil
	}
	if slices.ContainsFunc(v.Matched, func(m entry.Matched) bool { return name == as.SVID || m.ID.String() == name }) {
		return secret{}, reason.NotSignedYet
	}
	return secret{}, errUnknown
}

// isBundle reports whether a name stands for bundles and not for an SVID.
func (n Names) isBundle(name string) bool {
	td, ok := strings.CutPrefix(name, "spiffe://")
	return name == n.Bundle || name == n.AllBundles || ok && !strings.Contains(td, "/")
}

func (n Names) bundles(name string, v mirror.View, bundles []mirror.Bundle, plain bool) (given []mirror.Bundle, why *fault.Error) {
	for i, b := range bundles {
		if len(b.X509) > 0 && (name == n.AllBundles || name == n.Bundle && i == 0 || name == b.TrustDomain.IDString()) {
			given = append(given, b)
		}
	}
	switch {
	case name == n.AllBundles && plain:
		return nil, errPlain
	case len(given) > 0:
		return given, nil
	}
	for _, td := range v.Unknown {
		if td.IDString() == name {
			return nil, reason.FederatedBundleMissing
		}
	}
	return nil, errUnknown
}

// version tells contents apart, by what is public in them.
func version(found []secret, lost []missing, plain bool) string {
	h := sha256.New()
	put(h, []byte{bit(plain)})
	for _, s := range found {
		put(h, []byte(s.name))
		if s.svid != nil {
			put(h, s.svid.Chain)
			continue
		}
		put(h, nil) // no chain is empty
		for _, b := range s.bundles {
			put(h, []byte(b.TrustDomain.Name()))
			put(h, b.X509)
		}
		put(h, nil)
	}
	put(h, nil)
	for _, m := range lost {
		put(h, []byte(m.name))
		put(h, []byte(m.why.Reason))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func put(h hash.Hash, b []byte) {
	h.Write(binary.AppendUvarint(nil, uint64(len(b))))
	h.Write(b)
}

func bit(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// resource is a secret on the wire.
func (s *secret) resource(plain bool) (*anypb.Any, error) {
	out := &tlsv3.Secret{Name: s.name}
	if s.svid != nil {
		out.Type = &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(certificates(s.svid.Chain)),
			PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.svid.Key})),
		}}
		return anypb.New(out)
	}
	context := &tlsv3.CertificateValidationContext{}
	if plain {
		context.TrustedCa = inline(certificates(s.bundles[0].X509))
	} else {
		cfg := &tlsv3.SPIFFECertValidatorConfig{}
		for _, b := range s.bundles {
			cfg.TrustDomains = append(cfg.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
				Name: b.TrustDomain.Name(), TrustBundle: inline(certificates(b.X509)),
			})
		}
		typed, err := anypb.New(cfg)
		if err != nil {
			return nil, err
		}
		context.CustomValidatorConfig = &corev3.TypedExtensionConfig{Name: validator, TypedConfig: typed}
	}
	out.Type = &tlsv3.Secret_ValidationContext{ValidationContext: context}
	return anypb.New(out)
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// certificates are DER certificates, one after the other, in PEM.
func certificates(der []byte) (text []byte) {
	for len(der) > 0 {
		var one asn1.RawValue
		rest, err := asn1.Unmarshal(der, &one)
		if err != nil {
			return text // the mirror keeps none that does not parse
		}
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: one.FullBytes})...)
		der = rest
	}
	return text
}
