package main

import (
	"context"
	"fmt"

	loggerv1 "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/logging"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
)

// logger is a role's service Logger. The two roles' differ in name only.
type logger struct {
	role   string
	socket func(*pflag.FlagSet) *socket
	get    func(context.Context, *grpc.ClientConn) (*spiretypes.Logger, error)
	set    func(context.Context, *grpc.ClientConn, logging.Level) (*spiretypes.Logger, error)
	reset  func(context.Context, *grpc.ClientConn) (*spiretypes.Logger, error)
}

func serverLogger() logger {
	return logger{
		role: "server", socket: serverSocketFlags,
		get: func(ctx context.Context, conn *grpc.ClientConn) (*spiretypes.Logger, error) {
			return loggerv1.NewLoggerClient(conn).GetLogger(ctx, &loggerv1.GetLoggerRequest{})
		},
		set: func(ctx context.Context, conn *grpc.ClientConn, level logging.Level) (*spiretypes.Logger, error) {
			return loggerv1.NewLoggerClient(conn).SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: spiretypes.LogLevel(level)})
		},
		reset: func(ctx context.Context, conn *grpc.ClientConn) (*spiretypes.Logger, error) {
			return loggerv1.NewLoggerClient(conn).ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
		},
	}
}

// loggerGroup is the commands get, set and reset.
func (p *program) loggerGroup(l logger) *cobra.Command {
	get := p.loggerCommand(l, "get", "Show from which level on the "+l.role+" logs", l.get)
	reset := p.loggerCommand(l, "reset", "Return to the level that is configured", l.reset)
	var level logging.Level
	set := p.loggerCommand(l, "set", "Change the level until it is changed again or the "+l.role+" ends",
		func(ctx context.Context, conn *grpc.ClientConn) (*spiretypes.Logger, error) {
			return l.set(ctx, conn, level)
		})
	name := set.Flags().String("level", "", "`LEVEL`: panic, fatal, error, warn, info, debug or trace")
	call := set.RunE
	set.RunE = func(c *cobra.Command, args []string) (err error) {
		if *name == "" {
			return usage(c, "-level is required")
		}
		if level, err = logging.ParseLevel(*name); err != nil {
			return usage(c, "the value %q of -level is none of panic, fatal, error, warn, info, debug, trace", *name)
		}
		return call(c, args)
	}
	return group("logger", "The level of the "+l.role+"'s log", get, set, reset)
}

func (p *program) loggerCommand(l logger, name, short string, call func(context.Context, *grpc.ClientConn) (*spiretypes.Logger, error)) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short}
	at, out := l.socket(c.Flags()), outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		conn, peer, err := at.dial(c.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		state, err := call(c.Context(), conn)
		if err != nil {
			return peer.fault(err)
		}
		if *out == asJSON {
			return printJSON(p.stdout, state)
		}
		_, err = fmt.Fprintf(p.stdout, "Logger Level : %s\nLaunch Level : %s\n\n",
			logging.Level(state.GetCurrentLevel()), logging.Level(state.GetLaunchLevel()))
		return err
	}
	return c
}
