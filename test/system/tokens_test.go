package system_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	"github.com/plastron/plastron/internal/api/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// shape is all that the other side sees of a refusal.
func shape(err error) string {
	b, marshalErr := proto.MarshalOptions{Deterministic: true}.Marshal(status.Convert(err).Proto())
	return fmt.Sprintf("%x %v", b, marshalErr)
}

// checkNowhere looks for secrets in all that server and agent wrote or printed.
// Configuration, which we wrote, is left out.
func (d *deployment) checkNowhere(t *testing.T, secrets ...string) {
	t.Helper()
	places := map[string]string{}
	for name, p := range map[string]*process{"output of the server": d.server, "output of the agent": d.agent} {
		if p != nil {
			places[name] = p.Output()
		}
	}
	err := filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || filepath.Dir(path) == d.dir {
			return err
		}
		b, err := os.ReadFile(path)
		places[path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(slices.Collect(maps.Keys(places)), func(p string) bool { return strings.HasSuffix(p, "/plastron.db") }) {
		t.Error("the database was not looked at")
	}
	for _, secret := range secrets {
		for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), base64.RawStdEncoding.EncodeToString([]byte(secret))} {
			for place, text := range places {
				if strings.Contains(strings.ToLower(text), strings.ToLower(form)) {
					t.Errorf("%q is in %s", secret, place)
				}
			}
		}
	}
}

// Corpus K, and the rows of corpus A that a join token can reach. R19, R20, R22.
func TestCorpusK(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.serverOptions = "ratelimit {\n attestation = false\n }" // the engine shall judge, not the limit
	d.startServer()
	ctx := t.Context()
	admin := agentv1.NewAgentClient(dialUnix(t, d.adminSocket()))
	anybody := d.dialServer(nil)
	try := func(token string) error {
		_, err := attest(ctx, anybody, []byte(token), makeCSR(t, newKey(t), nil))
		return err
	}
	create := func(r *agentv1.CreateJoinTokenRequest) (string, error) {
		resp, err := admin.CreateJoinToken(ctx, r)
		return resp.GetValue(), err
	}
	must := func(r *agentv1.CreateJoinTokenRequest) string {
		t.Helper()
		token, err := create(r)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	var all []string // tokens whose text must be nowhere
	made := func() string {
		all = append(all, must(&agentv1.CreateJoinTokenRequest{Ttl: 600}))
		return all[len(all)-1]
	}
	short, err := admin.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 1})
	if err != nil {
		t.Fatal(err)
	}
	unknown := try(rand.Text())
	t.Run("K1 unknown", func(t *testing.T) {
		if status.Code(unknown) != codes.PermissionDenied {
			t.Errorf("%v, want PermissionDenied", unknown)
		}
	})
	t.Run("K2 expired by 1 s", func(t *testing.T) {
		<-time.After(time.Until(time.Unix(short.ExpiresAt+1, 0)))
		if err := try(short.Value); shape(err) != shape(unknown) {
			t.Errorf("%v, want %v", err, unknown)
		}
	})
	t.Run("K3 used before", func(t *testing.T) {
		token := made()
		if err := try(token); err != nil {
			t.Fatal(err)
		}
		if err := try(token); shape(err) != shape(unknown) {
			t.Errorf("%v, want %v", err, unknown)
		}
	})
	t.Run("K4 parallel uses", func(t *testing.T) {
		const uses, connections = 200, 20
		token, before := made(), len(d.agents())
		var conns []*grpc.ClientConn
		for range connections {
			conns = append(conns, d.dialServer(nil))
		}
		outcomes := make([]error, uses)
		begin := make(chan struct{})
		var all sync.WaitGroup
		for i := range uses {
			csr := makeCSR(t, newKey(t), nil)
			all.Go(func() {
				<-begin
				_, outcomes[i] = attest(ctx, conns[i%connections], []byte(token), csr)
			})
		}
		close(begin)
		all.Wait()
		succeeded := 0
		for _, err := range outcomes {
			if err == nil {
				succeeded++
			} else if shape(err) != shape(unknown) {
				t.Errorf("%v, want %v", err, unknown)
			}
		}
		if agents := len(d.agents()) - before; succeeded != 1 || agents != 1 {
			t.Errorf("%d of %d uses succeeded, %d agents were made; want 1 and 1", succeeded, uses, agents)
		}
	})
	t.Run("K5 K6 answer lost", func(t *testing.T) {
		token, before := made(), len(d.agents())
		key := newKey(t)
		stream, err := agentv1.NewAgentClient(d.dialServer(nil)).AttestAgent(ctx)
		if err != nil {
			t.Fatal(err)
		}
		err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
			Data: &spiretypes.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: makeCSR(t, key, nil)},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the node is admitted", func() bool { return len(d.agents()) == before+1 })
		d.server.stop(syscall.SIGKILL)
		d.startServer()
		if err := try(token); shape(err) != shape(unknown) {
			t.Errorf("K6: %v, want %v", err, unknown)
		}
		if _, err := attest(ctx, anybody, []byte(token), makeCSR(t, key, nil)); err != nil {
			t.Errorf("K5: %v", err)
		}
		if agents := len(d.agents()) - before; agents != 1 {
			t.Errorf("K5: %d agents, want 1", agents)
		}
	})
	t.Run("A48 same key at once", func(t *testing.T) {
		token, before, key := made(), len(d.agents()), newKey(t)
		var all sync.WaitGroup
		for range 20 {
			csr := makeCSR(t, key, nil)
			all.Go(func() {
				if _, err := attest(ctx, anybody, []byte(token), csr); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if agents := len(d.agents()) - before; agents != 1 {
			t.Errorf("%d agents, want 1", agents)
		}
	})
	t.Run("K7 nearly the token", func(t *testing.T) {
		token := made()
		for _, near := range []string{strings.ToLower(token), " " + token, token + " ", token + "\n", "\t" + token, token[:len(token)-1], token + "A", token + "\x00", token[1:]} {
			if code := status.Code(try(near)); code != codes.PermissionDenied && code != codes.InvalidArgument {
				t.Errorf("%q: %v", near, code)
			}
		}
		if err := try(token); err != nil {
			t.Errorf("the token itself: %v", err)
		}
	})
	t.Run("K8 size", func(t *testing.T) {
		for token, want := range map[string]codes.Code{
			"": codes.InvalidArgument, strings.Repeat("a", 256): codes.InvalidArgument, strings.Repeat("a", 10<<20): codes.ResourceExhausted,
		} {
			if err := try(token); status.Code(err) != want {
				t.Errorf("%d bytes: %v, want %v", len(token), err, want)
			}
		}
		_, err := create(&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: strings.Repeat("aB3xY7kQ", 32)})
		denied(t, "CreateJoinToken of 256 bytes", err)
	})
	for row, tokens := range map[string][]string{
		"K9":  {"../../x", "a/b", "%2e%2e", "/", ".."},
		"K10": {"a\x00b", "a\nb", "\U0001f511\U0001f511", "a\xff\xfeb"},
		"K11": {"'OR'1'='1", "' OR 1=1 --", "%", "_", "*", strings.Repeat("_", 26)},
	} {
		t.Run(row, func(t *testing.T) {
			for _, token := range tokens {
				if code := status.Code(try(token)); code != codes.PermissionDenied && code != codes.InvalidArgument {
					t.Errorf("%q: %v", token, code)
				}
				if strings.Contains(token, "\xff") {
					continue // no text of a protobuf message
				}
				_, err := create(&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: token})
				denied(t, fmt.Sprintf("CreateJoinToken %q", token), err)
			}
		})
	}
	t.Run("K9 never in a path", func(t *testing.T) {
		// Strong enough to be taken, so only the way of making IDs can keep it out.
		token := must(&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "../../" + rand.Text()})
		all = append(all, token)
		chain, err := attest(ctx, anybody, []byte(token), makeCSR(t, newKey(t), nil))
		if err != nil || len(chain) == 0 {
			t.Fatal(err)
		}
		for _, a := range d.agents() {
			if strings.Count(a.Id.Path, "/") != 4 || !strings.HasPrefix(a.Id.Path, "/spire/agent/join_token/") {
				t.Errorf("an agent's path is %s", a.Id.Path)
			}
		}
	})
	t.Run("K12 weak value", func(t *testing.T) {
		for _, value := range []string{"1234", "password", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "0123456789abcdef0123456789abcdef", "correct-horse"} {
			_, err := create(&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: value})
			denied(t, value, err)
		}
	})
	t.Run("K13 TTL", func(t *testing.T) {
		for _, ttl := range []int32{0, -1, math.MinInt32, math.MaxInt32} { // the last are 68 years; 100 do not fit
			_, err := create(&agentv1.CreateJoinTokenRequest{Ttl: ttl})
			denied(t, fmt.Sprint(ttl), err)
		}
		for _, ttl := range []string{"0", "-1", "3155760000", "63072000", "1h", ""} {
			refusedCommand(t, nil, "server", "token", "generate", "-socketPath", d.adminSocket(), "-ttl", ttl)
		}
	})
	t.Run("K15 ID not to be had", func(t *testing.T) {
		for _, id := range []string{"spiffe://example.org/spire/server", "spiffe://example.org/spire/agent/x", "spiffe://other.org/a"} {
			_, err := create(&agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: wireID(id)})
			denied(t, id, err)
			refusedCommand(t, nil, "server", "token", "generate", "-socketPath", d.adminSocket(), "-spiffeID", id)
		}
		// An ID follows from the value; agents may share the alias of -spiffeID, as with SPIRE.
		for _, value := range []string{made(), all[0]} { // waiting, used
			if _, err := create(&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: value}); status.Code(err) != codes.AlreadyExists {
				t.Errorf("taken: %v, want AlreadyExists", err)
			}
		}
	})
	t.Run("K17 used at once", func(t *testing.T) { // with one server there is no other to wait for
		if err := try(made()); err != nil {
			t.Error(err)
		}
	})
	t.Run("K18 bad request", func(t *testing.T) { // all of corpus C in TestCorpusC
		token := made()
		good := makeCSR(t, newKey(t), nil)
		bad := bytes.Clone(good)
		bad[len(bad)-1] ^= 1
		for _, csr := range [][]byte{nil, bad} {
			_, err := attest(ctx, anybody, []byte(token), csr)
			denied(t, "AttestAgent", err)
		}
		if _, err := attest(ctx, anybody, []byte(token), good); err != nil {
			t.Errorf("the token is burnt: %v", err)
		}
	})
	t.Run("A1 A2 A3 A7 A50 first message", func(t *testing.T) {
		token := made()
		good := makeCSR(t, newKey(t), nil)
		data := func(kind string, payload []byte) *spiretypes.AttestationData {
			return &spiretypes.AttestationData{Type: kind, Payload: payload}
		}
		csr := &agentv1.AgentX509SVIDParams{Csr: good}
		for row, params := range map[string]*agentv1.AttestAgentRequest_Params{
			"A1 unknown type":     {Data: data("aws_iid", []byte(token)), Params: csr},
			"A1 no type":          {Data: data("", []byte(token)), Params: csr},
			"A1 other upper case": {Data: data("JOIN_TOKEN", []byte(token)), Params: csr},
			"A1 other's data":     {Data: data("join_token", []byte(`{"token": "`+token+`"}`)), Params: csr},
			"A1 name of 1 MiB":    {Data: data(strings.Repeat("a", 1<<20), []byte(token)), Params: csr},
			"A2 no params":        {Data: data("join_token", []byte(token))},
			"A2 no data":          {Params: csr},
			"A2 no CSR":           {Data: data("join_token", []byte(token)), Params: &agentv1.AgentX509SVIDParams{}},
			"A2 nothing":          {},
			"A3 1 MiB and a byte": {Data: data("join_token", make([]byte, 1<<20+1)), Params: csr},
			"A3 deep":             {Data: data("join_token", bytes.Repeat([]byte("["), 100_000)), Params: csr},
		} {
			// each on its own connection: a stranger's may carry one such message, not all
			_, err := attestAs(ctx, d.dialServer(nil), params)
			denied(t, row, err)
		}
		stream, err := agentv1.NewAgentClient(anybody).AttestAgent(ctx)
		if err != nil {
			t.Fatal(err)
		}
		stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte(token)}})
		_, err = stream.Recv()
		denied(t, "A7 an answer before the question", err)
		if err := try(token); err != nil {
			t.Errorf("the token is burnt: %v", err)
		}
	})
	t.Run("A46 A47 banned", func(t *testing.T) {
		token, key := made(), newKey(t)
		csr := makeCSR(t, key, nil)
		before := d.agents()
		if _, err := attest(ctx, anybody, []byte(token), csr); err != nil {
			t.Fatal(err)
		}
		after := d.agents()
		i := slices.IndexFunc(after, func(a *spiretypes.Agent) bool {
			return !slices.ContainsFunc(before, func(b *spiretypes.Agent) bool { return proto.Equal(a.Id, b.Id) })
		})
		retrying, stop := context.WithCancel(ctx)
		defer stop()
		var retries sync.WaitGroup
		for range 4 { // the same evidence again and again, while the ban is committed
			retries.Go(func() {
				for retrying.Err() == nil {
					attest(retrying, anybody, []byte(token), csr)
				}
			})
		}
		if _, err := admin.BanAgent(ctx, &agentv1.BanAgentRequest{Id: after[i].Id}); err != nil {
			t.Fatal(err)
		}
		if _, err := attest(ctx, anybody, []byte(token), csr); status.Code(err) != codes.PermissionDenied {
			t.Errorf("A46: %v, want PermissionDenied", err)
		}
		stop()
		retries.Wait()
		if a, err := admin.GetAgent(ctx, &agentv1.GetAgentRequest{Id: after[i].Id}); err != nil || !a.Banned {
			t.Errorf("A47: %v %v, want it banned", a, err)
		}
	})
	t.Run("K14 R22 the text is nowhere", func(t *testing.T) {
		token, _ := d.token()
		all = append(all, token)
		d.write("token", token+"\n") // F29: one line end is taken off
		d.agentOptions = fmt.Sprintf("join_token_file = %q", d.path("token"))
		d.startAgent("")
		shown := d.run("server", "entry", "show", "-socketPath", d.adminSocket(), "-output", "json") + fmt.Sprint(d.agents())
		d.server.stop(syscall.SIGTERM)
		d.checkNowhere(t, append(all, short.Value)...)
		for _, token := range all {
			if strings.Contains(shown, token) {
				t.Errorf("%s is shown", token)
			}
		}
		// R72, R85: nor is a private key of an authority anywhere but in its file.
		var private []string
		for id, key := range d.authorityKeys() {
			scalar, err := key.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			if file := d.read("server/keys.json"); !strings.Contains(file, base64.StdEncoding.EncodeToString(der)) {
				t.Errorf("the key %s is not found where it is", id)
			}
			private = append(private, string(scalar), string(der))
		}
		if err := os.Remove(d.path("server/keys.json")); err != nil || len(private) < 4 {
			t.Fatal(err, len(private))
		}
		d.checkNowhere(t, private...)
	})
}

// A6: streams on which nothing is sent are bounded per address, and agents that
// are known are served meanwhile. A4: such a stream ends at its deadline, which
// only the long run waits for.
func TestSilentAttestations(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	d.startServer()
	agent := d.join()
	const streams = 1000
	var conns []*grpc.ClientConn
	for range streams / 100 {
		conns = append(conns, d.dialServer(nil))
	}
	ended := make(chan error, streams)
	began := time.Now()
	for i := range streams {
		stream, err := agentv1.NewAgentClient(conns[i%len(conns)]).AttestAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := stream.Recv()
			ended <- err
		}()
	}
	open := streams
	next := func() error {
		select {
		case err := <-ended:
			open--
			return err
		case <-time.After(patience):
			t.Fatal("no stream ended")
			return nil
		}
	}
	for open > streams/2 { // the share of an address is 50 at once and 10 more each second
		if err := next(); status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("A6: a silent stream ended with %v, want ResourceExhausted", err)
		}
	}
	key := newKey(t)
	if _, err := agentv1.NewAgentClient(agent.conn).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: makeCSR(t, key, nil)}}); err != nil {
		t.Errorf("A6: a renewal meanwhile: %v", err)
	}
	if os.Getenv("PLASTRON_SOAK") == "" {
		return
	}
	for open > 0 {
		if err := next(); status.Code(err) != codes.ResourceExhausted && status.Code(err) != codes.DeadlineExceeded {
			t.Fatalf("A4: %v, want DeadlineExceeded", err)
		}
	}
	if took := time.Since(began); took < 25*time.Second {
		t.Errorf("A4: the streams ended after %v, before their deadline", took)
	}
}
