package server

import (
	"cmp"
	"context"
	"path/filepath"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
	"github.com/plastron/plastron/internal/builtin"
	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys/diskkeys"
	"github.com/plastron/plastron/internal/registry"
)

// Subject is a server that is to be examined: by its configuration, by what it
// says of itself, or by both.
type Subject struct {
	Config  *Config                // nil: it is not known
	Running *statusv1.ServerStatus // nil: it does not answer
	Err     error                  // why it does not
}

// Examine looks at a server and what it stands on, and changes nothing.
func Examine(ctx context.Context, s Subject, now time.Time) (found []doctor.Finding) {
	dataDir, socket := s.Running.GetDataDir(), s.Running.GetSocketPath()
	places := []string{dataDir}
	if dir := s.Running.GetStore().GetDir(); dir != "" {
		places = append(places, dir)
	}
	var configured builtin.StoreConfig
	keyFile := filepath.Join(dataDir, "keys.json")
	domains := map[string]string{"the running server": s.Running.GetTrustDomain()}
	if s.Config != nil {
		p, err := s.Config.plan()
		found = append(found, doctor.Error("configuration", err, "it is valid"))
		set := s.Config.Server
		dataDir, socket, keyFile = set.DataDir, set.SocketPath, filepath.Join(set.DataDir, "keys.json")
		places = []string{dataDir}
		if configured = p.store; configured != nil {
			if dir := configured.Where(dataDir).Dir; dir != "" {
				places = append(places, dir)
			}
		}
		if disk, ok := p.keeper.(*diskkeys.Config); ok {
			keyFile = disk.Path
		}
		domains["the configuration"] = set.TrustDomain.Name()
	}
	found = append(found, alive(s, now), doctor.DataDir(dataDir), doctor.Keys(keyFile), doctor.Disk(places...))
	stored, owner := examineStore(ctx, s.Running, configured, dataDir)
	domains["the store"] = owner
	found = append(found, stored...)
	found = append(found, doctor.SameTrustDomain(domains), doctor.Socket("admin_socket", socket, false, s.Running != nil))
	return append(found, examineRunning(s.Running, now)...)
}

func alive(s Subject, now time.Time) doctor.Finding {
	switch r := s.Running; {
	case r == nil:
		f := doctor.Error("running", s.Err, "")
		f.Verdict = doctor.Warn
		return f
	case r.Unhealthy != nil:
		return doctor.Say("running", doctor.Fail, "it answers, but cannot serve and issue: %s (%s)", r.Unhealthy.Message, r.Unhealthy.Reason).
			Do("see the server's log")
	default:
		return doctor.Say("running", doctor.OK, "it answers, since %s", now.Sub(time.Unix(r.StartedAt, 0)).Round(time.Second))
	}
}

// examineStore asks the server that has the store open what it says of it. If none
// has, and of a store that is shared in any case, it looks itself, and then says
// whose it is.
func examineStore(ctx context.Context, running *statusv1.ServerStatus, configured builtin.StoreConfig, dataDir string) (found []doctor.Finding, owner string) {
	if running != nil {
		found = append(found, reportedStore(running))
	}
	var where builtin.Where
	if configured != nil {
		where = configured.Where(dataDir)
	}
	switch {
	case running != nil && !where.Shared:
		return found, ""
	case configured == nil:
		return append(found, doctor.Say("store", doctor.Skipped, "where it is is not known")), ""
	}
	seen, err := configured.Examine(ctx, dataDir, func(key string, value []byte) error {
		if name, ok := registry.Owner(key, value); ok {
			owner = name
		}
		return registry.Readable(key, value)
	})
	if !where.Shared {
		return append(found, readStore(where, seen, err)), owner
	}
	found = append(found, lookedAtStore(where, seen, err, running != nil))
	for _, r := range seen.Remarks {
		verdict := doctor.OK
		switch {
		case r.Fix != "" && r.Fails:
			verdict = doctor.Fail
		case r.Fix != "":
			verdict = doctor.Warn
		}
		found = append(found, doctor.Say("store_"+r.About, verdict, "%s", r.Found).Do("%s", r.Fix))
	}
	return found, owner
}

// reportedStore is what the running server says.
func reportedStore(running *statusv1.ServerStatus) (f doctor.Finding) {
	store := running.GetStore()
	switch {
	case store.GetFault() != nil && !store.GetChecked():
		f = doctor.Say("store", doctor.Fail, "%s (%s)", store.GetFault().GetMessage(), store.GetFault().GetReason())
	case store.GetFault() != nil:
		f = doctor.Say("store", doctor.Fail, "it is damaged: %s", store.GetFault().GetMessage())
	case running.GetUnreadable() > 0:
		f = doctor.Say("store", doctor.Warn, "%d of its rows cannot be read and are left aside", running.GetUnreadable())
	case !store.GetChecked():
		f = doctor.Say("store", doctor.Skipped, "it was not read as a whole")
	default:
		f = doctor.Say("store", doctor.OK, "read as a whole at revision %d, %d KiB", running.GetPosition().GetRevision(), store.GetBytes()>>10)
	}
	return f.Do("see the server's log; restore a backup if the store is damaged")
}

// readStore is what was read of one that no server has open.
func readStore(where builtin.Where, seen builtin.Examined, err error) doctor.Finding {
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return doctor.Say("store", doctor.Skipped, "there is none in %s", where.Dir)
	case err != nil:
		f := doctor.Error("store", err, "")
		f.Fix = cmp.Or(f.Fix, "restore a backup")
		return f
	case seen.Open:
		return doctor.Say("store", doctor.Skipped, "a server has it open, or was killed: it is read when a server starts")
	}
	return doctor.Say("store", doctor.OK, "read as a whole at revision %d, %d KiB", seen.Revision, seen.Bytes>>10)
}

// lookedAtStore is how a shared store looks from here: as whoever runs the doctor.
func lookedAtStore(where builtin.Where, seen builtin.Examined, err error, running bool) doctor.Finding {
	const check = "store_engine"
	switch {
	case fault.KindOf(err) == fault.NotFound:
		f := doctor.Error(check, err, "")
		f.Verdict, f.Found = doctor.Warn, seen.Engine+": "+f.Found
		return f
	case err != nil:
		f := doctor.Error(check, err, "")
		f.Found = where.Address + ": " + f.Found
		if running {
			f.Verdict = doctor.Warn // the server says itself how it fares
		}
		return f
	}
	return doctor.Say(check, doctor.OK, "%s, epoch %s, revision %d, %d KiB", seen.Engine, seen.Epoch, seen.Revision, seen.Bytes>>10)
}

// examineRunning judges what only a running server knows.
func examineRunning(r *statusv1.ServerStatus, now time.Time) []doctor.Finding {
	if r == nil {
		skip := func(check string) doctor.Finding {
			return doctor.Say(check, doctor.Skipped, "only a running server can say")
		}
		return []doctor.Finding{skip("authorities"), skip("certificate"), skip("bundle"), skip("agents"), skip("clock")}
	}
	moment := func(unix int64) time.Time { return time.Unix(unix, 0) }
	found := []doctor.Finding{
		examineAuthorities(r, now),
		doctor.Expiry("certificate", "the server's own certificate", moment(r.CertificateIssuedAt), moment(r.CertificateExpiresAt), now, 4),
		examineBundle(r, now),
	}
	a := r.GetAttached()
	agents := doctor.Say("agents", doctor.OK, "%d attached, all with the bundle as it is", a.GetAgents())
	if n := len(a.GetLaggards()); n > 0 {
		agents = doctor.Say("agents", doctor.Warn, "%d of %d have not acknowledged the bundle as it is, such as %s", n, a.GetAgents(), a.GetLaggards()[0]).
			Do("if it lasts, see 'plastron agent status' there")
	}
	clock := doctor.Say("clock", doctor.Skipped, "no agent has told its clock")
	if a.GetClocks() > 0 {
		clock = doctor.Clock(a.GetClockAgent(), time.Duration(a.GetClockAheadMs())*time.Millisecond)
	}
	return append(found, agents, clock)
}

func examineAuthorities(r *statusv1.ServerStatus, now time.Time) doctor.Finding {
	worst := doctor.Say("authorities", doctor.OK, "")
	for _, kind := range []string{"x509", "jwt"} {
		f := doctor.Say("authorities", doctor.Fail, "there is no active %s authority", kind).Do("see the server's log and its KeyManager")
		for _, a := range r.GetAuthorities() {
			if a.GetKind() == kind && a.GetState() == "active" {
				// Its successor takes over when a sixth of its life is left.
				f = doctor.Expiry("authorities", "the "+kind+" authority", time.Unix(a.GetNotBefore(), 0), time.Unix(a.GetExpiresAt(), 0), now, 8)
			}
		}
		if worst.Found == "" || doctor.Worst([]doctor.Finding{worst, f}) != worst.Verdict {
			worst = f
		}
	}
	return worst
}

func examineBundle(r *statusv1.ServerStatus, now time.Time) doctor.Finding {
	b := r.GetBundle()
	end := time.Unix(b.GetExpiresAt(), 0)
	switch {
	case b == nil || b.GetX509Authorities() == 0:
		return doctor.Say("bundle", doctor.Fail, "it holds no X.509 authority").Do("see the server's log")
	case !end.After(now):
		return doctor.Say("bundle", doctor.Fail, "all its X.509 authorities have ended, the last at %s", end.UTC().Format(time.RFC3339)).
			Do("see in the log why none was made anew, and that the clock is right")
	case b.GetTainted() > 0:
		return doctor.Say("bundle", doctor.Warn, "%d of its authorities are tainted", b.GetTainted()).
			Do("revoke them when nothing signed by them is in use any more")
	}
	return doctor.Say("bundle", doctor.OK, "sequence %d, %d X.509 and %d JWT authorities", b.GetSequence(), b.GetX509Authorities(), b.GetJwtAuthorities())
}
