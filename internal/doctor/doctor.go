// Package doctor looks at what a server or an agent stands on, whether it runs or
// not: files and their modes, room on disk, sockets, clocks, what expires. It
// only looks, and says of each thing how it is and what to do.
//
// What must always hold: nothing is written, no lock is taken, no process is
// disturbed; a check that cannot be made says so instead of passing.
package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/localsocket"
)

// Verdict is the outcome of a check.
type Verdict string

// The verdicts, from good to bad.
const (
	OK      Verdict = "ok"
	Skipped Verdict = "skipped" // it could not be made, which is nobody's fault
	Warn    Verdict = "warn"
	Fail    Verdict = "fail"
)

// Finding is what one check found.
type Finding struct {
	Check   string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Found   string  `json:"found"`
	Fix     string  `json:"fix,omitempty"`
}

// Say returns a finding.
func Say(check string, v Verdict, format string, args ...any) Finding {
	return Finding{Check: check, Verdict: v, Found: fmt.Sprintf(format, args...)}
}

// Do returns the finding with what to do, unless there is nothing to do.
func (f Finding) Do(format string, args ...any) Finding {
	if f.Verdict == Warn || f.Verdict == Fail {
		f.Fix = fmt.Sprintf(format, args...)
	}
	return f
}

// Error returns the finding about an error, which may be nil.
func Error(check string, err error, good string) Finding {
	if err == nil {
		return Say(check, OK, "%s", good)
	}
	f := Say(check, Fail, "%s", fault.MessageOf(err))
	if e, ok := errors.AsType[*fault.Error](err); ok {
		f.Fix = e.Remedy
	} else {
		f.Found = err.Error()
	}
	return f
}

// Worst returns the worst verdict of all.
func Worst(found []Finding) Verdict {
	worst := OK
	rank := map[Verdict]int{OK: 0, Skipped: 0, Warn: 1, Fail: 2}
	for _, f := range found {
		if rank[f.Verdict] > rank[worst] {
			worst = f.Verdict
		}
	}
	return worst
}

// DataDir looks at a data directory: a private one, for its owner to write.
func DataDir(path string) Finding {
	const check = "data_dir"
	info, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return Say(check, Warn, "%s does not exist", path).Do("it is made when it is first used; see that data_dir is right")
	case err != nil:
		return Say(check, Fail, "%s cannot be looked at: %v", path, err).Do("run this as its owner or as root")
	case !info.IsDir():
		return Say(check, Fail, "%s is not a directory", path).Do("choose another data_dir")
	case info.Mode().Perm()&0o022 != 0:
		return Say(check, Fail, "%s has mode %s: others may write to it", path, mode(info)).Do("chmod 700 %s", path)
	}
	if err := localsocket.CheckDirOf(path, info); err != nil {
		f := Error(check, err, "")
		return f.Do("let all directories above it belong to root or its owner, writable by nobody else")
	}
	if err := writable(path); err != nil {
		return Say(check, Fail, "%s cannot be written: %v", path, err).Do("mount it for writing, and let it belong to who runs the program")
	}
	if info.Mode().Perm()&0o055 != 0 {
		return Say(check, Warn, "%s has mode %s: others may look into it", path, mode(info)).Do("chmod 700 %s", path)
	}
	return Say(check, OK, "%s has mode %s", path, mode(info))
}

// Keys looks at files that hold private keys; none need be there.
func Keys(paths ...string) Finding {
	const check = "keys"
	seen := Say(check, Skipped, "there is no key file")
	for _, path := range paths {
		info, err := os.Lstat(path)
		switch {
		case os.IsNotExist(err):
		case err != nil:
			return Say(check, Fail, "%s cannot be looked at: %v", path, err).Do("run this as its owner or as root")
		case !info.Mode().IsRegular():
			return Say(check, Fail, "%s is not a file", path).Do("remove it")
		case info.Mode().Perm()&0o077 != 0:
			return Say(check, Fail, "%s has mode %s: others may read the private keys in it", path, mode(info)).
				Do("chmod 600 %s; if others may have read it, replace the keys", path)
		default:
			seen = Say(check, OK, "%s has mode %s", path, mode(info))
		}
	}
	return seen
}

func mode(info fs.FileInfo) string { return fmt.Sprintf("%04o", info.Mode().Perm()) }

// Limits of Disk.
const (
	littleSpace = 64 << 20
	someSpace   = 512 << 20
)

// Disk looks at the room on the file systems under paths; the worst counts.
func Disk(paths ...string) Finding {
	worst := Say("disk", Skipped, "nothing is on disk yet")
	for _, path := range paths {
		free, inodes, counted, err := room(path)
		switch {
		case os.IsNotExist(err):
			continue
		case err != nil:
			return Say("disk", Skipped, "how much is free cannot be told: %v", err)
		}
		f := judgeRoom(path, free, inodes, counted)
		if worst.Verdict == Skipped || Worst([]Finding{worst, f}) != worst.Verdict {
			worst = f
		}
	}
	return worst
}

// judgeRoom judges free bytes and files; counted says that files are limited there.
func judgeRoom(path string, free, inodes uint64, counted bool) Finding {
	v := OK
	switch {
	case free < littleSpace, counted && inodes < 100:
		v = Fail
	case free < someSpace, counted && inodes < 10_000:
		v = Warn
	}
	f := Say("disk", v, "%d MiB are free under %s", free>>20, path)
	if counted {
		f.Found += fmt.Sprintf(", and %d files", inodes)
	}
	return f.Do("make room: without it no change is accepted and nothing new is kept")
}

// Socket looks at a socket that should be there if serving is set.
func Socket(check, path string, public, serving bool) Finding {
	info, err := os.Lstat(path)
	switch {
	case os.IsNotExist(err) && !serving:
		return Say(check, Skipped, "%s is not there, as long as nothing runs", path)
	case os.IsNotExist(err):
		return Say(check, Fail, "%s is gone, although something runs", path).Do("restart it; and see what removes files there")
	case err != nil:
		return Say(check, Fail, "%s cannot be looked at: %v", path, err).Do("run this as its owner or as root")
	case info.Mode().Type() != fs.ModeSocket:
		return Say(check, Fail, "%s is not a socket", path).Do("remove it, or choose another path")
	case !public && info.Mode().Perm()&0o077 != 0:
		return Say(check, Fail, "%s has mode %s: others may use it as an operator does", path, mode(info)).Do("chmod 600 %s", path)
	case public && info.Mode().Perm()&0o222 != 0o222:
		return Say(check, Fail, "%s has mode %s: workloads of other users cannot open it", path, mode(info)).Do("chmod 777 %s", path)
	}
	if err := localsocket.CheckDirOf(filepath.Dir(path), info); err != nil {
		return Error(check, err, "")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return Say(check, Warn, "%s is there, but nobody listens: %v", path, err).Do("start the program: it replaces a socket that a killed run has left")
	}
	c.Close()
	return Say(check, OK, "%s has mode %s and is listened on", path, mode(info))
}

// Expiry looks at something that lives from one moment to another and should be
// renewed before the last 1/part of its life.
func Expiry(check, what string, from, end, now time.Time, part int) Finding {
	left := end.Sub(now)
	switch {
	case left <= 0:
		return Say(check, Fail, "%s ended %s ago, at %s", what, (-left).Round(time.Second), end.UTC().Format(time.RFC3339)).
			Do("see in the log why it was not renewed, and that the clock is right")
	case left < end.Sub(from)/time.Duration(part):
		return Say(check, Warn, "%s ends in %s, at %s, and should have been renewed by now", what, left.Round(time.Second), end.UTC().Format(time.RFC3339)).
			Do("see in the log why it was not renewed")
	}
	return Say(check, OK, "%s ends in %s, at %s", what, left.Round(time.Second), end.UTC().Format(time.RFC3339))
}

// Limits of Clock.
const (
	smallSkew = 5 * time.Second
	largeSkew = 30 * time.Second // how far NotBefore lies back
)

// Clock judges how far another clock is from ours.
func Clock(whose string, ahead time.Duration) Finding {
	v := OK
	switch {
	case ahead.Abs() >= largeSkew:
		v = Fail
	case ahead.Abs() >= smallSkew:
		v = Warn
	}
	direction := "ahead of"
	if ahead < 0 {
		direction = "behind"
	}
	return Say("clock", v, "the clock of %s is %s %s this one", whose, ahead.Abs().Round(time.Millisecond), direction).
		Do("set both by NTP; certificates are judged by them")
}

// SameTrustDomain compares where a trust domain is named.
func SameTrustDomain(names map[string]string) Finding {
	var first, firstIn string
	for _, where := range slices.Sorted(maps.Keys(names)) {
		name := names[where]
		switch {
		case name == "":
		case first == "":
			first, firstIn = name, where
		case name != first:
			return Say("trust_domain", Fail, "%s is of %q, but %s of %q", firstIn, first, where, name).
				Do("one of them is the wrong one: a data directory belongs to one trust domain for good")
		}
	}
	return Say("trust_domain", OK, "%s", cmp.Or(first, "not known yet"))
}
