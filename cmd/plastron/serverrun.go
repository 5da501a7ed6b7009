package main

import (
	"errors"
	"log/slog"

	"github.com/plastron/plastron/internal/logging"
	"github.com/plastron/plastron/internal/server"
	"github.com/spf13/cobra"
)

func (p *program) serverRunCommand() *cobra.Command {
	c := &cobra.Command{Use: "run", Short: "Run a server"}
	cfg, file, load := serverConfig(c)
	set := &cfg.Server
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := load(); err != nil {
			return err
		}
		if err := harden(); err != nil {
			return err
		}
		log, closeLog, err := p.openLog(logging.Settings{File: set.LogFile, Level: set.LogLevel, Format: set.LogFormat, Source: set.LogSourceLocation})
		if err != nil {
			return file.blame("logFile", about("server", err))
		}
		defer closeLog()
		s, err := server.New(*cfg, log)
		if err != nil {
			return err
		}
		return withCauses(s.Run(c.Context()))
	}
	return c
}

func (p *program) serverValidateCommand() *cobra.Command {
	return p.validateCommand("server", func(c *cobra.Command) (*configFile, func() error, func() []string) {
		cfg, file, load := serverConfig(c)
		return file, load, func() []string { return cfg.Warnings(c.Context()) }
	})
}

// serverConfig adds the flags of a server's configuration to a command. After load
// has found no fault, the configuration is what file and flags say.
func serverConfig(c *cobra.Command) (*server.Config, *configFile, func() error) {
	cfg := new(server.Config)
	*cfg = server.Default()
	set := &cfg.Server
	file := newConfigFile(c, "conf/server/server.conf")
	file.text(&set.BindAddress, "bindAddress", "`ADDRESS` to listen on for agents")
	file.number(&set.BindPort, "serverPort", "`PORT` to listen on for agents")
	file.text(&set.DataDir, "dataDir", "`DIR` of the store, the keys and the audit trail")
	file.text(&set.SocketPath, "socketPath", "`PATH` of the admin socket")
	file.value(&set.TrustDomain, "trustDomain", "`NAME` of the trust domain")
	file.logFlags(&set.LogFile, &set.LogLevel, &set.LogFormat, &set.LogSourceLocation)
	validate := func() error {
		_, err := server.New(*cfg, slog.New(slog.DiscardHandler)) // checks all and opens nothing
		return errors.Join(checkLog("server", logging.Settings{Level: set.LogLevel, Format: set.LogFormat}), err)
	}
	return cfg, file, func() error { return file.load(cfg, validate) }
}
