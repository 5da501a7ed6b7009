package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The configurations that are delivered with the units are good, and name the
// socket that the socket unit makes.
func TestDeployedConfigurations(t *testing.T) {
	dir := filepath.Join("..", "..", "deploy", "systemd")
	for _, role := range []string{"server", "agent"} {
		var out bytes.Buffer
		if code := run(t.Context(), []string{"plastron", role, "validate", "-config", filepath.Join(dir, role+".conf")}, nil, &out, &out); code != exitOK {
			t.Errorf("%s.conf: %s", role, &out)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	const socket = "/run/plastron/api.sock"
	if !strings.Contains(read("agent.conf"), `socket_path = "`+socket+`"`) || !strings.Contains(read("plastron-agent.socket"), "\nListenStream="+socket+"\n") {
		t.Errorf("agent.conf and plastron-agent.socket do not both name %s", socket)
	}
}
