package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/plastron/plastron/internal/store"
)

// kind is what a key holds; a key is its kind's prefix and a name.
type kind int

const (
	kindOther kind = iota // written by a version that knows more
	kindEntry
	kindRule
	kindContent
	kindNode
	kindToken
	kindBundle
	kindAuthority
	kindServer
	kindRoster
	kindDownstream
	kindExpulsion
	kindCopy
	kindTrustDomain
	kindFormat
	kinds
)

func prefixOf(k kind) string {
	return [kinds]string{"", "/entry/", "/rule/", "/entry-content/", "/node/", "/token/", "/bundle/", "/authority/", "/server/", "/roster/", "/downstream/", "/expelled/", "/copy/", "/trust-domain", "/format"}[k]
}

// split returns the kind of a key and the name after its prefix.
func split(key string) (kind, string) {
	for k := kindEntry; k < kinds; k++ {
		if name, ok := strings.CutPrefix(key, prefixOf(k)); ok && (name != "") == (k < kindTrustDomain) {
			return k, name
		}
	}
	return kindOther, key
}

func keyOf(k kind, name string) string { return prefixOf(k) + name }

// nodeName is the name of a node's key: its path without the first slash, or,
// for a path that is too long for a key, a slash and a hash of it. No path
// without its first slash begins with another.
func nodeName(path string) string {
	if len(prefixOf(kindNode))+len(path) <= store.MaxKey {
		return path[1:]
	}
	h := sha256.Sum256([]byte(path))
	return "/" + hex.EncodeToString(h[:])
}

func authorityName(server, what string) string { return server + "/" + what }
