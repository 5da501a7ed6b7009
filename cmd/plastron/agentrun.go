package main

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/plastron/plastron/internal/agent"
	"github.com/plastron/plastron/internal/logging"
	"github.com/plastron/plastron/internal/ticket"
	"github.com/spf13/cobra"
)

func (p *program) agentRunCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "run",
		Short: "Run an agent",
		Long: `Runs an agent until it is told to stop. With -ticket it needs no file and no other
flag; what 'plastron server token generate' prints is the whole command. The ticket
stands for the trust domain, the server's address, the roots by which the server is
recognised and the join token, in place of what the file says of them; flags win
over it.`,
	}
	cfg, file, load := agentConfig(c)
	set := &cfg.Agent
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := load(); err != nil {
			return err
		}
		if err := harden(); err != nil {
			return err
		}
		log, closeLog, err := p.openLog(logging.Settings{File: set.LogFile, Level: set.LogLevel, Format: set.LogFormat, Source: set.LogSourceLocation})
		if err != nil {
			return file.blame("logFile", about("agent", err))
		}
		defer closeLog()
		a, err := agent.New(*cfg, log)
		if err != nil {
			return err
		}
		go func() {
			select {
			case <-a.Ready(): // what is read only at the start has been read
				a.GiveUpRights()
			case <-c.Context().Done():
			}
		}()
		return withCauses(a.Run(c.Context()))
	}
	return c
}

func (p *program) agentValidateCommand() *cobra.Command {
	return p.validateCommand("agent", func(c *cobra.Command) (*configFile, func() error, func() []string) {
		cfg, file, load := agentConfig(c)
		return file, load, cfg.Warnings
	})
}

// agentConfig adds the flags of an agent's configuration to a command. After load
// has found no fault, the configuration is what file and flags say.
func agentConfig(c *cobra.Command) (*agent.Config, *configFile, func() error) {
	cfg := new(agent.Config)
	*cfg = agent.Default()
	set := &cfg.Agent
	file := newConfigFile(c, "conf/agent/agent.conf")
	ticketFault := ticketFlags(file, set)
	file.text(&set.ServerAddress, "serverAddress", "`HOST` of the server")
	file.number(&set.ServerPort, "serverPort", "`PORT` of the server")
	file.text(&set.DataDir, "dataDir", "`DIR` of the agent's own key, certificate and bundle")
	file.text(&set.SocketPath, "socketPath", "`PATH` of the Workload API socket")
	file.value(&set.TrustDomain, "trustDomain", "`NAME` of the trust domain")
	file.override("joinToken", func() error { set.JoinTokenFile = ""; return nil })
	file.override("joinTokenFile", func() error { set.JoinToken = ""; return nil })
	file.text(&set.JoinToken, "joinToken", "`TOKEN` with which the agent joins; others can read it in the list of processes")
	file.text(&set.JoinTokenFile, "joinTokenFile", "`FILE` that holds the token with which the agent joins")
	file.text(&set.TrustBundlePath, "trustBundle", "`FILE` with the bundle by which the server is recognised at first")
	file.text(&set.TrustBundleURL, "trustBundleUrl", "`URL` of that bundle, instead of a file")
	file.text(&set.TrustBundleFormat, "trustBundleFormat", "`FORM` of that bundle: pem or spiffe")
	file.text(&set.RebootstrapMode, "rebootstrapMode", "`MODE` in which the bundle is asked for again later: auto, never or always")
	file.value(&set.RebootstrapDelay, "rebootstrapDelay", "`TIME` that an agent whose own SVID is fresh waits before it asks for the bundle again")
	file.flag(&set.InsecureBootstrap, "insecureBootstrap", "trust whoever answers at the server's address at first; for trying out only")
	file.flag(&set.DisableSDSAPI, "disableSDSAPI", "keep Envoy's secret discovery away from the Workload API socket")
	file.flag(&set.AllowUnauthenticatedVerifiers, "allowUnauthenticatedVerifiers", "give bundles to processes that have no identity")
	file.logFlags(&set.LogFile, &set.LogLevel, &set.LogFormat, &set.LogSourceLocation)
	validate := func() error {
		if *ticketFault != nil { // without the ticket everything would be missing
			return *ticketFault
		}
		_, err := agent.New(*cfg, slog.New(slog.DiscardHandler)) // checks all and opens nothing
		return errors.Join(checkLog("agent", logging.Settings{Level: set.LogLevel, Format: set.LogFormat}), err)
	}
	return cfg, file, func() error { return file.load(cfg, validate) }
}

// ticketFlags come before the other flags: a ticket takes the place of what the
// file says of the same things, not of what the other flags say. What is wrong
// with the flags is where it points, once they are applied.
func ticketFlags(file *configFile, set *agent.Settings) *error {
	flags, found := file.command.Flags(), new(error)
	text := flags.String("ticket", "", "`TICKET` with which the agent joins; others can read it in the list of processes, but it is good only once")
	path := flags.String("ticketFile", "", "`FILE` that holds the ticket with which the agent joins")
	join := func(name, text string) {
		if _, err := ticket.Parse(text); err != nil {
			*found = about(name, err)
			return
		}
		set.Ticket = text
		set.ServerAddress, set.ServerPort, set.JoinToken, set.JoinTokenFile = "", 0, "", ""
		set.TrustBundlePath, set.TrustBundleHash, set.InsecureBootstrap = "", "", false
	}
	file.override("ticket", func() error { join("-ticket", *text); return nil })
	file.override("ticketFile", func() error {
		text, err := readTicket(*path)
		switch {
		case flags.Changed("ticket"):
			*found = usage(file.command, "-ticket and -ticketFile exclude each other")
		case err != nil:
			*found = about("-ticketFile", err)
		default:
			join("-ticketFile", text)
		}
		return nil
	})
	return found
}

// readTicket reads a file that holds a ticket. One line end is taken off it and
// nothing else.
func readTicket(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, ticket.MaxText+3)) // with a line end and one byte too many
	return strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r"), err
}
