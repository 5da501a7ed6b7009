package main

import (
	"strings"
	"testing"
	"time"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
)

// What a client of Envoy's secret discovery says of itself and of what it was sent
// reaches the operator's terminal quoted.
func TestSecretClients(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 5, 0, time.UTC)
	s := &statusv1.AgentStatus{SdsStreams: 2, SdsClients: []*statusv1.SecretClient{
		{Pid: 4711, Uid: 1000, Node: "web\n\x1b[2J", Missing: []*statusv1.SecretClient_Missing{{Name: "spiffe://example.org/typo\x1b[2J", Reason: "secret_unknown"}}, Open: true},
		{Pid: 4712, Uid: 1000, Node: "web", Names: []string{"default\x1b[2J"}, Rejected: "Failed to load private key\x1b[2J\r\n", At: now.Unix() - 5},
	}}
	var out strings.Builder
	if err := printAgentStatus(&out, s, now); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`pid 4711, uid 1000, node "web\n\x1b[2J": "spiffe://example.org/typo\x1b[2J" (secret_unknown)`,
		`pid 4712, uid 1000, node "web": ["default\x1b[2J"]: "Failed to load private key\x1b[2J\r\n", 2026-11-22T12:00:00Z (5s ago), and is gone`,
		"2 streams\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not in\n%s", want, out.String())
		}
	}
	if strings.ContainsAny(out.String(), "\x1b\r") {
		t.Errorf("raw words in %q", out.String())
	}
}

func TestAuthorityWithoutAKey(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	s := &statusv1.ServerStatus{Authorities: []*statusv1.Authority{
		{Kind: "x509", Slot: "A", State: "active", AuthorityId: "ab", ExpiresAt: now.Unix() + 3600}, {Kind: "x509", Slot: "B", State: "intended"},
	}}
	var out strings.Builder
	if err := printServerStatus(&out, s, now); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{": x509 A active ab, until 2026-11-22T13:00:00Z", ": x509 B intended\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}
