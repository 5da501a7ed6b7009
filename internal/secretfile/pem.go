package secretfile

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"
)

// ParseKey returns the first private key in PEM, RSA or ECDSA and not encrypted.
// Errors never quote the text.
func ParseKey(text []byte) (crypto.Signer, error) {
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("it holds no private key in PEM")
		}
		var key any
		var err error
		switch {
		case block.Type == "EC PARAMETERS": // openssl writes them before the key
			continue
		case block.Type == "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case block.Type == "RSA PRIVATE KEY" && block.Headers["DEK-Info"] == "":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case block.Type == "EC PRIVATE KEY" && block.Headers["DEK-Info"] == "":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			return nil, errors.New("the private key is encrypted, which is not offered")
		default:
			return nil, errors.New("it holds something else than a private key")
		}
		if err != nil {
			return nil, errors.New("the private key cannot be read")
		}
		switch key := key.(type) {
		case *rsa.PrivateKey:
			return key, nil
		case *ecdsa.PrivateKey:
			return key, nil
		}
		return nil, errors.New("the private key is neither RSA nor ECDSA")
	}
}
