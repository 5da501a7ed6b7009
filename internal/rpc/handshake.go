package rpc

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
)

// Handshake says who is at the other end of an accepted connection. It makes
// credentials for a listener of it.
type Handshake func(net.Conn) (net.Conn, credentials.AuthInfo, error)

// ServerHandshake implements credentials.TransportCredentials.
func (h Handshake) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) { return h(c) }

// ClientHandshake implements credentials.TransportCredentials; there is no client.
func (Handshake) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a listener's")
}

// Info implements credentials.TransportCredentials.
func (Handshake) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "plastron"}
}

// Clone implements credentials.TransportCredentials.
func (h Handshake) Clone() credentials.TransportCredentials { return h }

// OverrideServerName implements credentials.TransportCredentials.
func (Handshake) OverrideServerName(string) error { return nil }
