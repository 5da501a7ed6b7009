package serverapi

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/rpc"
)

const (
	maxApply  = 500 // items in one call, which is one transaction
	ownedPage = 1000

	// A page goes on after an entry or after a rule, which come last.
	entryKey, ruleKey = "e ", "r "
)

// applies is plastron.apply.v1.Apply.
type applies struct {
	applyv1.UnsafeApplyServer
	server *Server
}

// List gives a page of what an owner has.
func (a applies) List(ctx context.Context, req *applyv1.ListRequest) (*applyv1.ListResponse, error) {
	if err := entry.CheckOwner(req.Owner); err != nil {
		return nil, err
	}
	c := a.server.cursor("owned", &applyv1.ListRequest{Owner: req.Owner})
	after, err := c.key(req.PageToken)
	if err != nil {
		return nil, err
	}
	size := req.PageSize
	if size <= 0 || size > ownedPage {
		size = ownedPage
	}
	resp, page, last := &applyv1.ListResponse{}, newPage(size), ""
	visit := func(e *entry.Entry) (bool, error) {
		out := writeObject(e)
		fits, err := page.take(out)
		if !fits {
			resp.NextPageToken = c.token(last)
			return false, nil
		}
		last = entryKey + e.ID
		if e.Rule != nil {
			last = ruleKey + e.ID
		}
		resp.Objects = append(resp.Objects, out)
		return true, err
	}
	after, inRules := strings.CutPrefix(after, ruleKey)
	if !inRules {
		err = a.server.eachEntry(ctx, registry.Filter{Owner: req.Owner}, strings.TrimPrefix(after, entryKey), page.piece(), visit)
		after = ""
	}
	if err == nil && resp.NextPageToken == "" {
		err = a.eachRule(ctx, req.Owner, after, visit)
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// eachRule visits an owner's rules, in a view of its own each, since what is done
// with one takes time.
func (a applies) eachRule(ctx context.Context, owner, after string, visit func(*entry.Entry) (more bool, err error)) error {
	for ctx.Err() == nil {
		var next *entry.Entry
		a.server.cfg.Registry.View(func(s *registry.Snapshot) {
			for e := range s.Rules(after) {
				if e.Owner == owner {
					next = &e
					return
				}
			}
		})
		if next == nil {
			return nil
		}
		if more, err := visit(next); err != nil || !more {
			return err
		}
		after = next.ID
	}
	return ctx.Err()
}

// errDryRun ends a transaction that is not to be committed.
var errDryRun = errors.New("dry run")

// Apply makes an owner's objects what they are wanted to be, or says what that
// would change. Dry runs and real ones judge by the same code; what a real one
// finds must be what the dry run told, so nobody's change is undone unseen.
func (a applies) Apply(ctx context.Context, req *applyv1.ApplyRequest) (*applyv1.ApplyResponse, error) {
	if err := entry.CheckOwner(req.Owner); err != nil {
		return nil, err
	}
	if len(req.Items) > maxApply {
		return nil, fault.New(fault.Invalid, "batch_too_large", "the batch has %d items, the limit is %d", len(req.Items), maxApply).Fix("split it")
	}
	now := time.Now().UTC().Truncate(time.Second)
	var resp *applyv1.ApplyResponse
	_, err := a.server.cfg.Registry.Update(ctx, callerFrom(ctx).name(), func(tx *registry.Tx) error {
		resp = &applyv1.ApplyResponse{}
		for i, item := range req.Items {
			o, err := a.apply(tx, req.Owner, item, now)
			refused, isFault := errors.AsType[*fault.Error](err)
			switch {
			case err != nil && !isFault:
				return err
			case err == nil && (req.DryRun || o.Revision == item.Revision):
			case !req.DryRun && err != nil:
				return stale(i, refused.Message)
			case !req.DryRun:
				return stale(i, "it was changed meanwhile")
			default:
				o = &applyv1.Outcome{Action: applyv1.Outcome_ACTION_REFUSE, Refusal: &applyv1.Refusal{
					Reason: refused.Reason, Message: refused.Message, Remedy: refused.Remedy,
				}}
			}
			resp.Outcomes = append(resp.Outcomes, o)
		}
		if req.DryRun {
			return errDryRun
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDryRun) {
		return nil, err
	}
	return resp, nil
}

func stale(item int, why string) error {
	return fault.New(fault.Conflict, "plan_stale", "item %d is not as it was planned: %s", item+1, why).
		Fix("nothing of this group is changed; apply again")
}

// apply writes one item into a transaction. A refusal is a fault.
func (a applies) apply(tx *registry.Tx, owner string, item *applyv1.Item, now time.Time) (*applyv1.Outcome, error) {
	switch want := item.GetWant().(type) {
	case *applyv1.Item_Entry:
		e, err := a.server.readDeclared(want.Entry)
		if err != nil {
			return nil, err
		}
		return a.put(tx, owner, e, now)
	case *applyv1.Item_Rule:
		e, err := a.server.readRule(want.Rule)
		if err != nil {
			return nil, err
		}
		return a.put(tx, owner, e, now)
	case *applyv1.Item_DeleteEntry:
		return remove(tx.Entry, tx.DeleteEntry, owner, want.DeleteEntry)
	case *applyv1.Item_DeleteRule:
		return remove(tx.Rule, tx.DeleteRule, owner, want.DeleteRule)
	}
	return nil, fault.New(fault.Invalid, "item_missing", "the batch has an empty item")
}

// put makes an entry or a rule what it is wanted to be.
func (a applies) put(tx *registry.Tx, owner string, e *entry.Entry, now time.Time) (*applyv1.Outcome, error) {
	named := e.ID
	if e.Owner, e.CreatedAt = owner, now; named == "" {
		e.ID = entry.NewID()
	}
	if err := a.server.validate(e, time.Time{}); err != nil {
		return nil, err
	}
	store, stored := tx.PutEntry, tx.Entry
	if e.Rule != nil {
		store, stored = tx.PutRule, tx.Rule
	}
	old, err := found(tx, stored, e, named != "")
	if err != nil {
		return nil, err
	}
	if old == nil || !e.ExpiresAt.Equal(old.ExpiresAt) { // an end that was there before may have come
		if err := a.server.validate(e, now); err != nil {
			return nil, err
		}
	}
	if old == nil {
		return &applyv1.Outcome{Action: applyv1.Outcome_ACTION_CREATE, Id: named}, store(*e)
	}
	e.ID, e.CreatedAt = old.ID, old.CreatedAt
	o := &applyv1.Outcome{Action: applyv1.Outcome_ACTION_NONE, Id: e.ID, Revision: old.Revision, Changes: differences(old, e)}
	if len(o.Changes) == 0 {
		return o, nil
	}
	o.Action = applyv1.Outcome_ACTION_UPDATE
	return o, store(*e)
}

// remove deletes an entry or a rule.
func remove(stored func(string) (entry.Entry, error), drop func(string) error, owner, id string) (*applyv1.Outcome, error) {
	if err := entry.CheckID(id); err != nil {
		return nil, err
	}
	old, err := stored(id)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return &applyv1.Outcome{Action: applyv1.Outcome_ACTION_NONE, Id: id}, nil
	case err != nil:
		return nil, err
	case old.Owner != owner:
		return nil, foreign(&old)
	}
	return &applyv1.Outcome{Action: applyv1.Outcome_ACTION_DELETE, Id: id, Revision: old.Revision}, drop(id)
}

// found returns the owner's object that a wanted one stands for, or nil. byID says
// that the file names it; else its content does. What is not the owner's is
// refused, whoever's it is: nothing is taken over.
func found(tx *registry.Tx, stored func(string) (entry.Entry, error), e *entry.Entry, byID bool) (*entry.Entry, error) {
	same, err := tx.EntryByContent(entry.ContentHash(e))
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return nil, err
	}
	isThere := err == nil
	if byID {
		old, err := stored(e.ID)
		switch {
		case err == nil && old.Owner != e.Owner:
			return nil, foreign(&old)
		case err == nil && (!isThere || same.ID == e.ID):
			return &old, nil
		case err != nil && fault.KindOf(err) != fault.NotFound:
			return nil, err
		}
	}
	switch {
	case !isThere:
		return nil, nil
	case same.Owner != e.Owner:
		return nil, foreign(&same)
	case byID:
		return nil, fault.New(fault.Exists, word(e)+"_exists", "the %s %q has this content already", word(e), same.ID).
			Fix("give it this id, or delete it first")
	}
	return &same, nil
}

func word(e *entry.Entry) string {
	if e.Rule != nil {
		return "rule"
	}
	return "entry"
}

func foreign(e *entry.Entry) error {
	whose := "has no owner"
	if e.Owner != "" {
		whose = fmt.Sprintf("belongs to %q", e.Owner)
	}
	return fault.New(fault.Precondition, "foreign", "the %s %q exists and %s", word(e), e.ID, whose).
		Fix("leave it out of the file, or delete it first")
}

// readDeclared reads what a file says of an entry.
func (s *Server) readDeclared(in *applyv1.Entry) (*entry.Entry, error) {
	id, err := identity.Parse(in.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	parent, err := identity.Parse(in.GetParentId())
	if err != nil {
		return nil, err
	}
	wire := &spiretypes.Entry{
		SpiffeId: writeID(id), ParentId: writeID(parent), X509SvidTtl: in.X509SvidTtl, JwtSvidTtl: in.JwtSvidTtl,
		FederatesWith: in.FederatesWith, DnsNames: in.DnsNames, Hint: in.Hint, Admin: in.Admin, Downstream: in.Downstream, StoreSvid: in.StoreSvid,
		ExpiresAt: in.ExpiresAt, AdditionalAttributes: &spiretypes.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: in.DisableX509SvidPrefetch, JwtSvidIncludeJti: in.JwtSvidIncludeJti,
		},
	}
	for _, sel := range in.Selectors {
		wire.Selectors = append(wire.Selectors, &spiretypes.Selector{Type: sel.GetType(), Value: sel.GetValue()})
	}
	e := &entry.Entry{ID: in.Id}
	return e, s.changeEntry(e, wire, allEntry())
}

func writeObject(e *entry.Entry) *applyv1.Object {
	if e.Rule != nil {
		return &applyv1.Object{Revision: e.Revision, Object: &applyv1.Object_Rule{Rule: writeRule(e)}}
	}
	return &applyv1.Object{Revision: e.Revision, Object: &applyv1.Object_Entry{Entry: writeDeclared(e)}}
}

func writeDeclared(e *entry.Entry) *applyv1.Entry {
	out := &applyv1.Entry{
		Id: e.ID, SpiffeId: e.SPIFFEID.String(), ParentId: e.ParentID.String(), X509SvidTtl: int32(e.X509TTL / time.Second),
		JwtSvidTtl: int32(e.JWTTL / time.Second), DnsNames: e.DNSNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream,
		StoreSvid: e.StoreSVID, DisableX509SvidPrefetch: e.DisableX509Prefetch, JwtSvidIncludeJti: e.JWTIncludeJTI, ExpiresAt: rpc.Unix(e.ExpiresAt),
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	for _, sel := range e.Selectors {
		out.Selectors = append(out.Selectors, &applyv1.Selector{Type: sel.Type, Value: sel.Value})
	}
	return out
}

// differences lists the fields in which two objects of one kind differ, by their names in files.
func differences(before, after *entry.Entry) (all []*applyv1.FieldChange) {
	was, is := declaredFields(before), declaredFields(after)
	for i := range was {
		if was[i] != is[i] {
			all = append(all, &applyv1.FieldChange{Field: was[i].name, Before: was[i].text, After: is[i].text})
		}
	}
	return all
}

type declaredField struct{ name, text string }

func declaredFields(e *entry.Entry) []declaredField {
	var selectors, domains []string
	for _, sel := range e.Selectors {
		selectors = append(selectors, sel.String())
	}
	for _, td := range e.FederatesWith {
		domains = append(domains, td.Name())
	}
	list := func(texts []string) string { return fmt.Sprintf("%q", texts) } // quoted: a selector may hold anything
	seconds := func(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }
	identity := []declaredField{{"spiffe_id", e.SPIFFEID.String()}}
	if e.Rule != nil {
		identity = []declaredField{{"id_template", e.Rule.Template.String()}, {"id_prefix", e.Rule.Prefix}, {"trust", e.Rule.Trust()}}
	}
	return append(identity, []declaredField{
		{"parent_id", e.ParentID.String()}, {"selectors", list(selectors)},
		{"x509_svid_ttl", seconds(e.X509TTL)}, {"jwt_svid_ttl", seconds(e.JWTTL)},
		{"federates_with", list(domains)}, {"dns_names", list(e.DNSNames)}, {"hint", e.Hint},
		{"admin", strconv.FormatBool(e.Admin)}, {"downstream", strconv.FormatBool(e.Downstream)}, {"store_svid", strconv.FormatBool(e.StoreSVID)},
		{"disable_x509_svid_prefetch", strconv.FormatBool(e.DisableX509Prefetch)}, {"jwt_svid_include_jti", strconv.FormatBool(e.JWTIncludeJTI)},
		{word(e) + "Expiry", strconv.FormatInt(rpc.Unix(e.ExpiresAt), 10)},
	}...)
}
