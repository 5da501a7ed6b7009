package kube

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	callTime  = 10 * time.Second // for one call, all in all
	maxAnswer = 4 << 20          // an object is far smaller, unless somebody wants it large
)

// Client speaks to the API server of one cluster. It may be used concurrently,
// keeps a few connections and remembers no answer.
//
// Its faults: NotFound (there is no such object), Conflict (it has changed), Denied (the API server does not
// let us: a matter for the operator, not for whoever is attested), Unavailable
// (not now).
type Client struct {
	config ClientConfig

	mu sync.Mutex // guards what is below: what the files said when they were read last
	// src is the kubeconfig that access was read from.
	src    []byte
	access *access
	base   *url.URL
	sum    [sha256.Size]byte // of what http was made from
	http   *http.Client
}

// connection reads the files and returns a client that trusts and shows what they
// say now, and where to send calls.
func (c *Client) connection() (*connection, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.readConfigLocked(); err != nil {
		return nil, "", err
	}
	m, err := c.access.read(c.config)
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(bytes.Join([][]byte{m.ca, m.certificate, m.key, []byte(c.access.serverName)}, []byte{0}))
	if c.http == nil || sum != c.sum {
		config, err := m.tls(c.config, c.access.serverName)
		if err != nil {
			return nil, "", err
		}
		if c.http != nil {
			c.http.CloseIdleConnections()
		}
		c.sum = sum
		c.http = &http.Client{
			Transport: &http.Transport{
				TLSClientConfig: config, TLSHandshakeTimeout: callTime, MaxResponseHeaderBytes: 64 << 10,
				MaxConnsPerHost: 32, MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the token goes nowhere else
		}
	}
	return &connection{c.http, c.base}, m.token, nil
}

type connection struct {
	http *http.Client
	base *url.URL
}

func (c *Client) readConfigLocked() error {
	if c.config.Kubeconfig == "" {
		if c.access != nil {
			return nil
		}
		a, err := c.config.inCluster()
		if err != nil {
			return err
		}
		return c.takeLocked(a)
	}
	src, unfit := readSecret(c.config.Kubeconfig, maxConfigFile)
	if unfit != nil { // which is fine if it holds no secret
		var err error
		if src, err = readSmall(c.config.Kubeconfig, maxConfigFile); err != nil {
			return c.config.unusable("%v", err)
		}
	}
	if c.access == nil || !bytes.Equal(src, c.src) {
		a, err := c.config.parse(src)
		if err != nil {
			return err
		}
		if err := c.takeLocked(a); err != nil {
			return err
		}
		c.src = src
	}
	if unfit != nil && c.access.hasSecret() { // R113
		return c.config.unreadable(unfit)
	}
	return nil
}

func (c *Client) takeLocked(a *access) error {
	base, err := c.config.address(a.server)
	if err != nil {
		return err
	}
	c.access, c.base = a, base
	return nil
}

// Pod returns a pod. One that is there but asked to go has Meta.Deleted.
func (c *Client) Pod(ctx context.Context, namespace, name string) (Pod, error) {
	var p Pod
	err := c.do(ctx, call{verb: "get", resource: "pods", kind: "Pod", namespace: namespace, name: name}, &p)
	if err == nil {
		err = isIt("pod", p.Meta, namespace, name)
	}
	return p, err
}

// Node returns a node.
func (c *Client) Node(ctx context.Context, name string) (Node, error) {
	var n Node
	err := c.do(ctx, call{verb: "get", resource: "nodes", kind: "Node", name: name, cluster: true}, &n)
	if err == nil {
		err = isIt("node", n.Meta, "", name)
	}
	return n, err
}

// ConfigMap is a small set of texts.
type ConfigMap struct {
	Meta ConfigMapMeta     `json:"metadata"`
	Data map[string]string `json:"data"`
}

// ConfigMapMeta is the rest of a ConfigMap.
type ConfigMapMeta struct {
	Meta
	Annotations map[string]string `json:"annotations"`
	// Version is another one after each change; versions have no order.
	Version string `json:"resourceVersion"`
}

// ConfigMap returns a ConfigMap.
func (c *Client) ConfigMap(ctx context.Context, namespace, name string) (ConfigMap, error) {
	var m ConfigMap
	err := c.do(ctx, call{verb: "get", resource: "configmaps", kind: "ConfigMap", namespace: namespace, name: name}, &m)
	if err == nil {
		err = isIt("ConfigMap", m.Meta.Meta, namespace, name)
	}
	return m, err
}

// ConfigMapPatch is what is to be set in a ConfigMap; its other keys and
// annotations are left alone. With a Version it is only done if the ConfigMap
// still has that one, and otherwise fails with a Conflict.
type ConfigMapPatch struct {
	Version           string
	Annotations, Data map[string]string
}

// PatchConfigMap changes a ConfigMap that is there.
func (c *Client) PatchConfigMap(ctx context.Context, namespace, name string, p ConfigMapPatch) error {
	patch, meta := map[string]any{"data": p.Data}, map[string]any{}
	if p.Version != "" {
		meta["resourceVersion"] = p.Version
	}
	if len(p.Annotations) > 0 {
		meta["annotations"] = p.Annotations
	}
	if len(meta) > 0 {
		patch["metadata"] = meta
	}
	return c.do(ctx, call{verb: "patch", resource: "configmaps", kind: "ConfigMap", namespace: namespace, name: name, body: patch}, new(ConfigMap))
}

// isIt holds an answer against the question.
func isIt(what string, m Meta, namespace, name string) error {
	if m.Name != name || m.Namespace != namespace || !isUID(m.UID) {
		return unexpected("it answers with another " + what + " than was asked for, or with one without a UID")
	}
	return nil
}

// Review is what an API server says of a token.
type Review struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"` // those of the audiences asked for that the token is for
	User          struct {
		Name   string              `json:"username"`
		UID    string              `json:"uid"`
		Groups []string            `json:"groups"`
		Extra  map[string][]string `json:"extra"`
	} `json:"user"`
	Error string `json:"error"`
}

// ReviewToken asks whose token it is, and whether it is for one of these
// audiences. A token that is not accepted gives an answer, not an error.
func (c *Client) ReviewToken(ctx context.Context, token string, audiences []string) (Review, error) {
	if token == "" || len(token) > maxToken || len(audiences) == 0 {
		return Review{}, fault.New(fault.Invalid, "kube_token_malformed", "there is no token, or a text that is none, or no audience")
	}
	question := map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
		"spec": map[string]any{"token": token, "audiences": audiences},
	}
	var answer struct {
		Status Review `json:"status"`
	}
	err := c.do(ctx, call{
		verb: "create", group: "authentication.k8s.io", resource: "tokenreviews", kind: "TokenReview", cluster: true, body: question,
	}, &answer)
	return answer.Status, err
}

// call is one request, in the words of RBAC.
type call struct {
	verb, group, resource, kind string
	namespace, name             string
	cluster                     bool // it has no namespace
	body                        any
}

// path holds names to what Kubernetes allows before they become part of an address.
func (c call) path() (string, error) {
	path := "/api/v1"
	if c.group != "" {
		path = "/apis/" + c.group + "/v1"
	}
	if !c.cluster {
		if !isLabel(c.namespace) {
			return "", fault.New(fault.Invalid, "kube_name_invalid", "the namespace is not a name that Kubernetes allows")
		}
		path += "/namespaces/" + c.namespace
	}
	path += "/" + c.resource
	if c.verb == "create" {
		return path, nil
	}
	if !isSubdomain(c.name) {
		return "", fault.New(fault.Invalid, "kube_name_invalid", "the name is not one that Kubernetes allows")
	}
	return path + "/" + c.name, nil
}

// right is what somebody must be granted to make the call.
func (c call) right() string {
	resource := c.resource
	if c.group != "" {
		resource += "." + c.group
	}
	if c.namespace != "" {
		return fmt.Sprintf("%q on %q in the namespace %q", c.verb, resource, c.namespace)
	}
	return fmt.Sprintf("%q on %q", c.verb, resource)
}

func (c *Client) do(ctx context.Context, what call, into any) error {
	path, err := what.path()
	if err != nil {
		return err
	}
	conn, token, err := c.connection()
	if err != nil {
		return fault.New(fault.Unavailable, "kube_unavailable", "the cluster's API server cannot be asked").Because(err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var body io.Reader
	if what.body != nil {
		data, err := json.Marshal(what.body)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	method := map[string]string{"get": http.MethodGet, "create": http.MethodPost, "patch": http.MethodPatch}[what.verb]
	req, err := http.NewRequestWithContext(ctx, method, conn.base.JoinPath(path).String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "plastron")
	switch what.verb {
	case "create":
		req.Header.Set("Content-Type", "application/json")
	case "patch":
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := conn.http.Do(req)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		return fault.New(fault.Unavailable, "kube_unavailable", "the cluster's API server cannot be reached").Because(err)
	}
	defer resp.Body.Close()
	data, err := readBounded(resp.Body, maxAnswer)
	if errors.Is(err, errTooLarge) {
		return unexpected("its answer: " + err.Error())
	}
	if err != nil {
		return fault.New(fault.Unavailable, "kube_unavailable", "the cluster's API server broke off its answer").Because(err)
	}
	if err := judge(resp, what, data); err != nil {
		return err
	}
	var kind struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	version := strings.TrimPrefix(what.group+"/v1", "/")
	if err := json.Unmarshal(data, &kind); err != nil || kind.Kind != what.kind || kind.APIVersion != version {
		return unexpected("its answer is not a " + what.kind + " of " + version)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return unexpected("its answer is not the " + what.kind + " that it says it is")
	}
	return nil
}

// judge turns what is not a success into a fault. What the API server writes goes
// to the log only.
func judge(resp *http.Response, what call, data []byte) error {
	cause := fmt.Errorf("HTTP status %d", resp.StatusCode)
	var status struct {
		Kind    string `json:"kind"`
		Reason  string `json:"reason"`
		Message string `json:"message"`
	}
	if json.Unmarshal(data, &status) == nil && status.Kind == "Status" && what.resource != "tokenreviews" { // a message could repeat the token
		cause = fmt.Errorf("HTTP status %d: %q", resp.StatusCode, status.Message[:min(len(status.Message), 512)])
	}
	switch code := resp.StatusCode; {
	case code == http.StatusOK || code == http.StatusCreated:
		return nil
	case code == http.StatusNotFound && status.Reason == "NotFound":
		return fault.New(fault.NotFound, "kube_not_found", "the cluster has no such object").Because(cause)
	case code == http.StatusUnauthorized:
		return fault.New(fault.Denied, "kube_denied", "the cluster's API server does not accept our credentials").
			Fix("see that the token or client certificate has not expired and is of this cluster").Because(cause)
	case code == http.StatusForbidden:
		return fault.New(fault.Denied, "kube_denied", "our credentials have no right to %s", what.right()).
			Fix("grant it in a Role or ClusterRole of that cluster").Because(cause)
	case code == http.StatusConflict && status.Reason == "Conflict":
		return fault.New(fault.Conflict, "kube_conflict", "somebody else has changed the object meanwhile").Because(cause)
	case code == http.StatusTooManyRequests || code >= 500:
		var after time.Duration
		if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
			after = min(time.Duration(n)*time.Second, time.Minute)
		}
		return fault.New(fault.Unavailable, "kube_unavailable", "the cluster's API server has too much to do, or is in trouble").Because(cause).NotBefore(after)
	}
	return unexpected(cause.Error())
}

func unexpected(what string) error {
	return fault.New(fault.Unavailable, "kube_unexpected", "what answers for the cluster's API server is not one").Because(errors.New(what))
}

// CheckName holds a namespace, and the name of an object in it, to what Kubernetes allows.
func CheckName(namespace, name string) error {
	if !isLabel(namespace) || !isSubdomain(name) {
		return fault.New(fault.Invalid, "kube_name_invalid", "%q in %q is not a name that Kubernetes allows", name, namespace)
	}
	return nil
}

// isLabel tells an RFC 1123 label, as names of namespaces are.
func isLabel(s string) bool { return len(s) <= 63 && isPart(s) }

// isSubdomain tells what names of most objects are: parts joined by dots. Kubernetes
// bounds the whole, and not the parts.
func isSubdomain(s string) bool {
	return len(s) <= 253 && !slices.ContainsFunc(strings.Split(s, "."), func(part string) bool { return !isPart(part) })
}

func isPart(s string) bool {
	edge := func(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }
	return s != "" && edge(s[0]) && edge(s[len(s)-1]) &&
		!strings.ContainsFunc(s, func(r rune) bool { return r > '~' || !edge(byte(r)) && r != '-' })
}
