package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// root returns the whole tree of commands.
func (p *program) root() *cobra.Command {
	root := group("plastron", "A runtime for SPIFFE identities: server, agent and tools",
		p.devCommand(),
		p.runCommand(),
		p.doctorCommand(),
		group("server", "Run and administer a server",
			p.serverRunCommand(),
			p.serverValidateCommand(),
			group("agent", "Agents that have joined",
				p.agentListCommand(), p.agentShowCommand(), p.agentCountCommand(), p.agentEvictCommand(), p.agentBanCommand(), p.agentUnbanCommand(), p.agentPurgeCommand()),
			group("entry", "Registrations: which process gets which identity",
				p.entryCreateCommand(), p.entryUpdateCommand(), p.entryShowCommand(), p.entryDeleteCommand(), p.entryCountCommand(), p.entryWhyCommand()),
			group("rule", "Rules: identities named after facts about the process",
				p.ruleCreateCommand(), p.ruleShowCommand(), p.ruleDeleteCommand()),
			group("token", "Join tokens for new agents", p.tokenGenerateCommand()),
			group("bundle", "Trust bundles, the server's own and those of other trust domains",
				p.bundleShowCommand(), p.bundleListCommand(), p.bundleCountCommand(), p.bundleSetCommand(), p.bundleDeleteCommand()),
			group("x509", "X.509-SVIDs without an entry", p.mintX509Command()),
			group("jwt", "JWT-SVIDs without an entry", p.mintJWTCommand()),
			group("authority", "The signing keys of all servers", p.authorityStatusCommand(), p.authorityRotateCommand()),
			group("localauthority", "The signing keys of the server that answers", p.localAuthorityGroup(localX509()), p.localAuthorityGroup(localJWT())),
			p.upstreamAuthorityGroup(),
			group("ttl", "How long identities live", p.ttlExplainCommand()),
			group("db", "The store behind the server", p.dbCheckCommand(), p.dbStatsCommand(), p.dbCompactCommand(), p.dbCopyCommand()),
			p.serverApplyCommand(),
			p.serverRevokeCommand(),
			p.serverPanicCommand(),
			p.loggerGroup(serverLogger()),
			p.serverOutageCommand(),
			p.serverStatusCommand(),
			p.serverListCommand(),
			p.serverHealthcheckCommand(),
		),
		group("agent", "Run an agent and use its Workload API",
			p.agentRunCommand(),
			p.agentValidateCommand(),
			group("api", "Use the Workload API as a workload does",
				p.fetchCommand(),
				group("validate", "Check a credential", p.validateJWTCommand()),
				p.watchCommand(),
			),
			p.loggerGroup(agentLogger()),
			p.agentStatusCommand(),
			p.agentWhyCommand(),
			p.agentHealthcheckCommand(),
		),
		p.versionCommand(),
	)
	root.SetIn(p.stdin)
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetFlagErrorFunc(badValue)
	root.SetHelpFunc(func(c *cobra.Command, _ []string) { help(p.stdout, c) })
	return root
}

// group returns a command that only holds others; alone it prints its help.
func group(name, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: name, Short: short, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(commands...)
	return c
}

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program",
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(p.stdout, "plastron %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// version is what the Go tool recorded at build time: the module's version, or
// the revision of the source.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	revision, modified := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			revision = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = "+changes"
		}
	}
	if revision == "" {
		return info.Main.Version
	}
	return revision + modified
}

// help prints what a command does and its flags, in the one-dash spelling.
func help(w io.Writer, c *cobra.Command) {
	text := c.Short + "."
	if c.Long != "" {
		text = strings.TrimSpace(c.Long)
	}
	fmt.Fprintf(w, "%s\n\nUsage:\n", text)
	if c.HasAvailableSubCommands() {
		fmt.Fprintf(w, "  %s COMMAND\n", c.CommandPath())
	}
	if !c.HasAvailableSubCommands() || c.HasAvailableLocalFlags() && len(flagsOf(c)) > 0 {
		line := c.CommandPath()
		if len(flagsOf(c)) > 0 {
			line += " [flags]"
		}
		if name := argument(c); name != "" {
			line += " " + name
		}
		if at := strings.Index(c.Use, "--"); at >= 0 {
			line += " " + strings.TrimPrefix(c.Use[at-1:], " ")
		}
		fmt.Fprintf(w, "  %s\n", line)
	}
	if c.HasAvailableSubCommands() {
		fmt.Fprint(w, "\nCommands:\n")
		for _, child := range c.Commands() {
			if child.IsAvailableCommand() && child.Name() != "help" {
				fmt.Fprintf(w, "  %-12s %s\n", child.Name(), child.Short)
			}
		}
	}
	if flags := flagsOf(c); len(flags) > 0 {
		fmt.Fprint(w, "\nFlags:\n")
		for _, f := range flags {
			name, usage := pflag.UnquoteUsage(f)
			if name != "" {
				name = " " + name
			}
			fmt.Fprintf(w, "  -%s%s\n        %s", f.Name, name, usage)
			if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "[]" && f.DefValue != "0s" {
				fmt.Fprintf(w, " (default %s)", f.DefValue)
			}
			fmt.Fprintln(w)
		}
	}
}

func flagsOf(c *cobra.Command) []*pflag.Flag {
	var flags []*pflag.Flag
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && f.Name != "help" {
			flags = append(flags, f)
		}
	})
	return flags
}
