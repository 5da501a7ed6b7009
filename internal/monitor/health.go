package monitor

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

const (
	dialLimit       = time.Second // of a Unix socket
	maxExaminations = 8           // at once
)

// HealthChecks is the block health_checks { }.
type HealthChecks struct {
	// ListenerEnabled opens the listener. Default: false.
	ListenerEnabled bool `hcl:"listener_enabled"`
	// BindAddress and BindPort are where it listens. Anyone who can reach it may
	// ask. Default: localhost and 80.
	BindAddress string `hcl:"bind_address"`
	BindPort    int    `hcl:"bind_port"`
	// LivePath and ReadyPath are what to ask for. Default: /live and /ready.
	LivePath  string `hcl:"live_path"`
	ReadyPath string `hcl:"ready_path"`
}

// DefaultHealthChecks returns the values of keys that are absent.
func DefaultHealthChecks() HealthChecks {
	return HealthChecks{BindAddress: "localhost", BindPort: 80, LivePath: "/live", ReadyPath: "/ready"}
}

// Validate reports every fault at once.
func (c HealthChecks) Validate() error {
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "health_checks."+format, args...))
		}
	}
	check(c.BindAddress != "", "bind_address: must not be empty")
	check(c.BindPort >= 0 && c.BindPort <= 65535, "bind_port: %d is not a port", c.BindPort)
	check(strings.HasPrefix(c.LivePath, "/"), "live_path: %q does not begin with /", c.LivePath)
	check(strings.HasPrefix(c.ReadyPath, "/"), "ready_path: %q does not begin with /", c.ReadyPath)
	check(c.LivePath != c.ReadyPath, "ready_path: it is the live_path, %s, too", c.LivePath)
	return errors.Join(faults...)
}

// Address is where to listen.
func (c HealthChecks) Address() string {
	return net.JoinHostPort(c.BindAddress, strconv.Itoa(c.BindPort))
}

// Check is one thing that a process needs.
type Check struct {
	Name string
	// Run says what is wrong, or nil. It must not wait for the network.
	Run func() error
	// Degrades says that without this thing the process does less, but still does
	// what it is there for: it stays ready.
	Degrades bool
}

// Socket is a check that somebody can connect to a Unix socket of ours. What
// cleans up below /tmp may have removed its file while we listen on.
func Socket(name, path string) Check {
	return Check{Name: name, Run: func() error {
		conn, err := net.DialTimeout("unix", path, dialLimit)
		if err != nil {
			return fault.New(fault.Unavailable, "socket_unreachable", "nobody can connect to the socket %s", path).
				Fix("see whether its file was removed; a restart makes it again").Because(err)
		}
		return conn.Close()
	}}
}

// State is the outcome of a check, or of all of them together.
type State string

// The states, from good to bad.
const (
	OK       State = "ok"
	Degraded State = "degraded"
	Failing  State = "failing"
)

// Report is the outcome of all checks.
type Report struct {
	Status State             `json:"status"`
	Checks map[string]Result `json:"checks"`
}

// Result is the outcome of one check.
type Result struct {
	Status  State  `json:"status"`
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Fix     string `json:"fix,omitempty"`
}

// Examine runs the checks. What it says of a failure is what a caller may read:
// never a cause (R112).
func Examine(checks []Check) Report {
	report := Report{Status: OK, Checks: map[string]Result{}}
	for _, c := range checks {
		result := Result{Status: OK}
		if err := c.Run(); err != nil {
			result = Result{Status: Failing, Reason: fault.ReasonOf(err), Message: "internal error; the log has the details"}
			if f, ok := errors.AsType[*fault.Error](err); ok {
				result.Message, result.Fix = f.Message, f.Remedy
			}
			if c.Degrades {
				result.Status = Degraded
			}
		}
		report.Checks[c.Name] = result
		if result.Status == Failing || report.Status == OK {
			report.Status = result.Status
		}
	}
	return report
}

// Ready returns why a process with these checks is not ready, or nil.
func Ready(checks []Check) error {
	var failures []error
	for _, c := range checks {
		if !c.Degrades {
			failures = append(failures, c.Run())
		}
	}
	return errors.Join(failures...)
}

// Lacking returns without what a process with these checks goes on for a while.
func Lacking(checks []Check) (failures []error) {
	for _, c := range checks {
		if !c.Degrades {
			continue
		}
		if err := c.Run(); err != nil {
			failures = append(failures, err)
		}
	}
	return failures
}

// HealthHandler answers at the two paths: 200 as long as no check is failing,
// else 503, with the report as JSON. live and ready are called at each request.
// A check that hangs is a failure, and is not begun once more by each who asks (R106).
func HealthHandler(c HealthChecks, live, ready func() []Check) http.Handler {
	answers := map[string]http.Handler{c.LivePath: answer(live), c.ReadyPath: answer(ready)}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to := answers[r.URL.Path]
		switch {
		case to == nil:
			http.NotFound(w, r)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Cache-Control", "no-store")
			to.ServeHTTP(w, r)
		}
	})
}

// answer examines, in time and not more often at once than there is room.
func answer(checks func() []Check) http.Handler {
	const hung = `{"status":"failing","checks":{"answer":{"status":"failing","reason":"hung","message":"a check did not return in time"}}}` + "\n"
	room := make(chan struct{}, maxExaminations)
	return http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case room <- struct{}{}:
			defer func() { <-room }()
		case <-r.Context().Done(): // it is too late for an answer
			return
		}
		report := Examine(checks())
		body, err := json.Marshal(report)
		if err != nil { // strings only, so this is a bug
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if report.Status == Failing {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		w.Write(append(body, '\n'))
	}), answerLimit, hung)
}
