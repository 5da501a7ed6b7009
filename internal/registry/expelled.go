package registry

import (
	"maps"
	"slices"

	"github.com/plastron/plastron/internal/fault"
	"google.golang.org/protobuf/proto"

	"github.com/plastron/plastron/internal/api/plastron/state/v1"
)

func readExpulsion(server string, payload []byte) (Expulsion, error) {
	var m statev1.Expulsion
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Expulsion{}, err
	}
	return Expulsion{Server: server, Caller: m.Caller, At: timeOf(m.At), RevokeAt: timeOf(m.RevokeAt)}, nil
}

// Expelled returns the expulsion of a server, or fault.NotFound. A row that cannot be
// read expels too.
func (tx *Tx) Expelled(server string) (Expulsion, error) {
	m, payload, err := tx.get(kindExpulsion, server, "expulsion")
	switch {
	case fault.ReasonOf(err) == "row_unreadable":
		return Expulsion{Server: server}, nil
	case err != nil:
		return Expulsion{}, err
	case m != nil:
		payload = marshalled(m)
	}
	return readExpulsion(server, payload)
}

// Expel writes down that a server is expelled. Nothing takes that back.
func (tx *Tx) Expel(x Expulsion) error {
	if x.Server == "" || x.At.IsZero() || x.RevokeAt.IsZero() {
		return fault.New(fault.Invalid, "expulsion_invalid", "the expulsion names no server or no time")
	}
	return tx.put(kindExpulsion, x.Server, &statev1.Expulsion{Caller: x.Caller, At: unixOf(x.At), RevokeAt: unixOf(x.RevokeAt)})
}

// StillIn refuses what a server writes that is expelled.
func (tx *Tx) StillIn(server string) error {
	x, err := tx.Expelled(server)
	switch {
	case err == nil:
		return x.Fault()
	case fault.KindOf(err) == fault.NotFound:
		return nil
	}
	return err
}

// Fault is the refusal that an expelled server meets.
func (x Expulsion) Fault() *fault.Error {
	return fault.New(fault.Unavailable, "server_expelled", "this server, %s, was expelled by %s: it signs nothing, and nothing that it says counts", x.Server, x.Caller).
		Fix("start anew with an empty data_dir on a machine that is in good hands; its identity does not come back")
}

// Expelled returns the servers that are expelled, in the order of ids.
func (v *Snapshot) Expelled() (out []Expulsion) {
	for _, server := range slices.Sorted(maps.Keys(v.s.values[kindExpulsion])) {
		if x, err := readExpulsion(server, v.s.values[kindExpulsion][server].payload); err == nil {
			out = append(out, x)
		}
	}
	return out
}

func (s *state) expelled(server string) bool {
	_, expelled := s.values[kindExpulsion][server]
	_, unreadable := s.bad[keyOf(kindExpulsion, server)]
	return expelled || unreadable
}
