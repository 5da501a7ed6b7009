package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/doctor"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/server"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statusv1 "github.com/plastron/plastron/api/plastron/status/v1"
)

// examination is what doctor found of one server or agent.
type examination struct {
	Role     string           `json:"role"`
	Findings []doctor.Finding `json:"findings"`
}

func (p *program) doctorCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong with the server or agent on this host",
		Long: `Looks for what is wrong with the server or agent on this host, whether it runs or not,
and says of each check what was found and what to do. Nothing is changed. Run it as root
or as the user that runs the program.

With -config it examines what that file configures, with -socketPath what answers at that
admin socket. With neither it takes each of conf/server/server.conf, conf/agent/agent.conf
and the usual admin sockets that is there.

A running server is asked to read its whole store, which takes the longer the larger
that is. The exit status is 0 if all is well, 2 if there are warnings only, 1 if a check
fails or there is nothing to examine.`,
	}
	var path, socketPath string
	var expandEnv bool
	c.Flags().StringVar(&path, "config", "", "`FILE` with the configuration of a server or an agent")
	c.Flags().BoolVar(&expandEnv, "expandEnv", false, "replace $NAME and ${NAME} in the file by environment variables")
	c.Flags().StringVar(&socketPath, "socketPath", "", "`PATH` of the admin socket of a server or an agent")
	out := outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		found, err := p.examine(c, path, socketPath, expandEnv)
		if err != nil {
			return err
		}
		var all []doctor.Finding
		for _, one := range found {
			all = append(all, one.Findings...)
		}
		worst := doctor.Worst(all)
		if *out == asJSON {
			err = json.NewEncoder(p.stdout).Encode(map[string]any{"verdict": worst, "examined": found})
		} else {
			err = printExaminations(p.stdout, found)
		}
		switch {
		case err != nil:
			return err
		case worst == doctor.Fail:
			return exitStatus(exitFailed)
		case worst == doctor.Warn:
			return exitStatus(exitWarned)
		}
		return nil
	}
	return c
}

func printExaminations(w io.Writer, found []examination) error {
	for _, one := range found {
		fmt.Fprintf(w, "%s:\n", one.Role)
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, f := range one.Findings {
			fmt.Fprintf(table, "  %s\t%s\t%s\n", f.Verdict, f.Check, f.Found)
			if f.Fix != "" {
				fmt.Fprintf(table, "  \t\tFix: %s\n", f.Fix)
			}
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// examine finds out what there is to examine, and does it.
func (p *program) examine(c *cobra.Command, path, socketPath string, expandEnv bool) (found []examination, err error) {
	e := examiner{c: c, now: p.start, expandEnv: expandEnv}
	switch {
	case path != "":
		one, err := e.file(path, socketPath)
		return []examination{one}, err
	case socketPath != "":
		one, err := e.socket(socketPath)
		return []examination{one}, err
	}
	for _, place := range []struct{ config, socket string }{{"conf/server/server.conf", serverSocket}, {"conf/agent/agent.conf", adminSocket}} {
		var one examination
		if _, err = os.Stat(place.config); err == nil {
			one, err = e.file(place.config, "")
		} else if _, err = os.Stat(place.socket); err == nil {
			one, err = e.socket(place.socket)
		} else {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, one)
	}
	if len(found) == 0 {
		return nil, fault.New(fault.NotFound, "nothing_to_examine", "there is neither a server nor an agent at the usual places").
			Fix("name its configuration with -config, or its admin socket with -socketPath")
	}
	return found, nil
}

type examiner struct {
	c         *cobra.Command
	now       time.Time
	expandEnv bool
}

// file examines what a file configures.
func (e examiner) file(path, socketPath string) (examination, error) {
	src, err := config.ReadFile(path)
	if err == nil && e.expandEnv {
		src, err = config.Expand(path, src, os.LookupEnv)
	}
	var node config.Node
	if err == nil {
		node, err = config.Parse(path, src)
	}
	if err != nil {
		return examination{}, err
	}
	var blocks struct {
		Server       config.Node `hcl:"server"`
		Agent        config.Node `hcl:"agent"`
		Plugins      config.Node `hcl:"plugins"`
		Telemetry    config.Node `hcl:"telemetry"`
		HealthChecks config.Node `hcl:"health_checks"`
	}
	if err := node.Decode(&blocks); err != nil {
		return examination{}, err
	}
	switch {
	case blocks.Server.Present() && !blocks.Agent.Present():
		cfg := server.Default()
		if err := node.Decode(&cfg); err != nil {
			return examination{}, err
		}
		if socketPath == "" {
			socketPath = cfg.Server.SocketPath
		}
		return e.server(&cfg, socketPath), nil
	case blocks.Agent.Present() && !blocks.Server.Present():
		cfg := agent.Default()
		if err := node.Decode(&cfg); err != nil {
			return examination{}, err
		}
		if socketPath == "" {
			socketPath = cfg.AdminSocketPath()
		}
		return e.agent(&cfg, socketPath), nil
	}
	return examination{}, fault.New(fault.Invalid, "config_invalid", "%s has not exactly one of the blocks server and agent", path).
		Fix("name the file of a server or of an agent")
}

// socket examines what answers at an admin socket.
func (e examiner) socket(path string) (examination, error) {
	at := &socket{path: path, kind: "admin socket", absent: "start the server or agent, or name its configuration with -config", closed: runAsOwner}
	conn, peer, err := at.dial(e.c.Context())
	if err != nil {
		return examination{}, err
	}
	defer conn.Close()
	if _, err = statusv1.NewServerClient(conn).List(e.c.Context(), &statusv1.ListRequest{}); err == nil {
		return e.server(nil, path), nil
	}
	if status.Code(err) != codes.Unimplemented {
		return examination{}, peer.fault(err)
	}
	running, err := agentStatus(e.c, at)
	if err != nil {
		return examination{}, err
	}
	return examination{"agent", agent.Examine(e.c.Context(), agent.Subject{Running: running}, e.now)}, nil
}

func (e examiner) server(cfg *server.Config, socketPath string) examination {
	at := &socket{path: socketPath, kind: "server", absent: "start it if it should run; see its log for why it does not", closed: runAsOwner}
	s := server.Subject{Config: cfg}
	s.Running, s.Err = serverStatus(e.c, at, true)
	return examination{"server", server.Examine(e.c.Context(), s, e.now)}
}

func (e examiner) agent(cfg *agent.Config, socketPath string) examination {
	at := &socket{path: socketPath, kind: "agent's admin socket", absent: "start it if it should run; see its log for why it does not", closed: runAsOwner}
	s := agent.Subject{Config: cfg}
	s.Running, s.Err = agentStatus(e.c, at)
	return examination{"agent", agent.Examine(e.c.Context(), s, e.now)}
}
