package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// measure makes calls until count operations are done, parallel at a time, and
// returns times for one operation. A call does size operations.
func measure(ctx context.Context, o options, size int, call func(ctx context.Context, worker, call int) error) (result, error) {
	calls := (o.count + size - 1) / size
	times := make([]time.Duration, calls)
	var next atomic.Int64
	var once sync.Once
	var first error
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	before, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	start := time.Now()
	var group sync.WaitGroup
	for worker := range min(o.parallel, calls) {
		group.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= calls || ctx.Err() != nil {
					return
				}
				began := time.Now()
				if err := call(ctx, worker, i); err != nil {
					once.Do(func() { first = err; cancel() })
					return
				}
				times[i] = time.Since(began)
			}
		})
	}
	group.Wait()
	wall := time.Since(start)
	if first == nil {
		first = ctx.Err()
	}
	if first != nil {
		return result{}, first
	}
	after, err := o.pids.cpuTime()
	if err != nil {
		return result{}, err
	}
	done := int64(calls * size)
	r := result{Operations: int(done), WallNS: wall.Nanoseconds() / done, CPUNS: (after - before).Nanoseconds() / done}
	r.P50NS, r.P99NS = percentiles(times)
	return r, nil
}

// percentiles sorts the times and returns the median and what 99 % stay below.
func percentiles(times []time.Duration) (p50, p99 int64) {
	slices.Sort(times)
	return times[len(times)/2].Nanoseconds(), times[len(times)*99/100].Nanoseconds()
}

// pids are processes that are measured together.
type pids []int

func (p *pids) String() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint([]int(*p)), " ", ","), "[]")
}

func (p *pids) Set(text string) error {
	*p = nil
	for word := range strings.SplitSeq(text, ",") {
		pid, err := strconv.Atoi(word)
		if err != nil || pid < 0 {
			return errors.New("this is not the number of a process")
		}
		if pid > 0 {
			*p = append(*p, pid)
		}
	}
	return nil
}

// only returns the first of them, or 0.
func (p pids) only() int { return append(p, 0)[0] }

// cpuTime returns the sum of what they have used.
func (p pids) cpuTime() (sum time.Duration, err error) {
	for _, pid := range p {
		one, err := cpuTime(pid)
		if err != nil {
			return 0, err
		}
		sum += one
	}
	return sum, nil
}

// cpuTime returns the time that all threads of a process have run, to the
// nanosecond. (Threads that ended meanwhile are missing; the Go runtime keeps its
// threads.)
func cpuTime(pid int) (time.Duration, error) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if len(threads) == 0 {
		return 0, fmt.Errorf("-pid %d: there is no such process, or this system does not count its time", pid)
	}
	var sum time.Duration
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		ran, _, _ := strings.Cut(string(text), " ")
		ns, err := strconv.ParseInt(ran, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// reference measures the CPU time of one call of f in this process. Each round is
// some ticks of the kernel long: it may count a running thread at its ticks alone.
func reference(f func() error) (int64, error) {
	const rounds, each, long = 5, 200, 40 * time.Millisecond
	best := int64(0)
	for range rounds { // the best round is the one that was disturbed least
		before, err := cpuTime(os.Getpid())
		if err != nil {
			return 0, err
		}
		calls, took := int64(0), time.Duration(0)
		for took < long {
			for range each {
				if err := f(); err != nil {
					return 0, err
				}
			}
			after, err := cpuTime(os.Getpid())
			if err != nil {
				return 0, err
			}
			calls, took = calls+each, after-before
		}
		if ns := took.Nanoseconds() / calls; best == 0 || ns < best {
			best = ns
		}
	}
	return best, nil
}
