package docker

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

// With Docker itself: what it says of its containers, and where they are. It is
// for make soak, on a machine that has docker.io.
func TestDocker(t *testing.T) {
	if os.Getenv("PLASTRON_SOAK") == "" {
		return
	}
	if _, err := exec.LookPath("dockerd"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, and dockerd: apt-get install docker.io")
		}
		t.Skip("needs root, and dockerd: apt-get install docker.io")
	}
	dir, err := os.MkdirTemp("", "d") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	at := func(name string) string { return filepath.Join(dir, name) }
	socket := at("docker.sock")
	daemon := exec.Command("dockerd", "-H", "unix://"+socket, "--data-root", at("data"), "--exec-root", at("exec"), "-p", at("pid"),
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")
	var log bytes.Buffer
	daemon.Stdout, daemon.Stderr = &log, &log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		daemon.Process.Signal(syscall.SIGTERM)
		daemon.Wait()
		left, _ := filepath.Glob("/sys/fs/cgroup/*/docker")
		for _, group := range left {
			os.Remove(group) // if nothing is in it
		}
		if t.Failed() {
			t.Logf("dockerd printed:\n%s", log.String())
		}
	})
	docker := func(in []byte, args ...string) (string, error) {
		cmd := exec.Command("docker", append([]string{"-H", "unix://" + socket}, args...)...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := docker(nil, "version"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("dockerd does not answer")
		}
	}
	// An image of one static program that does nothing.
	source := at("idle.go")
	if err := os.WriteFile(source, []byte("package main\n\nimport \"os\"\n\nfunc main() { os.Stdin.Read(make([]byte, 1)); select {} }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", at("idle"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program, err := os.ReadFile(at("idle"))
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	w.WriteHeader(&tar.Header{Name: "idle", Mode: 0o755, Size: int64(len(program))})
	w.Write(program)
	w.Close()
	digest, err := docker(image.Bytes(), "import", "-c", `ENTRYPOINT ["/idle"]`, "-c", "ENV FROM=image", "-", "plastron.test/idle:1")
	if err != nil {
		t.Fatalf("%v: %s", err, digest)
	}
	id, err := docker(nil, "run", "-d", "-i", "--network", "none", "--label", "app=web", "--label", "a:b=c", "-e", "MODE=prod", "plastron.test/idle:1")
	if err != nil {
		t.Fatalf("%v: %s", err, id)
	}
	defer docker(nil, "rm", "-f", id)
	text, err := docker(nil, "inspect", "-f", "{{.State.Pid}}", id)
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	pid, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, Config{DockerSocketPath: "unix://" + socket})
	said, err := a.Attest(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"label:app:web", "env:MODE=prod", "env:FROM=image", "image_id:plastron.test/idle:1", "image_config_digest:" + digest} {
		if !slices.Contains(values(said), want) {
			t.Errorf("no selector docker:%s in %v", want, values(said))
		}
	}
	if len(said.Omitted) != 1 || slices.ContainsFunc(values(said), func(s string) bool { return strings.HasPrefix(s, "label:a") && s != "label:app:web" }) {
		t.Errorf("%+v", said)
	}
	if _, err := open(t, Config{DockerSocketPath: socket, DockerVersion: "9.99"}).Attest(t.Context(), pid); fault.ReasonOf(err) != "engine_unexpected" {
		t.Errorf("a version that is too new: %v", err)
	}
}
