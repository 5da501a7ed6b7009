package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Where SPIRE keeps its sockets, and so do we.
const (
	serverSocket = "/tmp/spire-server/private/api.sock"
	agentSocket  = "/tmp/spire-agent/public/api.sock"
	adminSocket  = "/tmp/spire-agent/private/admin.sock" // SPIRE's agents have none by default
)

// maxSocketPath is what fits into the kernel's address, without the closing zero.
const maxSocketPath = 107

// socket says how a command finds a Unix socket: by its own flags, then by the
// environment, then at the usual place.
type socket struct {
	path, instance          string
	kind                    string // "server" or "Workload API"
	variable, template, def string
	absent, closed, denied  string // what to do when it is not there, when it cannot be opened, when it refuses
}

// runAsOwner is what to do about a socket that is for its program's user only.
const runAsOwner = "run this as the user that runs it, or as root"

func serverSocketFlags(flags *pflag.FlagSet) *socket {
	s := &socket{kind: "server", variable: "SPIRE_SERVER_PRIVATE_SOCKET", template: "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE", def: serverSocket,
		absent: "start one with 'plastron dev' or 'plastron server run', or name its socket with -socketPath or SPIRE_SERVER_PRIVATE_SOCKET",
		closed: runAsOwner}
	s.addFlags(flags)
	return s
}

func agentSocketFlags(flags *pflag.FlagSet) *socket {
	s := &socket{kind: "Workload API", variable: "SPIFFE_ENDPOINT_SOCKET", template: "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE", def: agentSocket,
		absent: "start an agent with 'plastron dev' or 'plastron agent run', or name its socket with -socketPath or SPIFFE_ENDPOINT_SOCKET",
		closed: "let this user enter each directory above it; that of 'plastron dev' is for the user that runs it",
		denied: "'plastron agent why self' says what this process is to the agent"}
	s.addFlags(flags)
	return s
}

// agentAdminFlags are for what an agent tells its operator only.
func agentAdminFlags(flags *pflag.FlagSet) *socket {
	s := &socket{kind: "agent's admin socket", variable: "PLASTRON_AGENT_ADMIN_SOCKET", def: adminSocket,
		absent: "start an agent, or name its socket (admin_socket_path; without it private/admin.sock beside public, or admin.sock in data_dir) with -adminSocketPath or PLASTRON_AGENT_ADMIN_SOCKET",
		closed: runAsOwner, denied: runAsOwner}
	flags.StringVar(&s.path, "adminSocketPath", "", "`PATH` of the agent's admin socket (environment: "+s.variable+"; otherwise "+s.def+")")
	return s
}

func (s *socket) addFlags(flags *pflag.FlagSet) {
	flags.StringVar(&s.path, "socketPath", "", "`PATH` of the "+s.kind+" socket (environment: "+s.variable+"; otherwise "+s.def+")")
	flags.StringVar(&s.instance, "instance", "", "`NAME` that replaces %i in the environment variable "+s.template)
}

// find returns the path of the socket.
func (s *socket) find() (string, error) {
	path := s.path
	template, hasTemplate := "", false
	if s.template != "" {
		template, hasTemplate = os.LookupEnv(s.template)
	}
	fromEnvironment, hasVariable := os.LookupEnv(s.variable)
	switch {
	case path != "" && s.instance != "":
		return "", fault.New(fault.Invalid, "usage", "-socketPath and -instance exclude each other").Fix("give one of them")
	case path != "":
	case s.instance != "" && !hasTemplate:
		return "", fault.New(fault.Invalid, "usage", "-instance needs the environment variable %s", s.template).
			Fix("set it to a path that holds %%i")
	case s.instance != "":
		path = strings.ReplaceAll(template, "%i", s.instance)
	case hasVariable && fromEnvironment != "":
		path = fromEnvironment
	case hasTemplate && template != "":
		path = strings.ReplaceAll(template, "%i", "main")
	default:
		path = s.def
	}
	scheme, rest, hasScheme := strings.Cut(path, ":")
	if hasScheme && scheme != "unix" && !strings.Contains(scheme, "/") {
		return "", fault.New(fault.Invalid, "socket_invalid", "%q is not the address of a Unix socket", path).
			Fix("write it as unix:///PATH or as a plain path")
	}
	if hasScheme && scheme == "unix" {
		path = strings.TrimPrefix(rest, "//")
	}
	if path == "" || len(path) > maxSocketPath { // F8
		return "", fault.New(fault.Invalid, "socket_invalid", "the socket path %q is %d bytes long, the limit is %d", path, len(path), maxSocketPath)
	}
	return path, nil
}

// peer names the other end of the socket in errors.
func (s *socket) peer(path string) peer {
	return peer{name: "the " + s.kind + " at " + path, path: path, absent: s.absent, denied: s.denied}
}

// dial connects to the socket. It tries the socket first, so that the error is
// the kernel's and comes at once.
func (s *socket) dial(ctx context.Context) (*grpc.ClientConn, peer, error) {
	path, err := s.find()
	if err != nil {
		return nil, peer{}, err
	}
	at := s.peer(path)
	if err := probe(ctx, path); err != nil {
		remedy := s.absent
		if errors.Is(err, fs.ErrPermission) {
			remedy = s.closed
		}
		return nil, at, fault.New(fault.Unavailable, "unavailable", "%s does not answer: %s", at.name, why(err)).Fix("%s", remedy)
	}
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	return conn, at, err
}

func probe(ctx context.Context, path string) error {
	d := net.Dialer{Timeout: 5 * time.Second}
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
	}
	return err
}

// why says in a few words why a socket does not answer.
func why(err error) string {
	switch {
	case err == nil:
		return "it has just come up"
	case errors.Is(err, fs.ErrNotExist):
		return "there is no such file"
	case errors.Is(err, fs.ErrPermission):
		return "this user may not open it"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nobody listens there any more"
	}
	return err.Error()
}
