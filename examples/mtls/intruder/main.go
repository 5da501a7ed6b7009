// Command intruder is the client of the mTLS example in all but its identity: it has a
// good certificate of the same trust domain, for an ID that the server does not let in.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	log.SetFlags(0)
	address := flag.String("address", "127.0.0.1:9443", "address of the server")
	self := flag.String("self", "spiffe://dev.local/intruder", "which of its identities the intruder shows")
	server := flag.String("server", "spiffe://dev.local/server", "the only server to talk to")
	flag.Parse()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithDefaultX509SVIDPicker(named(*self)))
	if err != nil {
		log.Fatal(err)
	}
	authorize := tlsconfig.AuthorizeID(spiffeid.RequireFromString(*server))
	conn, err := dial(ctx, *address, tlsconfig.MTLSClientConfig(source, source, authorize))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	answer, err := bufio.NewReader(conn).ReadString('\n') // here it shows whether we were let in
	if err != nil {
		log.Fatalf("%s is refused: %v", *self, err)
	}
	fmt.Print(answer)
}

// dial waits for a server that is not up yet.
func dial(ctx context.Context, address string, config *tls.Config) (net.Conn, error) {
	for {
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		time.Sleep(100 * time.Millisecond)
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
