package kubeapi

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/plastron/plastron/internal/kube"
)

// deletedLeeway is for how long a token outlives the time by which its pod had to be gone.
const deletedLeeway = time.Minute

// TokenOptions say what a projected token is like.
type TokenOptions struct {
	Audience string        // required
	Lifetime time.Duration // default: an hour
	NoNode   bool          // as clusters before 1.30 make it: without claims on the node
}

// Token mints what the kubelet projects into the pod.
func (s *Server) Token(pod kube.Pod, o TokenOptions) string { return s.Sign(s.Claims(pod, o)) }

// Claims are those of the pod's token, for a test to change before it has them signed.
func (s *Server) Claims(pod kube.Pod, o TokenOptions) map[string]any {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.Audience == "" {
		s.t.Fatal("kubeapi: a projected token has an audience")
	}
	if o.Lifetime == 0 {
		o.Lifetime = time.Hour
	}
	type object = map[string]any
	account := pod.Spec.ServiceAccount
	private := object{
		"namespace":      pod.Meta.Namespace,
		"pod":            object{"name": pod.Meta.Name, "uid": pod.Meta.UID},
		"serviceaccount": object{"name": account, "uid": s.accounts[[2]string{pod.Meta.Namespace, account}]},
	}
	if node := s.nodes[pod.Spec.NodeName]; node != nil && !o.NoNode {
		private["node"] = object{"name": node.Meta.Name, "uid": node.Meta.UID}
	}
	now := time.Now()
	claims := object{
		"iss": s.Issuer, "sub": "system:serviceaccount:" + pod.Meta.Namespace + ":" + account, "aud": []any{o.Audience},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(o.Lifetime).Unix(), "kubernetes.io": private,
	}
	if !o.NoNode {
		claims["jti"] = uuid.NewString()
	}
	return claims
}

// Sign signs any claims with the cluster's newest key.
func (s *Server) Sign(claims map[string]any) string {
	s.t.Helper()
	s.needKey()
	s.mu.Lock()
	key := s.keys[len(s.keys)-1]
	s.mu.Unlock()
	head, err := json.Marshal(map[string]string{"alg": "RS256", "kid": keyID(key)})
	if err != nil {
		s.t.Fatal(err)
	}
	body, err := json.Marshal(claims)
	if err != nil {
		s.t.Fatal(err)
	}
	signed := encode(head) + "." + encode(body)
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		s.t.Fatal(err)
	}
	return signed + "." + encode(signature)
}

// RotateKey has the cluster sign with a new key. Tokens of the older ones stay good.
func (s *Server) RotateKey() {
	s.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, key)
}

// needKey makes the first key when it is asked for: it takes its time.
func (s *Server) needKey() {
	s.mu.Lock()
	n := len(s.keys)
	s.mu.Unlock()
	if n == 0 {
		s.RotateKey()
	}
}

// DropOldKeys makes tokens of all keys but the newest void.
func (s *Server) DropOldKeys() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = s.keys[len(s.keys)-1:]
}

// JWKS is what /openid/v1/jwks answers.
func (s *Server) JWKS() []byte {
	s.needKey()
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []any
	for _, key := range s.keys {
		keys = append(keys, map[string]string{
			"use": "sig", "kty": "RSA", "kid": keyID(key), "alg": "RS256",
			"n": encode(key.N.Bytes()), "e": encode(big.NewInt(int64(key.E)).Bytes()),
		})
	}
	data, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		panic(err)
	}
	return data
}

// keyID is made of the public key, as Kubernetes does it.
func keyID(key *rsa.PrivateKey) string {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(der)
	return encode(sum[:])
}

func encode(data []byte) string { return base64.RawURLEncoding.EncodeToString(data) }

// who is what a token or certificate says of its bearer.
type who struct {
	Name   string              `json:"username,omitempty"`
	UID    string              `json:"uid,omitempty"`
	Groups []string            `json:"groups,omitempty"`
	Extra  map[string][]string `json:"extra,omitempty"`
}

// object names something by the UID that it had.
type object struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// verifyLocked is what the API server does with a token: signature, issuer, time,
// audience, and whether what the token is bound to is still there. Of a pod's
// token, as in Kubernetes, the node is told but not looked up.
func (s *Server) verifyLocked(token string, audiences []string) (who, []string, error) {
	bad := func(why string) (who, []string, error) {
		return who{}, nil, fmt.Errorf("[invalid bearer token, %s]", why)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return bad("token lookup failed")
	}
	var raw [3][]byte
	for i, part := range parts {
		var err error
		if raw[i], err = base64.RawURLEncoding.Strict().DecodeString(part); err != nil {
			return bad("illegal base64 data")
		}
	}
	var head struct{ Alg, KID string }
	var claims struct {
		Issuer   string          `json:"iss"`
		Subject  string          `json:"sub"`
		Audience json.RawMessage `json:"aud"`
		Expiry   int64           `json:"exp"`
		Start    int64           `json:"nbf"`
		ID       string          `json:"jti"`
		Private  struct {
			Namespace string  `json:"namespace"`
			Pod       *object `json:"pod"`
			Node      *object `json:"node"`
			Account   object  `json:"serviceaccount"`
		} `json:"kubernetes.io"`
	}
	if json.Unmarshal(raw[0], &head) != nil || json.Unmarshal(raw[1], &claims) != nil {
		return bad("square/go-jose: malformed")
	}
	var list []string
	if json.Unmarshal(claims.Audience, &list) != nil {
		list = make([]string, 1)
		if json.Unmarshal(claims.Audience, &list[0]) != nil {
			return bad("the token has no audience")
		}
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if head.Alg != "RS256" || !slices.ContainsFunc(s.keys, func(key *rsa.PrivateKey) bool {
		return (head.KID == "" || head.KID == keyID(key)) && rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, sum[:], raw[2]) == nil
	}) {
		return bad("failed to verify the signature")
	}
	now := time.Now().Unix()
	p := claims.Private
	switch {
	case claims.Issuer != s.Issuer:
		return bad("the token is of another issuer")
	case now >= claims.Expiry || now < claims.Start:
		return bad("service account token has expired")
	}
	var common []string
	for _, a := range list {
		if slices.Contains(audiences, a) {
			common = append(common, a)
		}
	}
	if len(common) == 0 {
		return bad(fmt.Sprintf("token audiences %q is invalid for the target audiences %q", list, audiences))
	}
	if uid := s.accounts[[2]string{p.Namespace, p.Account.Name}]; uid == "" || uid != p.Account.UID {
		return bad("service account UID is not the token's")
	}
	name := "system:serviceaccount:" + p.Namespace + ":" + p.Account.Name
	if claims.Subject != name {
		return bad("sub claim is invalid")
	}
	w := who{
		Name: name, UID: p.Account.UID, Extra: map[string][]string{},
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + p.Namespace, "system:authenticated"},
	}
	if claims.ID != "" {
		w.Extra["authentication.kubernetes.io/credential-id"] = []string{"JTI=" + claims.ID}
	}
	if p.Pod != nil {
		pod := s.pods[[2]string{p.Namespace, p.Pod.Name}]
		if pod == nil || pod.Meta.UID != p.Pod.UID || pod.Meta.Deleted != nil && time.Since(*pod.Meta.Deleted) > deletedLeeway {
			return bad("service account token has been invalidated")
		}
		w.Extra["authentication.kubernetes.io/pod-name"] = []string{p.Pod.Name}
		w.Extra["authentication.kubernetes.io/pod-uid"] = []string{p.Pod.UID}
	}
	if p.Node != nil {
		w.Extra["authentication.kubernetes.io/node-name"] = []string{p.Node.Name}
		w.Extra["authentication.kubernetes.io/node-uid"] = []string{p.Node.UID}
	}
	return w, common, nil
}
