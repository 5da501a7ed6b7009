// Package docker proves which container of Docker or podman a local process runs
// in: the kernel names the container (package container), and the engine, asked
// over its socket, says what it was started as. Selectors have the type "docker"
// and SPIRE's names and forms. There are no facts for rules.
//
// What must always hold: an engine is believed only if root or the agent's own
// user runs it; a container that a user's own podman made has no selectors, since
// that user can give it any label; what the engine says is of the container that
// the kernel named. It never changes, so it is asked for once.
package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/container"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
	"github.com/plastron/plastron/internal/workload"
)

const (
	selectorType = "docker"
	maxAnswer    = 4 << 20
	maxSelectors = 512  // of labels, and of variables
	maxKnown     = 1024 // containers that are remembered
	maxAsking    = 16   // requests under way at once
)

// Config is the plugin's configuration, with SPIRE's keys. Its zero value works.
type Config struct {
	// DockerSocketPath is Docker's socket. Default unix:///var/run/docker.sock.
	DockerSocketPath string `hcl:"docker_socket_path"`
	// PodmanSocketPath is the socket of root's podman. Default unix:///run/podman/podman.sock.
	PodmanSocketPath string `hcl:"podman_socket_path"`
	// DockerVersion is the version of the API that is asked for, such as "1.41".
	// Default: the engine's own.
	DockerVersion string `hcl:"docker_version"`
	// CgroupRoots are directories of control groups, "/a/b", below which an engine
	// with --cgroup-parent makes containers.
	CgroupRoots []string `hcl:"cgroup_roots"`

	// What follows is SPIRE's and either has no effect or is refused, see Validate.
	UseNewContainerLocator      *bool       `hcl:"use_new_container_locator"`
	VerboseContainerLocatorLogs bool        `hcl:"verbose_container_locator_logs"`
	PodmanSocketPathTemplate    string      `hcl:"podman_socket_path_template"`
	ContainerIDCgroupMatchers   []string    `hcl:"container_id_cgroup_matchers"`
	DockerHost                  string      `hcl:"docker_host"`
	Sigstore                    config.Node `hcl:"sigstore"`
}

var version = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,3}$`)

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	var faults []error
	refuse := func(it bool, format string, args ...any) {
		if it {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", format, args...))
		}
	}
	for _, at := range []struct{ key, path string }{{"docker_socket_path", c.DockerSocketPath}, {"podman_socket_path", c.PodmanSocketPath}} {
		p := strings.TrimPrefix(at.path, "unix://")
		refuse(at.path != "" && (!path.IsAbs(p) || len(p) > 107), "%s: %q is not the path of a Unix socket, unix:///PATH", at.key, at.path)
	}
	for _, root := range c.CgroupRoots {
		refuse(!path.IsAbs(root) || root == "/" || path.Clean(root) != root, "cgroup_roots: %q is not an absolute path below /", root)
	}
	refuse(c.DockerVersion != "" && !version.MatchString(c.DockerVersion), `docker_version: %q is not a version of the API, such as "1.41"`, c.DockerVersion)
	refuse(c.UseNewContainerLocator != nil && !*c.UseNewContainerLocator, "use_new_container_locator: there is one way to find a process's container; remove it")
	refuse(c.PodmanSocketPathTemplate != "", "podman_socket_path_template is not offered: a user can say anything of the containers of a podman of his own; remove it, and use the selector unix:uid")
	refuse(len(c.ContainerIDCgroupMatchers) > 0, "container_id_cgroup_matchers is not offered: containers are found by the names that engines give them; remove it, and name an unusual --cgroup-parent in cgroup_roots")
	refuse(c.DockerHost != "", "docker_host is for Windows; remove it, and use docker_socket_path")
	refuse(c.Sigstore.Present(), "sigstore is not offered: remove the block, and use the selector docker:image_config_digest")
	return errors.Join(faults...)
}

// Open returns an attestor. It connects to nothing.
func (c *Config) Open(context.Context) (workload.Attestor, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Attestor{
		Config: *c,
		docker: clientOf("Docker", cmp.Or(c.DockerSocketPath, "/var/run/docker.sock")),
		podman: clientOf("podman", cmp.Or(c.PodmanSocketPath, "/run/podman/podman.sock")),
		asking: make(chan struct{}, maxAsking), known: map[string]workload.Attested{},
	}, nil
}

// Attestor is made by Config.Open.
type Attestor struct {
	Config
	docker, podman *http.Client
	asking         chan struct{}

	mu    sync.Mutex // guards everything below
	known map[string]workload.Attested
}

// Attest says which container process pid is in, and what that was started as.
func (a *Attestor) Attest(ctx context.Context, pid int) (workload.Attested, error) {
	if err := ctx.Err(); err != nil {
		return workload.Attested{}, err
	}
	in, err := container.Places(a.CgroupRoots).Of(pid)
	if err != nil || in.ID == "" {
		return workload.Attested{}, err
	}
	if in.Within != "" {
		return outside("the process is in what looks like a container, below %q, which others than root's engine may manage", in.Within), nil
	}
	if said, ok := a.remembered(in.ID); ok {
		return said, nil
	}
	select {
	case a.asking <- struct{}{}:
		defer func() { <-a.asking }()
	case <-ctx.Done():
		return workload.Attested{}, errUnavailable.Because(ctx.Err())
	}
	if said, ok := a.remembered(in.ID); ok {
		return said, nil
	}
	client := a.docker
	if in.Podman {
		client = a.podman
	}
	answer, found, err := a.inspect(ctx, client, in.ID)
	if err != nil {
		return workload.Attested{}, err
	}
	if !found {
		return outside("the engine does not know the container that the process is in: another runtime's"), nil
	}
	said := describe(answer)
	a.remember(in.ID, said)
	return said, nil
}

func outside(format string, args ...any) workload.Attested {
	return workload.Attested{Omitted: []string{"docker: " + fmt.Sprintf(format, args...)}}
}

// inspection is what counts of an engine's answer. All of it was fixed when the
// container was made.
type inspection struct {
	ID     string `json:"Id"`
	Image  string `json:"Image"` // by digest
	Config struct {
		Image  string            `json:"Image"` // as it was named
		Labels map[string]string `json:"Labels"`
		Env    []string          `json:"Env"`
	} `json:"Config"`
}

var (
	errUnavailable = fault.New(fault.Unavailable, "engine_unavailable", "the container engine cannot be asked").
			Fix("see whether it runs, whether docker_socket_path or podman_socket_path names its socket, and whether the agent's user may open that")
	errUnexpected = fault.New(fault.Unavailable, "engine_unexpected", "what answers for the container engine is not one, or speaks of another container")
	errStranger   = fault.New(fault.Denied, "engine_untrusted", "another user than root or the agent's own runs the container engine").
			Fix("let root run the engine, or the agent's user")
)

// inspect asks for a container; found is whether the engine knows it.
func (a *Attestor) inspect(ctx context.Context, client *http.Client, id string) (answer inspection, found bool, err error) {
	address := "http://engine/containers/" + id + "/json"
	if a.DockerVersion != "" {
		address = "http://engine/v" + a.DockerVersion + "/containers/" + id + "/json"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return answer, false, err
	}
	resp, err := client.Do(req)
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if errors.Is(err, errStranger) {
		return answer, false, errStranger
	}
	if err != nil {
		return answer, false, errUnavailable.Because(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return answer, false, errUnavailable.Because(err)
	case len(data) > maxAnswer:
		return answer, false, errUnexpected.Because(errors.New("its answer is too large"))
	case resp.StatusCode == http.StatusNotFound:
		return answer, false, nil
	case resp.StatusCode != http.StatusOK:
		return answer, false, errUnexpected.Because(fmt.Errorf("HTTP status %d", resp.StatusCode))
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return answer, false, errUnexpected.Because(err)
	}
	if answer.ID != id {
		return answer, false, errUnexpected.Because(errors.New("it answers for another container"))
	}
	return answer, true, nil
}

// clientOf returns a client of the engine behind a socket. Each request looks anew
// at who runs it.
func clientOf(name, socket string) *http.Client {
	socket = strings.TrimPrefix(socket, "unix://")
	return &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if p := localsocket.PeerOf(c); !p.Known || p.UID != 0 && int(p.UID) != os.Geteuid() {
				c.Close()
				return nil, errStranger
			}
			return c, nil
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func describe(answer inspection) workload.Attested {
	c := workload.Collector{Type: selectorType}
	add := func(key, value string) { c.Omit(key, c.Add(key, value)) }
	if answer.Config.Image != "" {
		add("image_id", answer.Config.Image)
	}
	if digest := strings.TrimPrefix(answer.Image, "sha256:"); len(digest) == 64 && strings.Trim(digest, "0123456789abcdef") == "" {
		add("image_config_digest", "sha256:"+digest)
	}
	labels := slices.Sorted(maps.Keys(answer.Config.Labels))
	if len(labels) > maxSelectors {
		c.Omit("label", fmt.Errorf("only the first %d are looked at", maxSelectors))
		labels = labels[:maxSelectors]
	}
	for _, key := range labels {
		if key == "" || strings.Contains(key, ":") { // R43: a:b=c would pass for a=b:c
			c.Omit("label", fmt.Errorf("the key %q is empty or holds a colon", key))
			continue
		}
		add("label", key+":"+answer.Config.Labels[key])
	}
	env := answer.Config.Env
	if len(env) > maxSelectors {
		c.Omit("env", fmt.Errorf("only the first %d are looked at", maxSelectors))
		env = env[:maxSelectors]
	}
	for _, variable := range env {
		if name, _, _ := strings.Cut(variable, "="); name == "" {
			c.Omit("env", errors.New("a variable has no name"))
			continue
		}
		add("env", variable)
	}
	return c.Attested()
}

func (a *Attestor) remembered(id string) (workload.Attested, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	said, ok := a.known[id]
	return said, ok
}

func (a *Attestor) remember(id string, said workload.Attested) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxKnown {
		clear(a.known)
	}
	a.known[id] = said
}
