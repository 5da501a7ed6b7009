package container

import (
	"errors"
	"os"
	"strings"
	"testing"
)

const (
	uid1 = "2c48913c-b29f-11e7-9350-020968147796"
	uid2 = "72f7f152-440c-66ac-9084-e0fc1d8a910c"
	id1  = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961"
	id2  = "b2a102854b2969b2ce98dc329c86b4fb2b06e4ad2cc8da9d8a7578c9cd2004a2"
	id3  = "6469646e742065787065637420616e796f6e6520746f2072656164207468697a"
)

var under = strings.NewReplacer("UID1", uid1, "UID2", uid2, "U_1", strings.ReplaceAll(uid1, "-", "_"), "U_2", strings.ReplaceAll(uid2, "-", "_"),
	"ID1", id1, "ID2", id2, "ID3", id3)

func TestForms(t *testing.T) {
	for name, c := range map[string]struct {
		record, own string
		places      Places
		want        Container
		ambiguous   bool
	}{
		"host":                 {record: "0::/system.slice/sshd.service\n"},
		"host, root":           {record: "12:pids:/\n1:name=systemd:/\n0::/\n"},
		"user on the host":     {record: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app.scope\n"},
		"v1, cgroupfs":         {record: "11:memory:/kubepods/burstable/podUID1/ID1\n10:devices:/kubepods/burstable/podUID1/ID1\n1:name=systemd:/kubepods/burstable/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"v1, guaranteed":       {record: "11:memory:/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"v2, cgroupfs":         {record: "0::/kubepods/besteffort/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"v2, containerd":       {record: "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_1.slice/cri-containerd-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"v2, guaranteed":       {record: "0::/kubepods.slice/kubepods-podU_1.slice/cri-containerd-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"CRI-O, systemd":       {record: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_1.slice/crio-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"CRI-O, below scope":   {record: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_1.slice/crio-ID1.scope/container\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"CRI-O, cgroupfs":      {record: "0::/kubepods/burstable/podUID1/crio-ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"CRI-O, conmon":        {record: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_1.slice/crio-conmon-ID1.scope\n", want: Container{PodUID: "UID1"}},
		"docker, systemd":      {record: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_1.slice/docker-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"docker alone":         {record: "9:pids:/docker/ID1\n0::/docker/ID1\n", want: Container{ID: "ID1"}},
		"docker alone, scope":  {record: "0::/system.slice/docker-ID1.scope\n", want: Container{ID: "ID1"}},
		"podman":               {record: "0::/machine.slice/libpod-ID1.scope/container\n", want: Container{ID: "ID1"}},
		"podman, cgroupfs":     {record: "0::/libpod_parent/libpod-ID1\n", want: Container{ID: "ID1"}},
		"podman pod, cgroupfs": {record: "0::/libpod_parent/ID3/libpod-ID1\n", want: Container{ID: "ID1"}},
		"podman pod, systemd":  {record: "0::/machine.slice/machine-libpod_pod_ID3.slice/libpod-ID1.scope/container\n", want: Container{ID: "ID1"}},
		"hash of a static pod": {record: "0::/kubepods/burstable/pod0123456789abcdef0123456789abcdef/ID1\n", want: Container{ID: "ID1", PodUID: "0123456789abcdef0123456789abcdef"}},
		"twice kubepods":       {record: "0::/kubepods/kubepods/besteffort/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}}, // Docker Desktop
		"two drivers":          {record: "11:memory:/system.slice/containerd.service/kubepods-burstable-podU_1.slice:cri-containerd:ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"two drivers, top":     {record: "0::/kubepods-besteffort-podU_1.slice:cri-containerd:ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"no newline at end":    {record: "0::/kubepods/podUID1/ID1", want: Container{ID: "ID1", PodUID: "UID1"}},

		// Only some controllers carry the container; a line without one is no contradiction.
		"hybrid": {record: "12:rdma:/\n11:memory:/kubepods/besteffort/podUID1/ID1\n10:cpu,cpuacct:/kubepods/besteffort/podUID1/ID1\n" +
			"1:name=systemd:/system.slice/containerd.service\n0::/system.slice/containerd.service\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"one line names the pod": {record: "2:cpu:/docker/ID1\n1:pids:/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},

		// Nodes that are containers themselves, as kind makes them.
		"kind, agent in the node": {record: "0::/docker/ID3/kubepods/besteffort/podUID1/ID1\n", own: "0::/docker/ID3/system.slice/agent.service\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"kind, agent in a pod":    {record: "4:pids:/docker/ID3/kubepods/besteffort/podUID1/ID1\n3:rdma:/docker/ID3\n", own: "4:pids:/docker/ID3/kubepods/burstable/podUID2/ID2\n3:rdma:/docker/ID3\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"kind, own namespace":     {record: "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-podU_1.slice/cri-containerd-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"kind, cgroupfs":          {record: "0::/kubelet/kubepods/besteffort/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"kind, agent outside":     {record: "0::/docker/ID3/kubepods/besteffort/podUID1/ID1\n", want: Container{ID: "ID3"}}, // the node is the container
		"process of the node":     {record: "0::/docker/ID3/system.slice/x.service\n", own: "0::/docker/ID3/kubepods/podUID2/ID2\n"},

		// The agent has a namespace of control groups of its own.
		"namespace, same class":  {record: "0::/../../kubepods-besteffort-podU_1.slice/cri-containerd-ID1.scope\n", own: "0::/\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"namespace, other class": {record: "0::/../../../kubepods-burstable.slice/kubepods-burstable-podU_1.slice/cri-containerd-ID1.scope\n", own: "0::/\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"namespace, cgroupfs":    {record: "0::/../../podUID1/ID1\n", own: "0::/\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"namespace, host":        {record: "0::/../../../../system.slice/sshd.service\n", own: "0::/\n"},
		"namespace, own pod":     {record: "0::/../cri-containerd-ID1.scope\n", own: "0::/\n", want: Container{ID: "ID1"}},
		"namespace, service":     {record: "0::/../../../../system.slice/x.service/kubepods/podUID1/ID1\n", own: "0::/\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "x.service"}},
		"own pod":                {record: "0::/kubepods/podUID1/ID2\n", own: "0::/kubepods/podUID1/ID1\n", want: Container{ID: "ID2", PodUID: "UID1"}},

		// W26: names that a process made below its own group.
		"pod below a pod":           {record: "0::/kubepods/podUID1/ID1/kubepods/podUID2/ID2\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"pod text in a child":       {record: "0::/kubepods/podUID1/ID1/podUID2\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"podman pod, below":         {record: "0::/libpod_parent/ID3/libpod-ID1/libpod_parent/ID3/libpod-ID2\n", want: Container{ID: "ID1"}},
		"container below another":   {record: "0::/kubepods.slice/kubepods-podU_1.slice/cri-containerd-ID1.scope/cri-containerd-ID2.scope\n", want: Container{ID: "ID1", PodUID: "UID1"}},
		"pod below a container":     {record: "0::/docker/ID1/kubepods/podUID2/ID2\n", want: Container{ID: "ID1"}},
		"below, in the agent's pod": {record: "0::/../cri-containerd-ID1.scope/podUID2/ID2\n", own: "0::/\n", want: Container{ID: "ID1"}},
		"pod below a user":          {record: "0::/user.slice/user-1000.slice/user@1000.service/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "user.slice"}},
		"pod below a service":       {record: "0::/system.slice/foo.service/kubepods.slice/kubepods-podU_1.slice/cri-containerd-ID1.scope\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "foo.service"}},
		"pod below LXC":             {record: "0::/lxc.payload.c1/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "lxc.payload.c1"}},
		"pod below the agent":       {record: "0::/system.slice/agent.service/x.scope/podUID1/ID1\n", own: "0::/system.slice/agent.service\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "x.scope"}},
		"rootless podman":           {record: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID1.scope/container\n", want: Container{ID: "ID1", Within: "user.slice"}},
		"rootless podman, v1":       {record: "1:name=systemd:/user.slice/user-1000.slice/user@1000.service/libpod-ID1.scope\n2:pids:/user.slice/user-1000.slice/user@1000.service\n", want: Container{ID: "ID1", Within: "user.slice"}},
		"one line of a user's":      {record: "2:pids:/kubepods/podUID1/ID1\n1:name=systemd:/user.slice/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "user.slice"}},
		"unusual place":             {record: "0::/k8s/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "k8s"}},
		"unusual place, named":      {record: "0::/k8s/node/kubepods/podUID1/ID1\n", places: Places{"/other", "/k8s/node"}, want: Container{ID: "ID1", PodUID: "UID1"}},
		"only part of a place":      {record: "0::/k8s/x/kubepods/podUID1/ID1\n", places: Places{"/k8s/node"}, want: Container{ID: "ID1", PodUID: "UID1", Within: "k8s"}},
		"pod itself":                {record: "0::/kubepods/podUID1\n", want: Container{PodUID: "UID1"}},
		"deep in a pod, no ID":      {record: "0::/kubepods/podUID1/x/ID1\n", want: Container{PodUID: "UID1"}},

		"two pods":       {record: "2:cpu:/kubepods/podUID1/ID1\n1:pids:/kubepods/podUID2/ID1\n", ambiguous: true},
		"two containers": {record: "2:cpu:/kubepods/podUID1/ID1\n1:pids:/kubepods/podUID1/ID2\n", ambiguous: true},
		"two engines":    {record: "2:cpu:/docker/ID2\n1:pids:/kubepods/podUID1/ID1\n", ambiguous: true},

		"short id":          {record: "0::/docker/abcdef\n"},
		"65 digits":         {record: "0::/docker/aID1\n"},
		"upper case":        {record: "0::/docker/" + strings.ToUpper(id1) + "\n"},
		"pod without uid":   {record: "0::/kubepods/podfoo/x\n"},
		"slice not of pods": {record: "0::/x-podU_1.slice/ID1\n", want: Container{ID: "ID1"}},
		"colons in a name":  {record: "0::/a:b/kubepods/podUID1/ID1\n", want: Container{ID: "ID1", PodUID: "UID1", Within: "a:b"}},
		"long":              {record: "0::/kubepods/podUID1/ID1" + strings.Repeat("/podUID2", 100) + "\n", want: Container{ID: "ID1", PodUID: "UID1"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.places.parse(under.Replace(c.record), under.Replace(c.own))
			want := Container{under.Replace(c.want.ID), under.Replace(c.want.PodUID), c.want.Within, strings.Contains(name, "podman")}
			if c.ambiguous {
				if !errors.Is(err, errAmbiguous) {
					t.Errorf("parse() = %+v, %v, want a refusal", got, err)
				}
			} else if err != nil || got != want {
				t.Errorf("parse() = %+v, %v, want %+v", got, err, want)
			}
		})
	}
}

func TestUnreadable(t *testing.T) {
	for name, record := range map[string]string{"no colons": "x\n", "one colon": "1:x\n", "no path": "1:x:\n", "relative": "1:x:y\n", "empty line": "\n"} {
		if got, err := Places(nil).parse(record, ""); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if _, err := Of(1 << 30); err == nil {
		t.Error("a process that is not there has a container")
	}
	big := t.TempDir() + "/cgroup"
	if err := os.WriteFile(big, []byte(strings.Repeat("0::/\n", maxRecord/5+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := read(big); err == nil {
		t.Error("a record of any size was read")
	}
}

// Whatever the record says, what is told is well formed, and what a process can
// add below its own group changes nothing (W26).
func FuzzParse(f *testing.F) {
	f.Add("0::/kubepods/podUID1/ID1\n", "0::/\n", "kubepods/podUID2/ID2")
	f.Add("4:pids:/docker/ID3/kubepods/besteffort/podUID1/ID1\n", "4:pids:/docker/ID3\n", "x")
	f.Add("0::/user.slice/x\n", "", "libpod-ID1.scope")
	f.Add("0::/kubepods-besteffort-podU_1.slice:cri-containerd:ID1\n", "", "")
	f.Fuzz(func(t *testing.T, record, own, below string) {
		record, own, below = under.Replace(record), under.Replace(own), under.Replace(below)
		c, err := Places(nil).parse(record, own)
		if err != nil {
			if c != (Container{}) {
				t.Errorf("%+v beside an error", c)
			}
			return
		}
		if c.ID != "" && (len(c.ID) != 64 || !isHex(c.ID)) || c.PodUID != "" && !isUID(c.PodUID) || c.Within != "" && c.ID == "" && c.PodUID == "" {
			t.Errorf("%+v", c)
		}
		line := strings.TrimSuffix(record, "\n")
		if c.ID == "" || strings.ContainsAny(line+below, "\n") || own != "" {
			return
		}
		if again, err := Places(nil).parse(line+"/"+below, own); err != nil || again != c {
			t.Errorf("with %q below: %+v, %v; without: %+v", below, again, err, c)
		}
	})
}
