// Package svid holds the profiles of X.509-SVIDs and JWT-SVIDs: it reads
// certificate requests, assembles and signs documents, and verifies those that
// others show. It decides what a document may look like; who may have one, and
// for how long, is decided by its callers.
//
// What must always hold: nothing of a request but its public key reaches a
// certificate (R2); only bytes that passed the lint are signed, once (R5);
// nothing outlives its issuer (R8, R10); a document is verified only with keys
// of its own trust domain.
package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// Backdate is how far before its issue a document begins, so that validators
// whose clock is up to 30 s slow accept a fresh one (R9).
const Backdate = 30 * time.Second

// scheme is how a signing key signs: the hash, the X.509 AlgorithmIdentifier,
// the JOSE name, and the size of r and s in a JOSE signature (0 for RSA).
type scheme struct {
	hash      crypto.Hash
	algorithm string
	jose      string
	size      int
}

func schemeOf(pub crypto.PublicKey) (scheme, error) {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve.Params().BitSize {
		case 256:
			return scheme{crypto.SHA256, sigECDSA256, "ES256", 32}, nil
		case 384:
			return scheme{crypto.SHA384, sigECDSA384, "ES384", 48}, nil
		}
	case *rsa.PublicKey:
		return scheme{crypto.SHA256, sigRSA256, "RS256", 0}, nil
	}
	return scheme{}, fault.New(fault.Invalid, "key_type_invalid", "an authority cannot sign with a %T", pub).
		Fix("use ec-p256, ec-p384, rsa-2048 or rsa-4096")
}

// sign hashes and signs: ASN.1 for ECDSA, PKCS#1 v1.5 for RSA.
func (s scheme) sign(signer crypto.Signer, message []byte) ([]byte, error) {
	h := s.hash.New()
	h.Write(message)
	signature, err := signer.Sign(rand.Reader, h.Sum(nil), s.hash)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "signing_failed", "the authority's key could not sign").Because(err)
	}
	return signature, nil
}
