package agent_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
)

// What an agent kept for its next start goes with the ban, before it ends.
func TestBanEmptiesTheSealedCache(t *testing.T) {
	d := newDomain(t)
	cfg := d.agentConfig()
	cfg.Agent.CacheDirectory = filepath.Join(shortDir(t), "memory")
	cfg.Plugins[0] = config.Plugin{Type: "KeyManager", Name: "disk"}
	a, err := agent.New(cfg, logger(t, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- a.Run(t.Context()) }()
	within(t, a.Ready())
	d.entry("/web")
	left := func() int {
		rows, err := os.ReadDir(cfg.Agent.CacheDirectory)
		if err != nil {
			t.Fatal(err)
		}
		return len(rows)
	}
	deadline := time.After(wait)
	for left() == 0 {
		select {
		case <-deadline:
			t.Fatal("nothing is kept")
		case <-time.After(10 * time.Millisecond):
		}
	}
	d.ban()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a banned agent ended without a word")
		}
	case <-time.After(wait):
		t.Fatal("a banned agent goes on")
	}
	if n := left(); n != 0 {
		t.Errorf("%d files are left", n)
	}
}
