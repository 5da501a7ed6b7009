package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	localauthorityv1 "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
)

// benchReissue has a real agent hold SVIDs that an authority signed which is then
// tainted, and waits until none of them is left.
func benchReissue(ctx context.Context, o options) (r result, err error) {
	s, err := dialServer(ctx, o)
	if err != nil {
		return r, err
	}
	defer s.Close()
	conn, first, err := dialWorkload(ctx, o.workload)
	if err != nil {
		return r, err
	}
	conn.Close()
	model, err := s.entryOf(ctx, first)
	if err != nil {
		return r, err
	}
	admin, err := dialSocket(o.agent)
	if err != nil {
		return r, err
	}
	defer admin.Close()
	agent := statusv1.NewAgentClient(admin)
	ids, err := s.fill(ctx, model.GetParentId(), o.entries)
	defer func() { err = errors.Join(err, s.remove(context.WithoutCancel(ctx), ids)) }()
	if err != nil {
		return r, err
	}
	if err := progress(ctx, agent, "hold the SVIDs (x509_svid_cache_max_size bounds how many it does)", func(s *statusv1.AgentStatus) int {
		return max(0, o.entries-int(s.GetX509Svids()))
	}); err != nil {
		return r, err
	}
	tainted, err := s.replaceAuthority(ctx)
	if err != nil {
		return r, err
	}
	before, err := o.pids.cpuTime()
	if err != nil {
		return r, err
	}
	start := time.Now()
	if _, err := localauthorityv1.NewLocalAuthorityClient(s.admin).TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: tainted}); err != nil {
		return r, err
	}
	server, err := statusv1.NewServerClient(s.admin).Status(ctx, &statusv1.ServerStatusRequest{})
	if err != nil {
		return r, err
	}
	if err := progress(ctx, agent, "replace the SVIDs", func(s *statusv1.AgentStatus) int {
		if s.GetBundleSequence() < server.GetBundle().GetSequence() {
			return o.entries + 1 // it does not know yet
		}
		return int(s.GetX509SvidsTainted())
	}); err != nil {
		return r, err
	}
	wall := time.Since(start)
	after, err := o.pids.cpuTime()
	if err != nil {
		return r, err
	}
	r.Operations, r.WallNS, r.CPUNS = o.entries, wall.Nanoseconds()/int64(o.entries), (after-before).Nanoseconds()/int64(o.entries)
	r.Reference = "make a key and a CSR, verify it, sign, P-256"
	r.ReferenceNS, err = referenceReissue()
	return r, err
}

// replaceAuthority prepares and activates an authority, and returns the ID of the
// one that signed before. The server sees that the agents hold the new one.
func (s *target) replaceAuthority(ctx context.Context) (old string, err error) {
	client := localauthorityv1.NewLocalAuthorityClient(s.admin)
	state, err := client.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		return "", err
	}
	prepared, err := client.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		return "", err
	}
	_, err = client.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.GetPreparedAuthority().GetAuthorityId()})
	return state.GetActive().GetAuthorityId(), err
}

// patience is for how long an agent may get no further.
const patience = time.Minute

// progress asks an agent how many are left until none is.
func progress(ctx context.Context, agent statusv1.AgentClient, what string, left func(*statusv1.AgentStatus) int) error {
	least, since := -1, time.Now()
	for {
		status, err := agent.Status(ctx, &statusv1.AgentStatusRequest{})
		if err != nil {
			return fmt.Errorf("ask the agent's admin socket: %w", err)
		}
		n := left(status)
		if n == 0 {
			return nil
		}
		if least < 0 || n < least {
			least, since = n, time.Now()
		}
		if time.Since(since) > patience {
			return fmt.Errorf("the agent does not %s: %d are left", what, n)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// referenceReissue is what a new X.509-SVID cannot do without at both ends.
func referenceReissue() (int64, error) {
	asked, err := reference(func() error {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		_, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		return err
	})
	if err != nil {
		return 0, err
	}
	signed, err := referenceCSR()
	return asked + signed, err
}
