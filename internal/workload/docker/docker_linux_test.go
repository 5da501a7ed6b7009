package docker

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fakes/engine"
	"github.com/plastron/plastron/internal/fakes/kubepods"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/workload"
	"github.com/plastron/plastron/internal/workload/workloadtest"
)

func open(t *testing.T, c Config) *Attestor {
	t.Helper()
	a, err := c.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a.(*Attestor)
}

func web(id string) engine.Container {
	return engine.Container{ID: id, Image: "shop/web:1", ImageDigest: "sha256:" + strings.Repeat("d", 64),
		Labels: map[string]string{"app": "web", "empty": "", "a:b": "c"}, Env: []string{"MODE=prod", "EMPTY=", "URL=http://a:1/?x=y", "=x"}}
}

func values(a workload.Attested) (all []string) {
	for _, s := range a.Selectors {
		all = append(all, s.Value)
	}
	return all
}

func in(t *testing.T, path string) int { return kubepods.Make(t, path, kubepods.Hybrid).Start(t) }

func TestContract(t *testing.T) {
	e, id := engine.New(t), kubepods.NewID()
	e.Put(web(id))
	workloadtest.RunOn(t, in(t, "/docker/"+id), func(t *testing.T) workload.Attestor { return open(t, Config{DockerSocketPath: e.Socket}) })
}

// Claim 28: docker with both drivers, podman as root, and the right socket for each.
func TestSelectors(t *testing.T) {
	docker, podman := engine.New(t), engine.New(t)
	want := []string{"env:EMPTY=", "env:MODE=prod", "env:URL=http://a:1/?x=y", "image_config_digest:sha256:" + strings.Repeat("d", 64),
		"image_id:shop/web:1", "label:app:web", "label:empty:"}
	for path, e := range map[string]*engine.Engine{
		"/docker/ID": docker, "/system.slice/docker-ID.scope": docker, "/machine.slice/libpod-ID.scope": podman, "/libpod_parent/libpod-ID": podman,
	} {
		id := kubepods.NewID()
		e.Put(web(id))
		a := open(t, Config{DockerSocketPath: "unix://" + docker.Socket, PodmanSocketPath: podman.Socket, DockerVersion: "1.41"})
		said, err := a.Attest(t.Context(), in(t, strings.ReplaceAll(path, "ID", id)))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, values(said)); diff != "" {
			t.Errorf("%s: %s", path, diff)
		}
		if len(said.Omitted) != 2 || said.Facts != nil { // R43: a key with a colon; a variable without a name
			t.Errorf("%s: %+v", path, said)
		}
	}
}

// What is in no container, in another runtime's, or where a user could have made
// the name up (T7), has no selector.
func TestOutside(t *testing.T) {
	e, id := engine.New(t), kubepods.NewID()
	e.Put(web(id))
	a := open(t, Config{DockerSocketPath: e.Socket, PodmanSocketPath: e.Socket})
	for path, why := range map[string]string{
		"": "",
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope": `below "user.slice"`,
		"/system.slice/some.service/docker-" + id + ".scope":                               `below "some.service"`,
		"/docker/" + kubepods.NewID():                                                      "does not know the container",
	} {
		pid := os.Getpid()
		if path != "" {
			pid = in(t, path)
		}
		said, err := a.Attest(t.Context(), pid)
		if err != nil || len(said.Selectors) != 0 || !strings.Contains(fmt.Sprint(said.Omitted), why) || why == "" && said.Omitted != nil {
			t.Errorf("%s: %+v, %v", path, said, err)
		}
	}
	if e.Requests() != 1 {
		t.Errorf("%d requests", e.Requests())
	}
}

// W28: an engine that is away, hangs up, or talks nonsense is an error. What was
// said of a container before stays true (R62).
func TestEngineAway(t *testing.T) {
	e, id, other := engine.New(t), kubepods.NewID(), kubepods.NewID()
	e.Put(web(id))
	e.Put(web(other))
	a := open(t, Config{DockerSocketPath: e.Socket})
	held, fresh := in(t, "/docker/"+id), in(t, "/docker/"+other)
	var callers sync.WaitGroup
	for range 100 {
		callers.Go(func() {
			if _, err := a.Attest(t.Context(), held); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if n := e.Requests(); n < 1 || n > maxAsking {
		t.Errorf("%d requests", n)
	}
	refused := func(reason string) {
		t.Helper()
		if said, err := a.Attest(t.Context(), fresh); fault.ReasonOf(err) != reason {
			t.Errorf("%+v, %v, want %s", said, err, reason)
		}
	}
	for reason, answers := range map[string][]http.HandlerFunc{
		"engine_unexpected": {
			func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
			func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
			func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"Id":%q}`, id) }, // another's
			func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxAnswer+1)) },
			http.RedirectHandler("http://engine/containers/"+other+"/json", http.StatusFound).ServeHTTP,
		},
		"engine_unavailable": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		for _, answer := range answers {
			e.Answer(answer)
			refused(reason)
		}
	}
	e.Kill()
	refused("engine_unavailable")
	if said, err := a.Attest(t.Context(), held); err != nil || len(said.Selectors) == 0 {
		t.Errorf("%+v, %v", said, err)
	}
	e.Answer(nil)
	e.Revive()
	if said, err := a.Attest(t.Context(), fresh); err != nil || len(said.Selectors) == 0 {
		t.Errorf("%+v, %v", said, err)
	}
}

// T7: a socket that another user serves is not asked.
func TestForeignEngine(t *testing.T) {
	id := kubepods.NewID()
	pid := in(t, "/docker/"+id)
	dir, err := os.MkdirTemp("", "e")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "engine.sock")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "DOCKER_TEST_SOCKET="+socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stdin.Close(); cmd.Wait() }()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if said, err := open(t, Config{DockerSocketPath: socket}).Attest(t.Context(), pid); fault.ReasonOf(err) != "engine_untrusted" {
		t.Errorf("%+v, %v", said, err)
	}
}

// TestMain lets the test binary be another user who listens.
func TestMain(m *testing.M) {
	if socket := os.Getenv("DOCKER_TEST_SOCKET"); socket != "" {
		if _, err := net.Listen("unix", socket); err != nil {
			os.Exit(1)
		}
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestConfig(t *testing.T) {
	no, yes := false, true
	var block struct {
		Sigstore config.Node `hcl:"sigstore"`
	}
	if err := config.Decode("x", []byte("sigstore { }"), &block); err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]Config{
		"docker_socket_path":            {DockerSocketPath: "tcp://127.0.0.1:2375"},
		"podman_socket_path":            {PodmanSocketPath: "run/x"},
		"docker_version":                {DockerVersion: "1.41/../x"},
		"cgroup_roots":                  {CgroupRoots: []string{"/a/"}},
		"use_new_container_locator":     {UseNewContainerLocator: &no},
		"podman_socket_path_template":   {PodmanSocketPathTemplate: "unix:///run/user/%d/podman/podman.sock"},
		"container_id_cgroup_matchers":  {ContainerIDCgroupMatchers: []string{"/docker/<id>"}},
		"docker_host is for Windows":    {DockerHost: "npipe://x"},
		"sigstore is not offered":       {Sigstore: block.Sigstore},
		`"1.41/../x" is not a version`:  {DockerVersion: "1.41/../x"},
		"is not the path of a Unix soc": {DockerSocketPath: "/" + strings.Repeat("x", 108)},
	} {
		if _, err := c.Open(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open() = %v, want it to say %q", err, want)
		}
	}
	open(t, Config{UseNewContainerLocator: &yes, VerboseContainerLocatorLogs: true})
}
