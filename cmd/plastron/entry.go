package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/identity"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// entryFlags are the fields of an entry as flags.
type entryFlags struct {
	entryID, parentID, spiffeID, hint, data string
	selectors, federatesWith, dns           []string
	x509TTL, jwtTTL                         int32
	expiry                                  int64
	admin, downstream, storeSVID, node      bool
	noPrefetch, withJTI                     bool
}

func (e *entryFlags) addFlags(flags *pflag.FlagSet) {
	flags.StringVar(&e.spiffeID, "spiffeID", "", "SPIFFE `ID` that the processes get")
	flags.StringVar(&e.parentID, "parentID", "", "SPIFFE `ID` of the agent, or of the node alias, that hands it out")
	flags.StringArrayVar(&e.selectors, "selector", nil, "`TYPE:VALUE` that a process must have; may be given more than once, and then all must fit")
	flags.Int32Var(&e.x509TTL, "x509SVIDTTL", 0, "lifetime of X.509-SVIDs in `SECONDS`; otherwise the server's default")
	flags.Int32Var(&e.jwtTTL, "jwtSVIDTTL", 0, "lifetime of JWT-SVIDs in `SECONDS`; otherwise the server's default")
	flags.StringArrayVar(&e.federatesWith, "federatesWith", nil, "`TRUST DOMAIN` whose bundle the processes also get; may be given more than once")
	flags.StringArrayVar(&e.dns, "dns", nil, "DNS `NAME` in the X.509-SVID; may be given more than once, the first is the common name")
	flags.StringVar(&e.hint, "hint", "", "`TEXT` by which a process with several identities tells them apart")
	flags.Int64Var(&e.expiry, "entryExpiry", 0, "time in Unix `SECONDS` at which the entry ends")
	flags.BoolVar(&e.admin, "admin", false, "the identity may administer the server")
	flags.BoolVar(&e.downstream, "downstream", false, "the identity is that of a downstream server")
	flags.BoolVar(&e.storeSVID, "storeSVID", false, "the SVID goes to a store instead of a process")
	flags.BoolVar(&e.noPrefetch, "disableX509SVIDPrefetch", false, "make the X.509-SVID only when a process asks")
	flags.BoolVar(&e.withJTI, "jwtSVIDIncludeJTI", false, "give each JWT-SVID an ID of its own")
	flags.StringVar(&e.data, "data", "", "`FILE` with entries as JSON, or - for the standard input, instead of flags")
}

func (p *program) entryCreateCommand() *cobra.Command {
	c := &cobra.Command{Use: "create", Short: "Register an identity for the processes that fit the selectors"}
	flags := c.Flags()
	var e entryFlags
	e.addFlags(flags)
	flags.StringVar(&e.entryID, "entryID", "", "`ID` of the new entry; otherwise the server chooses one")
	flags.BoolVar(&e.node, "node", false, "the entry is a node alias: the selectors are those of agents, the parent is the server")
	wait, at, out := waitFlag(flags), serverSocketFlags(flags), outputFlag(flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		entries, err := e.entries(c, p.stdin)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := entryv1.NewEntryClient(wait.over(conn)).BatchCreateEntry(c.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			if err := printJSON(p.stdout, reply); err != nil {
				return err
			}
		}
		failed := 0
		var made []*spiretypes.Entry
		for i, r := range reply.GetResults() {
			switch {
			case r.GetStatus().GetCode() != int32(codes.OK):
				failed++
				fmt.Fprintf(p.stderr, "Failed to create the following entry (code: %s, msg: %q):\n", codes.Code(r.GetStatus().GetCode()), r.GetStatus().GetMessage())
				if i < len(entries) {
					printEntry(p.stderr, entries[i])
				}
			default:
				if made = append(made, r.GetEntry()); *out == pretty {
					printEntry(p.stdout, r.GetEntry())
				}
			}
		}
		p.printNotes(c.Context(), conn, made)
		if failed > 0 {
			err = fault.New(fault.Invalid, "partly_failed", "%d of %d entries were not created", failed, len(entries))
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// entries returns what the flags, or the file of -data, describe.
func (e *entryFlags) entries(c *cobra.Command, stdin io.Reader) ([]*spiretypes.Entry, error) {
	if e.data != "" {
		return e.fromFile(c, stdin)
	}
	switch {
	case len(e.selectors) == 0:
		return nil, usage(c, "at least one -selector is required")
	case e.parentID == "" && !e.node:
		return nil, usage(c, "-parentID is required unless -node is given")
	case e.parentID != "" && e.node:
		return nil, usage(c, "-parentID and -node exclude each other")
	case e.spiffeID == "":
		return nil, usage(c, "-spiffeID is required")
	case e.node && len(e.federatesWith) > 0:
		return nil, usage(c, "-node and -federatesWith exclude each other: a node alias does not federate")
	}
	one, err := e.fromFlags(c)
	if err != nil {
		return nil, err
	}
	if e.node {
		one.ParentId = &spiretypes.SPIFFEID{TrustDomain: one.GetSpiffeId().GetTrustDomain(), Path: "/spire/server"}
	}
	return []*spiretypes.Entry{one}, nil
}

// fromFile reads the file of -data, which stands instead of all flags.
func (e *entryFlags) fromFile(c *cobra.Command, stdin io.Reader) ([]*spiretypes.Entry, error) {
	other := ""
	c.Flags().Visit(func(f *pflag.Flag) {
		if !slices.Contains([]string{"data", "output", "socketPath", "instance", "wait"}, f.Name) {
			other = f.Name
		}
	})
	if other != "" {
		return nil, usage(c, "-data and -%s exclude each other", other)
	}
	return readEntries(e.data, stdin)
}

// fromFlags returns an entry with the fields that flags name.
func (e *entryFlags) fromFlags(c *cobra.Command) (*spiretypes.Entry, error) {
	if e.x509TTL < 0 || e.jwtTTL < 0 || e.expiry < 0 {
		return nil, usage(c, "-x509SVIDTTL, -jwtSVIDTTL and -entryExpiry must not be negative")
	}
	one := &spiretypes.Entry{
		Id: e.entryID, X509SvidTtl: e.x509TTL, JwtSvidTtl: e.jwtTTL, Admin: e.admin, Downstream: e.downstream, ExpiresAt: e.expiry,
		DnsNames: e.dns, StoreSvid: e.storeSVID, Hint: e.hint,
	}
	var err error
	if c.Flags().Changed("spiffeID") {
		if one.SpiffeId, err = wireID("-spiffeID", e.spiffeID); err != nil {
			return nil, err
		}
	}
	if c.Flags().Changed("parentID") {
		if one.ParentId, err = wireID("-parentID", e.parentID); err != nil {
			return nil, err
		}
	}
	if one.Selectors, err = wireSelectors(e.selectors); err != nil {
		return nil, err
	}
	if one.FederatesWith, err = trustDomains(e.federatesWith); err != nil {
		return nil, err
	}
	if e.noPrefetch || e.withJTI {
		one.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{DisableX509SvidPrefetch: e.noPrefetch, JwtSvidIncludeJti: e.withJTI}
	}
	return one, nil
}

// entryFilter is what show and count look for.
type entryFilter struct {
	entryID, parentID, spiffeID, hint string
	selectors, federatesWith          []string
	selectorsOn, federatesOn          string
	downstream                        bool
}

func (f *entryFilter) addFlags(flags *pflag.FlagSet) {
	flags.StringVar(&f.parentID, "parentID", "", "SPIFFE `ID` of the parent")
	flags.StringVar(&f.spiffeID, "spiffeID", "", "SPIFFE `ID` of the entry")
	flags.StringArrayVar(&f.selectors, "selector", nil, "`TYPE:VALUE` of the entry; may be given more than once")
	flags.StringArrayVar(&f.federatesWith, "federatesWith", nil, "`TRUST DOMAIN` that the entry federates with; may be given more than once")
	flags.StringVar(&f.hint, "hint", "", "`TEXT` of the hint")
	flags.BoolVar(&f.downstream, "downstream", false, "entries of downstream servers")
	flags.StringVar(&f.selectorsOn, "matchSelectorsOn", "superset", "`MODE` of comparing selectors: exact, any, superset or subset")
	flags.StringVar(&f.federatesOn, "matchFederatesWithOn", "superset", "`MODE` of comparing trust domains: exact, any, superset or subset")
}

// list returns the filter as the API writes it.
func (f *entryFilter) list(c *cobra.Command) (*entryv1.ListEntriesRequest_Filter, error) {
	filter := &entryv1.ListEntriesRequest_Filter{}
	var err error
	if f.parentID != "" {
		if filter.ByParentId, err = wireID("-parentID", f.parentID); err != nil {
			return nil, err
		}
	}
	if f.spiffeID != "" {
		if filter.BySpiffeId, err = wireID("-spiffeID", f.spiffeID); err != nil {
			return nil, err
		}
	}
	if filter.BySelectors, err = selectorMatch(c, f.selectors, f.selectorsOn); err != nil {
		return nil, err
	}
	mode, ok := spiretypes.FederatesWithMatch_MatchBehavior_value["MATCH_"+strings.ToUpper(f.federatesOn)]
	if !ok {
		return nil, usage(c, "the value %q of -matchFederatesWithOn is none of exact, any, superset, subset", f.federatesOn)
	}
	if len(f.federatesWith) > 0 {
		names, err := trustDomains(f.federatesWith)
		if err != nil {
			return nil, err
		}
		filter.ByFederatesWith = &spiretypes.FederatesWithMatch{TrustDomains: names, Match: spiretypes.FederatesWithMatch_MatchBehavior(mode)}
	}
	if f.hint != "" {
		filter.ByHint = wrapperspb.String(f.hint)
	}
	if c.Flags().Changed("downstream") {
		filter.ByDownstream = wrapperspb.Bool(f.downstream)
	}
	return filter, nil
}

func (p *program) entryShowCommand() *cobra.Command {
	c := &cobra.Command{Use: "show", Short: "Show the registered entries, or those that fit"}
	var f entryFilter
	c.Flags().StringVar(&f.entryID, "entryID", "", "`ID` of the one entry to show")
	f.addFlags(c.Flags())
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		filter, err := f.list(c)
		if err != nil {
			return err
		}
		if f.entryID != "" && !proto.Equal(filter, &entryv1.ListEntriesRequest_Filter{}) {
			return usage(c, "-entryID stands alone: it names the one entry to show")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		client := entryv1.NewEntryClient(conn)
		found := &entryv1.ListEntriesResponse{}
		if f.entryID != "" {
			one, err := client.GetEntry(c.Context(), &entryv1.GetEntryRequest{Id: f.entryID})
			if err != nil {
				return peer.fault(err)
			}
			found.Entries = append(found.Entries, one)
		} else {
			request := &entryv1.ListEntriesRequest{Filter: filter, PageSize: 500}
			for {
				page, err := client.ListEntries(c.Context(), request)
				if err != nil {
					return peer.fault(err)
				}
				found.Entries = append(found.Entries, page.GetEntries()...)
				if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
					break
				}
			}
		}
		slices.SortStableFunc(found.Entries, func(a, b *spiretypes.Entry) int {
			return strings.Compare(idText(a.GetSpiffeId())+"\x00"+a.GetId(), idText(b.GetSpiffeId())+"\x00"+b.GetId())
		})
		if *out == asJSON {
			return printJSON(p.stdout, found)
		}
		fmt.Fprintf(p.stdout, "Found %s\n", plural(len(found.Entries), "entry", "entries"))
		for _, one := range found.Entries {
			printEntry(p.stdout, one)
		}
		return nil
	}
	return c
}

func (p *program) entryCountCommand() *cobra.Command {
	c := &cobra.Command{Use: "count", Short: "Count the registered entries, or those that fit"}
	var f entryFilter
	f.addFlags(c.Flags())
	at, out := serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		filter, err := f.list(c)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := entryv1.NewEntryClient(conn).CountEntries(c.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: filter.BySpiffeId, ByParentId: filter.ByParentId, BySelectors: filter.BySelectors,
			ByFederatesWith: filter.ByFederatesWith, ByHint: filter.ByHint, ByDownstream: filter.ByDownstream,
		}})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, reply)
		}
		_, err = fmt.Fprintln(p.stdout, plural(int(reply.GetCount()), "registration entry", "registration entries"))
		return err
	}
	return c
}

func (p *program) entryDeleteCommand() *cobra.Command {
	c := &cobra.Command{Use: "delete", Short: "Delete entries"}
	var entryID, file string
	c.Flags().StringVar(&entryID, "entryID", "", "`ID` of the entry to delete")
	c.Flags().StringVar(&file, "file", "", "`FILE` with a JSON object whose key ids lists the entries to delete, or - for the standard input")
	wait, at, out := waitFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		var ids []string
		switch {
		case entryID != "" && file != "":
			return usage(c, "-entryID and -file exclude each other")
		case entryID != "":
			ids = []string{entryID}
		case file != "":
			var err error
			if ids, err = readIDs(file, p.stdin); err != nil {
				return err
			}
		default:
			return usage(c, "-entryID or -file is required")
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := entryv1.NewEntryClient(wait.over(conn)).BatchDeleteEntry(c.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			if err := printJSON(p.stdout, reply); err != nil {
				return err
			}
		}
		failed := 0
		for _, r := range reply.GetResults() {
			switch {
			case r.GetStatus().GetCode() != int32(codes.OK):
				failed++
				fmt.Fprintf(p.stderr, "Failed to delete entry with ID %s (code: %s, msg: %q)\n", r.GetId(), codes.Code(r.GetStatus().GetCode()), r.GetStatus().GetMessage())
			case *out == pretty:
				fmt.Fprintf(p.stdout, "Deleted entry with ID: %s\n", r.GetId())
			}
		}
		if failed > 0 {
			err = fault.New(fault.Invalid, "partly_failed", "%d of %d entries were not deleted", failed, len(ids))
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// printEntry prints an entry in SPIRE's form: a block of labels.
func printEntry(w io.Writer, e *spiretypes.Entry) {
	line := func(label string, value any) { fmt.Fprintf(w, "%-17s: %v\n", label, value) }
	ttl := func(seconds int32) any {
		if seconds == 0 {
			return "default"
		}
		return seconds
	}
	id := e.GetId()
	if id == "" {
		id = "(none)"
	}
	line("Entry ID", id)
	line("SPIFFE ID", idText(e.GetSpiffeId()))
	line("Parent ID", idText(e.GetParentId()))
	line("Revision", e.GetRevisionNumber())
	if e.GetDownstream() {
		line("Downstream", true)
	}
	line("X509-SVID TTL", ttl(e.GetX509SvidTtl()))
	line("JWT-SVID TTL", ttl(e.GetJwtSvidTtl()))
	if e.GetExpiresAt() != 0 {
		line("Expiration time", time.Unix(e.GetExpiresAt(), 0).UTC())
	}
	for _, s := range e.GetSelectors() {
		line("Selector", s.GetType()+":"+s.GetValue())
	}
	for _, name := range e.GetFederatesWith() {
		line("FederatesWith", name)
	}
	for _, name := range e.GetDnsNames() {
		line("DNS name", name)
	}
	if e.GetAdmin() {
		line("Admin", true)
	}
	if e.GetStoreSvid() {
		line("StoreSvid", true)
	}
	if e.GetHint() != "" {
		line("Hint", e.GetHint())
	}
	fmt.Fprintln(w)
}

func idText(id *spiretypes.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

// wireID reads the SPIFFE ID of a flag.
func wireID(flag, text string) (*spiretypes.SPIFFEID, error) {
	id, err := identity.Parse(text)
	if err != nil {
		return nil, about(flag, err)
	}
	return &spiretypes.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, nil
}

// wireSelectors splits selectors; the server judges them.
func wireSelectors(texts []string) ([]*spiretypes.Selector, error) {
	var selectors []*spiretypes.Selector
	for _, text := range texts {
		kind, value, ok := strings.Cut(text, ":")
		if !ok {
			return nil, fault.New(fault.Invalid, "selector_invalid", "the selector %q has no colon", text).Fix("write it as TYPE:VALUE, such as unix:uid:1000")
		}
		selectors = append(selectors, &spiretypes.Selector{Type: kind, Value: value})
	}
	return selectors, nil
}

// selectorMatch reads -selector and -matchSelectorsOn; without the former it is nil.
func selectorMatch(c *cobra.Command, texts []string, on string) (*spiretypes.SelectorMatch, error) {
	selectors, err := wireSelectors(texts)
	if err != nil {
		return nil, err
	}
	mode, ok := spiretypes.SelectorMatch_MatchBehavior_value["MATCH_"+strings.ToUpper(on)]
	if !ok {
		return nil, usage(c, "the value %q of -matchSelectorsOn is none of exact, any, superset, subset", on)
	}
	if len(selectors) == 0 {
		return nil, nil
	}
	return &spiretypes.SelectorMatch{Selectors: selectors, Match: spiretypes.SelectorMatch_MatchBehavior(mode)}, nil
}

// trustDomains reads the values of -federatesWith.
func trustDomains(texts []string) ([]string, error) {
	var names []string
	for _, text := range texts {
		td, err := trustDomain("-federatesWith", text)
		if err != nil {
			return nil, err
		}
		names = append(names, td.Name())
	}
	return names, nil
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
