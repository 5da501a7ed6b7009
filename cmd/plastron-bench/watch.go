package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/metadata"
)

// An agent lets one user have only so many connections and streams, so those of
// watch and agent belong to several, which share a group.
const (
	holderGroup     = 61000
	holderStreams   = 4000
	holderConnected = 1000
)

// holders are processes of several users with open streams of the Workload API.
type holders struct {
	server  *target
	model   *spiretypes.Entry
	entries []string
	all     []*holder
}

type holder struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// hold opens the streams, each with a first message.
func hold(ctx context.Context, o options) (*holders, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("this takes root: the streams belong to several users, since one may not have that many")
	}
	s, err := dialServer(ctx, o)
	if err != nil {
		return nil, err
	}
	h := &holders{server: s}
	if err := h.open(ctx, o); err != nil {
		return nil, errors.Join(err, h.Close(ctx))
	}
	return h, nil
}

func (h *holders) open(ctx context.Context, o options) error {
	conn, first, err := dialWorkload(ctx, o.workload)
	if err != nil {
		return err
	}
	conn.Close()
	if h.model, err = h.server.entryOf(ctx, first); err != nil {
		return err
	}
	if err := h.create(ctx, "held"); err != nil {
		return err
	}
	number := max((o.streams+holderStreams-1)/holderStreams, (o.connections+holderConnected-1)/holderConnected)
	share := func(total, i int) int { return total*(i+1)/number - total*i/number }
	for i := range number {
		if err := h.start(ctx, i, o.workload, share(o.streams, i), share(o.connections, i)); err != nil {
			return err
		}
	}
	for _, one := range h.all {
		if _, err := one.hears("ready"); err != nil {
			return err
		}
	}
	return nil
}

func (h *holders) start(ctx context.Context, i int, path string, streams, connections int) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", holdVerb, path, strconv.Itoa(streams), strconv.Itoa(connections))
	cmd.Stderr = os.Stderr
	if err := becomeUser(cmd, uint32(holderGroup+i), holderGroup); err != nil {
		return err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	h.all = append(h.all, &holder{cmd, in, bufio.NewReader(out)})
	return nil
}

// create registers an entry for all holders.
func (h *holders) create(ctx context.Context, name string) error {
	reply, err := entryv1.NewEntryClient(h.server.admin).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*spiretypes.Entry{{
		SpiffeId: &spiretypes.SPIFFEID{TrustDomain: h.server.trustDomain, Path: fmt.Sprintf("/bench/%d/%s", time.Now().UnixNano(), name)},
		ParentId: h.model.GetParentId(), Selectors: []*spiretypes.Selector{{Type: "unix", Value: "gid:" + strconv.Itoa(holderGroup)}},
	}}})
	if err != nil {
		return err
	}
	made := reply.GetResults()[0]
	if made.GetStatus().GetCode() != 0 {
		return errors.New(made.GetStatus().GetMessage())
	}
	h.entries = append(h.entries, made.GetEntry().GetId())
	return nil
}

// Close ends the processes and deletes the entries.
func (h *holders) Close(ctx context.Context) error {
	for _, one := range h.all {
		one.in.Close()
		_ = one.cmd.Wait() // it was told to end
	}
	err := h.server.remove(context.WithoutCancel(ctx), h.entries)
	h.server.Close()
	return err
}

// after makes a change and returns how long it took until the last stream had a
// message.
func (h *holders) after(change func() error) (time.Duration, error) {
	for _, one := range h.all {
		if _, err := fmt.Fprintln(one.in, "next"); err != nil {
			return 0, err
		}
		if _, err := one.hears("armed"); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	if err := change(); err != nil {
		return 0, err
	}
	var last time.Duration
	for _, one := range h.all {
		text, err := one.hears("last")
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, err
		}
		last = max(last, time.Unix(0, ns).Sub(began.Round(0)))
	}
	return last, nil
}

// hears reads one line, which begins with a word, and returns the rest.
func (one *holder) hears(word string) (string, error) {
	line, err := one.out.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("a process with open streams ended: %w", err)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(line), word)
	if !ok {
		return "", fmt.Errorf("a process with open streams says: %s", line)
	}
	return strings.TrimSpace(rest), nil
}

// benchWatch changes what open streams show, by one entry, and back.
func benchWatch(ctx context.Context, o options) (r result, err error) {
	h, err := hold(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, h.Close(ctx)) }()
	before, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	var times []time.Duration
	for len(times) < o.count {
		took, err := h.after(func() error { return h.create(ctx, "change") })
		if err != nil {
			return result{}, err
		}
		times = append(times, took)
		if len(times) == o.count {
			break
		}
		took, err = h.after(func() error {
			last := len(h.entries) - 1
			gone := h.entries[last:]
			h.entries = h.entries[:last]
			return h.server.remove(ctx, gone)
		})
		if err != nil {
			return result{}, err
		}
		times = append(times, took)
	}
	after, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	r = result{Operations: o.count, CPUNS: (after - before).Nanoseconds() / int64(o.count), Streams: o.streams}
	for _, t := range times {
		r.WallNS += t.Nanoseconds() / int64(o.count)
	}
	r.P50NS, r.P99NS = percentiles(times)
	return r, nil
}

// benchAgent looks at the memory of an agent before there are streams and once
// they are open, each on a connection of its own, and at what it does while they
// are idle.
func benchAgent(ctx context.Context, o options) (r result, err error) {
	empty, err := anonymous(o.pids.only())
	if err != nil {
		return result{}, err
	}
	o.connections = o.streams
	h, err := hold(ctx, o)
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, h.Close(ctx)) }()
	before, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	select {
	case <-time.After(o.period):
	case <-ctx.Done():
		return result{}, ctx.Err()
	}
	after, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	full, err := anonymous(o.pids.only())
	return result{
		Operations: o.streams, WallNS: o.period.Nanoseconds(), CPUNS: (after - before).Nanoseconds() / int64(o.streams), Streams: o.streams,
		Memory: full, Before: empty,
	}, err
}

// anonymous returns the anonymous memory of a process, in bytes.
func anonymous(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("-pid %d: %w", pid, err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("-pid %d: this system does not tell its memory", pid)
}

// holdVerb makes this program a process with open streams.
const holdVerb = "-hold"

// holdStreams opens streams, says so, and for each line that it is told then says
// when each of them had one message more. It ends with its input.
func holdStreams(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	path := args[0]
	streams, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	connections, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	var (
		had  atomic.Int64 // messages
		last = make(chan time.Time, 1)
		want = int64(streams)
		fail = make(chan error, streams)
	)
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	for i := range connections {
		conn, err := newWorkloadClient(path)
		if err != nil {
			return err
		}
		defer conn.Close()
		for range streams*(i+1)/connections - streams*i/connections {
			stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				return err
			}
			if _, err := stream.Recv(); err != nil {
				return err
			}
			go func() {
				for {
					if _, err := stream.Recv(); err != nil {
						fail <- err
						return
					}
					if had.Add(1)%want == 0 {
						last <- time.Now()
					}
				}
			}()
		}
	}
	fmt.Fprintln(stdout, "ready")
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		fmt.Fprintln(stdout, "armed")
		select {
		case at := <-last:
			fmt.Fprintln(stdout, "last", at.UnixNano())
		case err := <-fail:
			return err
		}
	}
	return nil
}
