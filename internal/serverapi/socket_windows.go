package serverapi

import "io/fs"

// mine is what the directory's access list says on this system.
func mine(fs.FileInfo) bool { return true }
