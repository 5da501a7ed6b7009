package kube

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestReadBounded(t *testing.T) {
	for text, want := range map[string]error{"": nil, "1234": nil, "12345": errTooLarge, strings.Repeat("x", 100): errTooLarge} {
		if data, err := readBounded(strings.NewReader(text), 4); !errors.Is(err, want) || len(data) > 5 || err == nil && string(data) != text {
			t.Errorf("%q: %q, %v", text, data, err)
		}
	}
}

// A few bytes for a pod or a container must not become much memory.
func TestPodListBounds(t *testing.T) {
	list := func(items string) []byte { return []byte(`{"kind":"PodList","apiVersion":"v1","items":` + items + `}`) }
	many := func(n int, item string) string {
		return "[" + strings.TrimSuffix(strings.Repeat(item+",", n), ",") + "]"
	}
	for name, c := range map[string]struct {
		items string
		pods  int // -1: refused
	}{
		"none":              {"[]", 0},
		"null":              {"null", 0},
		"one":               {`[{"metadata":{"uid":"a"}}]`, 1},
		"as many as may be": {many(maxPods, "{}"), maxPods},
		"too many":          {many(maxPods+1, "{}"), -1},
		"no list":           {`{"a":1}`, -1},
		"text":              {`"a"`, -1},
		"no pods":           {`[1]`, -1},
	} {
		p, err := parsePods(list(c.items), time.Time{})
		if (err != nil) != (c.pods < 0) || err == nil && len(p.All) != c.pods {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Who may make a pod can make it as large as Kubernetes takes it. That costs only
// this pod its place, not the others of the node theirs (R59).
func TestLargePodIsLeftOut(t *testing.T) {
	pod := func(uid, status, rest string) string {
		return `{"metadata":{"uid":"` + uid + `"},"status":{` + status + `}` + rest + `}`
	}
	containers := `"containerStatuses":[` + strings.Repeat(`{"name":"c"},`, maxContainers) + `{"containerID":"containerd://x"}]`
	items := []string{
		pod("a", `"containerStatuses":[{"containerID":"containerd://a"}]`, ""), pod("many", containers, ""),
		pod("large", `"containerStatuses":[{"containerID":"containerd://y"}]`, `,"x":"`+strings.Repeat(`\u003c`, maxPod/6)+`"`), pod("b", "", ""),
	}
	p, err := parsePods([]byte(`{"kind":"PodList","apiVersion":"v1","items":[`+strings.Join(items, ",")+`]}`), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for uid, large := range map[string]bool{"a": false, "many": true, "large": true, "b": false} {
		if p.TooLarge(uid) != large || (p.Pod(uid) == nil) != large || len(p.All) != 2 {
			t.Errorf("%q: too large %v, %+v", uid, p.TooLarge(uid), p.Pod(uid))
		}
	}
	for id, want := range map[string]bool{"a": true, "x": false, "y": false} {
		if _, known := p.PodOf(id); known != want {
			t.Errorf("container %q: known %v, want %v", id, known, want)
		}
	}
}

// Whatever a kubelet says: a container is in the one pod that lists it, or in none.
func FuzzPodList(f *testing.F) {
	pod := `{"metadata":{"uid":%q},"status":{"containerStatuses":[{"name":"a","containerID":"containerd://%s"}]}}`
	f.Add([]byte(fmt.Sprintf(`{"kind":"PodList","apiVersion":"v1","items":[`+pod+`]}`, "u", "c")))
	f.Add([]byte(fmt.Sprintf(`{"kind":"PodList","apiVersion":"v1","items":[`+pod+`,`+pod+`]}`, "u", "c", "v", "c")))
	f.Add([]byte(`{"kind":"PodList","apiVersion":"v1","items":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parsePods(data, time.Time{})
		if err != nil {
			return
		}
		for id, uid := range p.containers {
			for i := range p.All {
				if uid != "" && p.All[i].Container(id) != nil && p.All[i].Meta.UID != uid {
					t.Errorf("%q is in %q, and %q has it too", id, uid, p.All[i].Meta.UID)
				}
			}
		}
	})
}
