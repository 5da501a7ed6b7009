package sds_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

// What docs/envoy.md lets Envoy do with secrets is what Envoy's own definitions
// know. (The rest of the file would take all of Envoy's definitions.)
func TestDocs(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "envoy.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, block, found := strings.Cut(string(text), "```yaml\n")
	block, _, ends := strings.Cut(block, "```")
	if !found || !ends {
		t.Fatal("no configuration there")
	}
	var tree any
	if err := yaml.Unmarshal([]byte(block), &tree); err != nil {
		t.Fatal(err)
	}
	var contexts []*tlsv3.CommonTlsContext
	var walk func(any)
	walk = func(node any) {
		switch node := node.(type) {
		case []any:
			for _, n := range node {
				walk(n)
			}
		case map[string]any:
			for _, n := range node {
				walk(n)
			}
			if kind, _ := node["@type"].(string); strings.HasSuffix(kind, "TlsContext") {
				contexts = append(contexts, tlsContext(t, node))
			}
		}
	}
	walk(tree)
	if len(contexts) != 2 {
		t.Fatalf("%d TLS contexts, want one in each direction", len(contexts))
	}
	for _, c := range contexts {
		svid, trust := c.GetTlsCertificateSdsSecretConfigs()[0], c.GetCombinedValidationContext().GetValidationContextSdsSecretConfig()
		if svid.GetName() != "spiffe://example.org/web" || trust.GetName() != "ROOTCA" ||
			len(c.GetCombinedValidationContext().GetDefaultValidationContext().GetMatchTypedSubjectAltNames()) != 1 {
			t.Errorf("not what the text says: %v", c)
		}
	}
}

func tlsContext(t *testing.T, node any) *tlsv3.CommonTlsContext {
	t.Helper()
	asJSON, err := json.Marshal(node)
	if err != nil {
		t.Fatal(err)
	}
	typed := new(anypb.Any)
	if err := protojson.Unmarshal(asJSON, typed); err != nil {
		t.Fatal(err)
	}
	m, err := typed.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	if v := m.(interface{ ValidateAll() error }); v.ValidateAll() != nil {
		t.Error(v.ValidateAll())
	}
	return m.(interface {
		GetCommonTlsContext() *tlsv3.CommonTlsContext
	}).GetCommonTlsContext()
}
