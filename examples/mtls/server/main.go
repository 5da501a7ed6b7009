// Command server is a TCP service that lets in exactly one caller, by SPIFFE ID.
// It holds no key and no certificate: both come from the Workload API, and are
// renewed while it runs.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	log.SetFlags(0)
	listen := flag.String("listen", "127.0.0.1:9443", "address to listen on")
	self := flag.String("self", "spiffe://dev.local/server", "which of its identities the service shows")
	allow := flag.String("allow", "spiffe://dev.local/client", "the only caller to let in")
	flag.Parse()

	source, err := workloadapi.NewX509Source(context.Background(), workloadapi.WithDefaultX509SVIDPicker(named(*self)))
	if err != nil {
		log.Fatal(err)
	}
	config := tlsconfig.MTLSServerConfig(source, source, only(spiffeid.RequireFromString(*allow)))
	listener, err := tls.Listen("tcp", *listen, config)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("%s listens on %s", *self, listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn.(*tls.Conn))
	}
}

func serve(conn *tls.Conn) {
	defer conn.Close()
	if err := conn.Handshake(); err != nil {
		log.Printf("refused: %v", err)
		return
	}
	peer := conn.ConnectionState().PeerCertificates[0].URIs[0]
	log.Printf("let in: %s", peer)
	fmt.Fprintf(conn, "hello %s\n", peer)
	_, _ = io.Copy(io.Discard, net.Conn(conn)) // until the caller leaves
}

// only lets in one caller, and says who was refused.
func only(allowed spiffeid.ID) tlsconfig.Authorizer {
	return func(peer spiffeid.ID, _ [][]*x509.Certificate) error {
		if peer != allowed {
			return fmt.Errorf("peer is %s, allowed is %s", peer, allowed)
		}
		return nil
	}
}

// named picks one of several identities. A process with only one needs no picker.
func named(id string) func([]*x509svid.SVID) *x509svid.SVID {
	return func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, svid := range svids {
			if svid.ID.String() == id {
				return svid
			}
		}
		return nil
	}
}
