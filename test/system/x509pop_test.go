package system_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
)

// nodePKI is an operator's PKI with one node certificate, as files of the deployment.
type nodePKI struct {
	d    *deployment
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newNodePKI(d *deployment) *nodePKI {
	d.t.Helper()
	key := d.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Nodes"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	p := &nodePKI{d: d, root: template, key: key}
	p.root = p.sign(template, key)
	d.write("nodes-ca.pem", pemBlock("CERTIFICATE", p.root.Raw))
	return p
}

func (d *deployment) newKey() *ecdsa.PrivateKey {
	d.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		d.t.Fatal(err)
	}
	return key
}

func (p *nodePKI) sign(template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	p.d.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, p.root, &key.PublicKey, p.key)
	if err != nil {
		p.d.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		p.d.t.Fatal(err)
	}
	return c
}

// node writes node.pem and node-key.pem.
func (p *nodePKI) node(cn string) *x509.Certificate {
	p.d.t.Helper()
	key := p.d.newKey()
	c := p.sign(&x509.Certificate{
		SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{{Scheme: "x509pop", Host: p.d.trustDomain, Path: "/rack/r1"}},
	}, key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.d.t.Fatal(err)
	}
	p.d.write("node.pem", pemBlock("CERTIFICATE", c.Raw))
	p.d.write("node-key.pem", pemBlock("PRIVATE KEY", der))
	return c
}

func pemBlock(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// attestBy has server and agent attest by x509pop.
func (d *deployment) attestBy(server string) {
	d.serverAttestor = server
	d.agentAttestor = `NodeAttestor "x509pop" { plugin_data { private_key_path = "` + d.path("node-key.pem") + `"
    certificate_path = "` + d.path("node.pem") + `" } }`
}

// TestX509PoP attests by a certificate of an operator's PKI, renews by attesting
// again at half of a short life, and ends with a ban.
func TestX509PoP(t *testing.T) {
	d := newDeployment(t)
	pki := newNodePKI(d)
	cert := pki.node("node-1")
	d.serverOptions = `agent_ttl = "20s"`
	d.attestBy(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "` + d.path("nodes-ca.pem") + `" } }`)
	d.startServer()
	d.startAgent("")

	sum := sha1.Sum(cert.Raw)
	id := "spiffe://" + d.trustDomain + "/spire/agent/x509pop/" + hex.EncodeToString(sum[:])
	all := d.agents()
	if len(all) != 1 || all[0].AttestationType != "x509pop" || !all[0].CanReattest || "spiffe://"+all[0].Id.TrustDomain+all[0].Id.Path != id {
		t.Fatalf("agents: %v, want %s", all, id)
	}
	var selectors []string
	for _, s := range all[0].Selectors {
		selectors = append(selectors, s.Type+":"+s.Value)
	}
	ca := sha1.Sum(pki.root.Raw)
	want := "x509pop:ca:fingerprint:" + hex.EncodeToString(ca[:]) + " x509pop:san:rack:r1 x509pop:serialnumber:0abc x509pop:subject:cn:node-1"
	if got := strings.Join(selectors, " "); got != want {
		t.Errorf("selectors %s, want %s", got, want)
	}
	d.createEntry(id, "/web", nil, mine())
	d.waitServed()

	// Twice half a life; the workload is served all the while.
	serial := all[0].X509SvidSerialNumber
	for range 2 {
		eventually(t, "a new agent certificate", func() bool {
			now := d.agents()[0].X509SvidSerialNumber
			changed := now != serial
			serial = now
			return changed
		})
		d.waitServed()
	}
	out := d.agent.Output()
	if !strings.Contains(out, "own SVID renewed") || strings.Contains(out, "attesting again") {
		t.Errorf("the agent did not renew by attesting, or not smoothly:\n%s", out)
	}
	if log := d.server.Output(); strings.Contains(log, "replaced agent certificate used") {
		t.Errorf("a re-attestation looks like a clone:\n%s", log)
	}

	// A ban is not lifted by proving the node again (A46, R29).
	admin := agentv1.NewAgentClient(dialUnix(t, d.adminSocket()))
	if _, err := admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(id)}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.agent.done:
	case <-time.After(patience):
		t.Fatal("the agent goes on although it is banned")
	}

	// An operator lifts it, and the node proves itself anew.
	d.run("server", "agent", "unban", "-spiffeID", id, "-socketPath", d.adminSocket())
	d.startAgent("")
	d.waitServed()
}

// TestX509PoPEvicted attests again by itself when the server has forgotten the node.
func TestX509PoPEvicted(t *testing.T) {
	d := newDeployment(t)
	pki := newNodePKI(d)
	pki.node("node-1")
	d.serverOptions = `agent_ttl = "6s"`
	d.attestBy(`NodeAttestor "x509pop" { plugin_data { ca_bundle_paths = ["` + d.path("nodes-ca.pem") + `"]
    agent_path_template = "/x509pop/cn/{{ .Subject.CommonName }}" } }`)
	d.startServer()
	d.startAgent("")
	id := "spiffe://" + d.trustDomain + "/spire/agent/x509pop/cn/node-1"
	d.createEntry(id, "/web", nil, mine())
	d.waitServed()

	admin := agentv1.NewAgentClient(dialUnix(t, d.adminSocket()))
	if _, err := admin.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(id)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node is back", func() bool { return len(d.agents()) == 1 })

	// Another key that proves the same name is let in, and put on record (F22).
	pki.node("node-1")
	eventually(t, "the other key is noticed", func() bool {
		log, err := os.ReadFile(d.path("server/audit.log"))
		return err == nil && strings.Contains(string(log), "node_changed")
	})
	d.waitServed()
}

// A node whose evidence is gone loses its identity within the re-attestation
// period, however long agents' certificates live otherwise.
func TestX509PoPEvidenceGone(t *testing.T) {
	d := newDeployment(t)
	pki := newNodePKI(d)
	pki.node("node-1")
	d.serverOptions = `agent_ttl = "1h"
  agent_reattest_period = "6s"`
	d.attestBy(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "` + d.path("nodes-ca.pem") + `"
    agent_path_template = "/x509pop/cn/{{ .Subject.CommonName }}" } }`)
	d.startServer()
	d.startAgent("")
	d.createEntry("spiffe://"+d.trustDomain+"/spire/agent/x509pop/cn/node-1", "/web", nil, mine())
	d.waitServed()
	if end := d.agents()[0].X509SvidExpiresAt; time.Until(time.Unix(end, 0)) > 6*time.Second {
		t.Errorf("the agent's certificate ends at %v", time.Unix(end, 0))
	}
	for _, name := range []string{"node.pem", "node-key.pem"} {
		if err := os.Remove(d.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-d.agent.done:
	case <-time.After(patience):
		t.Fatal("the agent goes on without evidence")
	}
	if out := d.agent.Output(); !strings.Contains(out, "mend what the node proves itself with") {
		t.Errorf("it does not say what to do:\n%s", out)
	}
}

// TestX509PoPBySVID exchanges a workload's SVID for an agent's identity.
func TestX509PoPBySVID(t *testing.T) {
	d := newDeployment(t)
	joined := d.serverAttestor
	d.attestBy(joined + ` NodeAttestor "x509pop" { plugin_data { mode = "spiffe" } }`)
	byCertificate := d.agentAttestor
	d.agentAttestor = joined
	parent := d.start()
	d.createEntry(parent, "/spire-exchange/rack/n1", nil, mine())
	d.waitServed()
	d.run("agent", "api", "fetch", "x509", "-socketPath", d.workloadSocket(), "-write", d.dir)
	d.agent.stop(syscall.SIGTERM)
	for from, to := range map[string]string{"svid.0.pem": "node.pem", "svid.0.key": "node-key.pem"} {
		if err := os.Rename(d.path(from), d.path(to)); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.RemoveAll(d.path("agent")); err != nil { // a node that has nothing but the SVID
		t.Fatal(err)
	}
	d.agentAttestor = byCertificate
	d.startAgent("")
	d.createEntry("spiffe://"+d.trustDomain+"/spire/agent/x509pop/rack/n1", "/web", nil, mine())
	d.waitServed()
}

// F21, F22: what a template makes of a node's certificate is refused unless it
// is the path of an agent, and two nodes are never one.
func TestCorpusFTemplates(t *testing.T) {
	t.Parallel()
	d := newDeployment(t)
	pki := newNodePKI(d)
	d.attestBy(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = "` + d.path("nodes-ca.pem") + `"
    agent_path_template = "/x509pop/{{ .Subject.CommonName }}" } }`)
	d.startServer()
	d.writeBundle()
	agent := d.agentConfig("")
	for name, cn := range map[string]string{
		"dots": "..", "one dot": ".", "empty": "", "slash": "/", "slash inside": "a/../b", "slash at the end": "a/", "3,000 bytes": strings.Repeat("a", 3000),
		"newline": "a\nb", "space": "a b", "percent": "a%2fb", "not ASCII": "n\u00f6de", "NUL": "a\x00b",
	} {
		t.Run("F21 "+name, func(t *testing.T) {
			pki.node(cn)
			d.write("agent.conf", agent)
			d.refusedStart(t, "agent", "agent.conf", "attest this node: the ")
			if err := os.RemoveAll(d.path("agent")); err != nil {
				t.Fatal(err)
			}
		})
	}
	if all := d.agents(); len(all) > 0 {
		t.Errorf("there are agents: %v", all)
	}
	t.Run("F22 two nodes of one name", func(t *testing.T) { // see also TestX509PoPEvicted: the second is on record
		pki.node("same")
		d.startAgent("")
		second := newDeployment(t)
		second.port, second.server = d.port, d.server
		second.agentAttestor = d.agentAttestor
		pki.node("same")
		second.write("bundle.pem", d.read("bundle.pem"))
		second.write("agent.conf", second.agentConfig(""))
		p := start(t, exec.Command(plastron, "agent", "run", "-config", second.path("agent.conf")))
		eventually(t, "the second is flagged", func() bool {
			log, err := os.ReadFile(d.path("server/audit.log"))
			return err == nil && strings.Contains(string(log), "node_changed")
		})
		p.stop(syscall.SIGTERM)
		if all := d.agents(); len(all) != 1 {
			t.Errorf("agents: %v", all)
		}
	})
}
