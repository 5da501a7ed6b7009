package main

import (
	"io"
	"os"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
)

// entryFile is the JSON of entry create and entry update -data. Its keys are those of SPIRE's
// registration files.
type entryFile struct {
	Entries []fileEntry `hcl:"entries,required"`
}

type fileEntry struct {
	EntryID       string         `hcl:"entry_id"`
	SPIFFEID      string         `hcl:"spiffe_id,required"`
	ParentID      string         `hcl:"parent_id,required"`
	Selectors     []fileSelector `hcl:"selectors,required"`
	X509TTL       int32          `hcl:"x509_svid_ttl"`
	JWTTTL        int32          `hcl:"jwt_svid_ttl"`
	FederatesWith []string       `hcl:"federates_with"`
	Admin         bool           `hcl:"admin"`
	Downstream    bool           `hcl:"downstream"`
	Expiry        int64          `hcl:"entryExpiry"`
	DNSNames      []string       `hcl:"dns_names"`
	StoreSVID     bool           `hcl:"store_svid"`
	Hint          string         `hcl:"hint"`
	Revision      int64          `hcl:"revision_number"` // SPIRE writes it; it has no meaning here
	CreatedAt     int64          `hcl:"created_at"`      // likewise
	Attributes    config.Node    `hcl:"additional_attributes"`
}

type fileAttributes struct {
	NoPrefetch bool `hcl:"disable_x509_svid_prefetch"`
	WithJTI    bool `hcl:"jwt_svid_include_jti"`
}

type fileSelector struct {
	Type  string `hcl:"type,required"`
	Value string `hcl:"value,required"`
}

// readEntries reads the file of entry create and entry update -data.
func readEntries(path string, stdin io.Reader) ([]*spiretypes.Entry, error) {
	var file entryFile
	if err := readInput(path, stdin, &file); err != nil {
		return nil, err
	}
	var entries []*spiretypes.Entry
	for _, e := range file.Entries {
		id, err := wireID("spiffe_id", e.SPIFFEID)
		if err != nil {
			return nil, err
		}
		parent, err := wireID("parent_id", e.ParentID)
		if err != nil {
			return nil, err
		}
		federates, err := trustDomains(e.FederatesWith)
		if err != nil {
			return nil, err
		}
		entry := &spiretypes.Entry{
			Id: e.EntryID, SpiffeId: id, ParentId: parent, X509SvidTtl: e.X509TTL, JwtSvidTtl: e.JWTTTL, FederatesWith: federates,
			Admin: e.Admin, Downstream: e.Downstream, ExpiresAt: e.Expiry, DnsNames: e.DNSNames, StoreSvid: e.StoreSVID, Hint: e.Hint,
		}
		if e.Attributes.Present() {
			var a fileAttributes
			if err := e.Attributes.Decode(&a); err != nil {
				return nil, err
			}
			entry.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: a.NoPrefetch, JwtSvidIncludeJti: a.WithJTI}
		}
		for _, s := range e.Selectors {
			entry.Selectors = append(entry.Selectors, &spiretypes.Selector{Type: s.Type, Value: s.Value})
		}
		entries = append(entries, entry)
	}
	return entries, nil
}

// readIDs reads the file of entry delete -file. SPIRE's own examples write the
// key as Ids.
func readIDs(path string, stdin io.Reader) ([]string, error) {
	var file struct {
		IDs      []string `hcl:"ids"`
		SPIREIDs []string `hcl:"Ids"`
	}
	if err := readInput(path, stdin, &file); err != nil {
		return nil, err
	}
	ids := append(file.IDs, file.SPIREIDs...)
	if len(ids) == 0 {
		return nil, fault.New(fault.Invalid, "usage", "%s lists no entries", path).Fix(`write {"ids": ["ENTRY-ID"]}`)
	}
	return ids, nil
}

// readInput decodes a file, or the standard input for "-", strictly.
func readInput(path string, stdin io.Reader, dst any) error {
	if path != "-" {
		return config.Load(path, dst)
	}
	src, err := readSmall("", stdin, config.MaxSize)
	if err != nil {
		return err
	}
	return config.Decode("standard input", src, dst)
}

// readSmall reads a file, or the standard input without one, of which no more
// than a limit of bytes is of use: one byte more shows that there is more.
func readSmall(path string, stdin io.Reader, limit int64) ([]byte, error) {
	what := "the standard input"
	if path != "" {
		file, err := os.Open(path)
		if err != nil {
			return nil, fault.New(fault.Invalid, "file_unreadable", "the file cannot be read: %v", err).Fix("check its path and its mode")
		}
		defer file.Close()
		stdin, what = file, path
	}
	src, err := io.ReadAll(io.LimitReader(stdin, limit+1))
	if err != nil {
		return nil, fault.New(fault.Invalid, "file_unreadable", "%s cannot be read: %v", what, err)
	}
	return src, nil
}
