package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// configFile is the file of server run or agent run.
type configFile struct {
	path      string
	expandEnv bool
	node      config.Node
	read      bool // there is a file
}

func (f *configFile) addFlags(flags *pflag.FlagSet, path string) {
	flags.StringVar(&f.path, "config", path, "`FILE` with the configuration; the default may be absent")
	flags.BoolVar(&f.expandEnv, "expandEnv", false, "replace $NAME and ${NAME} in the file by environment variables")
}

// decode reads the file into dst. A file that was not asked for may be absent.
func (f *configFile) decode(c *cobra.Command, dst any) error {
	if _, err := os.Stat(f.path); errors.Is(err, fs.ErrNotExist) && !c.Flags().Changed("config") {
		return nil
	}
	src, err := config.ReadFile(f.path)
	if err != nil {
		return err
	}
	if f.expandEnv {
		if src, err = config.Expand(f.path, src, os.LookupEnv); err != nil {
			return err
		}
	}
	if f.node, err = config.Parse(f.path, src); err != nil {
		return err
	}
	f.read = true
	return f.node.Decode(dst)
}

// locate adds file and line to the faults that a role found in what was decoded.
// A role's fault begins with the path of the key: "server.bind_port: …" or
// "server: bind_port: …".
func (f *configFile) locate(err error) error {
	if err == nil || !f.read {
		return err
	}
	var found []error
	for _, one := range flatten(err) {
		block, rest, _ := strings.Cut(one.Error(), ": ")
		path := strings.ReplaceAll(strings.ReplaceAll(block, "\"", ""), " ", ".") // plugins.KeyManager "disk": …
		if key, _, ok := strings.Cut(rest, ": "); ok && !strings.Contains(key, " ") {
			path += "." + key
		}
		if !strings.HasPrefix(one.Error(), f.path) {
			one = fmt.Errorf("%s:%d: %w", f.path, f.node.LineOf(path), one)
		}
		found = append(found, one)
	}
	return errors.Join(found...)
}

// logSettings are the keys of a role's log, wherever the role keeps them.
type logSettings struct {
	file, level, form string
	source            bool
}

// open makes the log that the settings describe. It is called last, since it
// may make a file.
func (s logSettings) open(stderr io.Writer) (*slog.Logger, io.Closer, error) {
	out, closer := stderr, io.NopCloser(nil)
	options, err := s.options()
	if err != nil {
		return nil, nil, err
	}
	if s.file != "" {
		file, err := os.OpenFile(s.file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil { // F25
			return nil, nil, fault.New(fault.Invalid, "log_file", "log_file: %v", err).Fix("name a file that this user may write to")
		}
		out, closer = file, file
	}
	if s.form == "json" {
		return slog.New(slog.NewJSONHandler(out, options)), closer, nil
	}
	return slog.New(slog.NewTextHandler(out, options)), closer, nil
}

// options checks the settings without opening anything.
func (s logSettings) options() (*slog.HandlerOptions, error) {
	levels := map[string]slog.Level{"DEBUG": slog.LevelDebug, "INFO": slog.LevelInfo, "WARN": slog.LevelWarn, "WARNING": slog.LevelWarn, "ERROR": slog.LevelError}
	level, ok := levels[strings.ToUpper(s.level)]
	if !ok && s.level != "" {
		return nil, fault.New(fault.Invalid, "log_level", "log_level: %q is none of DEBUG, INFO, WARN, ERROR", s.level)
	}
	if s.form != "" && s.form != "text" && s.form != "json" {
		return nil, fault.New(fault.Invalid, "log_format", "log_format: %q is neither text nor json", s.form)
	}
	return &slog.HandlerOptions{Level: level, AddSource: s.source}, nil
}
