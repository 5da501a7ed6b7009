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
		"none":                {"[]", 0},
		"null":                {"null", 0},
		"one":                 {`[{"metadata":{"uid":"a"}}]`, 1},
		"as many as may be":   {many(maxPods, "{}"), maxPods},
		"too many":            {many(maxPods+1, "{}"), -1},
		"too many containers": {`[{"status":{"containerStatuses":` + many(maxContainers+1, "{}") + `}}]`, -1},
		"large":               {`[{"x":"` + strings.Repeat("x", maxPod) + `"}]`, -1},
		"no list":             {`{"a":1}`, -1},
		"text":                {`"a"`, -1},
		"no pods":             {`[1]`, -1},
	} {
		p, err := parsePods(list(c.items), time.Time{})
		if (err != nil) != (c.pods < 0) || err == nil && len(p.All) != c.pods {
			t.Errorf("%s: %v", name, err)
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
