package agent_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/fault"
)

// The admin socket lies beside the public one's directory or in the data
// directory, and is for the agent's user only. A default that cannot be made does
// not stop the agent; one that was asked for does.
func TestAdminSocket(t *testing.T) {
	d := newDomain(t)
	base := shortDir(t)
	inTheWay := filepath.Join(base, "taken")
	if err := os.WriteFile(inTheWay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		public, admin string // as configured
		want          string // where it is then; empty: nowhere
		reason        string
	}{
		"beside public":           {public: filepath.Join(base, "1", "public", "api.sock"), want: filepath.Join(base, "1", "private", "admin.sock")},
		"in data_dir":             {public: filepath.Join(base, "2", "api.sock"), want: "admin.sock"},
		"asked for":               {public: filepath.Join(base, "3", "public", "api.sock"), admin: filepath.Join(base, "3", "own", "a"), want: filepath.Join(base, "3", "own", "a")},
		"not possible":            {public: filepath.Join(inTheWay, "..", "4", "public", "api.sock")},
		"asked for, not possible": {public: filepath.Join(base, "5", "public", "api.sock"), admin: inTheWay, reason: "socket_path_taken"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := d.agentConfig()
			cfg.Agent.SocketPath, cfg.Agent.AdminSocketPath = c.public, c.admin
			if name == "not possible" {
				if err := os.MkdirAll(filepath.Join(base, "4"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(base, "4", "private"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if c.reason != "" {
				a, err := agent.New(cfg, logger(t, "agent"))
				if err != nil {
					t.Fatal(err)
				}
				if err := a.Run(t.Context()); fault.ReasonOf(err) != c.reason {
					t.Errorf("Run() = %v, want %s", err, c.reason)
				}
				return
			}
			_, stop := d.agent(cfg)
			defer stop()
			want := c.want
			if want == "admin.sock" {
				want = filepath.Join(cfg.Agent.DataDir, want)
			}
			if want == "" {
				return // it runs
			}
			if info, err := os.Stat(want); err != nil || info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("%s: %v, %v", want, info, err)
			}
			stop()
			if _, err := os.Lstat(want); !os.IsNotExist(err) {
				t.Errorf("after the agent's end: %v", err)
			}
		})
	}
}
