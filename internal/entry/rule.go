package entry

import (
	"strings"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Rule is what makes a grant a rule: in place of one SPIFFE ID it has a template
// that facts about the caller fill.
type Rule struct {
	Template Template
	// Prefix bounds the IDs: each begins with it. It ends in a slash, names at least
	// one segment, and is not in the reserved space.
	Prefix string
	// TrustAgent says that the facts are taken on the agent's word. A compromised
	// agent then obtains every ID that the template can give. Without it the server
	// finds out by itself whether they are true of something on the agent's node.
	TrustAgent bool
}

// The values of a rule's trust as users write it.
const (
	TrustNone  = ""
	TrustAgent = "agent"
)

// Trust returns TrustAgent as users write it.
func (r *Rule) Trust() string {
	if r.TrustAgent {
		return TrustAgent
	}
	return TrustNone
}

// FactsBy says whose word it is that the facts are true: "agent", or "server" if
// that finds out.
func (r *Rule) FactsBy() string {
	if r.TrustAgent {
		return TrustAgent
	}
	return "server"
}

// ParseRule reads a rule as users write it. An empty prefix stands for what the
// template fixes: all before the segment with the first fact.
func ParseRule(td spiffeid.TrustDomain, template, prefix, trust string) (*Rule, error) {
	t, err := ParseTemplate(td, template)
	if err != nil {
		return nil, err
	}
	r := &Rule{Template: t, Prefix: prefix}
	switch {
	case prefix == "":
		r.Prefix = t.fixed()
	case len(prefix) <= MaxTemplate && !strings.HasSuffix(prefix, "/"):
		r.Prefix += "/"
	}
	switch trust {
	case TrustNone:
	case TrustAgent:
		r.TrustAgent = true
	default:
		return nil, fault.New(fault.Invalid, "rule_trust_invalid", "%.100q is not a trust of a rule", trust).
			Fix("use %q, which takes the facts on the agent's word", TrustAgent)
	}
	return r, nil
}

// checkRule checks what is particular to rules.
func checkRule(td spiffeid.TrustDomain, e *Entry) error {
	r := e.Rule
	switch {
	case !e.SPIFFEID.IsZero():
		return fault.New(fault.Invalid, "rule_spiffe_id", "a rule has an ID template, not a SPIFFE ID")
	case r.Template.IsZero() || r.Template.td != td:
		return fault.New(fault.Invalid, "rule_template_invalid", "the rule has no ID template of the trust domain %q", td.Name())
	case e.Alias():
		return fault.New(fault.Invalid, "rule_parent_server", "the parent of a rule cannot be the server").
			Fix("name an agent, a node alias or an entry's SPIFFE ID; a rule is for workloads, not for nodes")
	case e.Admin, e.Downstream, e.StoreSVID:
		return fault.New(fault.Invalid, "rule_privileged", "a rule cannot be admin, downstream or store_svid").
			Fix("create an entry for the one ID that needs it")
	case len(e.DNSNames) > 0:
		return fault.New(fault.Invalid, "rule_dns_names", "a rule cannot have DNS names: all that match would share them").
			Fix("create an entry for the one ID that needs them")
	case e.DisableX509Prefetch, e.JWTIncludeJTI:
		return fault.New(fault.Invalid, "rule_option", "a rule has neither disable_x509_svid_prefetch nor jwt_svid_include_jti")
	}
	if err := checkPrefix(td, r); err != nil {
		return err
	}
	for _, name := range r.Template.Facts() {
		if !r.TrustAgent && !Verifiable(name) {
			return r.Unverifiable(name, "no server can verify the fact %s by itself", name)
		}
	}
	return nil
}

// Unverifiable is the refusal of a rule without trust for a fact that the server
// cannot verify.
func (r *Rule) Unverifiable(fact, format string, args ...any) error {
	return fault.New(fault.Invalid, "rule_trust_missing", format, args...).
		Fix("set trust to %q, which takes %s on the agent's word, if every agent that the rule reaches may hand out all IDs under %s", TrustAgent, fact, r.Prefix)
}

func checkPrefix(td spiffeid.TrustDomain, r *Rule) error {
	path, ours := strings.CutPrefix(r.Prefix, td.IDString()+"/")
	switch {
	case !ours || !strings.HasSuffix(r.Prefix, "/"):
		return fault.New(fault.Invalid, "rule_prefix_invalid", "%.100q is not a prefix of IDs in the trust domain %q", r.Prefix, td.Name()).
			Fix("write it as %s/SEGMENT/", td.IDString())
	case !strings.HasPrefix(r.Template.fixed(), r.Prefix):
		return fault.New(fault.Invalid, "rule_prefix_mismatch", "not all IDs of the template %q begin with the prefix %q", r.Template, r.Prefix).
			Fix("leave the prefix out, or make it %s", r.Template.fixed())
	case path == "": // it would hold servers and agents too
		return fault.New(fault.Invalid, "rule_prefix_too_wide", "the rule would give out IDs all over the trust domain").
			Fix("begin the path of the template with a segment without facts, such as %s/user/{unix.user}", td.IDString())
	}
	if id, err := spiffeid.FromString(strings.TrimSuffix(r.Prefix, "/")); err != nil || identity.Reserved(id) {
		return fault.New(fault.Invalid, "rule_prefix_reserved", "the prefix %q lies under /spire, which is reserved for servers and agents", r.Prefix).
			Fix("use another first segment")
	}
	return nil
}

// Reasons why a rule whose selectors a caller shows gives it nothing. The first two
// agents see by themselves.
const (
	FactMissing = "rule_fact_missing"
	FactInvalid = "rule_fact_invalid"
	// FactsUnavailable: the server could not look, and may be able to in a moment.
	FactsUnavailable = "rule_facts_unavailable"
)

// FactFault is such a rule.
type FactFault struct {
	GrantID  string
	Template string
	Fact     string // the one that is missing or does not fit
	Value    string // what it is; empty if it is missing
	Reason   string // FactMissing or FactInvalid
	Why      string // of FactInvalid: what does not fit
}

// Fault returns the sentence and the fix.
func (f *FactFault) Fault() *fault.Error {
	if f.Reason == FactMissing {
		return fault.New(fault.Invalid, FactMissing, "the ID template %s needs the fact %s, which is not known of the process", f.Template, f.Fact).
			Fix("see to it that an attestor of the agent yields %s, or name another fact", f.Fact)
	}
	return fault.New(fault.Invalid, FactInvalid, "the fact %s is %.*q, which cannot stand in the ID template %s: %s", f.Fact, maxShownOfValue, f.Value, f.Template, f.Why).
		Fix("name another fact, such as unix.uid for unix.user, or create an entry for this process")
}

// template returns the text of a rule's template; empty for an exact entry.
func (e *Entry) template() string {
	if e.Rule == nil {
		return ""
	}
	return e.Rule.Template.text
}

// Grants returns the SPIFFE ID that a grant gives for what is known of a caller
// who shows its selectors, and the facts that this takes: none for an exact
// entry. It is a pure function that agent and server both ask.
func (e *Entry) Grants(facts map[string]string) (spiffeid.ID, map[string]string, *FactFault) {
	if e.Rule == nil {
		return e.SPIFFEID, nil, nil
	}
	id, bad := e.Rule.Template.expand(facts)
	if bad == nil && !strings.HasPrefix(id.String(), e.Rule.Prefix) { // Validate excludes it
		bad = &FactFault{Template: e.Rule.Template.text, Fact: e.Rule.Template.facts[0], Reason: FactInvalid, Why: "the ID would lie outside " + e.Rule.Prefix}
	}
	if bad != nil {
		bad.GrantID = e.ID
		return spiffeid.ID{}, nil, bad
	}
	named := make(map[string]string, len(e.Rule.Template.stated))
	for _, name := range e.Rule.Template.stated {
		named[name] = facts[name]
	}
	return id, named, nil
}
