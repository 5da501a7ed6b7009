package sds

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/mirror"
	"github.com/plastron/plastron/internal/rpc"
	"google.golang.org/grpc/status"
)

// typeURL names what is served here.
const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// plainKey is the key of a node's metadata that says which form of validation
// contexts it wants, over the configuration.
const plainKey = "disable_spiffe_cert_validation"

// Limits on what a stream may ask for; it is kept for as long as the stream is open.
const (
	maxNames     = 256
	maxNamesSize = 32 << 10 // bytes in all of them
	maxText      = 512      // bytes kept of what a client says for people to read
)

// errNothing says that there is nothing at all for this caller. The socket says why.
var errNothing = errors.New("nothing to hand out")

// stream is one conversation as the protocol has it: what the client asks for,
// what it was sent last, and whether it took it.
type stream struct {
	cfg   *Config
	ended bool // clients.mu guards it

	mu      sync.Mutex // guards everything below
	begun   bool       // the first request was heard
	node    string     // the client's name for itself
	known   bool       // a node was named
	plain   bool
	names   []string // sorted; none: everything
	due     bool     // the names have changed since the last answer
	nonce   string   // of the last answer; empty: there was none
	version string
}

func newStream(cfg *Config) *stream { return &stream{cfg: cfg, plain: cfg.Plain} }

// heard is what a request says besides its names.
type heard struct {
	renamed  bool
	accepted bool
	rejected string // why the client does not take the last answer; empty: it does
}

// hear takes a request. One that answers to anything but the last answer is
// ignored: the client has not read that yet, and will answer to it.
func (s *stream) hear(req *discoveryv3.DiscoveryRequest) (heard, error) {
	if t := req.GetTypeUrl(); t != "" && t != typeURL {
		return heard{}, fault.New(fault.Invalid, "resource_type_unknown", "only secrets are served here, in version 3 of Envoy's API").
			Fix("set resource_api_version and transport_api_version to V3")
	}
	names, err := checkNames(req.GetResourceNames())
	if err != nil {
		return heard{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.begun && req.GetResponseNonce() != s.nonce {
		return heard{}, nil
	}
	if node := req.GetNode(); node != nil && !s.known {
		s.known, s.node, s.plain = true, cut(node.GetId()), wantsPlain(node, s.cfg.Plain)
	}
	h := heard{renamed: !s.begun || !slices.Equal(names, s.names)}
	if s.begun && s.nonce != "" {
		if e := req.GetErrorDetail(); e != nil {
			h.rejected = cut(e.GetMessage())
			if h.rejected == "" {
				h.rejected = "no reason was given"
			}
		} else {
			h.accepted = true
		}
	}
	if s.begun = true; h.renamed {
		s.names, s.due = names, true
	}
	return h, nil
}

// checkNames returns names sorted, without empty ones and without duplicates.
func checkNames(in []string) ([]string, error) {
	size := 0
	for _, name := range in {
		size += len(name)
	}
	if len(in) > maxNames || size > maxNamesSize {
		return nil, fault.New(fault.Invalid, "too_many_names", "more than %d resource names, or more than %d bytes of them", maxNames, maxNamesSize).
			Fix("ask for no name to be given everything, or open further streams")
	}
	names := slices.DeleteFunc(slices.Clone(in), func(name string) bool { return name == "" })
	slices.Sort(names)
	return slices.Compact(names), nil
}

// wantsPlain reports whether a node wants validation contexts without Envoy's
// validator for SPIFFE, which came with Envoy 1.18.
func wantsPlain(node *corev3.Node, configured bool) bool {
	if v := node.GetUserAgentBuildVersion().GetVersion(); v != nil && (v.GetMajorNumber() < 1 || v.GetMajorNumber() == 1 && v.GetMinorNumber() < 18) {
		return true
	}
	said := node.GetMetadata().GetFields()[plainKey]
	if b, err := strconv.ParseBool(said.GetStringValue()); err == nil {
		return b
	}
	if _, ok := said.AsInterface().(bool); ok {
		return said.GetBoolValue()
	}
	return configured
}

// wantsSVID reports whether an SVID is asked for.
func (s *stream) wantsSVID() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.names) == 0 || slices.ContainsFunc(s.names, func(name string) bool { return !s.cfg.Names.isBundle(name) })
}

// answer returns what to send for a view, and which names stand for nothing. nil:
// the client has it already.
func (s *stream) answer(v mirror.View) (*discoveryv3.DiscoveryResponse, []missing, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	bundles := []mirror.Bundle{v.Bundle}
	if len(v.Matched) > 0 {
		bundles = append(bundles, v.Federated...)
	} else if !s.cfg.AllowUnauthenticatedVerifiers {
		return nil, nil, errNothing
	}
	found, lost := resolve(s.names, s.cfg.Names, v, bundles, s.plain)
	if len(found) == 0 && len(v.Matched) == 0 {
		return nil, nil, errNothing
	}
	version := version(found, lost, s.plain)
	if !s.due && version == s.version {
		return nil, lost, nil
	}
	resp := &discoveryv3.DiscoveryResponse{VersionInfo: version, TypeUrl: typeURL, Nonce: newNonce()}
	for _, f := range found {
		r, err := f.resource(s.plain)
		if err != nil {
			return nil, nil, err
		}
		resp.Resources = append(resp.Resources, r)
	}
	for _, l := range lost {
		resp.ResourceErrors = append(resp.ResourceErrors, &discoveryv3.ResourceError{
			ResourceName: &discoveryv3.ResourceName{Name: l.name},
			ErrorDetail:  status.Convert(rpc.Status(l.why, rpc.Code(l.why))).Proto(),
		})
	}
	s.due, s.version, s.nonce = false, version, resp.GetNonce()
	return resp, lost, nil
}

func newNonce() string {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// cut returns what is kept of a client's words, and nothing behind it.
func cut(text string) string {
	if len(text) > maxText {
		return strings.Clone(strings.ToValidUTF8(text[:maxText], ""))
	}
	return text
}

// sent returns the version of the last answer.
func (s *stream) sent() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.version
}

// asked returns the client's name for itself, and the first names that it asks for.
func (s *stream) asked() (node string, names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range s.names[:min(len(s.names), maxList)] {
		names = append(names, cut(name))
	}
	return s.node, names
}
