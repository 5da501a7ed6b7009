package system_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"os/exec"
	"syscall"
	"testing"
	"time"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
)

// While the server is away for the whole life of an SVID, and the agent is
// restarted twice, once killed, every fetch is answered until the SVID ends, by
// new processes as well; so is every fetch of a JWT-SVID for an audience that is
// known (R56). Nothing expired is handed out (R35). When the server is back the
// agent is in step without a restart.
func TestOutage(t *testing.T) {
	const life = 45 // seconds, of each SVID
	d := newDeployment(t)
	d.agentCache = d.path("cache")
	parent := d.start()
	d.createEntry(parent, "/web", func(e *spiretypes.Entry) { e.X509SvidTtl, e.JwtSvidTtl = life, life }, mine())
	d.waitServed()
	ctx, cancel := context.WithCancel(withHeader(t.Context()))
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.workloadSocket())))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()

	// A new connection each time, as a process that starts has. It waits for the
	// socket, as libraries do, and for nothing else.
	fetch := func() ([]*workload.X509SVID, error) {
		ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
		defer cancel()
		conn := dialUnix(t, d.workloadSocket())
		defer conn.Close()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return nil, err
		}
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		return resp.GetSvids(), nil
	}
	fetchJWT := func() (string, error) {
		ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
		defer cancel()
		conn := dialUnix(t, d.workloadSocket())
		defer conn.Close()
		resp, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"them"}}, grpc.WaitForReady(true))
		if err != nil {
			return "", err
		}
		return resp.GetSvids()[0].GetSvid(), nil
	}
	fetchOne := func() (*x509.Certificate, error) {
		got, err := fetch()
		if err != nil {
			return nil, err
		}
		chain, err := x509.ParseCertificates(got[0].GetX509Svid())
		if err != nil {
			return nil, err
		}
		return chain[0], nil
	}
	leaf, err := fetchOne()
	if err != nil {
		t.Fatal(err)
	}
	token, err := fetchJWT()
	if err != nil {
		t.Fatal(err)
	}
	d.server.stop(syscall.SIGKILL)

	// The margin before the end is a tenth of the life.
	end := leaf.NotAfter.Add(-life * time.Second / 10).Add(-time.Second)
	began, restarts := time.Now(), []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}
	n, restarted := 0, 0
	for ; time.Now().Before(end); n++ {
		if restarted < len(restarts) && time.Since(began) > time.Duration(restarted+1)*end.Sub(began)/4 {
			d.agent.stop(restarts[restarted])
			restarted++
			d.agent = start(t, exec.Command(plastron, "agent", "run", "-config", d.path("agent.conf")))
		}
		asked := time.Now()
		got, err := fetchOne()
		now := time.Now()
		switch {
		case err != nil && now.Before(end):
			t.Fatalf("fetch %d, with %v to go: %v", n, end.Sub(now), err)
		case err == nil && !asked.Before(got.NotAfter):
			t.Fatalf("fetch %d: an SVID that had ended %v ago", n, asked.Sub(got.NotAfter))
		case err == nil && !got.Equal(leaf):
			leaf = got // it was signed before the server went, and came late
		}
		if jwt, err := fetchJWT(); err != nil && time.Now().Before(end) || err == nil && jwt != token {
			t.Fatalf("fetch %d of a JWT-SVID, with %v to go: %v", n, time.Until(end), err)
		}
		if n%10 == 0 { // a program that starts
			out, err := exec.Command(plastron, "agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-silent", "-timeout", patience.String()).CombinedOutput()
			if err != nil && time.Now().Before(end) {
				t.Fatalf("a program that starts: %v\n%s", err, out)
			}
		}
		waitUntil(time.Now().Add(100 * time.Millisecond))
	}
	if n < 3 || restarted != len(restarts) {
		t.Fatalf("%d fetches, and the agent was restarted %d times", n, restarted)
	}
	t.Logf("%d fetches of each kind", n)

	waitUntil(leaf.NotAfter)
	asked := time.Now()
	if got, err := fetchOne(); err == nil && !asked.Before(got.NotAfter) { // R35
		t.Errorf("an SVID that has ended was handed out, valid until %v", got.NotAfter)
	}

	d.startServer()
	back := time.Now()
	eventually(t, "the agent is in step", func() bool {
		out, _ := exec.Command(plastron, "agent", "status", "-adminSocketPath", d.path("private/admin.sock"), "-output", "json").Output()
		var s struct {
			Following struct {
				InStep bool `json:"in_step"`
			} `json:"following"`
		}
		return json.Unmarshal(out, &s) == nil && s.Following.InStep
	})
	inStep := time.Since(back)
	d.waitServed()
	t.Logf("in step %v after the server was healthy, served after %v", inStep, time.Since(back))
	d.createEntry(parent, "/other", nil, mine())
	eventually(t, "a new entry is served, and a client that was there all the time is well", func() bool {
		got, err := fetch()
		held, heldErr := source.GetX509SVID()
		return err == nil && len(got) == 2 && heldErr == nil && time.Now().Before(held.Certificates[0].NotAfter)
	})
}

// waitUntil waits for a moment: what is tested ends by the clock.
func waitUntil(at time.Time) { <-time.After(time.Until(at)) }
