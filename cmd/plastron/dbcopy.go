package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/plastron/plastron/internal/server"
	"github.com/spf13/cobra"
)

// longCopy is how long a copy may take.
const longCopy = 24 * time.Hour

func (p *program) dbCopyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "copy",
		Short: "Copy the store into an empty one, of the same or another engine",
		Long: `Copies the store that one configuration names into the empty store that another names,
such as SQLite into PostgreSQL, and compares the two. Stop the servers first; start them
with the second configuration and the same data_dir afterwards: their keys stay, and
agents go on without attesting again. Join tokens that were not used are void.

No server starts on the copy before it is complete; a copy that was cut off goes on
when the same command is run again. Nor does one start on what was copied away, so that
there are no two trust domains of one name. -undo takes that back; do so only if no
server ever ran on the copy.

Run it as the server's user, on the server's machine.`,
	}
	var from, to string
	var undo bool
	c.Flags().StringVar(&from, "from", "", "`FILE` with the configuration that the servers have had")
	c.Flags().StringVar(&to, "to", "", "`FILE` with the configuration that the servers will have")
	c.Flags().BoolVar(&undo, "undo", false, "let servers start on the store of -from again")
	var expandEnv bool
	c.Flags().BoolVar(&expandEnv, "expandEnv", false, "replace $NAME and ${NAME} in the files by environment variables")
	out := outputFlag(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		if from == "" || (to == "") != undo {
			return usage(c, "give -from and -to, or -from and -undo")
		}
		load := func(path string) (server.Config, error) {
			cfg := server.Default()
			file := &configFile{command: c, path: path, expandEnv: expandEnv}
			if err := file.readFile(&cfg); err != nil {
				return cfg, err
			}
			return cfg, cfg.Validate()
		}
		ctx, cancel := contextWithTimeout(c, longCopy)
		defer cancel()
		old, err := load(from)
		if err != nil {
			return about("-from", err)
		}
		if undo {
			if err := server.UndoCopy(ctx, old, p.quietLog()); err != nil {
				return withCauses(err)
			}
			_, err := fmt.Fprintln(p.stdout, "Servers start on it again.")
			return err
		}
		next, err := load(to)
		if err != nil {
			return about("-to", err)
		}
		done, err := server.CopyStore(ctx, old, next, p.quietLog())
		if err != nil {
			return withCauses(err)
		}
		if *out == asJSON {
			return json.NewEncoder(p.stdout).Encode(map[string]any{
				"rows": done.Rows, "bytes": done.Bytes, "written": done.Written, "join_tokens_void": done.Tokens, "digest": fmt.Sprintf("%x", done.Digest),
				"from": done.From.String(), "to": done.To.String(),
			})
		}
		_, err = fmt.Fprintf(p.stdout, `%d rows with %d bytes are in both stores, digest %x; %d were written now.
The old one was at %s, the new one is at %s; %d join tokens are void.
Start the servers with %s and the same data_dir.
`, done.Rows, done.Bytes, done.Digest[:8], done.Written, done.From, done.To, done.Tokens, to)
		return err
	}
	return c
}
