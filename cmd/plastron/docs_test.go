package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

// generated compares the part of a document below the mark with what the program
// says of itself, or writes it anew with -update.
func generated(t *testing.T, name, want string) {
	t.Helper()
	const mark = "<!-- what follows is written by go test ./cmd/plastron -update -->\n"
	path := filepath.Join("..", "..", "docs", name)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, got, ok := strings.Cut(string(text), mark)
	if !ok {
		t.Fatalf("%s has no line %s", name, mark)
	}
	if *update {
		if err := os.WriteFile(path, []byte(head+mark+"\n"+want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff("\n"+want, got); diff != "" {
		t.Errorf("docs/%s is not what the program says (-want +got):\n%s", name, diff)
	}
}

// commands calls f for every command that a person may call.
func commands(f func(*cobra.Command)) {
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		f(c)
		for _, child := range c.Commands() {
			if child.IsAvailableCommand() && child.Name() != "help" && child.Name() != "completion" {
				walk(child)
			}
		}
	}
	walk((&program{stdin: new(bytes.Buffer), stdout: new(bytes.Buffer), stderr: new(bytes.Buffer)}).root())
}

// TestCommandDocs keeps docs/cli.md equal to what -h prints.
func TestCommandDocs(t *testing.T) {
	var text bytes.Buffer
	commands(func(c *cobra.Command) {
		if c.HasAvailableSubCommands() && !c.HasAvailableLocalFlags() {
			return
		}
		fmt.Fprintf(&text, "### %s\n\n```text\n", c.CommandPath())
		help(&text, c)
		fmt.Fprint(&text, "```\n\n")
	})
	generated(t, "cli.md", text.String())
}
