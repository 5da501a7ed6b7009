// Package servers is what the servers of a trust domain know of one another:
// the row in which each says that it lives, the right to sign that goes with the
// row, and how fresh and how right the own view is. It decides whether this
// server may sign, whether it may grant what it has not granted before, and
// when what a vanished server left is removed. It signs and grants nothing.
//
// What must always hold: of two processes with one identity at most one signs
// (R68); nobody signs or removes anything by a clock that is off (R70, R108); a
// server that cannot see what the others change says so after a minute and
// grants nothing new from then on (R77); an authority of a server that is gone
// stays in the bundle until the last document under it has ended (R65).
//
// # The lease
//
// A server's identity is the server-id in its data directory; each life of its
// process draws a random instance. Every 10 s it writes a beat into its row, on
// condition that the row is as it left it. A beat that was committed and came
// back through the log lets the instance sign for the time of its lease, counted
// from before the beat was sent, on a clock that cannot be set and counts sleep.
//
// Who starts and finds another instance in its row takes over at once if that
// one stopped in order, or if it lived in the same directory of the same running
// kernel, because the directory is locked now. Else it waits, and signs nothing:
// until the lease of what it found has run out, counted from when it first saw
// that beat, or until the beat moves. Then somebody else lives under this
// identity, and the start is refused. Who finds another instance in its own row
// while it runs has been replaced, and signs nothing any more.
//
// With a store that one process holds (SQLite) holding the store is the lease:
// there is nobody to beat for, and nothing that could go stale.
//
// # Expulsion
//
// A server in wrong hands is expelled by another: a row of its own, that nothing
// takes back, says so. Its beats, roster and keys are then refused by a condition of
// the transactions in which they are written, and it ends when it sees the row. What
// is written in its name all the same every other server removes as it comes. Its
// authorities are tainted at once and revoked at a time that the row names, by
// whichever server is there.
//
// # The clocks
//
// A beat carries its writer's clock. What it says, less the own clock when it
// arrives, is by how much the two differ, or less, for it was under way; of the
// last three the greatest counts. The median over the live servers is the right
// time; of an even number the two in the middle have one whose server has lived
// longer, and that counts. A server that is more than 30 s off signs nothing.
package servers
