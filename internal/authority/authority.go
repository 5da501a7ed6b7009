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
//	revoke     old        forgotten    leaves the bundle for ever; an operator asks
//	taint      old        old          is marked, so that all replace what is under it; an operator asks
//	retire     active     old          stays in the bundle, unless withdrawn already
//	drop       prepared   forgotten    leaves the bundle; it never signed
//	ready      prepared   prepared     everyone has it, or is not waited for any longer
//	activate   prepared   active       stays; the key that was active becomes old
//	publish    intended   prepared     enters the bundle
//	make       intended   intended     is made by the keeper
//	intend     -          intended     -
//	prune      old        forgotten    leaves the bundle
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
package authority
