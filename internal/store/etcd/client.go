package etcd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/stats"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/secretfile"
)

// gRPC's own least; etcd by default tolerates a ping every 5 s.
const keepAlive = 10 * time.Second

const (
	maxPassword   = 4096
	maxSecretFile = 256 << 10
)

// Validate refuses (fault.Invalid) what cannot work. It reads no file.
func (c Config) Validate() error {
	secure := 0
	for _, e := range c.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Port() == "" || u.Path != "" || u.User != nil || u.RawQuery != "" {
			// Not the endpoint itself: it may hold a password.
			return fault.New(fault.Invalid, "bad_endpoint", "an etcd endpoint is not of the form https://HOST:PORT").
				Fix("name it like https://etcd-1.example.org:2379; user and password have settings of their own")
		}
		if u.Scheme == "https" {
			secure++
		}
	}
	switch {
	case len(c.Endpoints) == 0:
		return fault.New(fault.Invalid, "no_endpoints", "no etcd endpoint is configured").
			Fix("name all members: https://etcd-1.example.org:2379, …")
	case secure != 0 && secure != len(c.Endpoints):
		return fault.New(fault.Invalid, "mixed_endpoints", "some etcd endpoints are https and some are not").
			Fix("begin all of them with https://")
	case secure == 0 && c.CAFile+c.CertFile+c.KeyFile != "":
		return fault.New(fault.Invalid, "mixed_endpoints", "certificates are configured, but the etcd endpoints are not https").
			Fix("begin all of them with https://")
	case (c.CertFile == "") != (c.KeyFile == ""):
		return fault.New(fault.Invalid, "certificate_incomplete", "etcd's client certificate and its key come together").
			Fix("configure both files or none")
	case (c.PasswordFile == "") != (c.Username == ""): // etcd's client would leave a user without a password out
		return fault.New(fault.Invalid, "login_incomplete", "etcd's user and the file with its password come together").
			Fix("configure username and password_file, or neither")
	case !strings.HasSuffix(c.prefix(), "/"):
		return fault.New(fault.Invalid, "bad_prefix", "the prefix %q does not end with a slash", c.Prefix).
			Fix("add one, so that no other key can begin with it by accident")
	}
	return nil
}

// Warnings says what works but may surprise.
func (c Config) Warnings() (out []string) {
	for _, e := range c.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "http" || u.Hostname() == "localhost" {
			continue
		}
		if at, err := netip.ParseAddr(u.Hostname()); err != nil || !at.IsLoopback() {
			return []string{"endpoints: with http:// who is on the network can read and write the store; use https://"}
		}
	}
	return nil
}

// connect makes the client. Without a password it does not wait for a server.
func (c Config) connect(ctx, life context.Context, limit limits) (*clientv3.Client, error) {
	options := []grpc.DialOption{grpc.WithStatsHandler(sentHandler{}), grpc.WithChainUnaryInterceptor(failFast)}
	if strings.HasPrefix(c.Endpoints[0], "https://") {
		files := tlsFiles{c.CAFile, c.CertFile, c.KeyFile}
		if _, err := files.load(); err != nil { // now rather than as a failed handshake
			if fault.KindOf(err) != fault.Internal {
				return nil, err // the key's place or mode
			}
			return nil, fault.New(fault.Precondition, "store_tls", "etcd's certificate files cannot be used: %v", err).
				Fix("check that ca_file, cert_file and key_file are there, in PEM and readable")
		}
		options = append(options, grpc.WithTransportCredentials(reloading{credentials.NewTLS(nil), files}))
	}
	config := clientv3.Config{
		Endpoints: c.Endpoints, Username: c.Username,
		DialTimeout: limit.attempt, DialKeepAliveTime: keepAlive, DialKeepAliveTimeout: limit.attempt,
		MaxUnaryRetries: 2, // once more with a new token; the rest we send again ourselves
		DialOptions:     options, Context: life, Logger: zap.NewNop(),
	}
	if c.PasswordFile != "" {
		password, err := secretfile.ReadGiven(c.PasswordFile, maxSecretFile)
		if fault.KindOf(err) != fault.Internal {
			return nil, err // its place or mode
		}
		if err != nil {
			return nil, fault.New(fault.Precondition, "store_login", "password_file %q, with etcd's password, cannot be read", c.PasswordFile).
				Fix("check its path and permissions").Because(err)
		}
		password = bytes.TrimRight(password, "\r\n")
		if len(password) == 0 || len(password) > maxPassword {
			return nil, fault.New(fault.Precondition, "store_login", "etcd's password has %d bytes; it must have 1 to %d", len(password), maxPassword).
				Fix("write the password alone into the file")
		}
		config.Password = string(password)
	}
	client, err := clientv3.New(config)
	if err != nil {
		return nil, lasting(err)
	}
	return client, nil
}

// failFast says at once why no server can be reached, instead of waiting for one.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, conn, append(options, grpc.WaitForReady(false))...)
}

// tlsFiles are read for each connection.
type tlsFiles struct{ ca, cert, key string }

func (f tlsFiles) load() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, err
		}
		if config.RootCAs = x509.NewCertPool(); !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New(f.ca + " holds no certificate")
		}
	}
	if f.cert != "" {
		cert, err := os.ReadFile(f.cert)
		if err != nil {
			return nil, err
		}
		key, err := secretfile.ReadGiven(f.key, maxSecretFile) // R113
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("%s and %s: %w", f.cert, f.key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// reloading shakes hands with what the files hold at that moment. The embedded
// credentials only tell the protocol's name.
type reloading struct {
	credentials.TransportCredentials
	files tlsFiles
}

func (r reloading) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, err := r.files.load()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(config).ClientHandshake(ctx, authority, conn)
}

func (r reloading) Clone() credentials.TransportCredentials {
	return reloading{r.TransportCredentials.Clone(), r.files}
}

// sentHandler notes in a call's context whether the call ever left for a server.
type sentHandler struct{}

type sentKey struct{}

// noteSent returns a context whose calls set sent once they have a stream to a
// server. While it is unset nothing can have reached one.
func noteSent(ctx context.Context) (_ context.Context, sent *atomic.Bool) {
	sent = new(atomic.Bool)
	return context.WithValue(ctx, sentKey{}, sent), sent
}

func (sentHandler) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); ok {
		if sent, ok := ctx.Value(sentKey{}).(*atomic.Bool); ok {
			sent.Store(true)
		}
	}
}
func (sentHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (sentHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (sentHandler) HandleConn(context.Context, stats.ConnStats)                       {}

// explain says what an error of etcd's client means to the operator. It is
// always a fault.
func explain(err error) *fault.Error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f
	}
	is := func(texts ...error) bool {
		return slices.ContainsFunc(texts, func(known error) bool { return strings.Contains(err.Error(), known.Error()) })
	}
	say := func(reason, message, remedy string) *fault.Error {
		return fault.New(fault.Unavailable, reason, "%s", message).Fix("%s", remedy).Because(err)
	}
	switch {
	case is(rpctypes.ErrNoSpace):
		return say("store_full", "etcd is over its space quota and takes no writes",
			"compact and defragment it, then run \"etcdctl alarm disarm\"; or raise --quota-backend-bytes")
	case is(rpctypes.ErrAuthFailed, rpctypes.ErrUserEmpty, rpctypes.ErrAuthNotEnabled, rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserNotFound):
		return say("store_login", "etcd does not accept this server's user",
			"check the user, its password file and whether etcd has authentication enabled")
	case is(rpctypes.ErrPermissionDenied):
		return say("store_denied", "etcd's role for this server does not cover what it has to do",
			"grant it readwrite for the store's prefix: etcdctl role grant-permission ROLE readwrite --prefix=true PREFIX")
	case is(rpctypes.ErrRequestTooLarge, rpctypes.ErrTooManyOps):
		return say("store_limits", "etcd's limits are lower than its defaults",
			"give it at least --max-request-bytes 1572864 and --max-txn-ops 128")
	case is(rpctypes.ErrCompacted):
		return say("snapshot_compacted", "etcd's history was compacted while it was read", "try again")
	case strings.Contains(err.Error(), "authentication handshake failed"):
		return say("store_tls", "TLS with etcd fails",
			"check the CA file, that etcd's certificate names the endpoint, and that etcd trusts this server's certificate")
	case is(rpctypes.ErrNoLeader):
		return say("store_no_quorum", "etcd has no leader", "see that more than half of its members run and reach each other")
	case is(context.DeadlineExceeded, rpctypes.ErrTimeout):
		return say("store_timeout", "etcd did not answer in time", "see that more than half of its members run and reach each other")
	}
	return say("store_unreachable", "etcd cannot be reached", "check the endpoints, and that etcd runs there")
}

// lasting makes of a failure one that stays until somebody mends it, where that
// is so.
func lasting(err error) error {
	f := explain(err)
	switch f.Reason {
	case "store_login", "store_denied", "store_limits":
		again := *f
		again.Kind = fault.Precondition
		return &again
	}
	return f
}

// refused tells errors of a write that etcd gives before it has proposed it, or
// instead of applying it: nothing of it is there or will come. It is not so of a
// write that is refused for want of space: see arrived.
func refused(err error) bool {
	switch explain(err).Reason {
	case "store_full", "store_login", "store_denied", "store_limits":
		return true
	}
	return slices.ContainsFunc([]error{rpctypes.ErrKeyNotFound, rpctypes.ErrLeaseNotFound, rpctypes.ErrDuplicateKey, rpctypes.ErrTooManyRequests},
		func(known error) bool { return errors.Is(err, known) })
}
