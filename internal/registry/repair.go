package registry

import (
	"context"
	"encoding/hex"
	"slices"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

// repairPart is how many rows one transaction mends.
const repairPart = 256

// RepairContents mends the defects that can be mended without a decision: the
// rows that keep contents unique follow from the entries and rules. Rows that are
// right by now stay as they are. It returns how many were written.
func (r *Registry) RepairContents(ctx context.Context, caller string, defects []Defect) (mended int, err error) {
	var hashes [][32]byte
	for _, d := range defects {
		if _, name := split(d.Key); d.Repair {
			if hash, ok := contentHash(name); ok {
				hashes = append(hashes, hash)
			}
		}
	}
	for part := range slices.Chunk(hashes, repairPart) {
		if _, err := r.Update(ctx, caller, func(tx *Tx) error {
			for _, hash := range part {
				tx.repairContent(hash)
			}
			return nil
		}); err != nil {
			return mended, err
		}
		mended += len(part)
	}
	return mended, nil
}

// repairContent lets the row of a content name the entry that has it, or removes
// the row. Both are read, so that a change of either meanwhile is not undone.
func (tx *Tx) repairContent(hash [32]byte) {
	key := keyOf(kindContent, hex.EncodeToString(hash[:]))
	tx.read(key)
	h := tx.s.rows.findContent(hash)
	if h == 0 {
		if tx.reads[key] != 0 {
			tx.write(key, write{deleted: true})
		}
		return
	}
	e := tx.s.rows.entry(h)
	tx.read(keyOf(kindOf(&e), e.ID))
	tx.write(key, write{value: &statev1.EntryContent{EntryId: e.ID}, entry: &e})
}
