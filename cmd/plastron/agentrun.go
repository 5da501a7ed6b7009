package main

import (
	"context"
	"errors"

	"github.com/plastron/plastron/internal/agent"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (p *program) agentRunCommand() *cobra.Command {
	c := &cobra.Command{Use: "run", Short: "Run an agent"}
	var file configFile
	cfg := agent.Default()
	file.addFlags(c.Flags(), "conf/agent/agent.conf")
	set := agentFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := file.decode(c, &cfg); err != nil {
			return err
		}
		if err := set(&cfg.Agent); err != nil {
			return err
		}
		return p.runAgent(c.Context(), cfg, &file)
	}
	return c
}

// agentFlags adds the flags that stand for keys of the file; the function it
// returns writes those that were given over what the file said.
func agentFlags(flags *pflag.FlagSet) func(*agent.Settings) error {
	var from agent.Settings
	var trustDomain string
	flags.StringVar(&from.ServerAddress, "serverAddress", "", "`HOST` of the server")
	flags.IntVar(&from.ServerPort, "serverPort", 0, "`PORT` of the server")
	flags.StringVar(&from.DataDir, "dataDir", "", "`DIR` of the agent's own key, certificate and bundle")
	flags.StringVar(&from.SocketPath, "socketPath", "", "`PATH` of the Workload API socket")
	flags.StringVar(&trustDomain, "trustDomain", "", "`NAME` of the trust domain")
	flags.StringVar(&from.JoinToken, "joinToken", "", "`TOKEN` with which the agent joins; others can read it in the list of processes")
	flags.StringVar(&from.JoinTokenFile, "joinTokenFile", "", "`FILE` that holds the token with which the agent joins")
	flags.StringVar(&from.TrustBundlePath, "trustBundle", "", "`FILE` with the bundle by which the server is recognised at first")
	flags.StringVar(&from.TrustBundleFormat, "trustBundleFormat", "", "`FORM` of that file: pem or spiffe")
	flags.BoolVar(&from.InsecureBootstrap, "insecureBootstrap", false, "trust whoever answers at the server's address at first; for trying out only")
	flags.BoolVar(&from.AllowUnauthenticatedVerifiers, "allowUnauthenticatedVerifiers", false, "give bundles to processes that have no identity")
	flags.StringVar(&from.LogFile, "logFile", "", "`FILE` to log to; otherwise standard error")
	flags.StringVar(&from.LogLevel, "logLevel", "", "`LEVEL` of the log: DEBUG, INFO, WARN or ERROR")
	flags.StringVar(&from.LogFormat, "logFormat", "", "`FORMAT` of the log: text or json")
	flags.BoolVar(&from.LogSourceLocation, "logSourceLocation", false, "log where in the source a message comes from")
	return func(to *agent.Settings) error {
		var err error
		flags.Visit(func(f *pflag.Flag) {
			switch f.Name {
			case "serverAddress":
				to.ServerAddress = from.ServerAddress
			case "serverPort":
				to.ServerPort = from.ServerPort
			case "dataDir":
				to.DataDir = from.DataDir
			case "socketPath":
				to.SocketPath = from.SocketPath
			case "trustDomain":
				to.TrustDomain, err = trustDomainFlag(trustDomain)
			case "joinToken":
				to.JoinToken, to.JoinTokenFile = from.JoinToken, ""
			case "joinTokenFile":
				to.JoinTokenFile, to.JoinToken = from.JoinTokenFile, ""
			case "trustBundle":
				to.TrustBundlePath = from.TrustBundlePath
			case "trustBundleFormat":
				to.TrustBundleFormat = from.TrustBundleFormat
			case "insecureBootstrap":
				to.InsecureBootstrap = from.InsecureBootstrap
			case "allowUnauthenticatedVerifiers":
				to.AllowUnauthenticatedVerifiers = from.AllowUnauthenticatedVerifiers
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
		if flags.Changed("joinToken") && flags.Changed("joinTokenFile") {
			return errors.New("-joinToken and -joinTokenFile exclude each other")
		}
		return err
	}
}

// runAgent runs an agent until ctx is done. Everything is checked before
// anything is opened.
func (p *program) runAgent(ctx context.Context, cfg agent.Config, file *configFile) error {
	logs := logSettings{cfg.Agent.LogFile, cfg.Agent.LogLevel, cfg.Agent.LogFormat, cfg.Agent.LogSourceLocation}
	_, err := logs.options()
	if err != nil {
		err = about("agent", err)
	}
	if err := file.locate(errors.Join(err, cfg.Validate())); err != nil {
		return err
	}
	log, closer, err := logs.open(p.stderr)
	if err != nil {
		return err
	}
	defer closer.Close()
	a, err := agent.New(cfg, log)
	if err != nil {
		return file.locate(err)
	}
	return a.Run(ctx)
}
