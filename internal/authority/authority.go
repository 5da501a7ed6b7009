// Package authority is the life cycle of signing keys: one machine for every
// kind of key, which this server turns for its own. It decides when keys change
// and which one signs. Where keys live is the keeper's business, who may have a
// document that of the callers.
//
// What must always hold: nothing is signed with a key that is not committed to
// the bundle (R63); every step is stored before it is acted on, so that a crash
// anywhere resumes (R66); a key stays in the bundle until the last document
// under it has ended (R65). A step and the change of the bundle that belongs to
// it are one transaction.
//
// # The machine
//
//	rule       key was    key becomes  its public half
//	retire     active     old          stays in the bundle, unless withdrawn already
//	drop       prepared   forgotten    leaves the bundle; it never signed
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
package authority
