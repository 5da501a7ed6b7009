package serverapi

import (
	"context"

	joinv1 "github.com/plastron/plastron/api/plastron/join/v1"
)

// joins is plastron.join.v1.Join.
type joins struct {
	joinv1.UnsafeJoinServer
	server *Server
}

// Address says where agents reach this server.
func (a joins) Address(context.Context, *joinv1.AddressRequest) (*joinv1.AddressResponse, error) {
	return &joinv1.AddressResponse{Addresses: a.server.cfg.Addresses}, nil
}
