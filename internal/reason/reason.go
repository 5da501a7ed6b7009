// Package reason is the table of why a workload gets no identity, or not all
// that it might expect. Each reason has one stable code, one sentence and one
// fix, the same in the status that the workload gets, in what 'agent why' and
// 'server entry why' print, in the agent's log and in docs/why.md.
//
// The sentences here are for everybody: they name no selector, no grant and no
// SPIFFE ID (R131). What an operator may know besides is said with Say.
package reason

import "github.com/plastron/plastron/internal/fault"

// No grant reaches the process.
var (
	NoGrant = fault.New(fault.Denied, "no_grant",
		"nothing that is registered for this node fits this process, not even nearly").
		Fix("register it: 'plastron server entry create' with this agent, or an alias of it, as the parent and selectors that the process shows")
	SelectorMismatch = fault.New(fault.Denied, "selector_mismatch",
		"a grant of this agent fits this process but for one selector").
		Fix("correct the entry, or run the process as the entry says; 'plastron agent why PID' names the selector")
	ParentMismatch = fault.New(fault.Denied, "parent_mismatch",
		"an entry fits this process, but its parent is not this agent").
		Fix("give the entry this agent, or an alias of it, as the parent; 'plastron server entry why' names the entry")
	AliasMismatch = fault.New(fault.Denied, "alias_mismatch",
		"an entry fits this process, but its parent is an alias that wants one node selector which this agent does not have").
		Fix("correct the alias, or attest the node so that it has the selector; 'plastron server entry why' names it")
	GrantExpired = fault.New(fault.Denied, "grant_expired",
		"the grant that fits this process has ended").
		Fix("set a later end: 'plastron server entry update' with -entryExpiry, or create the entry anew")
	RuleFactMissing = fault.New(fault.Denied, "rule_fact_missing",
		"a rule fits this process, but a fact that it names is not known of the process").
		Fix("let an attestor yield the fact, or take it out of the rule; 'plastron agent why PID' names it")
	RuleFactInvalid = fault.New(fault.Denied, "rule_fact_invalid",
		"a rule fits this process, but a fact that it names has a value which no SPIFFE ID can hold").
		Fix("rename what the fact stands for, or register the process by an entry of its own; 'plastron agent why PID' names it")
)

// What the process is cannot be told.
var (
	AttestorFailed = fault.New(fault.Unavailable, "attestor_failed",
		"what the calling process is could not be found out").
		Fix("the agent's log says which attestor failed and why; the next call tries again")
	PeerGone         = fault.New(fault.Denied, "peer_gone", "the calling process has exited").Fix("let the process live until it has the answer")
	PeerUnresolvable = fault.New(fault.Denied, "peer_unresolvable",
		"the kernel does not say which process is calling").
		Fix("run the agent in a pid namespace that contains its workloads")
)

// There is a grant, and it cannot be served now.
var (
	NotSynced = fault.New(fault.Unavailable, "not_synced", "the agent has not yet been told what there is").
			Fix("try again; if it lasts, the agent's log says why it does not reach its server")
	NotSignedYet = fault.New(fault.Unavailable, "not_signed_yet", "an identity is there, but its SVID is not signed yet").
			Fix("try again; if it lasts, see whether the agent reaches its server")
	SigningRefused = fault.New(fault.Unavailable, "signing_refused", "an identity is there, but the server refuses to sign its SVID").
			Fix("'plastron agent why PID' says what the server objects to")
	ClockSkew = fault.New(fault.Unavailable, "clock_skew",
		"an identity is there, but by this machine's clock its SVID is not valid").
		Fix("set the clocks of the agent's machine and of the server right")
	FederatedBundleMissing = fault.New(fault.Invalid, "federated_bundle_missing",
		"the keys of a trust domain that the grant federates with are not known").
		Fix("'plastron server bundle set -id' with that trust domain's bundle")
	RateLimited = fault.New(fault.Exhausted, "rate_limited", "this user asks for more than the agent allows at once").
			Fix("wait a little and try again; keep one stream open instead of calling often")
)

// All returns every reason, in the order of the documentation.
func All() []*fault.Error {
	return []*fault.Error{
		NoGrant, SelectorMismatch, ParentMismatch, AliasMismatch, GrantExpired, RuleFactMissing, RuleFactInvalid,
		AttestorFailed, PeerGone, PeerUnresolvable,
		NotSynced, NotSignedYet, SigningRefused, ClockSkew, FederatedBundleMissing, RateLimited,
	}
}

// Find returns the reason with a code, or nil.
func Find(code string) *fault.Error {
	for _, r := range All() {
		if r.Reason == code {
			return r
		}
	}
	return nil
}

// Say returns a reason that says more, to somebody who may know it.
func Say(r *fault.Error, format string, args ...any) *fault.Error {
	c := *r
	c.Message = fault.New(r.Kind, r.Reason, format, args...).Message
	return &c
}
