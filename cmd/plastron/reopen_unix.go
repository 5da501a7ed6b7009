//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// onReopen calls f, one call after the other, whenever SIGUSR2 asks for files to be
// opened anew, until stop is called.
func onReopen(f func()) (stop func()) {
	asked, ended := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(asked, syscall.SIGUSR2)
	go func() {
		defer close(ended)
		for range asked {
			f()
		}
	}()
	return func() {
		signal.Stop(asked)
		close(asked)
		<-ended
	}
}
