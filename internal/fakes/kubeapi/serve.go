package kubeapi

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"maps"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/plastron/plastron/internal/kube"
)

// request is a call in the words of RBAC; url instead for what is no resource.
type request struct {
	verb, group, resource, namespace, name, url string
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 3<<20+1))
	if err != nil || len(body) > 3<<20 {
		refuse(w, http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", "the request is too large")
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body)) // read, so that a handler that hangs hears when the caller goes
	s.mu.Lock()
	intercept := s.intercept
	s.mu.Unlock()
	if intercept != nil && intercept(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()

	// 1. Who calls.
	caller := who{Name: "system:anonymous", Groups: []string{"system:unauthenticated"}}
	bearer, hasBearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	switch {
	case len(r.TLS.PeerCertificates) > 0:
		subject := r.TLS.PeerCertificates[0].Subject
		caller = who{Name: subject.CommonName, Groups: append(slices.Clone(subject.Organization), "system:authenticated")}
	case hasBearer:
		if caller, _, err = s.verifyLocked(bearer, []string{Audience}); err != nil {
			refuse(w, http.StatusUnauthorized, "Unauthorized", "Unauthorized")
			return
		}
	}

	// 2. What it wants, and whether it may.
	what := read(r)
	count := what.verb + " " + what.resource
	if what.url != "" {
		count = "get " + what.url
	}
	s.calls[count]++
	if !s.allowsLocked(caller, what) {
		refuse(w, http.StatusForbidden, "Forbidden", what.resource+what.url+` is forbidden: User "`+caller.Name+`" cannot `+what.verb+" it")
		return
	}

	// 3. The answer.
	at := [2]string{what.namespace, what.name}
	switch count {
	case "create tokenreviews":
		s.reviewLocked(w, r, body)
	case "get pods":
		if pod := s.pods[at]; pod != nil {
			s.show(w, http.StatusOK, "Pod", pod)
			return
		}
		missing(w, what)
	case "get nodes":
		if node := s.nodes[what.name]; node != nil {
			s.show(w, http.StatusOK, "Node", node)
			return
		}
		missing(w, what)
	case "get namespaces":
		if meta, there := s.namespaces[what.name]; there {
			s.show(w, http.StatusOK, "Namespace", map[string]any{"metadata": meta})
			return
		}
		missing(w, what)
	case "get configmaps":
		if m := s.configMaps[at]; m != nil {
			s.show(w, http.StatusOK, "ConfigMap", m)
			return
		}
		missing(w, what)
	case "create configmaps", "patch configmaps":
		s.writeLocked(w, r, what, body)
	case "get /version":
		answer(w, http.StatusOK, map[string]string{"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
	case "get /.well-known/openid-configuration":
		answer(w, http.StatusOK, map[string]any{
			"issuer": s.Issuer, "jwks_uri": s.URL + "/openid/v1/jwks", "response_types_supported": []string{"id_token"},
			"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256"},
		})
	case "get /openid/v1/jwks":
		s.mu.Unlock()
		data := s.JWKS()
		s.mu.Lock()
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Write(data)
	default:
		refuse(w, http.StatusNotFound, "NotFound", "the server could not find the requested resource")
	}
}

// read says what a request is about.
func read(r *http.Request) request {
	verb := map[string]string{"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}[r.Method]
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")
	out := request{verb: verb}
	switch {
	case len(parts) > 2 && parts[0] == "api" && parts[1] == "v1":
		parts = parts[2:]
	case len(parts) > 3 && parts[0] == "apis":
		out.group, parts = parts[1], parts[3:]
	default:
		return request{verb: verb, url: r.URL.Path}
	}
	if parts[0] == "namespaces" && len(parts) > 2 {
		out.namespace, parts = parts[1], parts[2:]
	}
	out.resource = parts[0]
	if len(parts) > 1 {
		out.name = parts[1]
	}
	if len(parts) > 2 { // a subresource, of which there is none here
		out.resource += "/" + strings.Join(parts[2:], "/")
	}
	if verb == "get" && out.name == "" {
		out.verb = "list"
	}
	return out
}

func (s *Server) allowsLocked(caller who, what request) bool {
	has := func(list []string, x string) bool { return slices.Contains(list, x) || slices.Contains(list, "*") }
	for _, name := range append([]string{caller.Name}, caller.Groups...) {
		for _, rule := range s.grants[name] {
			if what.url != "" {
				if has(rule.Verbs, what.verb) && has(rule.URLs, what.url) {
					return true
				}
				continue
			}
			if has(rule.Verbs, what.verb) && has(rule.Groups, what.group) && has(rule.Resources, what.resource) &&
				(rule.Namespace == "" || rule.Namespace == what.namespace) &&
				(len(rule.Names) == 0 || what.name != "" && slices.Contains(rule.Names, what.name)) {
				return true
			}
		}
	}
	return false
}

func (s *Server) reviewLocked(w http.ResponseWriter, r *http.Request, body []byte) {
	var in struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   any    `json:"metadata"`
		Status     any    `json:"status"`
		Spec       struct {
			Token     string   `json:"token"`
			Audiences []string `json:"audiences"`
		} `json:"spec"`
	}
	if !decode(w, r, "application/json", body, &in) {
		return
	}
	if in.APIVersion != "authentication.k8s.io/v1" || in.Kind != "TokenReview" || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" {
		refuse(w, http.StatusBadRequest, "BadRequest", "it is no TokenReview of v1")
		return
	}
	if in.Spec.Token == "" {
		refuse(w, http.StatusUnprocessableEntity, "Invalid", "spec.token: Required value")
		return
	}
	audiences := in.Spec.Audiences
	if len(audiences) == 0 {
		audiences = []string{Audience}
	}
	status := map[string]any{"user": map[string]any{}}
	if user, common, err := s.verifyLocked(in.Spec.Token, audiences); err != nil {
		status["error"] = err.Error()
	} else {
		status["authenticated"], status["user"], status["audiences"] = true, user, common
	}
	s.show(w, http.StatusCreated, "TokenReview", map[string]any{"metadata": map[string]any{}, "spec": in.Spec, "status": status})
}

// writeLocked creates or patches a ConfigMap.
func (s *Server) writeLocked(w http.ResponseWriter, r *http.Request, what request, body []byte) {
	type object struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name        string            `json:"name"`
			Namespace   string            `json:"namespace"`
			Labels      map[string]string `json:"labels"`
			Annotations map[string]string `json:"annotations"`
			Version     string            `json:"resourceVersion"`
		} `json:"metadata"`
		Data map[string]*string `json:"data"`
	}
	var in object
	if what.verb == "create" {
		if !decode(w, r, "application/json", body, &in) {
			return
		}
		at := [2]string{what.namespace, in.Metadata.Name}
		_, there := s.configMaps[at]
		_, hasNamespace := s.namespaces[what.namespace]
		switch {
		case in.Kind != "ConfigMap" || in.APIVersion != "v1" || in.Metadata.Name == "" || in.Metadata.Namespace != "" && in.Metadata.Namespace != what.namespace:
			refuse(w, http.StatusBadRequest, "BadRequest", "it is no ConfigMap of that namespace")
			return
		case !hasNamespace:
			missing(w, request{resource: "namespaces", name: what.namespace})
			return
		case there:
			refuse(w, http.StatusConflict, "AlreadyExists", "configmaps "+strconv.Quote(in.Metadata.Name)+" already exists")
			return
		}
		s.configMaps[at] = &kube.ConfigMap{Meta: kube.ConfigMapMeta{Meta: kube.Meta{Name: in.Metadata.Name, Namespace: what.namespace, UID: uuid.NewString(), Labels: in.Metadata.Labels}}}
		what.name = in.Metadata.Name
	} else if !decode(w, r, "application/merge-patch+json", body, &in) {
		return
	}
	m := s.configMaps[[2]string{what.namespace, what.name}]
	if m == nil {
		missing(w, what)
		return
	}
	if version := in.Metadata.Version; version != "" && version != m.Meta.Version {
		refuse(w, http.StatusConflict, "Conflict", "the object has been modified; please apply your changes to the latest version and try again")
		return
	}
	before := clone(*m)
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	if m.Meta.Annotations == nil {
		m.Meta.Annotations = map[string]string{}
	}
	maps.Copy(m.Meta.Annotations, in.Metadata.Annotations)
	for key, value := range in.Data {
		if value == nil {
			delete(m.Data, key)
		} else {
			m.Data[key] = *value
		}
	}
	if m.Meta.Version == "" || !maps.Equal(before.Data, m.Data) || !maps.Equal(before.Meta.Annotations, m.Meta.Annotations) {
		s.version++ // a change that changes nothing makes no new version
		m.Meta.Version = strconv.Itoa(s.version)
	}
	code := http.StatusOK
	if what.verb == "create" {
		code = http.StatusCreated
	}
	s.show(w, code, "ConfigMap", m)
}

func decode(w http.ResponseWriter, r *http.Request, contentType string, body []byte, into any) bool {
	if got, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || got != contentType {
		refuse(w, http.StatusUnsupportedMediaType, "UnsupportedMediaType", "the body of the request was in an unknown format")
		return false
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		refuse(w, http.StatusBadRequest, "BadRequest", err.Error())
		return false
	}
	return true
}

// show answers with an object, dressed as a real one is.
func (s *Server) show(w http.ResponseWriter, code int, kind string, v any) {
	data, err := json.Marshal(v)
	out := map[string]any{}
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		panic(err)
	}
	out["kind"], out["apiVersion"] = kind, "v1"
	if kind == "TokenReview" {
		out["apiVersion"] = "authentication.k8s.io/v1"
	}
	if meta, ok := out["metadata"].(map[string]any); ok {
		maps.DeleteFunc(meta, func(_ string, v any) bool { return v == nil || v == "" })
		if meta["uid"] != nil {
			if meta["resourceVersion"] == nil {
				meta["resourceVersion"] = strconv.Itoa(s.version)
			}
			meta["managedFields"] = []any{map[string]any{"manager": "kubeapi", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{}}}
		}
	}
	answer(w, code, out)
}

func missing(w http.ResponseWriter, what request) {
	refuse(w, http.StatusNotFound, "NotFound", what.resource+" "+strconv.Quote(what.name)+" not found")
}

func refuse(w http.ResponseWriter, code int, reason, message string) {
	answer(w, code, map[string]any{
		"kind": "Status", "apiVersion": "v1", "metadata": map[string]any{}, "status": "Failure", "message": message, "reason": reason, "code": code,
	})
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}

// quiet keeps refused handshakes out of the test's output.
func quiet() *log.Logger { return log.New(io.Discard, "", 0) }
