//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// onSignals calls reopen whenever SIGUSR2 asks for files to be opened anew, and
// reload whenever SIGUSR1 asks for the configuration to be read again, one call
// after the other, until stop is called.
func onSignals(reopen, reload func()) (stop func()) {
	asked, ended := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(asked, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		defer close(ended)
		for s := range asked {
			if s == syscall.SIGUSR1 {
				reload()
			} else {
				reopen()
			}
		}
	}()
	return func() {
		signal.Stop(asked)
		close(asked)
		<-ended
	}
}
