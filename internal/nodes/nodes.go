// Package nodes admits, renews, bans and forgets agents. It holds all policy
// about evidence: what admits a node the first time, what admits it again, and
// which of its certificates count.
//
// What must always hold: one-time evidence is consumed by the commit that
// admits the node, so it works once under any concurrency (R19, R20); a ban
// outlives every attestation and renewal that races it (R29); an agent has at
// most two live certificates, and using the second retires the first (R33).
//
// The decisions are pure functions of rows (this file); run.go reads and writes
// the rows through the registry.
package nodes

import (
	"bytes"
	"time"

	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Reasons of refusals that agents act on.
const (
	ReasonExpired      = "agent_expired"
	ReasonNotAttested  = "agent_not_attested"
	ReasonNotActive    = "agent_not_active"
	ReasonBanned       = "agent_banned"
	ReasonMustReattest = "agent_must_reattest"
)

// Candidate is a node that proved itself and the certificate it would get.
type Candidate struct {
	Now         time.Time
	Epoch       store.Epoch // of the store, as the deciding transaction sees it
	ID          spiffeid.ID
	Type        string
	Selectors   []entry.Selector
	CanReattest bool
	FirstUse    bool
	OneTime     []byte // hash of the one-time secret; empty if there is none
	Holder      []byte // who proved the node; empty if the attestor cannot tell
	Credential  registry.Credential
	Lineage     []byte // fresh random bytes, used if a new lineage begins
}

// Admit decides on a candidate. node and token are the rows as the transaction
// reads them, nil if absent. It returns the rows to write; a nil token means
// that there is none to write.
func Admit(node *registry.Node, token *registry.Token, c Candidate) (*registry.Node, *registry.Token, error) {
	if node != nil && node.Banned {
		return nil, nil, banned()
	}
	if node != nil && node.AttestationType != c.Type {
		return nil, nil, fault.New(fault.Denied, "agent_exists", "another attestor has admitted an agent with this ID").
			Fix("evict that agent, or give this one another path")
	}
	if len(c.OneTime) == 0 {
		switch {
		case node == nil:
			return admitted(c), nil, nil
		case c.FirstUse:
			return nil, nil, fault.New(fault.Denied, "already_attested", "this node was attested before, and its proof is good only once").
				Fix("evict the agent to let it attest again")
		}
		return reattested(node, c), nil, nil
	}
	switch {
	// One error for all three, so that it tells a guesser nothing (K1, K2, K3).
	case token == nil, token.Epoch != c.Epoch, !c.Now.Before(token.ExpiresAt), token.NodeID != c.ID.String():
		return nil, nil, tokenRefused()
	case len(token.Consumer) > 0:
		return retried(node, token, c)
	case node != nil:
		return nil, nil, tokenRefused()
	}
	used := *token
	used.Consumer = c.Credential.KeyHash
	return admitted(c), &used, nil
}

// retried lets the node that used the token go on when the answer was lost:
// same key, and still on its first certificate (K5). Anyone else is refused (K3, K6).
func retried(node *registry.Node, token *registry.Token, c Candidate) (*registry.Node, *registry.Token, error) {
	key := c.Credential.KeyHash
	first := node != nil && bytes.Equal(node.Evidence, c.OneTime) && bytes.Equal(node.Current.KeyHash, key) &&
		(node.Next.Serial == "" || bytes.Equal(node.Next.KeyHash, key))
	if !first || !bytes.Equal(token.Consumer, key) {
		return nil, nil, tokenRefused()
	}
	next := *node
	next.Next = c.Credential
	return &next, nil, nil
}

// reattested lets a node in again, which for some attestors is how an agent
// renews. As with a renewal the certificate before counts until the new one is
// used (R33): the agent is at work with it, and the answer may be lost.
func reattested(node *registry.Node, c Candidate) *registry.Node {
	again := admitted(c)
	again.AgentVersion, again.Follows = node.AgentVersion, node.Follows
	if c.Now.Before(node.Current.ExpiresAt) {
		again.Current, again.Next = node.Current, c.Credential
	}
	return again
}

// Changed reports whether somebody else than before has proved to be the node: it
// got a new key, or the attestor is set up so that two nodes have one ID (F22).
func Changed(node *registry.Node, c Candidate) bool {
	return node != nil && len(c.Holder) > 0 && !bytes.Equal(node.Evidence, c.Holder)
}

func admitted(c Candidate) *registry.Node {
	evidence := c.OneTime
	if len(evidence) == 0 {
		evidence = c.Holder
	}
	return &registry.Node{
		ID: c.ID, AttestationType: c.Type, Selectors: c.Selectors, CanReattest: c.CanReattest,
		Current: c.Credential, Lineage: c.Lineage, AttestedAt: c.Now.UTC().Truncate(time.Second), Evidence: evidence,
	}
}

// Authenticate decides whether the certificate with that serial, which the
// caller verified to be ours and node's, still counts. promote means that it was
// issued and not used before: Promote must be written.
// A refusal with ReasonNotActive means that a certificate was used after it was
// replaced, or belongs to a lineage that is over: someone has a copy (R31).
func Authenticate(node *registry.Node, serial string, expiry, now time.Time) (promote bool, err error) {
	switch {
	case node != nil && node.Banned:
		return false, banned()
	case !now.Before(expiry):
		return false, fault.New(fault.Denied, ReasonExpired, "the agent's certificate has expired").
			Fix("the agent has to attest again")
	case node == nil:
		return false, fault.New(fault.Denied, ReasonNotAttested, "the agent is not attested").
			Fix("the agent has to attest again")
	case serial == node.Current.Serial:
		return false, nil
	case node.Next.Serial != "" && serial == node.Next.Serial:
		return true, nil
	case renewedSince(node, expiry):
		return true, nil
	}
	return false, fault.New(fault.Denied, ReasonNotActive, "the agent's certificate was replaced by a newer one").
		Fix("if the agent is not in possession of the newer one, its key was copied: evict it and attest it again")
}

// renewedSince reports whether a certificate of ours, which the row does not know,
// can only be of a renewal that was lost when the store was restored. The first
// that comes is taken; with it the row knows again which one counts.
func renewedSince(node *registry.Node, expiry time.Time) bool {
	return node.Restored && expiry.After(node.Current.ExpiresAt) && expiry.After(node.Next.ExpiresAt)
}

// Standing decides whether a connection that authenticated before may stay open.
// reconnect means that the agent has, or could have, a newer certificate: it is
// to come again with that, and there is nothing wrong with it.
func Standing(node *registry.Node, serial string, expiry, now time.Time) (reconnect bool, err error) {
	switch {
	case node == nil || node.Banned:
		_, err := Authenticate(node, serial, expiry, now)
		return false, err
	case serial == node.Current.Serial && (now.Before(expiry) || !now.Before(node.Next.ExpiresAt)),
		node.Next.Serial != "" && serial == node.Next.Serial:
		_, err := Authenticate(node, serial, expiry, now)
		return false, err
	}
	return true, nil
}

// Promote makes a certificate the current one, if it is the one issued next, or of
// a renewal that a restored store has lost; the one before does not count any more.
func Promote(node registry.Node, used registry.Credential) registry.Node {
	switch {
	case used.Serial == node.Current.Serial:
	case node.Next.Serial != "" && used.Serial == node.Next.Serial:
		node.Current, node.Next = node.Next, registry.Credential{}
	case renewedSince(&node, used.ExpiresAt):
		node.Current, node.Next = used, registry.Credential{}
	}
	return node
}

// Renew decides on a new certificate for an agent that authenticated with serial.
// The old one counts until the new one is used, so that a lost answer locks
// nobody out (R33).
func Renew(node *registry.Node, serial string, expiry, now time.Time, next registry.Credential) (*registry.Node, error) {
	if _, err := Authenticate(node, serial, expiry, now); err != nil {
		return nil, err
	}
	if node.CanReattest {
		return nil, fault.New(fault.Denied, ReasonMustReattest, "this agent attests again instead of renewing")
	}
	renewed := Promote(*node, registry.Credential{Serial: serial, ExpiresAt: expiry})
	if bytes.Equal(renewed.Current.KeyHash, next.KeyHash) {
		return nil, fault.New(fault.Invalid, "key_reused", "the new certificate needs a new key") // C38
	}
	renewed.Next = next
	return &renewed, nil
}

// Unban decides whether there is a ban to lift. The node is forgotten then.
func Unban(node *registry.Node) error {
	if !node.Banned {
		return fault.New(fault.Precondition, "agent_not_banned", "the agent %q is not banned", node.ID)
	}
	return nil
}

func banned() error {
	return fault.New(fault.Denied, ReasonBanned, "the agent is banned").Fix("an operator lifts the ban with 'plastron server agent unban'")
}

func tokenRefused() error {
	return fault.New(fault.Denied, "join_token_refused", "the join token is unknown, expired or used").
		Fix("make a new one with 'plastron server token generate'")
}
