package serverapi

import "io/fs"

// mine is what the directory's access list says on this system.
func mine(fs.FileInfo) bool { return true }

// checkParents is what the directories' access lists say on this system.
func checkParents(string) error { return nil }
