package main

import (
	"cmp"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/logging"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/grpclog"
)

// configFile is the file of run and validate, with the flags that stand for some of
// its keys. A flag that is given wins over the file, whatever its value.
type configFile struct {
	command   *cobra.Command
	path      string
	expandEnv bool
	overrides []func() error
	node      config.Node     // what the file holds; absent without a file
	own       map[string]bool // faults that are there without the flags
}

func newConfigFile(c *cobra.Command, path string) *configFile {
	f := &configFile{command: c}
	c.Flags().StringVar(&f.path, "config", path, "`FILE` with the configuration; the default may be absent")
	c.Flags().BoolVar(&f.expandEnv, "expandEnv", false, "replace $NAME and ${NAME} in the file by environment variables")
	return f
}

// override adds what a flag does if it is given.
func (f *configFile) override(name string, apply func() error) {
	f.overrides = append(f.overrides, func() error {
		if !f.command.Flags().Changed(name) {
			return nil
		}
		return apply()
	})
}

func (f *configFile) text(to *string, name, usage string) {
	from := f.command.Flags().String(name, "", usage)
	f.override(name, func() error { *to = *from; return nil })
}

func (f *configFile) number(to *int, name, usage string) {
	from := f.command.Flags().Int(name, 0, usage)
	f.override(name, func() error { *to = *from; return nil })
}

func (f *configFile) flag(to *bool, name, usage string) {
	from := f.command.Flags().Bool(name, false, usage)
	f.override(name, func() error { *to = *from; return nil })
}

func (f *configFile) value(to encoding.TextUnmarshaler, name, usage string) {
	from := f.command.Flags().String(name, "", usage)
	f.override(name, func() error {
		if err := to.UnmarshalText([]byte(*from)); err != nil {
			return about("-"+name, err)
		}
		return nil
	})
}

func (f *configFile) logFlags(file, level, form *string, source *bool) {
	f.text(file, "logFile", "`FILE` to log to; otherwise standard error")
	f.text(level, "logLevel", "`LEVEL` of the log: PANIC, FATAL, ERROR, WARN, INFO, DEBUG or TRACE")
	f.text(form, "logFormat", "`FORMAT` of the log: text or json")
	f.flag(source, "logSourceLocation", "log where in the source a message comes from")
}

// load reads the file into dst, applies the flags and judges the result. All that
// is wrong comes back at once: what the role finds counts even when the file has
// faults of its own, unless there is no telling what the file says. A file that was
// not asked for may be absent if the flags say enough. What validate finds before
// the flags is the file's fault.
func (f *configFile) load(dst any, validate func() error) error {
	err := f.read(dst)
	if err != nil && !f.node.Present() {
		return err
	}
	faults := []error{err}
	f.own = map[string]bool{}
	for _, one := range flatten(validate()) {
		f.own[one.Error()] = true
	}
	for _, apply := range f.overrides {
		faults = append(faults, apply())
	}
	found := validate()
	missing := slices.ContainsFunc(flatten(found), func(one error) bool { return f.own[one.Error()] }) // what the flags have not said
	if missing && f.absent() {
		path, _ := filepath.Abs(f.path) // on failure "", and the directory is gone
		faults[0] = fault.New(fault.Invalid, "config_absent", "no configuration file is named, and there is none at %s", cmp.Or(path, f.path)).
			Fix("name one with -config")
	}
	return errors.Join(append(faults, f.locate(found))...)
}

// absent reports whether there is no file, and none was asked for.
func (f *configFile) absent() bool {
	_, err := os.Stat(f.path)
	return errors.Is(err, fs.ErrNotExist) && !f.command.Flags().Changed("config")
}

// flagKey is the key of a role's block that a flag of run stands for.
func flagKey(role, flag string) string {
	switch {
	case flag == "serverPort" && role == "server":
		return "server.bind_port"
	case flag == "trustBundle":
		return "agent.trust_bundle_path"
	case flag == "trustBundleUrl":
		return "agent.trust_bundle_url"
	}
	var key strings.Builder
	for _, c := range flag {
		if 'A' <= c && c <= 'Z' {
			key.WriteByte('_')
			c += 'a' - 'A'
		}
		key.WriteRune(c)
	}
	return role + "." + key.String()
}

// overruled says which keys of the file a flag stands in place of (F30). Values
// are not shown: a token may be one.
func (f *configFile) overruled(role string) (notes []string) {
	f.command.Flags().Visit(func(flag *pflag.Flag) {
		if key := flagKey(role, flag.Name); f.node.Has(key) {
			notes = append(notes, fmt.Sprintf("-%s stands in place of %s:%d: %s", flag.Name, f.path, f.node.LineOf(key), key))
		}
	})
	return notes
}

// validateCommand is run without the running: the same flags, the same judgement.
func (p *program) validateCommand(role string, load func(*cobra.Command) (file *configFile, check func() error, warnings func() []string)) *cobra.Command {
	c := &cobra.Command{
		Use:   "validate",
		Short: "Check the " + role + "'s configuration without running it; all faults are told at once",
		Long: "Checks the " + role + `'s configuration without running it, and tells all faults at once. Of what
works but may surprise, and of files that cannot be used on this machine, it warns;
that leaves the exit status at 0.`,
	}
	out := outputFlag(c.Flags())
	file, check, warn := load(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		err := check()
		notes := file.overruled(role)
		var warnings []string
		if err == nil {
			warnings = warn()
		}
		if *out == pretty {
			for _, text := range warnings {
				fmt.Fprintf(p.stderr, "Warning: %s\n", text)
			}
			for _, note := range notes {
				fmt.Fprintf(p.stderr, "Note: %s\n", note)
			}
			if err == nil {
				_, err = fmt.Fprintf(p.stdout, "The %s's configuration is valid.\n", role)
			}
			return err
		}
		type oneFault struct {
			Text string `json:"fault"`
			Fix  string `json:"fix,omitempty"`
		}
		all := []oneFault{}
		for _, one := range flatten(err) {
			text, fix := fault.Words(one)
			all = append(all, oneFault{text, fix})
		}
		reply := map[string]any{"valid": err == nil, "faults": all}
		if len(notes) > 0 {
			reply["notes"] = notes
		}
		if len(warnings) > 0 {
			reply["warnings"] = warnings
		}
		if err := json.NewEncoder(p.stdout).Encode(reply); err != nil {
			return err
		}
		if err != nil {
			return exitStatus(exitFailed)
		}
		return nil
	}
	return c
}

func (f *configFile) read(dst any) error {
	if f.absent() {
		return nil
	}
	return f.readFile(dst)
}

// readFile is read for a file that must be there.
func (f *configFile) readFile(dst any) error {
	src, err := config.ReadFile(f.path)
	if err != nil {
		return err
	}
	if f.expandEnv {
		if src, err = config.Expand(f.path, src, os.LookupEnv); err != nil {
			return err
		}
	}
	node, err := config.Parse(f.path, src)
	if err != nil {
		return err
	}
	f.node = node
	return node.Decode(dst)
}

// locate adds file and line to the faults that a role found in what was decoded,
// as far as the file is to blame and not a flag.
// A role's fault begins with the path of the key: "server.bind_port: …" or
// "server: bind_port: …".
func (f *configFile) locate(err error) error {
	if err == nil || !f.node.Present() {
		return err
	}
	var found []error
	for _, one := range flatten(err) {
		block, rest, _ := strings.Cut(one.Error(), ": ")
		path := strings.ReplaceAll(strings.ReplaceAll(block, "\"", ""), " ", ".") // plugins.KeyManager "disk": …
		if key, _, ok := strings.Cut(rest, ": "); ok && !strings.Contains(key, " ") {
			if strings.HasPrefix(path, "plugins.") {
				path += ".plugin_data"
			}
			path += "." + key
		}
		if f.own[one.Error()] && !strings.HasPrefix(one.Error(), f.path+":") {
			one = fmt.Errorf("%s:%d: %w", f.path, f.node.LineOf(path), one)
		}
		found = append(found, one)
	}
	return errors.Join(found...)
}

// blame is locate for a fault that shows only when a key is used: it is the file's
// unless the flag that stands for the key was given.
func (f *configFile) blame(flag string, err error) error {
	if err == nil {
		return nil
	}
	for _, one := range flatten(err) {
		f.own[one.Error()] = !f.command.Flags().Changed(flag)
	}
	return f.locate(err)
}

// checkLog judges the settings of a role's log without opening anything.
func checkLog(role string, s logging.Settings) error {
	var faults []error
	for _, one := range flatten(s.Validate()) {
		faults = append(faults, about(role, one))
	}
	return errors.Join(faults...)
}

// openLog makes the log of a role that is the whole process: what libraries have to
// say goes there too, or nowhere, so that each line is one event of ours; and its
// file is opened anew on SIGUSR2. SIGUSR1 changes nothing. It is called last, since it may make a file.
func (p *program) openLog(s logging.Settings) (*slog.Logger, func(), error) {
	log, err := s.Open(p.stderr)
	if err != nil {
		return nil, nil, err
	}
	slog.SetDefault(log.Logger)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	stop := onSignals(func() {
		if err := log.Reopen(); err != nil {
			log.Error("log file not reopened", "err", err)
		} else if s.File != "" {
			log.Info("log file reopened")
		}
	}, func() { // F27: SPIRE's tools send it; what runs goes on as it is
		log.Warn("configuration not read again, it is read at the start only")
	})
	return log.Logger, func() {
		stop()
		log.Close() // nobody is left to be told
	}, nil
}
