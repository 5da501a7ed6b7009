package main

// onSignals does nothing: there are no signals that ask for either.
func onSignals(_, _ func()) (stop func()) { return func() {} }
