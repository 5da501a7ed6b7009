package arch_test

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// rows are the rooms of the house, from the bottom up. A package imports packages
// of lower rows only. A new package gets its place here first.
var rows = [...][]string{
	1:  {"fault"},
	2:  {"identity", "strictjson", "reason", "logging", "secretfile"},
	3:  {"entry", "bundle", "svid", "audit", "config", "ticket", "lifetime"},
	4:  {"keys", "nodeattest", "workload", "upstream", "publish", "store", "monitor"},
	5:  {"process", "systemd", "serverlink", "localsocket", "machine", "rpc", "kube", "container"},
	6:  {"nodeattest/jointoken", "nodeattest/x509pop", "nodeattest/k8spsat", "workload/unix", "workload/k8s", "workload/docker", "keys/diskkeys", "keys/memkeys", "upstream/diskca", "upstream/spire", "publish/k8sbundle", "store/sqlite", "store/postgres", "store/etcd", "doctor"},
	7:  {"registry"},
	8:  {"agentid", "authority", "nodes", "mirror", "servers", "upkeep"},
	9:  {"serverapi", "workloadapi", "sds", "agentapi"},
	10: {"builtin"},
	11: {"server", "agent"},
}

// maxChain is how many of our own packages may lie on one path of imports.
const maxChain = 9

// rowOf returns the row of a directory, or 0.
func rowOf(dir string) int {
	name, ok := strings.CutPrefix(dir, "internal/")
	if !ok {
		return 0
	}
	for row, names := range rows {
		if slices.Contains(names, name) {
			return row
		}
	}
	return 0
}

// beside tells what stands beside the rows.
func beside(dir, what string) bool { return dir == what || strings.HasPrefix(dir, what+"/") }

func isAPI(dir string) bool { return beside(dir, "internal/api") || beside(dir, "api") }

// isTop tells packages that nobody imports.
func isTop(dir string) bool {
	return beside(dir, "cmd") || beside(dir, "test") || beside(dir, "examples") || beside(dir, "internal/arch")
}

// isSuite tells packages that are used by tests only: contract suites, such as
// keys/keystest, and fakes.
func isSuite(dir string) bool {
	return rowOf(dir) == 0 && strings.HasPrefix(dir, "internal/") && strings.HasSuffix(dir, "test") || beside(dir, "internal/fakes")
}

func checkRows(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		row := rowOf(p.dir)
		if row == 0 && p.name() != "" && !isAPI(p.dir) && !isTop(p.dir) && !isSuite(p.dir) {
			breaches = append(breaches, fmt.Sprintf("%s has no row: give it one in internal/arch/rows_test.go and DESIGN.md", p.dir))
			continue
		}
		for _, path := range p.imports(false) {
			dir, ok := own(path)
			if !ok {
				continue
			}
			switch {
			case isTop(dir):
				breaches = append(breaches, fmt.Sprintf("%s imports %s, which is for nobody", p.dir, dir))
			case isSuite(dir) && !isSuite(p.dir):
				breaches = append(breaches, fmt.Sprintf("%s imports %s, which is for tests", p.dir, dir))
			case isAPI(p.dir) && !isAPI(dir):
				breaches = append(breaches, fmt.Sprintf("%s is generated, but imports %s", p.dir, dir))
			case beside(p.dir, "examples"):
				breaches = append(breaches, fmt.Sprintf("%s imports %s: an example uses what any user can use", p.dir, dir))
			case row != 0 && rowOf(dir) >= row:
				breaches = append(breaches, fmt.Sprintf("%s (row %d) imports %s (row %d)", p.dir, row, dir, rowOf(dir)))
			}
		}
	}
	return breaches
}

// checkDesign compares the rows with the table in DESIGN.md that readers see.
func checkDesign(t *tree) (breaches []string) {
	_, section, _ := strings.Cut(t.design, "\n## Rooms\n")
	section, _, _ = strings.Cut(section, "\n## ")
	listed := make(map[string]int)
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			continue
		}
		if row, err := strconv.Atoi(strings.TrimSpace(cells[1])); err == nil {
			for _, name := range strings.Fields(cells[2]) {
				listed["internal/"+strings.Trim(name, "`")] = row
			}
		}
	}
	for _, p := range t.sorted() {
		if row := rowOf(p.dir); row != listed[p.dir] {
			breaches = append(breaches, fmt.Sprintf("%s is in row %d, but DESIGN.md says row %d", p.dir, row, listed[p.dir]))
		}
		delete(listed, p.dir)
	}
	for _, dir := range slices.Sorted(maps.Keys(listed)) {
		if rowOf(dir) != listed[dir] {
			breaches = append(breaches, fmt.Sprintf("DESIGN.md has %s in row %d, rows_test.go in row %d", dir, listed[dir], rowOf(dir)))
		}
	}
	return breaches
}

func checkChain(t *tree) []string {
	longest := make(map[string][]string)
	var walk func(dir string) []string
	walk = func(dir string) []string {
		p := t.packages[dir]
		if p == nil || p.generated() {
			return nil
		}
		if chain, ok := longest[dir]; ok {
			return chain
		}
		var rest []string
		for _, path := range p.imports(false) {
			if next, ok := own(path); ok {
				if chain := walk(next); len(chain) > len(rest) {
					rest = chain
				}
			}
		}
		longest[dir] = append([]string{dir}, rest...)
		return longest[dir]
	}
	var chain []string
	for _, p := range t.sorted() {
		if c := walk(p.dir); len(c) > len(chain) {
			chain = c
		}
	}
	if len(chain) <= maxChain {
		return nil
	}
	return []string{fmt.Sprintf("%d packages import one another in a chain, at most %d may: %s",
		len(chain), maxChain, strings.Join(chain, " → "))}
}

// parties says which of our packages may import what is not ours; "*" are all.
// Tests may import everything that is listed.
var parties = map[string][]string{
	"github.com/spiffe/go-spiffe/v2/spiffeid":              {"*"},
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload": {"internal/workloadapi", "cmd", "test"},
	"github.com/spiffe/go-spiffe/v2/workloadapi":           {"internal/agent", "internal/upstream/spire", "cmd", "examples", "test"},
	"github.com/spiffe/go-spiffe/v2":                       {"cmd", "examples", "test"},

	"google.golang.org/grpc": {"internal/api", "api", "internal/serverlink", "internal/rpc", "internal/serverapi",
		"internal/workloadapi", "internal/sds", "internal/agentapi", "internal/server", "internal/agent", "internal/store/etcd", "cmd", "examples"},
	"google.golang.org/protobuf": {"internal/api", "api", "internal/serverlink", "internal/registry",
		"internal/mirror", "internal/rpc", "internal/serverapi", "internal/workloadapi", "internal/sds", "internal/agentapi", "cmd"},
	"github.com/envoyproxy/go-control-plane/envoy": {"internal/sds"},

	"github.com/go-jose/go-jose/v4": {"internal/svid", "internal/bundle"},
	"github.com/hashicorp/hcl":      {"internal/config"},
	"modernc.org/sqlite":            {"internal/store/sqlite"},
	"github.com/jackc/pgx/v5":       {"internal/store/postgres", "test", "cmd/plastron-bench"},
	"go.etcd.io/etcd/api/v3":        {"internal/store/etcd"},
	"go.etcd.io/etcd/client/v3":     {"internal/store/etcd", "cmd/plastron-bench"},
	"go.uber.org/zap":               {"internal/store/etcd"},
	"github.com/spf13/cobra":        {"cmd/plastron"},
	"github.com/spf13/pflag":        {"cmd/plastron"},
	"go.yaml.in/yaml/v3":            {"cmd/plastron", "internal/kube"},
	"github.com/mattn/go-isatty":    {"cmd/plastron"},
	"github.com/google/uuid":        {"internal/serverapi", "internal/registry", "internal/entry"},

	"github.com/prometheus/client_golang": {"internal/monitor"},

	"golang.org/x/crypto/cryptobyte": {"internal/svid", "internal/bundle", "internal/ticket"},
	"golang.org/x/net/idna":          {"internal/entry", "internal/svid"},
	"golang.org/x/sync":              {"internal/server", "internal/agent", "internal/workloadapi", "internal/serverlink", "cmd"},
	"golang.org/x/sys": {"internal/process", "internal/machine", "internal/localsocket", "internal/doctor", "internal/serverlink", "internal/workload/unix", "internal/keys/diskkeys",
		"internal/store/sqlite", "internal/store/postgres", "internal/serverapi", "internal/workloadapi", "internal/server", "internal/agent", "cmd"},

	"github.com/anishathalye/porcupine":         {},
	"github.com/google/go-cmp":                  {},
	"github.com/rogpeppe/go-internal":           {},
	"golang.org/x/net/dns/dnsmessage":           {},
	"golang.org/x/net/http2":                    {},
	"google.golang.org/genproto/googleapis/rpc": {"internal/rpc", "internal/serverapi", "internal/workloadapi", "internal/serverlink", "cmd"},
}

func checkThirdParties(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		for _, test := range []bool{false, true} {
			for _, path := range p.imports(test) {
				if _, ok := own(path); ok || path == module || !strings.Contains(strings.Split(path, "/")[0], ".") {
					continue
				}
				users, known := mayImport(path)
				allowed := slices.ContainsFunc(users, func(u string) bool { return u == "*" || beside(p.dir, u) })
				if known && (allowed || test || isSuite(p.dir)) {
					continue
				}
				breaches = append(breaches, fmt.Sprintf("%s imports %s: a new user of a library is a decision, made in internal/arch/rows_test.go and DESIGN.md", p.dir, path))
			}
		}
	}
	return breaches
}

// mayImport returns the users of the longest listed prefix of path.
func mayImport(path string) (users []string, known bool) {
	longest := ""
	for prefix, u := range parties {
		if beside(path, prefix) && len(prefix) > len(longest) {
			longest, users, known = prefix, u, true
		}
	}
	return users, known
}

// speaksStatus are the packages that turn faults into gRPC status codes or back.
var speaksStatus = []string{"internal/rpc", "internal/serverapi", "internal/workloadapi", "internal/sds", "internal/serverlink", "cmd/plastron", "internal/api", "api"}

func checkStatus(t *tree) (breaches []string) {
	for _, p := range t.sorted() {
		for _, path := range p.imports(false) {
			if path != "google.golang.org/grpc/status" && path != "google.golang.org/grpc/codes" {
				continue
			}
			if !slices.ContainsFunc(speaksStatus, func(dir string) bool { return beside(p.dir, dir) }) {
				breaches = append(breaches, fmt.Sprintf("%s imports %s: return a fault, the wire maps it", p.dir, path))
			}
		}
	}
	return breaches
}
