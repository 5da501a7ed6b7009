package kube

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/strictjson"
	"github.com/plastron/plastron/internal/svid"
)

// Bearer is whom a service-account token was made for. All names and UIDs are such
// as Kubernetes allows.
type Bearer struct {
	Namespace, ServiceAccount string
	Pod                       Object
	Node                      Object // empty: the token does not tell
}

// Object is one that was there, by name and UID.
type Object struct{ Name, UID string }

const userPrefix = "system:serviceaccount:"

// The names that an API server gives to what else it knows of a bearer.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// Bearer returns whose token it was, if the API server says that it is good for
// one of the audiences and was made for a pod.
func (r Review) Bearer(audiences []string) (Bearer, error) {
	switch {
	case !r.Authenticated || r.Error != "":
		return Bearer{}, refused("kube_token_refused", "the cluster's API server does not accept it").
			Fix("see that it is of this cluster, for the audience %q, not at its end, and that its pod is there", audiences).
			Because(fmt.Errorf("the API server: %q", r.Error[:min(len(r.Error), 512)]))
	case !share(r.Audiences, audiences):
		return Bearer{}, refused("kube_token_audience", "it is for another audience")
	}
	one := func(name string) string {
		if list := r.User.Extra[name]; len(list) == 1 {
			return list[0]
		}
		return ""
	}
	return bearer(r.User.Name, Object{one(extraPodName), one(extraPodUID)}, Object{one(extraNodeName), one(extraNodeUID)})
}

// bearer holds what a token says against the rules of Kubernetes.
func bearer(user string, pod, node Object) (Bearer, error) {
	rest, ok := strings.CutPrefix(user, userPrefix)
	namespace, account, ok2 := strings.Cut(rest, ":")
	switch {
	case !ok || !ok2 || !isLabel(namespace) || !isSubdomain(account):
		return Bearer{}, refused("kube_token_subject", "it is not a service account's")
	case pod == Object{}:
		return Bearer{}, refused("kube_token_unbound", "it was not made for a pod").
			Fix("give the agent's pod a projected volume with a serviceAccountToken; a token of a Secret does not do")
	case !isSubdomain(pod.Name) || !isUID(pod.UID):
		return Bearer{}, refused("kube_token_claims", "it names its pod in a way that Kubernetes does not")
	case node != Object{} && (!isSubdomain(node.Name) || !isUID(node.UID)):
		return Bearer{}, refused("kube_token_claims", "it names its node in a way that Kubernetes does not")
	}
	return Bearer{Namespace: namespace, ServiceAccount: account, Pod: pod, Node: node}, nil
}

func refused(reason, why string) *fault.Error {
	return fault.New(fault.Denied, reason, "the service-account token is refused: %s", why)
}

// Inspect reads a token that is not verified, so that one which cannot be good for
// any of the audiences is refused before somebody is asked.
func Inspect(token string, audiences []string) (Bearer, error) {
	_, c, err := split(token)
	if err == nil {
		err = c.check(audiences, time.Now())
	}
	return c.Bearer, err
}

func split(token string) (svid.JWS, claims, error) {
	jws, err := svid.ParseJWS(token)
	if err != nil {
		return jws, claims{}, err
	}
	c, err := parseClaims(jws.Payload)
	return jws, c, err
}

// claims are those of a token that is not verified yet.
type claims struct {
	Bearer
	issuer      string
	audience    []string
	start, ends time.Time
}

const (
	maxAudiences = 100
	latest       = 253402300799 // Unix seconds: the end of the year 9999
)

// parseClaims reads what every projected token has. What they say twice must agree.
func parseClaims(data []byte) (claims, error) {
	malformed := func(what string) (claims, error) { return claims{}, refused("kube_token_claims", what) }
	all, err := strictjson.Object(data)
	if err != nil {
		return malformed("its claims are not a JSON object")
	}
	var c claims
	c.issuer, _ = all["iss"].(string)
	switch aud := all["aud"].(type) {
	case string:
		c.audience = []string{aud}
	case []any:
		if len(aud) > maxAudiences {
			return malformed("it is for too many audiences")
		}
		for _, v := range aud {
			s, ok := v.(string)
			if !ok {
				return malformed("an audience is not a text")
			}
			c.audience = append(c.audience, s)
		}
	}
	private, ok := all["kubernetes.io"].(map[string]any)
	if !ok { // A18: also tokens of Secrets, which never end
		return malformed("it is not a projected token of a pod")
	}
	var okStart, okEnds bool
	c.start, okStart = seconds(all["nbf"])
	c.ends, okEnds = seconds(all["exp"])
	if !okStart || !okEnds {
		return malformed("its times are missing, or not whole seconds")
	}
	subject, _ := all["sub"].(string)
	if c.Bearer, err = bearer(subject, objectOf(private["pod"]), objectOf(private["node"])); err != nil {
		return claims{}, err
	}
	if private["namespace"] != c.Namespace || objectOf(private["serviceaccount"]).Name != c.ServiceAccount {
		return malformed("its subject is not the service account that it names")
	}
	return c, nil
}

// objectOf reads a name and a UID; empty if there is nothing, and with an invalid
// name, so that it is refused, if it is something else.
func objectOf(v any) Object {
	if v == nil {
		return Object{}
	}
	o, _ := v.(map[string]any)
	name, _ := o["name"].(string)
	uid, _ := o["uid"].(string)
	if name == "" && uid == "" {
		name = "/"
	}
	return Object{name, uid}
}

func seconds(v any) (time.Time, bool) {
	number, _ := v.(json.Number)
	n, err := number.Int64()
	return time.Unix(n, 0), err == nil && n > 0 && n <= latest
}

// check judges what depends on who asks, and when.
func (c claims) check(audiences []string, now time.Time) error {
	switch {
	case !share(c.audience, audiences):
		return refused("kube_token_audience", "it is for another audience")
	case !now.Before(c.ends.Add(svid.Leeway)):
		return refused("kube_token_expired", "it has expired")
	case c.start.After(now.Add(svid.Leeway)):
		return refused("kube_token_early", "it is not valid yet").Fix("set the clocks of this server and of the cluster right")
	}
	return nil
}

func share(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return s != "" && slices.Contains(b, s) })
}

// isUID tells what Kubernetes names objects by. It is a UUID; no more is relied on
// than that it is short and has nothing that an ID or a path gives a meaning to.
func isUID(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
	})
}
