package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"math/big"
	"math/bits"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/plastron/plastron/internal/fault"
)

// PublicKey is a key that passed the policy (R4).
type PublicKey struct {
	Key  crypto.PublicKey
	SPKI []byte   // the DER SubjectPublicKeyInfo
	Hash [32]byte // SHA-256 of SPKI
}

// ParsePublicKey reads a DER SubjectPublicKeyInfo and applies the key policy:
// EC on P-256 or P-384 as a named curve with an uncompressed point on the
// curve, or RSA of 2048, 3072 or 4096 bits with exponent 65537 and a modulus
// without known weakness. Sizes are tested before any arithmetic.
func ParsePublicKey(der []byte) (PublicKey, error) {
	alg, bits, err := splitSPKI(der)
	if err != nil {
		return PublicKey{}, err
	}
	var key crypto.PublicKey
	switch string(alg) {
	case algECP256:
		key, err = parseEC(elliptic.P256(), bits)
	case algECP384:
		key, err = parseEC(elliptic.P384(), bits)
	case algRSA:
		key, err = parseRSA(bits)
	default:
		err = errKey("the key's algorithm or curve is not allowed")
	}
	if err != nil {
		return PublicKey{}, err
	}
	return PublicKey{Key: key, SPKI: der, Hash: sha256.Sum256(der)}, nil
}

// The whole DER AlgorithmIdentifier of each kind of key that is allowed.
// Comparing whole encodings leaves no room for other parameters (C16).
const (
	algECP256 = "\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
	algECP384 = "\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22"
	algRSA    = "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00"
)

func errKey(message string) error {
	return fault.New(fault.Invalid, "public_key_invalid", "the public key is refused: %s", message).
		Fix("use EC P-256, EC P-384 or RSA with 2048, 3072 or 4096 bits and exponent 65537")
}

// splitSPKI returns the AlgorithmIdentifier and the content of the key's bit string.
func splitSPKI(der []byte) (alg, key []byte, err error) {
	in := cryptobyte.String(der)
	var seq, algorithm, content cryptobyte.String
	var unused uint8
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() ||
		!seq.ReadASN1Element(&algorithm, asn1.SEQUENCE) ||
		!seq.ReadASN1(&content, asn1.BIT_STRING) || !seq.Empty() ||
		!content.ReadUint8(&unused) || unused != 0 {
		return nil, nil, errKey("it is not a DER SubjectPublicKeyInfo")
	}
	return algorithm, content, nil
}

func parseEC(curve elliptic.Curve, point []byte) (crypto.PublicKey, error) {
	// The uncompressed form is the only one accepted, on every path (C18).
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, errKey("the point is not an uncompressed point on the curve")
	}
	return key, nil
}

func parseRSA(der []byte) (crypto.PublicKey, error) {
	in := cryptobyte.String(der)
	var seq, n cryptobyte.String
	var e uint64
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() ||
		!seq.ReadASN1(&n, asn1.INTEGER) || !seq.ReadASN1Integer(&e) || !seq.Empty() {
		return nil, errKey("it is not a DER RSA key")
	}
	// A positive modulus of a whole number of bytes has exactly one zero byte in
	// front of a byte whose top bit is set; anything else is of another size.
	if len(n) < 2 || n[0] != 0 || n[1] < 0x80 {
		return nil, errKey("the RSA modulus has a size that is not allowed")
	}
	modulus := []byte(n[1:])
	switch len(modulus) * 8 {
	case 2048, 3072, 4096:
	default:
		return nil, errKey("the RSA modulus has a size that is not allowed")
	}
	if e != 65537 {
		return nil, errKey("the RSA exponent is not 65537")
	}
	if modulus[len(modulus)-1]&1 == 0 || hasSmallFactor(modulus) {
		return nil, errKey("the RSA modulus has a small factor")
	}
	if roca(modulus) {
		return nil, errKey("the RSA modulus has the shape of a weak generator (ROCA)")
	}
	N := new(big.Int).SetBytes(modulus)
	if closePrimes(N) {
		return nil, errKey("the primes of the RSA modulus are too close")
	}
	return &rsa.PublicKey{N: N, E: 65537}, nil
}

// mod returns the big-endian number n modulo m.
func mod(n []byte, m uint64) uint64 {
	var r uint64
	for len(n) >= 8 {
		w := uint64(n[0])<<56 | uint64(n[1])<<48 | uint64(n[2])<<40 | uint64(n[3])<<32 |
			uint64(n[4])<<24 | uint64(n[5])<<16 | uint64(n[6])<<8 | uint64(n[7])
		r = bits.Rem64(r, w, m)
		n = n[8:]
	}
	for _, b := range n {
		r = bits.Rem64(r>>56, r<<8|uint64(b), m)
	}
	return r
}

// hasSmallFactor reports whether an odd prime below 1000 divides n. It reduces
// n once for each product of primes that fits a word.
func hasSmallFactor(n []byte) bool {
	product, first := uint64(1), uint64(3)
	divides := func(last uint64) bool {
		r := mod(n, product)
		for p := first; p <= last; p += 2 {
			if product%p == 0 && r%p == 0 {
				return true
			}
		}
		return false
	}
	for p := uint64(3); p < 1000; p += 2 {
		if !smallPrime(p) {
			continue
		}
		if hi, _ := bits.Mul64(product, p); hi != 0 {
			if divides(p - 2) {
				return true
			}
			product, first = 1, p
		}
		product *= p
	}
	return divides(999)
}

func smallPrime(p uint64) bool {
	for d := uint64(3); d*d <= p; d += 2 {
		if p%d == 0 {
			return false
		}
	}
	return true
}

// roca reports whether n is, modulo every odd prime up to 167, a power of
// 65537: the mark of the generator of CVE-2017-15361. A sound modulus passes as
// such by chance less than once in 2^27.
func roca(n []byte) bool {
	for p := uint64(3); p <= 167; p += 2 {
		if !smallPrime(p) {
			continue
		}
		r, g := mod(n, p), 65537%p
		x := g
		for x != r && x != 1 {
			x = x * g % p
		}
		if x != r {
			return false
		}
	}
	return true
}

// closePrimes looks for N = a²-b² near the root of N (Fermat), for a bounded
// number of steps.
func closePrimes(N *big.Int) bool {
	a := new(big.Int).Sqrt(N)
	if new(big.Int).Mul(a, a).Cmp(N) == 0 {
		return true // a square
	}
	a.Add(a, big.NewInt(1))
	b2 := new(big.Int).Sub(new(big.Int).Mul(a, a), N)
	step := new(big.Int).Add(new(big.Int).Lsh(a, 1), big.NewInt(1))
	two, b := big.NewInt(2), new(big.Int)
	for range 128 {
		// Few numbers are squares modulo all of these; the root is taken of those only.
		if squareModulo(b2, 64) && squareModulo(b2, 63) && squareModulo(b2, 65) && squareModulo(b2, 11) {
			if b.Sqrt(b2); new(big.Int).Mul(b, b).Cmp(b2) == 0 {
				return true
			}
		}
		b2.Add(b2, step)
		step.Add(step, two)
	}
	return false
}

// squareModulo reports whether n is congruent to a square modulo a small m.
func squareModulo(n *big.Int, m uint) bool {
	var r uint
	words := n.Bits()
	for i := len(words) - 1; i >= 0; i-- {
		r = bits.Rem(r, uint(words[i]), m)
	}
	for x := range m/2 + 1 {
		if x*x%m == r {
			return true
		}
	}
	return false
}
