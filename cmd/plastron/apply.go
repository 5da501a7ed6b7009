package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	applyv1 "github.com/plastron/plastron/api/plastron/apply/v1"
	"github.com/plastron/plastron/internal/entry"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

// Items in one call to the server, which is one transaction, and their bytes.
const (
	groupItems = 500
	groupBytes = 2 << 20
)

func (p *program) serverApplyCommand() *cobra.Command {
	c := &cobra.Command{Use: "apply", Short: "Make entries and rules what a file says they are",
		Long: `Makes entries and rules what a YAML or JSON file says they are: creates those that are
not there, changes those that differ, and with -prune deletes those that the file does
not have any more. Everything it makes bears the owner's mark, and it changes and
deletes nothing that does not; what is there already and is
not the owner's is refused.

The exit status is 0 if everything is as the file says, 2 if -dry-run found
changes, 3 if -wait ended too early, and 1 if anything failed.`,
	}
	var file, owner string
	var dryRun, prune, confirm bool
	flags := c.Flags()
	flags.StringVar(&file, "f", "", "`FILE` with the entries and rules, or - for the standard input")
	flags.StringVar(&owner, "owner", "", "`NAME` of the owner, unless the file says it: letters, digits, '.', '_', '-' and '/'")
	flags.BoolVar(&dryRun, "dry-run", false, "only say what would change; the exit status is 2 if anything would")
	flags.BoolVar(&prune, "prune", false, "delete what the owner has and the file does not")
	flags.BoolVar(&confirm, "confirm", false, "delete even if that is more than a fifth of what the owner has")
	wait, at, out := waitFlag(flags), serverSocketFlags(flags), outputFlag(flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if file == "" {
			return usage(c, "-f is required")
		}
		wanted, err := readDeclarations(file, p.stdin)
		if err != nil {
			return err
		}
		switch {
		case owner == "" && wanted.owner == "":
			return usage(c, "-owner is required, since the file names no owner")
		case owner != "" && wanted.owner != "" && owner != wanted.owner:
			return usage(c, "-owner says %q, the file says %q", owner, wanted.owner)
		case owner == "":
			owner = wanted.owner
		}
		if err := entry.CheckOwner(owner); err != nil {
			return about("owner", err)
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		a := &applying{client: applyv1.NewApplyClient(conn), doc: applyDocument{Owner: owner, DryRun: dryRun, Changes: []applyChange{}}}
		if err := a.plan(c.Context(), wanted.items, prune); err != nil {
			return peer.fault(err)
		}
		err = a.refusal(confirm)
		if err == nil && !dryRun {
			a.client = applyv1.NewApplyClient(wait.over(conn)) // the time of planning is not waited
			err = a.carryOut(c.Context(), peer)
		}
		if printed := a.print(p.stdout, *out); printed != nil {
			return printed
		}
		switch {
		case dryRun && err == nil && len(a.steps) > 0:
			return exitStatus(exitChanges)
		case dryRun:
			return err
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// applyDocument is what apply -output json prints.
type applyDocument struct {
	Owner        string        `json:"owner"`
	DryRun       bool          `json:"dry_run"`
	Done         int           `json:"done"` // of the changes, how many were made
	Create       int           `json:"create"`
	Update       int           `json:"update"`
	Delete       int           `json:"delete"`
	Unchanged    int           `json:"unchanged"`
	Kept         int           `json:"kept"` // not in the file, and not deleted without -prune
	Refused      int           `json:"refused"`
	NeedsConfirm bool          `json:"needs_confirm"`
	Changes      []applyChange `json:"changes"`
}

type applyChange struct {
	Action    string        `json:"action"`                // create, update, delete or refuse
	Kind      string        `json:"kind"`                  // entry or rule
	ID        string        `json:"id"`                    // empty: the server draws one
	SPIFFEID  string        `json:"spiffe_id,omitempty"`   // of an entry
	Template  string        `json:"id_template,omitempty"` // of a rule
	ParentID  string        `json:"parent_id"`
	Selectors []string      `json:"selectors"`
	Line      int           `json:"line,omitempty"` // in the file
	Fields    []applyField  `json:"fields,omitempty"`
	Refusal   *applyRefusal `json:"refusal,omitempty"`
}

type applyField struct {
	Field  string `json:"field"`
	Before string `json:"before"`
	After  string `json:"after"`
}

type applyRefusal struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// applying is one run of apply.
type applying struct {
	client applyv1.ApplyClient
	doc    applyDocument
	owned  int             // what the owner has
	steps  []*applyv1.Item // that are to be taken, deletions last
}

// plan asks the server what would change.
func (a *applying) plan(ctx context.Context, wanted []declaredItem, prune bool) error {
	owned, err := a.list(ctx)
	if err != nil {
		return err
	}
	a.owned = len(owned)
	items := make([]*applyv1.Item, len(wanted))
	for i, one := range wanted {
		items[i] = one.item
	}
	inFile, next := map[string]bool{}, 0
	for group := range groups(items) {
		reply, err := a.client.Apply(ctx, &applyv1.ApplyRequest{Owner: a.doc.Owner, DryRun: true, Items: group})
		if err != nil {
			return err
		}
		if len(reply.GetOutcomes()) != len(group) {
			return fault.New(fault.Internal, "internal", "the server answered for %d objects of %d", len(reply.GetOutcomes()), len(group))
		}
		for i, o := range reply.GetOutcomes() {
			inFile[kindOf(group[i])+o.GetId()] = true
			group[i].Revision = o.GetRevision()
			a.note(group[i], o, wanted[next].line)
			next++
		}
	}
	for _, o := range owned {
		there, gone := asItems(o)
		change := changeOf("delete", there)
		switch {
		case inFile[change.Kind+change.ID]:
		case !prune:
			a.doc.Kept++
		default:
			a.doc.Delete++
			a.steps = append(a.steps, gone)
			a.doc.Changes = append(a.doc.Changes, change)
		}
	}
	a.doc.NeedsConfirm = a.doc.Delete*5 > a.owned
	return nil
}

// list returns what the owner has.
func (a *applying) list(ctx context.Context) (all []*applyv1.Object, err error) {
	request := &applyv1.ListRequest{Owner: a.doc.Owner}
	for {
		page, err := a.client.List(ctx, request)
		if err != nil {
			return nil, err
		}
		all = append(all, page.GetObjects()...)
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			return all, nil
		}
	}
}

// note takes the outcome of one item into the plan.
func (a *applying) note(item *applyv1.Item, o *applyv1.Outcome, line int) {
	change := changeOf("", item)
	change.Line = line
	if o.GetId() != "" {
		change.ID = o.GetId()
	}
	switch o.GetAction() {
	case applyv1.Outcome_ACTION_NONE:
		a.doc.Unchanged++
		return
	case applyv1.Outcome_ACTION_CREATE:
		change.Action = "create"
		a.doc.Create++
	case applyv1.Outcome_ACTION_UPDATE:
		change.Action = "update"
		a.doc.Update++
		for _, f := range o.GetChanges() {
			change.Fields = append(change.Fields, applyField{f.GetField(), f.GetBefore(), f.GetAfter()})
		}
	default:
		change.Action = "refuse"
		a.doc.Refused++
		change.Refusal = &applyRefusal{o.GetRefusal().GetReason(), o.GetRefusal().GetMessage(), o.GetRefusal().GetRemedy()}
	}
	a.doc.Changes = append(a.doc.Changes, change)
	if change.Refusal == nil {
		a.steps = append(a.steps, item)
	}
}

// asItems returns what is listed as it would stand in a file, and its deletion.
func asItems(o *applyv1.Object) (there, gone *applyv1.Item) {
	if r := o.GetRule(); r != nil {
		return &applyv1.Item{Want: &applyv1.Item_Rule{Rule: r}},
			&applyv1.Item{Want: &applyv1.Item_DeleteRule{DeleteRule: r.GetId()}, Revision: o.GetRevision()}
	}
	return &applyv1.Item{Want: &applyv1.Item_Entry{Entry: o.GetEntry()}},
		&applyv1.Item{Want: &applyv1.Item_DeleteEntry{DeleteEntry: o.GetEntry().GetId()}, Revision: o.GetRevision()}
}

func kindOf(item *applyv1.Item) string {
	if item.GetRule() != nil {
		return "rule"
	}
	return "entry"
}

func changeOf(action string, item *applyv1.Item) applyChange {
	e, r := item.GetEntry(), item.GetRule()
	c := applyChange{
		Action: action, Kind: kindOf(item), ID: e.GetId() + r.GetId(), SPIFFEID: e.GetSpiffeId(), Template: r.GetIdTemplate(),
		ParentID: e.GetParentId() + r.GetParentId(), Selectors: []string{},
	}
	for _, s := range e.GetSelectors() {
		c.Selectors = append(c.Selectors, s.GetType()+":"+s.GetValue())
	}
	for _, s := range r.GetSelectors() {
		c.Selectors = append(c.Selectors, s.GetType()+":"+s.GetValue())
	}
	return c
}

// refusal says why the plan must not be carried out, if there is a reason.
func (a *applying) refusal(confirm bool) error {
	switch {
	case a.doc.Refused > 0:
		return fault.New(fault.Invalid, "partly_refused", "%s cannot be applied, so nothing is changed", plural(a.doc.Refused, "object", "objects"))
	case a.doc.NeedsConfirm && !confirm && !a.doc.DryRun:
		return fault.New(fault.Precondition, "needs_confirm", "%d of the %s of %q would be deleted, which is more than a fifth; nothing is changed",
			a.doc.Delete, plural(a.owned, "object", "objects"), a.doc.Owner).Fix("look at it with -dry-run, and add -confirm if it is meant")
	}
	return nil
}

// carryOut takes the steps, group by group.
func (a *applying) carryOut(ctx context.Context, at peer) error {
	for group := range groups(a.steps) {
		if _, err := a.client.Apply(ctx, &applyv1.ApplyRequest{Owner: a.doc.Owner, Items: group}); err != nil {
			return about(fmt.Sprintf("%d of %d changes are made", a.doc.Done, len(a.steps)), at.fault(err))
		}
		a.doc.Done += len(group)
	}
	return nil
}

// groups yields items in groups that the server takes.
func groups(items []*applyv1.Item) func(yield func([]*applyv1.Item) bool) {
	return func(yield func([]*applyv1.Item) bool) {
		for len(items) > 0 {
			n, size := 0, 0
			for n < len(items) && n < groupItems && (n == 0 || size+proto.Size(items[n]) <= groupBytes) {
				size += proto.Size(items[n])
				n++
			}
			if !yield(items[:n]) {
				return
			}
			items = items[n:]
		}
	}
}

func (a *applying) print(w io.Writer, out format) error {
	if out == asJSON {
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		return enc.Encode(a.doc)
	}
	var text strings.Builder
	for _, c := range a.doc.Changes {
		sign := map[string]string{"create": "+", "update": "~", "delete": "-", "refuse": "!"}[c.Action]
		fmt.Fprintf(&text, "%s %s %s", sign, c.Kind, c.SPIFFEID+c.Template)
		if c.ID != "" {
			fmt.Fprintf(&text, " (%s)", c.ID)
		}
		fmt.Fprintf(&text, " under %s for %s\n", c.ParentID, strings.Join(c.Selectors, " "))
		for _, f := range c.Fields {
			fmt.Fprintf(&text, "    %s: %s → %s\n", f.Field, shown(f.Before), shown(f.After))
		}
		if c.Refusal != nil {
			fmt.Fprintf(&text, "    line %d: %s\n", c.Line, c.Refusal.Message)
			if c.Refusal.Remedy != "" {
				fmt.Fprintf(&text, "    Fix: %s\n", c.Refusal.Remedy)
			}
		}
	}
	words := [...]string{"to create", "to change", "to delete"}
	if len(a.steps) > 0 && a.doc.Done == len(a.steps) {
		words = [...]string{"created", "changed", "deleted"}
	}
	fmt.Fprintf(&text, "%d %s, %d %s, %d %s, %d unchanged\n", a.doc.Create, words[0], a.doc.Update, words[1], a.doc.Delete, words[2], a.doc.Unchanged)
	if a.doc.Kept > 0 {
		fmt.Fprintf(&text, "%s of %q not in the file; -prune deletes what is not\n", plural(a.doc.Kept, "object", "objects"), a.doc.Owner)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func shown(text string) string {
	if text == "" {
		return `""`
	}
	return text
}
