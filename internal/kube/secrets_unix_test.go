//go:build unix

package kube_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fakes/kubeapi"
	"github.com/plastron/plastron/internal/fakes/kubelet"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
)

// A kubeconfig that holds a secret, and the files of secrets that it names, count
// only while nobody else can read them (R113). What a kubelet puts into a volume is
// for whom Kubernetes says.
func TestSecretFiles(t *testing.T) {
	api, _ := cluster(t)
	grant(api, "system:serviceaccount:spire:spire-server")
	api.AddNode("node-2", nil)
	server := api.AddPod(kubeapi.Pod{Namespace: "spire", Name: "server", ServiceAccount: "spire-server", Node: "node-2"})
	token := api.Token(server, kubeapi.TokenOptions{Audience: kubeapi.Audience})
	beside := func(kubeconfig, name string) string { return filepath.Join(filepath.Dir(kubeconfig), name) }
	for name, c := range map[string]struct {
		user map[string]any
		file string // that others can read; "": the kubeconfig
		ok   bool
	}{
		"token in it":   {user: map[string]any{"token": token}},
		"key in it":     {},
		"nothing in it": {user: map[string]any{"tokenFile": "token"}, ok: true},
		"token's file":  {user: map[string]any{"tokenFile": "token"}, file: "token"},
		"key's file":    {user: map[string]any{"client-certificate": "cert.pem", "client-key": "key.pem"}, file: "key.pem"},
		"certificate":   {user: map[string]any{"client-certificate": "cert.pem", "client-key": "key.pem"}, file: "cert.pem", ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			path := api.Kubeconfig("plastron")
			cert, key := inline(t, path)
			if c.user != nil {
				path = api.WriteKubeconfig(c.user)
			}
			for name, text := range map[string]string{"token": token, "cert.pem": cert, "key.pem": key} {
				if err := os.WriteFile(beside(path, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			client := open(t, path)
			file := path
			if c.file != "" {
				file = beside(path, c.file)
			}
			if err := os.Chmod(file, 0o644); err != nil {
				t.Fatal(err)
			}
			_, called := client.Node(t.Context(), "node-1")
			_, opened := kube.ClientConfig{Kubeconfig: path}.Open()
			for _, err := range []error{called, opened} {
				if c.ok && err != nil {
					t.Error(err)
				}
				if !c.ok && (err == nil || !strings.Contains(err.Error(), file+" has mode 0644") || strings.Contains(err.Error(), token)) {
					t.Errorf("%v", err)
				}
			}
			if !c.ok && fault.ReasonOf(opened) != "key_file_unsafe" {
				t.Errorf("%v", opened)
			}
			if c.ok || os.Geteuid() != 0 {
				return
			}
			// The same file as a kubelet, which is root, mounts it, and as another would.
			at := func(name string) string { return beside(path, name) }
			link := filepath.Base(file)
			if err := errors.Join(os.Chmod(at(""), 0o1777), os.Mkdir(at("..2026"), 0o755), os.Rename(file, at("..2026/"+link)),
				os.Symlink("..2026", at("..data")), os.Symlink("..data/"+link, file)); err != nil {
				t.Fatal(err)
			}
			open(t, path)
			if err := os.Lchown(at("..data"), 65534, 65534); err != nil {
				t.Fatal(err)
			}
			if _, err := (kube.ClientConfig{Kubeconfig: path}).Open(); fault.ReasonOf(err) != "key_file_unsafe" {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("pod", func(t *testing.T) {
		dir := api.ServiceAccountDir(server)
		if err := os.Chmod(filepath.Join(dir, "token"), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
		t.Setenv("KUBERNETES_SERVICE_PORT", api.Port())
		if _, err := (kube.ClientConfig{ServiceAccountDir: dir}).Open(); err != nil {
			t.Error(err)
		}
	})
}

// The same of what is shown to a kubelet.
func TestKubeletSecretFiles(t *testing.T) {
	fake := kubelet.New(t)
	byKey := by(fake)
	byKey.TokenPath, byKey.CertificatePath, byKey.KeyPath = "", fake.CertificatePath, fake.KeyPath
	for file, config := range map[string]kube.KubeletConfig{fake.TokenPath: by(fake), fake.KeyPath: byKey} {
		k := openKubelet(t, config)
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
		_, opened := config.Open()
		_, asked := k.Pods(t.Context())
		for _, err := range []error{opened, asked} {
			if fault.ReasonOf(err) != "key_file_unsafe" || !strings.Contains(err.Error(), file+" has mode 0644") {
				t.Errorf("%v", err)
			}
		}
	}
}

// inline returns the certificate and the key that are in a kubeconfig.
func inline(t *testing.T, path string) (cert, key string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	return string(file.Users[0].User.Cert), string(file.Users[0].User.Key)
}
