package serverapi_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	syncv1 "github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/audit"
	"github.com/plastron/plastron/internal/authority"
	"github.com/plastron/plastron/internal/bundle"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/memkeys"
	"github.com/plastron/plastron/internal/lifetime"
	"github.com/plastron/plastron/internal/nodeattest"
	"github.com/plastron/plastron/internal/nodeattest/jointoken"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/serverapi"
	"github.com/plastron/plastron/internal/store/sqlite"
	"github.com/plastron/plastron/internal/svid"
	"google.golang.org/grpc"
)

// quietServer is a server without sockets, for tests that let hours pass.
type quietServer struct {
	t        *testing.T
	registry *registry.Registry
	nodes    *nodes.Engine
	api      *serverapi.Server
	cfg      serverapi.Config
}

func newQuietServer(t *testing.T, options ...option) *quietServer {
	t.Helper()
	dir, log := t.TempDir(), slog.New(slog.NewTextHandler(io.Discard, nil))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(dir, 0o700))
	st, err := sqlite.Config{Dir: dir}.Open(t.Context(), log)
	must(err)
	s := &quietServer{t: t}
	s.registry, err = registry.Open(t.Context(), st, td, log)
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.registry.Run(ctx) }()
	trail, err := audit.Open(audit.Config{Path: filepath.Join(dir, "audit.log"), Server: "s1", Log: log})
	must(err)
	t.Cleanup(func() { cancel(); <-done; trail.Close(); st.Close() })
	keeper, err := new(memkeys.Config).Open(t.Context())
	must(err)
	auth, err := authority.New(authority.Config{
		TrustDomain: td, ServerID: "s1", Keeper: keeper, Registry: s.registry, TTL: 72 * time.Hour, KeyType: keys.ECP256, Log: log,
	})
	must(err)
	must(auth.Start(t.Context()))
	verifier, err := new(jointoken.Config).Open(t.Context(), nodeattest.Env{})
	must(err)
	nodesConfig := nodes.Config{
		TrustDomain: td, Registry: s.registry, Audit: trail, Issuer: auth.X509, Lifetimes: lifetime.Set{Agent: 24 * time.Hour}, Log: log,
		Verifiers: map[string]nodeattest.Verifier{jointoken.Name: verifier},
	}
	s.cfg = serverapi.Config{
		TrustDomain: td, Registry: s.registry, Audit: trail, X509: auth.X509, JWT: auth.JWT, Log: log,
		Health: func() error { return nil }, Lifetimes: lifetime.Set{X509: time.Hour, JWT: time.Hour},
	}
	for _, o := range options {
		o(&s.cfg, &nodesConfig)
	}
	s.nodes = nodes.New(nodesConfig)
	s.cfg.Nodes = s.nodes
	s.api = serverapi.New(s.cfg)
	return s
}

// changeBundle writes the own bundle.
func (s *quietServer) changeBundle(change func(*bundle.Bundle) *bundle.Bundle) {
	s.t.Helper()
	_, err := s.registry.Update(s.t.Context(), "test", func(tx *registry.Tx) error {
		b, err := tx.Bundle(td)
		if err != nil {
			return err
		}
		return tx.PutBundle(change(b))
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// pipe is a stream without a wire.
type pipe struct {
	grpc.ServerStream
	ctx     context.Context
	toAgent chan *syncv1.ServerMessage
	toUs    chan *syncv1.AgentMessage
}

func (p *pipe) Context() context.Context { return p.ctx }

func (p *pipe) Send(m *syncv1.ServerMessage) error {
	select {
	case p.toAgent <- m:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p *pipe) Recv() (*syncv1.AgentMessage, error) {
	select {
	case m := <-p.toUs:
		return m, nil
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

// admit attests an agent.
func (s *quietServer) admit() nodes.Admitted {
	s.t.Helper()
	token, _, err := s.nodes.CreateToken(s.t.Context(), "test", nodes.TokenRequest{TTL: time.Minute})
	if err != nil {
		s.t.Fatal(err)
	}
	admitted, err := s.nodes.Attest(s.t.Context(), nodes.Attestation{
		Type: jointoken.Name, Payload: []byte(token.Reveal()), CSR: newCSR(s.t, newKey(s.t)), Address: "pipe",
	}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return admitted
}

// follows attests an agent and opens its stream, in step from the start.
func (s *quietServer) follows() (heard chan *syncv1.ServerMessage, ended chan error) {
	s.t.Helper()
	return s.followsWith(s.admit().SVID)
}

// followsWith opens a stream with an agent's certificate, in step from the start.
func (s *quietServer) followsWith(agent svid.X509) (heard chan *syncv1.ServerMessage, ended chan error) {
	s.t.Helper()
	hello := &syncv1.Hello{Version: 1, AgentVersion: "test"}
	s.registry.View(func(snap *registry.Snapshot) { h := snap.Hash(agent.ID); hello.Hash = h[:] })
	ctx, cancel := context.WithCancel(context.Background())
	p := &pipe{ctx: ctx, toAgent: make(chan *syncv1.ServerMessage, 64), toUs: make(chan *syncv1.AgentMessage, 1)}
	p.toUs <- &syncv1.AgentMessage{Message: &syncv1.AgentMessage_Hello{Hello: hello}}
	ended = make(chan error, 1)
	go func() { ended <- s.api.FollowAs(agent.Chain, p) }()
	s.t.Cleanup(func() { cancel(); synctest.Wait() })
	if m := <-p.toAgent; m.GetCurrent() == nil {
		s.t.Fatalf("the first message is %v, want Current", m)
	}
	return p.toAgent, ended
}

// An agent that hears nothing is told where it stands every five minutes, and
// not before; what it is told otherwise begins these minutes anew.
func TestConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newQuietServer(t)
		heard, _ := s.follows()
		for range 3 {
			began := time.Now()
			m := <-heard
			if took := time.Since(began); took != 5*time.Minute {
				t.Fatalf("%v after %v, want nothing for five minutes", m, took)
			}
			var want [32]byte
			s.registry.View(func(snap *registry.Snapshot) {
				for n := range snap.Nodes("") {
					want = snap.Hash(n.ID)
				}
			})
			if got := m.GetCurrent(); got == nil || string(got.Hash) != string(want[:]) {
				t.Fatalf("%v, want Current with the hash %x", m, want)
			}
		}
		time.Sleep(4 * time.Minute)
		s.changeBundle(func(b *bundle.Bundle) *bundle.Bundle {
			b = b.Clone()
			b.RefreshHint, b.Sequence = time.Hour, b.Sequence+1
			return b
		})
		if m := <-heard; m.GetDelta() == nil {
			t.Fatalf("%v, want a Delta", m)
		}
		changed := time.Now()
		if m := <-heard; m.GetCurrent() == nil || time.Since(changed) != 5*time.Minute {
			t.Errorf("%v after %v, want Current after five minutes", m, time.Since(changed))
		}
	})
}

// R69: an agent whose certificate stands under a tainted authority is told to
// renew within half a minute, once for each such bundle.
func TestTaintedAuthorityAsksForRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newQuietServer(t)
		heard, ended := s.follows()
		next := func() *syncv1.ServerMessage {
			t.Helper()
			select {
			case m := <-heard:
				return m
			case err := <-ended:
				t.Fatalf("the stream ended: %v", err)
			case <-time.After(time.Minute):
				t.Fatal("nothing came in a minute")
			}
			return nil
		}
		s.changeBundle(func(b *bundle.Bundle) *bundle.Bundle {
			return b.WithX509(bundle.X509Authority{ASN1: b.X509[0].ASN1, Tainted: true})
		})
		began := time.Now()
		if m := next(); m.GetDelta() == nil {
			t.Fatalf("%v, want a Delta with the bundle", m)
		}
		m := next()
		renew := m.GetDirective().GetRenew()
		if renew == nil || renew.WithinMs != 30_000 || time.Since(began) > 30*time.Second {
			t.Fatalf("%v after %v, want Renew within half a minute", m, time.Since(began))
		}
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if n := len(heard); n > 0 {
			t.Errorf("it is told again: %v", <-heard)
		}
		// Another bundle in which it still is tainted: an agent that has not renewed by then is told again.
		s.changeBundle(func(b *bundle.Bundle) *bundle.Bundle {
			b = b.Clone()
			b.RefreshHint, b.Sequence = time.Hour, b.Sequence+1
			return b
		})
		if m := next(); m.GetDelta() == nil {
			t.Fatalf("%v, want a Delta", m)
		}
		if m := next(); m.GetDirective().GetRenew() == nil {
			t.Errorf("%v, want Renew", m)
		}
	})
}

// R30, R124: a stream ends within half a minute of the moment at which its agent
// would not be let in any more, however long nothing happened before.
func TestStreamEndsWithItsRight(t *testing.T) {
	const life = 20 * time.Minute
	presented := func(a svid.X509) nodes.Presented {
		return nodes.Presented{ID: a.ID, Serial: a.Serial, Expiry: a.NotAfter, KeyHash: a.KeyHash[:], Address: "pipe"}
	}
	for name, c := range map[string]struct {
		act    func(*quietServer, svid.X509)
		kind   fault.Kind
		reason string
	}{
		"its certificate ends": {func(*quietServer, svid.X509) {}, fault.Denied, nodes.ReasonExpired},
		"it is banned": {func(s *quietServer, a svid.X509) {
			if err := s.nodes.Ban(s.t.Context(), "test", a.ID); err != nil {
				s.t.Fatal(err)
			}
		}, fault.Denied, nodes.ReasonBanned},
		"a newer certificate is used": {func(s *quietServer, a svid.X509) {
			next, err := s.nodes.Renew(s.t.Context(), presented(a), newCSR(s.t, newKey(s.t)))
			if err != nil {
				s.t.Fatal(err)
			}
			if err := s.nodes.Authenticate(s.t.Context(), presented(next.SVID)); err != nil {
				s.t.Fatal(err)
			}
		}, fault.Unavailable, "reconnect"},
		"its authority is revoked": {func(s *quietServer, _ svid.X509) {
			s.changeBundle(func(b *bundle.Bundle) *bundle.Bundle { return b.WithoutX509(b.X509[0].ASN1) })
		}, fault.Unauthenticated, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newQuietServer(t, func(_ *serverapi.Config, n *nodes.Config) { n.Lifetimes.Agent = life })
				stays, away := s.admit().SVID, s.admit().SVID
				_, stayed := s.followsWith(stays)
				_, ended := s.followsWith(away)
				time.Sleep(life / 2)
				from := away.NotAfter
				if name != "its certificate ends" {
					c.act(s, away)
					from = time.Now()
				}
				select {
				case err := <-ended:
					if took := time.Since(from); fault.KindOf(err) != c.kind || c.reason != "" && fault.ReasonOf(err) != c.reason || took < 0 || took > 30*time.Second {
						t.Errorf("it ends with %v (%s) %v later, want %s within half a minute", err, fault.ReasonOf(err), took, c.reason)
					}
				case <-time.After(2 * life):
					t.Error("it stays open")
				}
				select {
				case err := <-stayed: // all are under one authority, and end at one time
					if name != "its certificate ends" && name != "its authority is revoked" {
						t.Errorf("the stream of another agent ends with %v", err)
					}
				default:
				}
			})
		})
	}
}

// A stream lives for an hour, more or less; then the agent is asked to connect
// anew, and the stream ends if it does not.
func TestConnectionAge(t *testing.T) {
	const runs = 5
	ages := map[time.Duration]bool{}
	for range runs {
		synctest.Test(t, func(t *testing.T) {
			s := newQuietServer(t)
			began := time.Now()
			heard, ended := s.follows()
			for {
				m := <-heard
				if m.GetCurrent() != nil {
					continue
				}
				age := time.Since(began)
				if d := m.GetDirective().GetReconnect(); d == nil || d.WithinMs != 15_000 || age < 48*time.Minute || age > 72*time.Minute {
					t.Fatalf("%v after %v, want Reconnect after 48 to 72 minutes", m, age)
				}
				ages[age] = true
				break
			}
			asked := time.Now()
			err := <-ended
			if took := time.Since(asked); fault.ReasonOf(err) != "reconnect" || took != 30*time.Second {
				t.Errorf("it ends with %v after %v, want reconnect after half a minute", err, took)
			}
		})
	}
	if len(ages) < 2 {
		t.Errorf("all streams have one age: %v", ages) // a fleet would come back at once
	}
}
