package main

import (
	"context"
	"errors"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/identity"
	"github.com/plastron/plastron/internal/server"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (p *program) serverRunCommand() *cobra.Command {
	c := &cobra.Command{Use: "run", Short: "Run a server"}
	var file configFile
	cfg := server.Default()
	file.addFlags(c.Flags(), "conf/server/server.conf")
	set := serverFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := file.decode(c, &cfg); err != nil {
			return err
		}
		if err := set(&cfg.Server); err != nil {
			return err
		}
		return p.runServer(c.Context(), cfg, &file)
	}
	return c
}

// serverFlags adds the flags that stand for keys of the file; the function it
// returns writes those that were given over what the file said.
func serverFlags(flags *pflag.FlagSet) func(*server.Settings) error {
	var from server.Settings
	var trustDomain string
	flags.StringVar(&from.BindAddress, "bindAddress", "", "`ADDRESS` to listen on for agents")
	flags.IntVar(&from.BindPort, "serverPort", 0, "`PORT` to listen on for agents")
	flags.StringVar(&from.DataDir, "dataDir", "", "`DIR` of the store, the keys and the audit trail")
	flags.StringVar(&from.SocketPath, "socketPath", "", "`PATH` of the admin socket")
	flags.StringVar(&trustDomain, "trustDomain", "", "`NAME` of the trust domain")
	flags.StringVar(&from.LogFile, "logFile", "", "`FILE` to log to; otherwise standard error")
	flags.StringVar(&from.LogLevel, "logLevel", "", "`LEVEL` of the log: DEBUG, INFO, WARN or ERROR")
	flags.StringVar(&from.LogFormat, "logFormat", "", "`FORMAT` of the log: text or json")
	flags.BoolVar(&from.LogSourceLocation, "logSourceLocation", false, "log where in the source a message comes from")
	return func(to *server.Settings) error {
		var err error
		flags.Visit(func(f *pflag.Flag) {
			switch f.Name {
			case "bindAddress":
				to.BindAddress = from.BindAddress
			case "serverPort":
				to.BindPort = from.BindPort
			case "dataDir":
				to.DataDir = from.DataDir
			case "socketPath":
				to.SocketPath = from.SocketPath
			case "trustDomain":
				to.TrustDomain, err = trustDomainFlag(trustDomain)
			case "logFile":
				to.LogFile = from.LogFile
			case "logLevel":
				to.LogLevel = from.LogLevel
			case "logFormat":
				to.LogFormat = from.LogFormat
			case "logSourceLocation":
				to.LogSourceLocation = from.LogSourceLocation
			}
		})
		return err
	}
}

func trustDomainFlag(text string) (config.TrustDomain, error) {
	td, err := identity.ParseTrustDomain(text)
	if err != nil {
		return config.TrustDomain{}, about("-trustDomain", err)
	}
	return config.TrustDomain{TrustDomain: td}, nil
}

// runServer runs a server until ctx is done. Everything is checked before
// anything is opened.
func (p *program) runServer(ctx context.Context, cfg server.Config, file *configFile) error {
	logs := logSettings{cfg.Server.LogFile, cfg.Server.LogLevel, cfg.Server.LogFormat, cfg.Server.LogSourceLocation}
	_, err := logs.options()
	if err != nil {
		err = about("server", err)
	}
	if err := file.locate(errors.Join(err, cfg.Validate())); err != nil {
		return err
	}
	log, closer, err := logs.open(p.stderr)
	if err != nil {
		return err
	}
	defer closer.Close()
	s, err := server.New(cfg, log)
	if err != nil {
		return err
	}
	return s.Run(ctx)
}
