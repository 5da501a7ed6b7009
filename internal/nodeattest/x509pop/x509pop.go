// Package x509pop proves a node by a certificate that it got beforehand, from a
// PKI of the operator's (mode external_pki) or as an SVID of the trust domain
// itself (mode spiffe), and by a signature with the certificate's key. Both
// halves are here; the messages are those that SPIRE's agents and servers send.
//
// What must always hold: nothing is parsed before its size is checked and no
// signature verified before the key's size is (R27); everything said about the
// node is read from the one leaf certificate that was verified and whose key
// signed (R25); the signature covers 32 random bytes of the server's made for
// this one conversation, so a recorded answer is worth nothing (R26); different
// facts make different selectors (R43).
package x509pop

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/strictjson"
)

// Name is the attestor's name in configuration, IDs and selectors.
const Name = "x509pop"

// Sizes in bytes.
const (
	nonceSize    = 32
	maxPerCert   = 8 << 10 // of the payload, in base64
	maxChallenge = 1 << 10
	maxAnswer    = 8 << 10 // holds the signature of the largest RSA key that can be allowed
)

// The messages. Bytes are standard base64.
type (
	attestation struct {
		Certificates [][]byte `json:"certificates"` // leaf first
	}
	nonce struct {
		Nonce []byte `json:"nonce"`
	}
	challenge struct {
		RSA   *nonce `json:"rsa_signature,omitempty"`
		ECDSA *nonce `json:"ecdsa_signature,omitempty"`
	}
	rsaAnswer struct {
		Nonce     []byte `json:"nonce"`
		Signature []byte `json:"signature"`
	}
	ecdsaAnswer struct {
		Nonce []byte `json:"nonce"`
		R     []byte `json:"r"`
		S     []byte `json:"s"`
	}
	answer struct {
		RSA   *rsaAnswer   `json:"rsa_signature,omitempty"`
		ECDSA *ecdsaAnswer `json:"ecdsa_signature,omitempty"`
	}
)

// digest is what the node signs: both sides have their say in it, so that
// neither can have something of its choice signed.
func digest(server, node []byte) []byte {
	sum := sha256.Sum256(append(append(make([]byte, 0, 2*nonceSize), server...), node...))
	return sum[:]
}

func malformed(what string, err error) error {
	return fault.New(fault.Invalid, "x509pop_malformed", "the x509pop message is malformed: %s", what).Because(err)
}

func encode(message any) ([]byte, error) { return json.Marshal(message) }

func parseAttestation(data []byte, maxCertificates int) ([][]byte, error) {
	if len(data) > maxCertificates*maxPerCert {
		return nil, malformed("it is too large", nil)
	}
	o, err := object(data, "certificates")
	if err != nil {
		return nil, err
	}
	list, _ := o["certificates"].([]any)
	if len(list) == 0 || len(list) > maxCertificates { // A9, A10
		return nil, fault.New(fault.Invalid, "x509pop_chain_length", "the node shows %d certificates; there must be 1 to %d", len(list), maxCertificates).
			Fix("show the node's certificate and its intermediates only, or raise max_intermediates")
	}
	var out [][]byte
	for _, v := range list {
		der, err := decodeBytes(v)
		if err != nil {
			return nil, malformed("a certificate is not base64", err)
		}
		out = append(out, der)
	}
	return out, nil
}

func parseChallenge(data []byte) (challenge, error) {
	if len(data) > maxChallenge {
		return challenge{}, malformed("it is too large", nil)
	}
	var c challenge
	kind, o, err := oneOf(data, "nonce")
	if err != nil {
		return c, err
	}
	n := nonce{o["nonce"]}
	if len(n.Nonce) != nonceSize {
		return c, malformed("the nonce does not have 32 bytes", nil)
	}
	if kind == "rsa_signature" {
		c.RSA = &n
	} else {
		c.ECDSA = &n
	}
	return c, nil
}

func parseRSAAnswer(data []byte) (rsaAnswer, error) {
	o, err := parseAnswer(data, "rsa_signature", "nonce", "signature")
	return rsaAnswer{o["nonce"], o["signature"]}, err
}

func parseECDSAAnswer(data []byte) (ecdsaAnswer, error) {
	o, err := parseAnswer(data, "ecdsa_signature", "nonce", "r", "s")
	return ecdsaAnswer{o["nonce"], o["r"], o["s"]}, err
}

func parseAnswer(data []byte, want string, names ...string) (map[string][]byte, error) {
	if len(data) > maxAnswer {
		return nil, malformed("it is too large", nil)
	}
	kind, o, err := oneOf(data, names...)
	switch {
	case err != nil:
		return nil, err
	case kind != want:
		return nil, malformed("the signature is not of the kind that was asked for", nil)
	case len(o["nonce"]) != nonceSize:
		return nil, malformed("the nonce does not have 32 bytes", nil)
	}
	return o, nil
}

// oneOf reads a message that is either about RSA or about ECDSA, whose members
// are bytes. The other one may be there as null.
func oneOf(data []byte, names ...string) (kind string, out map[string][]byte, err error) {
	o, err := object(data, "rsa_signature", "ecdsa_signature")
	if err != nil {
		return "", nil, err
	}
	for name, v := range o {
		if v == nil {
			continue
		}
		if kind != "" {
			return "", nil, malformed("it is about RSA and ECDSA at once", nil)
		}
		kind = name
	}
	inner, ok := o[kind].(map[string]any)
	if !ok {
		return "", nil, malformed("it is about neither RSA nor ECDSA", nil)
	}
	if err := only(inner, names); err != nil {
		return "", nil, err
	}
	out = map[string][]byte{}
	for _, name := range names {
		if out[name], err = decodeBytes(inner[name]); err != nil {
			return "", nil, malformed("the member "+name+" is not base64", err)
		}
	}
	return kind, out, nil
}

func object(data []byte, names ...string) (map[string]any, error) {
	o, err := strictjson.Object(data)
	if err != nil {
		return nil, malformed("it is not a JSON object", err)
	}
	return o, only(o, names)
}

func only(o map[string]any, names []string) error {
	known := 0
	for _, name := range names {
		if _, there := o[name]; there {
			known++
		}
	}
	if known != len(o) {
		return malformed("it has members that are not known", nil)
	}
	return nil
}

func decodeBytes(v any) ([]byte, error) {
	text, ok := v.(string)
	if !ok || text == "" || strings.ContainsAny(text, "\r\n") { // line ends pass encoding/base64
		return nil, errors.New("not a base64 string")
	}
	return base64.StdEncoding.Strict().DecodeString(text)
}
