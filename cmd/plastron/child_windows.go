package main

import (
	"os"

	"golang.org/x/sys/windows"
)

func passedOn() []os.Signal { return []os.Signal{os.Interrupt} }

// The console sends its interrupt to every process attached to it.
func sentByTerminal(os.Signal) bool { return true }

func endedBySignal(*os.ProcessState) (int, bool) { return 0, false }

func lockFile(file *os.File) bool {
	return windows.LockFileEx(windows.Handle(file.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, new(windows.Overlapped)) == nil
}

// Directories below the user's own temporary directory are the user's.
func ownedByUs(os.FileInfo) bool { return true }
