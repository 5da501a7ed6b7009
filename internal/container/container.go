// Package container tells in which container, and in which pod, a process runs,
// from the kernel's record of its control groups and from nothing else. The
// mounts of a process are never looked at: it may have made them itself.
//
// What must always hold: of a control group's path only the part counts that the
// process cannot have made. A container that may make groups makes them below its
// own, so of several names of containers the first one is its own, and what
// follows is not read; a user or service that may make groups makes them below
// its own too, so what looks like a pod there is marked (Within) and believed by
// nobody. Records that contradict each other are refused.
package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/fault"
)

// maxRecord is more than the kernel's record of a process can be: a path of 4 KiB
// in each of 14 hierarchies.
const maxRecord = 64 << 10

// errAmbiguous refuses a process that seems to be in two places.
var errAmbiguous = fault.New(fault.Denied, "container_ambiguous",
	"the control groups of the process name two containers or two pods").
	Fix("let the container runtime alone move processes between control groups")

// Container is where a process runs. The zero Container is outside any.
type Container struct {
	ID     string // 64 hexadecimal digits; empty: in no container
	PodUID string // of the pod that the container belongs to; empty: to none
	// Within is the first directory above the container that is not known to be
	// the system's. Whoever manages it, such as a user with a podman of its own, can
	// have made up everything below, so neither ID nor PodUID is to be believed.
	// Empty: they are.
	Within string
	Podman bool // by its name the container is podman's
}

// Places are directories of control groups, "/a/b", below which pods and
// containers are believed besides the usual ones.
type Places []string

// Of returns where the process with this number runs.
func Of(pid int) (Container, error) { return Places(nil).Of(pid) }

// Of returns where the process with this number runs. The caller holds the process
// and looks at it again afterwards, so that the record is known to be its own.
func (p Places) Of(pid int) (Container, error) {
	record, err := read("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return Container{}, err
	}
	own, err := read("/proc/self/cgroup")
	if err != nil {
		return Container{}, err
	}
	return p.parse(record, own)
}

func read(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read control groups: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("read control groups: %w", err)
	case len(b) > maxRecord:
		return "", errors.New("the record of control groups is larger than the kernel's can be")
	}
	return string(b), nil
}

// parse puts the hierarchies together (cgroups(7): "ID:controllers:path", with ID
// 0 for version 2). Those that name no container say nothing: runtimes use some
// of the hierarchies only. own is the record of this very process.
func (p Places) parse(record, own string) (Container, error) {
	ours := map[string]string{}
	for line := range strings.Lines(own) {
		if hierarchy, path, ok := hierarchy(line); ok {
			ours[hierarchy] = path
		}
	}
	var found Container
	for line := range strings.Lines(record) {
		hierarchy, path, ok := hierarchy(line)
		if !ok {
			return Container{}, errors.New("a line of /proc/PID/cgroup cannot be read")
		}
		c := p.locate(path, ours[hierarchy])
		if !merge(&found.ID, c.ID) || !merge(&found.PodUID, c.PodUID) {
			return Container{}, errAmbiguous
		}
		if found.Within == "" {
			found.Within = c.Within
		}
		found.Podman = found.Podman || c.Podman
	}
	return found, nil
}

// merge reports whether two hierarchies agree.
func merge(found *string, said string) bool {
	if *found == "" {
		*found = said
	}
	return said == "" || said == *found
}

// hierarchy splits a line. The kernel allows no newline in a name (W26), but colons.
func hierarchy(line string) (id, path string, ok bool) {
	f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
	if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
		return "", "", false
	}
	return f[0] + ":" + f[1], f[2], true
}

// locate reads one path from the outside in. The directories that this process is
// in itself are above suspicion, and a container among them is its own, as with
// nodes that are containers; where it has a namespace of control groups of its
// own the kernel shows them as "..".
func (p Places) locate(path, own string) (c Container) {
	names := split(path)
	shared := common(names, split(own))
	trusted := shared
	for _, place := range p {
		if at := split(place); common(names, at) == len(at) {
			trusted = max(trusted, len(at))
		}
	}
	for i, name := range names {
		if uid, rest := podOf(name); uid != "" {
			c.PodUID, c.ID = uid, idOf(rest)
			if c.ID == "" && i+1 < len(names) {
				c.ID = idOf(names[i+1]) // in the pod and in none of its containers, otherwise
			}
			return c
		}
		if i > 0 && names[i-1] == "libpod_parent" && idOf(name) == name {
			continue // a pod of podman's own: its containers are called libpod-ID
		}
		if id := idOf(name); id != "" && i >= shared {
			c.ID, c.Podman = id, strings.HasPrefix(name, "libpod-")
			return c
		}
		if c.Within == "" && i >= trusted && !systems(name) {
			c.Within = name
		}
	}
	return Container{}
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// common returns how many names two paths begin with together.
func common(a, b []string) (n int) {
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// systems tells directories that kubelets, runtimes and systemd make and manage
// themselves. Of systemd's units these are slices; it hands services and scopes
// over to whoever runs them, and a user's slice holds such.
func systems(name string) bool {
	switch name {
	case "..", "kubelet", "kubepods", "besteffort", "burstable", "docker", "libpod_parent",
		// A runtime whose driver is not the kubelet's puts pods below its own service.
		"containerd.service", "crio.service", "docker.service", "k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service":
		return true
	}
	return strings.HasSuffix(name, ".slice") && name != "user.slice" && !strings.HasPrefix(name, "user-")
}

// podOf returns the UID of the pod that a directory is for, as Kubernetes writes
// it, and what follows where the container is in the same name: "podUID",
// "kubepods-besteffort-podU_I_D.slice", "kubepods-podU_I_D.slice:cri-containerd:ID".
func podOf(name string) (uid, rest string) {
	name, rest, _ = strings.Cut(name, ":")
	name, slice := strings.CutSuffix(name, ".slice")
	i := strings.LastIndex(name, "pod")
	if i < 0 {
		return "", ""
	}
	parent, uid := name[:i], strings.ReplaceAll(name[i+len("pod"):], "_", "-")
	parent = strings.TrimSuffix(strings.TrimSuffix(parent, "besteffort-"), "burstable-")
	if slice && !strings.HasSuffix("-"+parent, "-kubepods-") || !slice && parent != "" || !isUID(uid) {
		return "", ""
	}
	return uid, rest
}

// isUID tells a UUID, or the hash that a kubelet gives to a pod of its own.
func isUID(s string) bool {
	switch len(s) {
	case 32:
		return isHex(s)
	case 36:
		return s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' && isHex(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])
	}
	return false
}

// idOf returns the ID of the container that a directory is for: "ID",
// "crio-ID", "docker-ID.scope", "cri-containerd:ID". What watches over a
// container beside it (conmon) is not in it.
func idOf(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	i := len(name) - 64
	if i < 0 || !isHex(name[i:]) {
		return ""
	}
	if i > 0 && (!strings.ContainsRune("-_:", rune(name[i-1])) || strings.HasSuffix(name[:i-1], "conmon")) {
		return ""
	}
	return name[i:]
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == "" // of nothing else, so nothing is left
}
