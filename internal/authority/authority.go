// Package authority is the life cycle of signing keys: one machine for every
// kind of key, which this server turns for its own. It decides when keys change
// and which one signs. Where keys live is the keeper's business, who may have a
// document that of the callers.
//
// What must always hold: nothing is signed with a key that is not committed to
// the bundle (R63), or that someone who could meet its documents is not known to
// have (R64), unless waiting longer would do more harm and the key's row says so;
// every step is stored before it is acted on, so that a crash anywhere resumes
// (R66); a key stays in the bundle until the last document under it has ended, or
// it is revoked (R65), and what was revoked never comes back (R69). A step and
// the change of the bundle that belongs to it are one transaction.
//
// # The machine
//
//	rule       key was    key becomes  its public half
//	purge      any        as it was    leaves the bundle: it was revoked once
//	adopt      any        as it was    the bundle follows the authority above
//	revoke     old        forgotten    leaves the bundle for ever; an operator asks
//	taint      old        old          is marked, so that all replace what is under it; an operator asks
//	revoke upstream, taint upstream    as revoke and taint, of the root above an old key
//	retire     active     old          stays in the bundle, unless withdrawn already
//	drop       prepared   forgotten    leaves the bundle; it never signed
//	ready      prepared   prepared     everyone has it, or is not waited for any longer
//	activate   prepared   active       stays; the key that was active becomes old
//	publish    intended   prepared     enters the bundle
//	prune      old        forgotten    leaves the bundle
//	make       intended   intended     is made by the keeper, and signed above
//	intend     -          intended     -
//
// A key that signs is replaced by time: the next one is prepared when half of
// its life is left, 30 days at most, and activated when a sixth is left, 7 days
// at most. A document is cut to its authority's end, so the longest lifetime
// that a rotation never cuts is that sixth.
//
// In between, the prepared key waits for proof: for each agent that holds a
// certificate, and each live server, until it has acknowledged the bundle. Who
// is silent is waited for until its certificate ends, for Config.MaxWait at the
// longest, and never into the last twelfth of the active key's life. Who cannot
// acknowledge is given time.
//
// # An authority above
//
// Below an upstream authority the bundle holds the upstream's roots instead of our
// own, and where the upstream passes JWT keys on, all of them. A key of another
// origin than the configuration says (self-signed, or not), or below a root that
// the upstream has dropped or tainted, is replaced at once, and stays good until
// then. A root leaves the bundle when no key of any server leads to it any more
// and the upstream does not have it; at once, and for ever, when it was tainted
// before. An upstream that is away, or answers something unfit, delays a
// replacement and nothing else (R67).
package authority
