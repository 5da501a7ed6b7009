package registry

import (
	"encoding/hex"
	"fmt"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// storedRow is one row of the store as it was read: what can be known of it without
// the rest of the state. It is most of the work, and a load shares it out.
type storedRow struct {
	key      string
	kind     kind
	name     string
	revision uint64
	keyHash  [32]byte
	err      error // why it cannot be read; then nothing below counts

	payload []byte
	entry   entry.Entry // or a rule
	unknown []byte      // fields of the entry that a newer version wrote
	content [32]byte    // of an entry, or that a content key names
	body    [32]byte    // hash of what agents get, of an entry or a bundle
	node    Node
}

func readStored(td spiffeid.TrustDomain, key string, rev uint64, val []byte) storedRow {
	r := storedRow{key: key, revision: rev, keyHash: keyHash(key, rev)}
	r.kind, r.name = split(key)
	if r.payload, r.err = unseal(val); r.err == nil {
		r.err = r.read(td)
	}
	return r
}

func (r *storedRow) read(td spiffeid.TrustDomain) (err error) {
	switch r.kind {
	case kindEntry:
		if r.entry, r.unknown, err = readEntry(td, r.name, r.payload); err != nil {
			return err
		}
		r.readGrant()
	case kindRule:
		if r.entry, r.unknown, err = readRule(td, r.name, r.payload); err != nil {
			return err
		}
		r.readGrant()
	case kindContent:
		var ok bool
		if r.content, ok = contentHash(r.name); !ok {
			return fmt.Errorf("the key is not a content hash")
		}
	case kindNode:
		r.node, err = readNode(td, store.Epoch{}, r.name, r.payload)
	case kindBundle:
		b, err := readBundle(r.name, r.payload)
		if err != nil {
			return err
		}
		r.body = sumOf(bundleBody(b))
	case kindToken:
		var hash []byte
		if hash, err = hex.DecodeString(r.name); err == nil {
			_, err = readToken(hash, r.payload)
		}
	case kindAuthority:
		_, err = readAuthority(r.name, r.payload)
	case kindDownstream:
		_, err = readDownstream(r.name, r.payload)
	case kindExpulsion:
		_, err = readExpulsion(r.name, r.payload)
	case kindCopy:
		_, err = readCopy(r.payload)
	case kindRoster:
		_, err = readRoster(r.payload)
	case kindFormat:
		_, _, err = readFormat(r.payload)
	case kindServer, kindTrustDomain:
		_, err = readServer(td, r.payload)
	}
	return err
}

func (r *storedRow) readGrant() {
	r.entry.Revision = r.revision
	r.content, r.body = entry.ContentHash(&r.entry), sumOf(grantBody(&r.entry))
}
