package x509pop

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/secretfile"
)

// maxFile bounds the agent's files, in bytes.
const maxFile = 256 << 10

// AgentConfig is the agent's half.
type AgentConfig struct {
	// PrivateKeyPath and CertificatePath are the node's key and certificate in PEM;
	// intermediates may follow in the same file. Required. They are read again at
	// each attestation, so a renewed certificate needs no restart.
	PrivateKeyPath  string `hcl:"private_key_path"`
	CertificatePath string `hcl:"certificate_path"`
	// IntermediatesPath is a file with more intermediates. Default: none.
	IntermediatesPath string `hcl:"intermediates_path"`
	// SPIFFEEndpointSocket is not offered yet.
	SPIFFEEndpointSocket string `hcl:"spiffe_endpoint_socket"`
}

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *AgentConfig) Validate() error {
	if c.SPIFFEEndpointSocket != "" {
		return fault.New(fault.Unsupported, "config_unsupported", "x509pop: spiffe_endpoint_socket is not offered yet").
			Fix("have 'plastron run' keep the SVID in files, and name them in certificate_path and private_key_path")
	}
	if c.PrivateKeyPath == "" || c.CertificatePath == "" {
		return fault.New(fault.Invalid, "config_invalid", "x509pop: private_key_path and certificate_path must be set")
	}
	return nil
}

// Prover reads the files. It needs no join token.
func (c *AgentConfig) Prover(string) (nodeattest.Prover, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	unreadable := func(path string, err error) error {
		return fault.New(fault.Precondition, "x509pop_unreadable", "%q cannot be used to attest this node: %v", path, err).Because(err)
	}
	p := &Prover{}
	for _, path := range []string{c.CertificatePath, c.IntermediatesPath} {
		if path == "" {
			continue
		}
		chain, err := readCertificates(path)
		if err != nil {
			return nil, unreadable(path, err)
		}
		p.chain = append(p.chain, chain...)
	}
	leaf, err := x509.ParseCertificate(p.chain[0])
	if err != nil {
		return nil, unreadable(c.CertificatePath, err)
	}
	if p.key, err = readKey(c.PrivateKeyPath); err != nil {
		return nil, unreadable(c.PrivateKeyPath, err)
	}
	if public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(p.key.Public()) {
		return nil, unreadable(c.PrivateKeyPath, errors.New("it is not the key of the first certificate"))
	}
	return p, nil
}

// readCertificates reads PEM blocks. Text around them is let pass: PKI tools
// like to describe the certificate there.
func readCertificates(path string) (chain [][]byte, err error) {
	rest, err := readFile(path, maxFile)
	for err == nil {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("it holds something else than certificates")
		}
		chain = append(chain, block.Bytes)
	}
	if err == nil && len(chain) == 0 {
		err = errors.New("it holds no certificate in PEM")
	}
	return chain, err
}

// readKey reads the first private key of a PEM file. Errors never quote the file.
func readKey(path string) (crypto.Signer, error) {
	rest, err := readFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	return secretfile.ParseKey(rest)
}

// Prover is the agent's half: it shows its certificates and signs. It prints as its name.
type Prover struct {
	chain [][]byte // DER, leaf first
	key   crypto.Signer
}

// String keeps the secret out of messages.
func (*Prover) String() string { return "x509pop.Prover" }

// GoString keeps the secret out of %#v.
func (*Prover) GoString() string { return "x509pop.Prover" }

// Payload implements nodeattest.Prover.
func (p *Prover) Payload(context.Context) ([]byte, error) { return encode(attestation{p.chain}) }

// Answer implements nodeattest.Prover.
func (p *Prover) Answer(_ context.Context, question []byte) ([]byte, error) {
	c, err := parseChallenge(question)
	if err != nil {
		return nil, err
	}
	mine := make([]byte, nonceSize)
	rand.Read(mine)
	_, isRSA := p.key.(*rsa.PrivateKey)
	switch {
	case isRSA && c.RSA != nil:
		signature, err := p.key.Sign(rand.Reader, digest(c.RSA.Nonce, mine), &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256})
		if err != nil {
			return nil, err
		}
		return encode(answer{RSA: &rsaAnswer{mine, signature}})
	case !isRSA && c.ECDSA != nil:
		der, err := p.key.Sign(rand.Reader, digest(c.ECDSA.Nonce, mine), crypto.SHA256)
		if err != nil {
			return nil, err
		}
		var signature struct{ R, S *big.Int }
		if _, err := asn1.Unmarshal(der, &signature); err != nil {
			return nil, err
		}
		return encode(answer{ECDSA: &ecdsaAnswer{mine, signature.R.Bytes(), signature.S.Bytes()}})
	}
	return nil, malformed("the challenge is not for the node's kind of key", nil)
}
