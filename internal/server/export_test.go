package server

import "context"

// StopSigning has a server that serves give its lease back.
func (s *Server) StopSigning(ctx context.Context) { s.stopSigning(ctx, s.fleet.Load()) }
