package kube_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
)

var (
	containerA = strings.Repeat("a", 64)
	containerB = strings.Repeat("b", 64)
)

func web() kubelet.Pod {
	return kubelet.Pod{Namespace: "shop", Name: "web-1", UID: "u-web", ServiceAccount: "web", Labels: map[string]string{"app": "web"},
		Owners:     []kubelet.Owner{{Kind: "ReplicaSet", Name: "web", UID: "u-rs"}},
		Containers: []kubelet.Container{{Name: "main", Image: "shop/web:1", ImageID: "shop/web@sha256:1", ID: containerA}, {Name: "late", Image: "shop/late"}},
		Init:       []kubelet.Container{{Name: "init", Image: "shop/init:1", ImageID: "shop/init@sha256:2", ID: containerB}}}
}

// by is the configuration that a kubelet is meant to be asked with.
func by(k *kubelet.Kubelet) kube.KubeletConfig {
	return kube.KubeletConfig{SecurePort: k.SecurePort(), CAPath: k.CAPath, TokenPath: k.TokenPath}
}

func openKubelet(t *testing.T, c kube.KubeletConfig) *kube.Kubelet {
	t.Helper()
	k, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKubelet(t *testing.T) {
	fake := kubelet.New(t)
	fake.Put(web())
	fake.AllowAnonymous()
	for name, change := range map[string]func(*kube.KubeletConfig){
		"token": func(*kube.KubeletConfig) {},
		"client certificate": func(c *kube.KubeletConfig) {
			c.TokenPath, c.CertificatePath, c.KeyPath = "", fake.CertificatePath, fake.KeyPath
		},
		"anonymous":      func(c *kube.KubeletConfig) { c.TokenPath, c.Anonymous = "", true },
		"name":           func(c *kube.KubeletConfig) { c.NodeName = "localhost" },
		"address":        func(c *kube.KubeletConfig) { c.NodeName = "127.0.0.1" }, // status.hostIP
		"IPv6 address":   func(c *kube.KubeletConfig) { c.NodeName = "::ffff:127.0.0.1" },
		"unverified":     func(c *kube.KubeletConfig) { c.CAPath, c.SkipVerification = "", true },
		"pinned":         func(c *kube.KubeletConfig) { c.CAPath, c.Pinned = "", fake.ServingPath },
		"read-only port": func(c *kube.KubeletConfig) { *c = kube.KubeletConfig{ReadOnlyPort: fake.ReadOnlyPort()} },
		"read-only port, with a node's name": func(c *kube.KubeletConfig) { // nothing proves who answers there
			*c = kube.KubeletConfig{NodeName: "node.invalid", ReadOnlyPort: fake.ReadOnlyPort()}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := by(fake)
			change(&c)
			pods, err := openKubelet(t, c).Pods(t.Context())
			if err != nil || len(pods) != 1 {
				t.Fatalf("Pods() = %v, %v", pods, err)
			}
			p := pods[0]
			want := kube.Pod{
				Meta: kube.Meta{Name: "web-1", Namespace: "shop", UID: "u-web", Labels: map[string]string{"app": "web"},
					Owners: []kube.Owner{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "u-rs", Controller: true}}},
				Spec: kube.PodSpec{NodeName: "node-1", ServiceAccount: "web", Containers: []kube.ContainerSpec{{Name: "main", Image: "shop/web:1"}, {Name: "late", Image: "shop/late"}},
					Init: []kube.ContainerSpec{{Name: "init", Image: "shop/init:1"}}},
				Status: kube.PodStatus{Phase: "Running", HostIP: "127.0.0.1",
					Containers: []kube.ContainerStatus{{Name: "main", Image: "shop/web:1", ImageID: "shop/web@sha256:1", ID: "containerd://" + containerA}, {Name: "late", Image: "shop/late"}},
					Init:       []kube.ContainerStatus{{Name: "init", Image: "shop/init:1", ImageID: "shop/init@sha256:2", ID: "containerd://" + containerB}}},
			}
			if diff := cmp.Diff(want, p); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A kubelet that lets us not in, is not the one, or says what no kubelet says (W28).
func TestKubeletRefuses(t *testing.T) {
	fake, other := kubelet.New(t), kubelet.New(t)
	fake.Know("of-somebody-else")
	foreign := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(foreign, []byte("of-somebody-else\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	unknown := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(unknown, []byte("of-nobody"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
	}
	for name, c := range map[string]struct {
		change func(*kube.KubeletConfig)
		answer http.HandlerFunc
		reason string
	}{
		"unknown token":       {change: func(c *kube.KubeletConfig) { c.TokenPath = unknown }, reason: "kubelet_denied"},
		"no right":            {change: func(c *kube.KubeletConfig) { c.TokenPath = foreign }, reason: "kubelet_denied"},
		"anonymous":           {change: func(c *kube.KubeletConfig) { c.TokenPath, c.Anonymous = "", true }, reason: "kubelet_denied"},
		"another's CA":        {change: func(c *kube.KubeletConfig) { c.CAPath = other.CAPath }, reason: "kubelet_unverified"},
		"another certificate": {change: func(c *kube.KubeletConfig) { c.CAPath, c.Pinned = "", other.ServingPath }, reason: "kubelet_unverified"},
		"client of another": {change: func(c *kube.KubeletConfig) {
			c.TokenPath, c.CertificatePath, c.KeyPath = "", other.CertificatePath, other.KeyPath
		}, reason: "kubelet_unavailable"},
		"nobody there":    {change: func(c *kube.KubeletConfig) { c.SecurePort = closedPort(t) }, reason: "kubelet_unavailable"},
		"404":             {answer: http.NotFound, reason: "kubelet_unexpected"},
		"500":             {answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, reason: "kubelet_unexpected"},
		"redirect":        {answer: http.RedirectHandler("https://127.0.0.1:1/pods", http.StatusFound).ServeHTTP, reason: "kubelet_unexpected"},
		"not JSON":        {answer: text("<html>"), reason: "kubelet_unexpected"},
		"empty":           {answer: text(""), reason: "kubelet_unexpected"},
		"another kind":    {answer: text(`{"kind":"NodeList","apiVersion":"v1","items":[]}`), reason: "kubelet_unexpected"},
		"another version": {answer: text(`{"kind":"PodList","apiVersion":"v2","items":[]}`), reason: "kubelet_unexpected"},
		"wrong types":     {answer: text(`{"kind":"PodList","apiVersion":"v1","items":[{"metadata":{"uid":1}}]}`), reason: "kubelet_unexpected"},
		"cut short":       {answer: text(`{"kind":"PodList","apiVersion":"v1","items":[{"metadata":`), reason: "kubelet_unexpected"},
		"broken off": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "{")
		}, reason: "kubelet_unavailable"},
		"100 MiB": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(100<<20))
			w.Write(make([]byte, 1<<20))
		}, reason: "kubelet_unexpected"},
	} {
		t.Run(name, func(t *testing.T) {
			fake.Answer(c.answer)
			config := by(fake)
			if c.change != nil {
				c.change(&config)
			}
			pods, err := openKubelet(t, config).Pods(t.Context())
			if err == nil || fault.ReasonOf(err) != c.reason {
				t.Errorf("Pods() = %v, %v, want %s", pods, err, c.reason)
			}
			for _, secret := range []string{"first", "of-somebody-else", "of-nobody"} {
				if strings.Contains(fmt.Sprint(err), secret) {
					t.Errorf("the token is in %q", err)
				}
			}
		})
	}
}

func closedPort(t *testing.T) int {
	k := kubelet.New(t)
	k.Kill()
	return k.SecurePort()
}

func TestKubeletConfig(t *testing.T) {
	fake := kubelet.New(t)
	none := filepath.Join(t.TempDir(), "none")
	for name, c := range map[string]struct {
		change func(*kube.KubeletConfig)
		want   string
	}{
		"port":              {func(c *kube.KubeletConfig) { c.SecurePort = 65536 }, "not a port"},
		"both ports":        {func(c *kube.KubeletConfig) { c.ReadOnlyPort = 1 }, "only one of them can be asked"},
		"CA and any":        {func(c *kube.KubeletConfig) { c.SkipVerification = true }, "only one of them can say"},
		"CA and pinned":     {func(c *kube.KubeletConfig) { c.Pinned = "x" }, "only one of them can say"},
		"two credentials":   {func(c *kube.KubeletConfig) { c.Anonymous = true }, "only one of them can say"},
		"key without":       {func(c *kube.KubeletConfig) { c.TokenPath, c.KeyPath = "", "x" }, "set together"},
		"read-only and TLS": {func(c *kube.KubeletConfig) { c.SecurePort, c.ReadOnlyPort = 0, 1 }, "neither TLS nor"},
		"node":              {func(c *kube.KubeletConfig) { c.NodeName = "a/b" }, "not the name of a node"},
		"zone":              {func(c *kube.KubeletConfig) { c.NodeName = "fe80::1%lo" }, "not the name of a node"},
		"no CA":             {func(c *kube.KubeletConfig) { c.CAPath = none }, "kubelet_ca_path"},
		"CA is none":        {func(c *kube.KubeletConfig) { c.CAPath = fake.TokenPath }, "no certificate in PEM"},
		"no pin":            {func(c *kube.KubeletConfig) { c.CAPath, c.Pinned = "", fake.TokenPath }, "begin with a certificate"},
		"no token":          {func(c *kube.KubeletConfig) { c.TokenPath = none }, "token_path"},
		"token is none":     {func(c *kube.KubeletConfig) { c.TokenPath = fake.CAPath }, "what no token does"},
		"certificate is a token": {func(c *kube.KubeletConfig) {
			c.TokenPath, c.CertificatePath, c.KeyPath = "", fake.TokenPath, fake.KeyPath
		}, "not a certificate and its key"},
	} {
		t.Run(name, func(t *testing.T) {
			config := by(fake)
			c.change(&config)
			if _, err := config.Open(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open() = %v, want it to say %q", err, c.want)
			}
		})
	}
}

// The files are read for each request: a token that was rotated works at once.
func TestKubeletRotation(t *testing.T) {
	fake := kubelet.New(t)
	k := openKubelet(t, by(fake))
	for _, token := range []string{"second", "third"} {
		fake.Rotate(token)
		if _, err := k.Pods(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// R62: who comes while a request is under way shares it, unless its answer could
// be older than they are; those share the next.
func TestKubeletIsShared(t *testing.T) {
	fake := kubelet.New(t)
	asked, release := make(chan struct{}), make(chan struct{})
	fake.Answer(func(w http.ResponseWriter, _ *http.Request) {
		fake.Answer(nil)
		close(asked)
		<-release
		fake.Put(web()) // so this answer is without it, and the next is not
		fmt.Fprint(w, `{"kind":"PodList","apiVersion":"v1","items":null}`)
	})
	k := openKubelet(t, by(fake))
	var callers sync.WaitGroup
	call := func(at time.Time, check func(*kube.Pods) bool) {
		for range 100 {
			callers.Go(func() {
				if p, err := k.Since(t.Context(), at); err != nil || !check(p) {
					t.Errorf("%v, %v", p, err)
				}
			})
		}
	}
	call(time.Now(), func(*kube.Pods) bool { return true })
	<-asked
	now := time.Now() // after the request began
	call(now, func(p *kube.Pods) bool { return p.Pod("u-web") != nil })
	close(release)
	callers.Wait()
	if p, err := k.Since(t.Context(), now); err != nil || p.Pod("u-web") == nil {
		t.Errorf("%v, %v", p, err)
	}
	if n := fake.Requests(); n != 2 {
		t.Errorf("%d requests, want 2", n)
	}
}

// Who leaves does not end the request that others wait for; a kubelet that hangs
// holds nobody longer than they want.
func TestKubeletHangs(t *testing.T) {
	fake := kubelet.New(t)
	release := fake.Hold()
	k := openKubelet(t, by(fake))
	at := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() { _, err := k.Since(ctx, at); left <- err }()
	stayed := make(chan error)
	go func() { _, err := k.Since(t.Context(), at); stayed <- err }()
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) || fault.KindOf(err) != fault.Unavailable {
		t.Error(err)
	}
	release()
	if err := <-stayed; err != nil || fake.Requests() != 1 {
		t.Errorf("%v after %d requests", err, fake.Requests())
	}
}

// What the kubelet shows twice counts for nothing.
func TestContainersOfTwoPods(t *testing.T) {
	fake := kubelet.New(t)
	a, b := web(), web()
	b.UID, b.Init = "u-b", nil
	fake.Put(a, b)
	p, err := openKubelet(t, by(fake)).Since(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{containerA: "", containerB: "u-web"} {
		if uid, known := p.PodOf(id); uid != want || !known {
			t.Errorf("PodOf(%s) = %q, %t, want %q", id[:4], uid, known, want)
		}
	}
	if uid, known := p.PodOf(""); uid != "" || known {
		t.Errorf("a container without ID is of %q", uid)
	}
	if c := p.Pod("u-web").Container(containerB); c == nil || c.Name != "init" {
		t.Errorf("%+v", c)
	}
	if c := p.Pod("u-web").Container(""); c != nil {
		t.Errorf("%+v", c)
	}
	item := `{"metadata":{"uid":"u","name":"a"}}`
	fake.Answer(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"kind":"PodList","apiVersion":"v1","items":[%s,%s]}`, item, item)
	})
	p, err = openKubelet(t, by(fake)).Since(t.Context(), time.Now())
	if err != nil || p.Pod("u") != nil {
		t.Errorf("%v, %v", p, err)
	}
}
