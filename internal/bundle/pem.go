package bundle

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"

	"github.com/plastron/plastron/internal/fault"
)

// ParsePEM reads a file of authorities' certificates. Anything else in it (a
// private key, a leaf, text between blocks) is an error with its line: such a
// file is not what the operator believes it is (B38, B39).
func ParsePEM(data []byte) ([][]byte, error) {
	if len(data) > MaxDocument {
		return nil, fault.New(fault.Invalid, "bundle_invalid", "the PEM bundle is larger than 1 MiB")
	}
	line := 1
	refuse := func(what string) ([][]byte, error) {
		return nil, fault.New(fault.Invalid, "bundle_invalid", "line %d of the PEM bundle: %s", line, what).
			Fix("the file may hold CERTIFICATE blocks of authorities only")
	}
	var found [][]byte
	for rest := data; ; {
		trimmed := bytes.TrimLeft(rest, " \t\r\n")
		line += bytes.Count(rest[:len(rest)-len(trimmed)], []byte("\n"))
		if len(trimmed) == 0 {
			break
		}
		// pem.Decode skips what it cannot read, so each block must begin right here.
		if !bytes.HasPrefix(trimmed, []byte("-----BEGIN ")) {
			return refuse("text outside a block")
		}
		block, after := pem.Decode(trimmed)
		if block == nil || bytes.Count(trimmed[:len(trimmed)-len(after)], []byte("-----BEGIN ")) != 1 {
			return refuse("a block that cannot be read")
		}
		if block.Type != "CERTIFICATE" || len(block.Headers) != 0 {
			return refuse("a block that is not a plain CERTIFICATE")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return refuse("a certificate that cannot be read")
		}
		if fault := CheckRoot(c); fault != "" {
			return refuse("a certificate is refused: " + fault)
		}
		if len(found) == MaxKeys {
			return refuse("too many certificates")
		}
		found = append(found, block.Bytes)
		line += bytes.Count(trimmed[:len(trimmed)-len(after)], []byte("\n"))
		rest = after
	}
	if len(found) == 0 {
		return nil, fault.New(fault.Invalid, "bundle_empty", "the PEM bundle holds no certificate").
			Fix("write the server's bundle to it: plastron server bundle show")
	}
	return found, nil
}

// MarshalPEM writes the X.509 authorities as PEM.
func (b *Bundle) MarshalPEM() []byte {
	var out []byte
	for _, a := range b.X509 {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.ASN1})...)
	}
	return out
}
