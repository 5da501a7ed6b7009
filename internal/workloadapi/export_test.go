package workloadapi

import "time"

// Hurry shortens the waits.
func (c *Config) Hurry(request, send, reattest time.Duration) {
	c.waits = waits{request: request, send: send, reattest: reattest}
}
