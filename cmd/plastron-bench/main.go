// Command plastron-bench measures a running server or agent through its public
// interfaces only: the admin socket, the TCP port and the Workload API. So it can
// drive any server that speaks SPIRE's API. Only "store" looks inside: it drives
// the store's own interface, beside the engine's.
//
// It prints wall time and CPU time for each operation. The CPU time is that of
// the process named by -pid, read from /proc before and after. In the same run it
// measures a reference on this machine (the cryptography that an operation cannot
// do without, or a bare gRPC call), since only the ratio of the two can be
// compared between machines.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "Error:", err)
		}
		os.Exit(1)
	}
}

// options are the flags, the same for each benchmark.
type options struct {
	admin, address, workload, agent, output string
	store, at, server                       string
	pids                                    pids
	count, batch, parallel                  int
	entries, agents                         int
	streams, connections                    int
	period, ping                            time.Duration
}

// benchmark is one row of the table of what can be measured.
type benchmark struct {
	name, doc string
	count     int // default of -n
	run       func(context.Context, options) (result, error)
}

func benchmarks() []benchmark {
	return []benchmark{
		{"create", "create entries in batches over the admin socket", 5000, benchCreate},
		{"x509", "issue X.509-SVIDs in batches to an agent", 5000, benchX509},
		{"jwt", "issue JWT-SVIDs to an agent", 5000, benchJWT},
		{"reissue", "taint the X.509 authority, until an agent has replaced the SVIDs of -entries entries", 1, benchReissue},
		{"attest", "attest new agents with join tokens, each on its own TLS connection", 500, benchAttest},
		{"list", "list the one entry of -entries that has a selector", 1000, benchList},
		{"count", "count the -entries below one parent", 1000, benchCount},
		{"propagation", "create an entry and wait for it on an open stream of the Workload API, with -agents more attached", 200, benchPropagation},
		{"sync", "let -agents attached agents be idle for the time -for", 1, benchSync},
		{"watch", "change what -streams open streams of the Workload API on -connections connections show, until the last has the message", 10, benchWatch},
		{"agent", "open -streams streams, each on its own connection, and see the agent's memory, and its CPU time in the time -for", 1, benchAgent},
		{"store", "commit to the -store at -at for the time -for, in turns with a bare loop on the same engine", 1, benchStore},
		{"restart", "start the -server on -entries entries, until it serves them", 5, benchRestart},
		{"memory", "start the -server on -entries entries, and see its memory after the time -for", 1, benchMemory},
		{"fetch", "fetch X.509-SVIDs from the Workload API, each on a stream of its own", 5000, benchFetch},
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 2 && args[0] == echoVerb {
		return serveEcho(args[1], os.Stdin, stdout)
	}
	if len(args) == 4 && args[0] == holdVerb {
		return holdStreams(ctx, args[1:], os.Stdin, stdout)
	}
	var names []string
	for _, b := range benchmarks() {
		names = append(names, b.name)
	}
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		fmt.Fprintf(stderr, "Usage: plastron-bench NAME [flags]\n\n")
		for _, b := range benchmarks() {
			fmt.Fprintf(stderr, "  %-11s %s\n", b.name, b.doc)
		}
		fmt.Fprintf(stderr, "\nplastron-bench NAME -h lists the flags.\n")
		return flag.ErrHelp
	}
	for _, b := range benchmarks() {
		if b.name != args[0] {
			continue
		}
		o, err := parse(b, args[1:], stderr)
		if err != nil {
			return err
		}
		r, err := b.run(ctx, o)
		if err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
		r.Name, r.Pid = b.name, o.pids.String()
		return r.print(stdout, o.output)
	}
	return fmt.Errorf("there is no benchmark %q, but %s", args[0], strings.Join(names, ", "))
}

func parse(b benchmark, args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("plastron-bench "+b.name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.admin, "socketPath", env("SPIRE_SERVER_PRIVATE_SOCKET", "/tmp/spire-server/private/api.sock"), "`PATH` of the server's admin socket")
	flags.StringVar(&o.address, "address", "127.0.0.1:8081", "`HOST:PORT` of the server")
	flags.StringVar(&o.workload, "workloadSocket", strings.TrimPrefix(env("SPIFFE_ENDPOINT_SOCKET", "/tmp/spire-agent/public/api.sock"), "unix://"), "`PATH` of the Workload API")
	flags.StringVar(&o.agent, "agentSocketPath", "/tmp/spire-agent/private/admin.sock", "`PATH` of the agent's admin socket")
	flags.Var(&o.pids, "pid", "`PID` of the process whose CPU time is measured, or several with commas between")
	flags.IntVar(&o.count, "n", b.count, "`NUMBER` of operations")
	flags.IntVar(&o.batch, "batch", 50, "`NUMBER` of operations in one call, where the call takes several")
	flags.IntVar(&o.parallel, "parallel", 4, "`NUMBER` of calls at the same time")
	flags.IntVar(&o.entries, "entries", 10000, "`NUMBER` of entries that x509, jwt, list, count and reissue add first, and that restart and memory want")
	flags.IntVar(&o.agents, "agents", 1, "`NUMBER` of agents that sync and propagation attach, besides what is there")
	flags.IntVar(&o.streams, "streams", 1000, "`NUMBER` of streams that watch and agent open")
	flags.IntVar(&o.connections, "connections", 1000, "`NUMBER` of connections that watch opens them on")
	flags.DurationVar(&o.period, "for", 30*time.Second, "`TIME` for which sync and agent measure")
	flags.DurationVar(&o.ping, "ping", 30*time.Second, "`TIME` of silence after which agents that this program plays ping, as Plastron's do")
	flags.StringVar(&o.server, "server", "", "`COMMAND` that starts a server at -socketPath, with data of its own")
	flags.StringVar(&o.store, "store", "sqlite", "`KIND` of store: sqlite, postgres or etcd")
	flags.StringVar(&o.at, "at", os.TempDir(), "`WHERE` the store is made: a directory, a connection string, or endpoints of etcd with commas between")
	flags.StringVar(&o.output, "output", "table", "`FORMAT`: table or json")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case min(o.count, o.batch, o.parallel, o.entries, o.agents, o.streams, o.connections) < 1 || o.period <= 0 || o.ping <= 0:
		return o, errors.New("-n, -batch, -parallel, -entries, -agents, -streams, -connections and -for must be positive")
	case o.output != "table" && o.output != "json":
		return o, fmt.Errorf("-output is %q, not table or json", o.output)
	}
	return o, nil
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// result is what one benchmark found. Times are nanoseconds for one operation.
type result struct {
	Name        string  `json:"name"`
	Pid         string  `json:"pid,omitempty"`
	Operations  int     `json:"operations"`
	WallNS      int64   `json:"wall_ns_per_op"`
	CPUNS       int64   `json:"cpu_ns_per_op,omitempty"` // of the process at -pid
	Reference   string  `json:"reference,omitempty"`
	ReferenceNS int64   `json:"reference_cpu_ns_per_op,omitempty"`
	Ratio       float64 `json:"ratio,omitempty"` // CPUNS / ReferenceNS; of store wall times
	// Of store: the bare loop, and keys and values of one operation.
	ReferenceWallNS int64  `json:"reference_wall_ns_per_op,omitempty"`
	Bytes           int    `json:"bytes_per_op,omitempty"`
	P50NS           int64  `json:"p50_ns,omitempty"`
	P99NS           int64  `json:"p99_ns,omitempty"`
	Messages        *int64 `json:"messages,omitempty"`        // that the server sent to the attached agents meanwhile
	Streams         int    `json:"streams,omitempty"`         // that were open
	Memory          int64  `json:"anonymous_bytes,omitempty"` // of the process at -pid, with the streams open
	Before          int64  `json:"anonymous_bytes_before,omitempty"`
	Go              string `json:"go"`
	CPUs            int    `json:"cpus"`
}

func (r result) print(w io.Writer, output string) error {
	r.Go, r.CPUs = runtime.Version(), runtime.NumCPU()
	if r.CPUNS > 0 && r.ReferenceNS > 0 {
		r.Ratio = float64(r.CPUNS) / float64(r.ReferenceNS)
	}
	if output == "json" {
		return json.NewEncoder(w).Encode(r)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "benchmark\toperations\twall/op\tCPU/op\treference\tratio\tp50/call\tp99/call\tmessages\tmemory before\tmemory each\n")
	cpu, ratio, against, p50, p99, messages, before, memory := "-", "-", "-", "-", "-", "-", "-", "-"
	if r.CPUNS > 0 {
		cpu = micro(r.CPUNS)
	}
	if r.Ratio > 0 {
		ratio = fmt.Sprintf("%.2f", r.Ratio)
	}
	if r.ReferenceWallNS > 0 {
		against = fmt.Sprintf("%s (%s)", micro(r.ReferenceWallNS), r.Reference)
	}
	if r.ReferenceNS > 0 {
		against = fmt.Sprintf("%s (%s)", micro(r.ReferenceNS), r.Reference)
	}
	if r.P50NS > 0 {
		p50, p99 = micro(r.P50NS), micro(r.P99NS)
	}
	if r.Messages != nil {
		messages = fmt.Sprint(*r.Messages)
	}
	if r.Memory > 0 {
		before, memory = fmt.Sprintf("%.1f MB", float64(r.Before)/1e6), fmt.Sprintf("%.1f KB", float64(r.Memory-r.Before)/1e3/float64(r.Streams))
	}
	fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
		r.Name, r.Operations, micro(r.WallNS), cpu, against, ratio, p50, p99, messages, before, memory)
	return t.Flush()
}

func micro(ns int64) string {
	return fmt.Sprintf("%.1f µs", float64(ns)/float64(time.Microsecond))
}
