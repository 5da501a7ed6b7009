package main

import (
	"errors"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// normalize finds the command that args name and rewrites its flags so that
// -flag and --flag mean the same, as SPIRE's scripts write them. It knows which
// flags take a value, so a value may begin with a dash. What follows a bare --
// is left alone. Unknown commands and flags are refused here, with the nearest
// name that exists, and a command without the one argument that it takes.
func normalize(root *cobra.Command, args []string) ([]string, error) {
	if len(args) > 0 && strings.HasPrefix(args[0], cobra.ShellCompRequestCmd) {
		return args, nil // the shell's own words, complete or not
	}
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	command, rest := root, args
	for len(rest) > 0 {
		next := subcommand(command, rest[0])
		if next == nil {
			break
		}
		command, rest = next, rest[1:]
	}
	if command.Name() == "help" {
		return args, nil
	}
	out := append([]string{}, args[:len(args)-len(rest)]...)
	command.InitDefaultHelpFlag()
	given, asks := false, false
	for len(rest) > 0 {
		arg := rest[0]
		rest = rest[1:]
		if arg == "--" {
			return append(append(out, arg), rest...), nil
		}
		if len(arg) < 2 || arg[0] != '-' {
			if argument(command) == "" || given {
				return nil, unexpected(command, arg)
			}
			out, given = append(out, arg), true
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		if name == "h" {
			name = "help"
		}
		asks = asks || name == "help"
		flag := lookup(command, name)
		if flag == nil {
			return nil, unknownFlag(command, name)
		}
		if !hasValue && flag.NoOptDefVal == "" {
			if len(rest) == 0 {
				return nil, usage(command, "the flag -%s needs a value", name)
			}
			value, hasValue, rest = rest[0], true, rest[1:]
		}
		arg = "--" + name
		if hasValue {
			arg += "=" + value
		}
		out = append(out, arg)
	}
	if name := argument(command); name != "" && !given && !asks {
		return nil, usage(command, "%s needs %s", command.CommandPath(), name)
	}
	return out, nil
}

func subcommand(parent *cobra.Command, name string) *cobra.Command {
	for _, child := range parent.Commands() {
		if child.Name() == name {
			return child
		}
	}
	return nil
}

func lookup(command *cobra.Command, name string) *pflag.Flag {
	if flag := command.Flags().Lookup(name); flag != nil {
		return flag
	}
	return command.InheritedFlags().Lookup(name)
}

// unexpected refuses an argument that is neither a flag nor a command.
func unexpected(command *cobra.Command, arg string) error {
	if command.HasAvailableSubCommands() {
		var names []string
		for _, child := range command.Commands() {
			if child.IsAvailableCommand() {
				names = append(names, child.Name())
			}
		}
		err := fault.New(fault.Invalid, "usage", "%q is not a command of %s", arg, command.CommandPath())
		if nearest := config.Nearest(arg, names); nearest != "" {
			return err.Fix("did you mean %q?", nearest)
		}
		if len(names) == 1 {
			return err.Fix("there is %s", names[0])
		}
		return err.Fix("there are %s", strings.Join(names, ", "))
	}
	err := fault.New(fault.Invalid, "usage", "%s does not take the argument %q", command.CommandPath(), arg)
	if takesCommand(command) {
		return err.Fix("put -- before the command to run: %s -- %s", command.CommandPath(), arg)
	}
	return err.Fix("a flag begins with a dash; see %s -h", command.CommandPath())
}

func unknownFlag(command *cobra.Command, name string) error {
	var names []string
	command.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	err := fault.New(fault.Invalid, "usage", "%s has no flag -%s", command.CommandPath(), name)
	if nearest := config.Nearest(name, names); nearest != "" {
		return err.Fix("did you mean -%s?", nearest)
	}
	return err.Fix("see %s -h", command.CommandPath())
}

// badValue rewrites what the flag library says about a value that it cannot read.
func badValue(command *cobra.Command, err error) error {
	invalid, ok := errors.AsType[*pflag.InvalidValueError](err)
	if !ok {
		return usage(command, "%v", err)
	}
	flag := invalid.GetFlag()
	wants := map[string]string{
		"int": "a whole number", "int32": "a whole number", "int64": "a whole number",
		"duration": "a duration such as 5s", "bool": "true or false",
	}[flag.Value.Type()]
	if wants == "" {
		return usage(command, "the value %q of -%s is wrong: %v", invalid.GetValue(), flag.Name, errors.Unwrap(invalid))
	}
	return usage(command, "the value %q of -%s is not %s", invalid.GetValue(), flag.Name, wants)
}

// usage returns a fault of the command line.
func usage(command *cobra.Command, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "usage", format, args...).Fix("see %s -h", command.CommandPath())
}

// argument returns the name of the one argument that a command takes, if it does.
func argument(command *cobra.Command) string {
	if words := strings.Fields(command.Use); len(words) == 2 {
		return words[1]
	}
	return ""
}

// takesCommand reports whether a command line goes on after a bare --.
func takesCommand(command *cobra.Command) bool { return strings.Contains(command.Use, "--") }
