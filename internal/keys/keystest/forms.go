package keystest

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
)

// forms returns the ways in which a secret might appear in text. Eight bytes
// out of the middle are enough to tell.
func forms(raw, der []byte) [][]byte {
	part := raw[8:16]
	list := fmt.Sprint(part)
	return [][]byte{
		part,
		[]byte(hex.EncodeToString(part)),
		[]byte(strings.ToUpper(hex.EncodeToString(part))),
		[]byte(strings.Trim(list, "[]")),
		[]byte(strings.Trim(strings.ReplaceAll(list, " ", ", "), "[]")),
		[]byte(base64.StdEncoding.EncodeToString(raw)[:16]),
		[]byte(base64.StdEncoding.EncodeToString(der)),
		[]byte(base64.RawURLEncoding.EncodeToString(raw)),
	}
}

func secretNumber(raw []byte) *big.Int { return new(big.Int).SetBytes(raw) }
