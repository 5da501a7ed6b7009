// Package secretfile reads files that hold private keys. It decides whether a
// file is fit to: who else could have read it, and who could have put another in
// its place (R113), and what counts as a private key in it. What it is used for
// is the caller's business.
//
// What must always hold: the checks are made on the file that is then read; no
// error quotes the file's content.
package secretfile
