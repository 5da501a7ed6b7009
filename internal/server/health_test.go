package server

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/monitor"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// brokenStore refuses writes as long as refuse is set.
type brokenStore struct {
	store.Store
	refuse error
}

func (b *brokenStore) Commit(ctx context.Context, txns []store.Txn) []store.Result {
	if b.refuse == nil {
		return b.Store.Commit(ctx, txns)
	}
	results := make([]store.Result, len(txns))
	for i := range results {
		results[i].Err = b.refuse
	}
	return results
}

// Each check says so when the thing that it stands for is broken, and no other
// check does (R105).
func TestHealthChecks(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	log := slog.New(slog.DiscardHandler)
	type parts struct {
		s       *Server
		stop    context.CancelFunc
		store   *watched
		broken  *brokenStore
		reg     *registry.Registry
		own     *ownSVID
		trail   *audit.Writer
		admin   net.Listener
		serving context.Context
	}
	const degrades, fails = monitor.Degraded, monitor.Failing
	for _, tt := range []struct {
		check  string
		strict bool
		want   monitor.State
		reason string
		smash  func(t *testing.T, p *parts)
	}{
		{"", false, monitor.OK, "", func(*testing.T, *parts) {}},
		{"serving", false, fails, "server_stopping", func(_ *testing.T, p *parts) { p.stop() }},
		{"certificate", false, fails, "server_certificate_expired", func(_ *testing.T, p *parts) { p.own.end = time.Now().Add(-time.Second) }},
		{"audit", false, degrades, "audit_unavailable", func(_ *testing.T, p *parts) { p.trail.Close() }},
		{"audit", true, fails, "audit_unavailable", func(_ *testing.T, p *parts) { p.trail.Close() }},
		{"store", false, degrades, "disk_full", func(t *testing.T, p *parts) {
			p.broken.refuse = fault.New(fault.Unavailable, "disk_full", "the disk that holds the store is full")
			write(t, p.store, "disk_full")
		}},
		{"admin_socket", false, degrades, "socket_unreachable", func(_ *testing.T, p *parts) { p.admin.Close() }},
	} {
		name := tt.check
		if tt.strict {
			name += ", strict"
		}
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			opened, err := sqlite.Config{Dir: dir}.Open(t.Context(), log)
			if err != nil {
				t.Fatal(err)
			}
			defer opened.Close()
			p := &parts{broken: &brokenStore{Store: opened}}
			p.store = &watched{Store: p.broken}
			if p.reg, err = registry.Open(t.Context(), p.store, td, log); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- p.reg.Run(ctx) }()
			defer func() { cancel(); <-ended }()
			keeper, err := (&memkeys.Config{}).Open(ctx)
			if err != nil {
				t.Fatal(err)
			}
			auth, err := authority.New(authority.Config{TrustDomain: td, ServerID: "s", Keeper: keeper, Registry: p.reg, Log: log, TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			if p.trail, err = audit.Open(audit.Config{Path: filepath.Join(dir, "audit.log"), Server: "s", Log: log}); err != nil {
				t.Fatal(err)
			}
			defer p.trail.Close()
			p.own = &ownSVID{wake: make(chan struct{}, 1), current: &tls.Certificate{}, end: time.Now().Add(time.Hour)}
			if p.admin, err = net.Listen("unix", filepath.Join(dir, "s")); err != nil {
				t.Fatal(err)
			}
			defer p.admin.Close()
			p.serving, p.stop = context.WithCancel(t.Context())
			defer p.stop()
			p.s = &Server{ready: make(chan struct{}), registry: p.reg}
			p.s.cfg.Server.SocketPath, p.s.cfg.Server.AuditStrict = filepath.Join(dir, "s"), tt.strict
			checks := p.s.needs(p.serving, p.store, auth, p.own, p.trail)

			// Without keys nothing can be issued.
			before := monitor.Examine(checks)
			for _, check := range []string{"x509_authority", "jwt_authority"} {
				if got := before.Checks[check]; got.Status != fails || got.Reason != "authority_unavailable" {
					t.Errorf("%s before there is one: %+v", check, got)
				}
			}
			if err := auth.Start(ctx); err != nil {
				t.Fatal(err)
			}
			tt.smash(t, p)
			report := monitor.Examine(checks)
			if report.Status != tt.want {
				t.Errorf("status %s, want %s", report.Status, tt.want)
			}
			for check, got := range report.Checks {
				want := monitor.Result{Status: monitor.OK}
				if check == tt.check {
					want = monitor.Result{Status: tt.want, Reason: tt.reason}
				}
				if got.Status != want.Status || got.Reason != want.Reason {
					t.Errorf("%s: %+v, want %+v", check, got, want)
				}
			}
			if (monitor.Ready(checks) == nil) != (tt.want != fails) {
				t.Errorf("gRPC health says %v", monitor.Ready(checks))
			}
			if tt.check == "store" {
				p.broken.refuse = nil
				write(t, p.store, "")
				if got := monitor.Examine(checks); got.Status != monitor.OK {
					t.Errorf("after the store is back: %+v", got)
				}
			}
		})
	}
}

func write(t *testing.T, st store.Store, reason string) {
	t.Helper()
	err := st.Commit(t.Context(), []store.Txn{{Puts: []store.Put{{Key: "/test", Value: []byte("x")}}}})[0].Err
	if (err == nil) != (reason == "") || err != nil && fault.ReasonOf(err) != reason {
		t.Fatalf("Commit() = %v, want %q", err, reason)
	}
}

func TestReadinessBeforeTheStart(t *testing.T) {
	c := Default()
	c.Server.DataDir = t.TempDir()
	c.Server.TrustDomain = config.TrustDomain{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	s, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	report := monitor.Examine(s.readiness())
	if report.Checks["serving"].Reason != "server_starting" {
		t.Errorf("readiness %+v", report)
	}
	if report := monitor.Examine(s.living()); report.Status != monitor.OK { // it is busy, not dead
		t.Errorf("living %+v", report)
	}
}
