package server

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/machine"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/servers"
)

// handOver is how long the end of a server may take to give its lease back.
const handOver = 10 * time.Second

// lockDataDir takes the data directory for this process: who has it is this
// server, and no former life of it goes on (R68).
// A directory that others can write is refused, whatever the store is (R113).
func lockDataDir(dir string) (*machine.Lock, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("examine data_dir: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 && runtime.GOOS != "windows" {
		return nil, fault.New(fault.Precondition, "unsafe_permissions", "data_dir %s has mode %04o: others can write it", dir, info.Mode().Perm()).
			Fix("chmod go-w %s", dir)
	}
	l, err := machine.LockFile(filepath.Join(dir, "server.lock"))
	if fault.ReasonOf(err) == "locked" {
		return nil, fault.New(fault.Precondition, "data_dir_in_use", "another server runs in data_dir: %s", fault.MessageOf(err)).
			Fix("stop that process, or give this one a data_dir of its own")
	}
	return l, err
}

// place says where this server keeps its identity.
func place(dir string) (registry.Place, error) {
	at := registry.Place{BootID: machine.BootID()}
	var err error
	if at.Host, err = os.Hostname(); err != nil {
		at.Host = "" // it is for people only
	}
	if at.DataDir, err = filepath.Abs(dir); err != nil {
		return registry.Place{}, err
	}
	if at.Device, at.Inode, err = machine.Directory(dir); err != nil {
		return registry.Place{}, fmt.Errorf("examine data_dir: %w", err)
	}
	return at, nil
}

// stopSigning gives the lease back, so that whoever comes next need not wait.
func (s *Server) stopSigning(ctx context.Context, fleet *servers.Servers) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), handOver)
	defer cancel()
	if err := fleet.Stop(ctx); err != nil {
		s.log.WarnContext(ctx, "the next life of this server may have to wait for the lease", "err", err)
	}
}

// manyAuthorities is how many authorities of a kind are more than a trust domain
// should have: with half as many again no server can add one.
const manyAuthorities = authority.MaxLive * 2 / 3

// fleetChecks is what a server needs of the others, and of its own row.
func (s *Server) fleetChecks(fleet *servers.Servers) []monitor.Check {
	return []monitor.Check{
		{Name: "signing", Run: func() error { return fleet.MaySign(time.Now()) }},
		// What was granted before is renewed until the lease ends.
		{Name: "freshness", Run: fleet.Stale, Degrades: true},
		{Name: "replicas", Degrades: true, Run: func() error {
			for _, o := range fleet.Others() {
				if o.Live && o.Diverged {
					return fault.New(fault.Unavailable, "state_diverged", "server %s holds something else than this one at the same position", o.Row.ID).
						Fix("it is loaded afresh by itself; if it lasts, check the store")
				}
			}
			return nil
		}},
		{Name: "bundle", Degrades: true, Run: func() error {
			n := 0
			s.registry.View(func(snap *registry.Snapshot) {
				if b, err := snap.Bundle(s.cfg.Server.TrustDomain.TrustDomain); err == nil {
					x509, jwt := authority.Live(snap, b)
					n = max(x509, jwt)
				}
			})
			if n > manyAuthorities {
				return fault.New(fault.Unavailable, "authorities_many", "the bundle holds %d authorities of a kind; with %d no server can add one", n, authority.MaxLive).
					Fix("replace servers less often than once in ca_ttl, or keep their data_dir; what is left of a server goes when its last SVID has ended")
			}
			return nil
		}},
	}
}

// liveAuthorities counts those in the bundle.
func (s *Server) liveAuthorities() (x509, jwt int) {
	s.registry.View(func(snap *registry.Snapshot) {
		if b, err := snap.Bundle(s.cfg.Server.TrustDomain.TrustDomain); err == nil {
			x509, jwt = len(b.X509), len(b.JWT)
		}
	})
	return x509, jwt
}

// fleetGauges adds what is measured of this and the other servers.
func (s *Server) fleetGauges(m *monitor.Metrics, fleet *servers.Servers) {
	m.Gauge("stale_seconds", "How long ago this server's view of the trust domain was surely complete. Past 60 s it grants nothing new. 0 with a store that it has for itself.", func() float64 { return fleet.Fresh().Seconds() })
	m.Gauges("lease_seconds", "For how long this server may go on signing without its store. Absent with a store that it has for itself.", nil, func(give func(float64, ...string)) {
		if left, limited := fleet.LeaseLeft(); limited {
			give(left.Seconds())
		}
	})
	m.Gauge("clock_ahead_seconds", "By how much this server's clock is ahead of what the live servers take for right. Past 30 s either way it signs nothing.", func() float64 {
		ahead, _ := fleet.Clock(time.Now())
		return ahead.Seconds()
	})
	m.Gauges("servers", "Servers of the trust domain, this one included, by state: live, silent, stopped.", []string{"state"}, func(give func(float64, ...string)) {
		count := map[string]float64{"live": 1, "silent": 0, "stopped": 0}
		for _, o := range fleet.Others() {
			count[stateOf(o)]++
		}
		for state, n := range count {
			give(n, state)
		}
	})
	m.Gauges("bundle_authorities", "Authorities in the own trust domain's bundle, of all servers, by kind.", []string{"kind"}, func(give func(float64, ...string)) {
		x509, jwt := s.liveAuthorities()
		give(float64(x509), "x509")
		give(float64(jwt), "jwt")
	})
}

func stateOf(o servers.Other) string {
	switch {
	case o.Row.Stopped:
		return "stopped"
	case o.Live:
		return "live"
	}
	return "silent"
}
