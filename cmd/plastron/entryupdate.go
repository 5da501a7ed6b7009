package main

import (
	"fmt"
	"slices"

	entryv1 "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// updateTries is how often an update that builds on what it has read is tried
// when others change the entry at the same time.
const updateTries = 5

func (p *program) entryUpdateCommand() *cobra.Command {
	c := &cobra.Command{Use: "update", Short: "Change registered entries",
		Long: `Changes the fields of one entry that flags name, and no others. A value that is
empty, 0 or =false is a value like any other: -hint "" removes the hint, -dns ""
and -federatesWith "" remove all names, -admin=false takes the right away. A list
that is given replaces the list that was there.

The entries of -data are whole entries, as for entry create: what a file does not
say is reset, save for additional_attributes: they stay if no entry of the file
has them, and if one has, all must.`,
	}
	var e entryFlags
	e.addFlags(c.Flags())
	c.Flags().StringVar(&e.entryID, "entryID", "", "`ID` of the entry to change")
	wait, at, out := waitFlag(c.Flags()), serverSocketFlags(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		request, err := e.update(c, p)
		if err != nil {
			return err
		}
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		reply, err := e.merge(c, entryv1.NewEntryClient(wait.over(conn)), request)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			if err := printJSON(p.stdout, reply); err != nil {
				return err
			}
		}
		failed := 0
		if len(reply.GetResults()) != len(request.GetEntries()) {
			return fault.New(fault.Internal, "internal", "%s answered for %d entries of %d", peer.name, len(reply.GetResults()), len(request.GetEntries()))
		}
		var changed []*spiretypes.Entry
		for i, one := range request.GetEntries() {
			r := reply.GetResults()[i]
			switch {
			case r.GetStatus().GetCode() != int32(codes.OK):
				failed++
				fmt.Fprintf(p.stderr, "Failed to update entry with ID %s (code: %s, msg: %q)\n",
					one.GetId(), codes.Code(r.GetStatus().GetCode()), r.GetStatus().GetMessage())
			default:
				if changed = append(changed, r.GetEntry()); *out == pretty {
					printEntry(p.stdout, r.GetEntry())
				}
			}
		}
		p.printNotes(c.Context(), conn, changed)
		if failed > 0 {
			err = fault.New(fault.Invalid, "partly_failed", "%d of %d entries were not updated", failed, len(request.GetEntries()))
		}
		return wait.finish(c, p, conn, peer, *out, err)
	}
	return c
}

// update returns the change that the flags, or the file of -data, describe.
func (e *entryFlags) update(c *cobra.Command, p *program) (*entryv1.BatchUpdateEntryRequest, error) {
	given := func(flag string) bool { return c.Flags().Changed(flag) }
	if e.data != "" {
		entries, err := e.fromFile(c, p.stdin)
		attributes := slices.ContainsFunc(entries, func(one *spiretypes.Entry) bool { return one.AdditionalAttributes != nil })
		for _, one := range entries {
			if attributes && one.AdditionalAttributes == nil {
				return nil, fault.New(fault.Invalid, "usage", "%s: the entry %q has no additional_attributes, and another has", e.data, one.GetId()).
					Fix("give them for all entries of the file, or for none")
			}
			if one.GetId() == "" {
				return nil, fault.New(fault.Invalid, "usage", "%s: the entry of %s has no entry_id", e.data, idText(one.GetSpiffeId())).
					Fix("add the entry_id that 'plastron server entry show' prints")
			}
		}
		return &entryv1.BatchUpdateEntryRequest{Entries: entries, InputMask: &spiretypes.EntryMask{
			SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, JwtSvidTtl: true, FederatesWith: true,
			Admin: true, Downstream: true, ExpiresAt: true, DnsNames: true, StoreSvid: true, Hint: true,
			AdditionalAttributes: attributes,
		}}, err
	}
	if e.entryID == "" {
		return nil, usage(c, "-entryID or -data is required")
	}
	mask := &spiretypes.EntryMask{
		SpiffeId: given("spiffeID"), ParentId: given("parentID"), Selectors: given("selector"),
		X509SvidTtl: given("x509SVIDTTL"), JwtSvidTtl: given("jwtSVIDTTL"), FederatesWith: given("federatesWith"),
		Admin: given("admin"), Downstream: given("downstream"), ExpiresAt: given("entryExpiry"), DnsNames: given("dns"),
		StoreSvid: given("storeSVID"), Hint: given("hint"),
		AdditionalAttributes: given("disableX509SVIDPrefetch") || given("jwtSVIDIncludeJTI"),
	}
	if proto.Equal(mask, &spiretypes.EntryMask{}) {
		return nil, usage(c, "there is nothing to change: give a flag besides -entryID")
	}
	if slices.Equal(e.dns, []string{""}) {
		e.dns = nil
	}
	if slices.Equal(e.federatesWith, []string{""}) {
		e.federatesWith = nil
	}
	one, err := e.fromFlags(c)
	return &entryv1.BatchUpdateEntryRequest{Entries: []*spiretypes.Entry{one}, InputMask: mask}, err
}

// merge sends the change. The API knows the additional attributes only all
// together, so if one is given and the other is not, the other is read first; the
// revision that it was read at keeps a change by somebody else from being undone.
func (e *entryFlags) merge(c *cobra.Command, client entryv1.EntryClient, request *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	prefetch, jti := c.Flags().Changed("disableX509SVIDPrefetch"), c.Flags().Changed("jwtSVIDIncludeJTI")
	if prefetch == jti {
		return client.BatchUpdateEntry(c.Context(), request)
	}
	one := request.GetEntries()[0]
	request.InputMask.RevisionNumber = true
	for try := 1; ; try++ {
		old, err := client.GetEntry(c.Context(), &entryv1.GetEntryRequest{Id: one.GetId()})
		if err != nil {
			return nil, err
		}
		one.RevisionNumber = old.GetRevisionNumber()
		one.AdditionalAttributes = &spiretypes.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: old.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
			JwtSvidIncludeJti:       old.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		}
		if prefetch {
			one.AdditionalAttributes.DisableX509SvidPrefetch = e.noPrefetch
		} else {
			one.AdditionalAttributes.JwtSvidIncludeJti = e.withJTI
		}
		reply, err := client.BatchUpdateEntry(c.Context(), request)
		if err != nil || try == updateTries || !slices.ContainsFunc(reply.GetResults(), conflicts) {
			return reply, err
		}
	}
}

func conflicts(r *entryv1.BatchUpdateEntryResponse_Result) bool {
	return r.GetStatus().GetCode() == int32(codes.Aborted)
}
