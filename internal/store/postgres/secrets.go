package postgres

import (
	"cmp"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/secretfile"
)

const maxSecretFile = 256 << 10

// checkSecrets refuses files with secrets that others can read or exchange (R113):
// the client's key, and the password's if that is where the client finds it. The
// client itself reads any file, and goes without a password when it cannot.
func (c Config) checkSecrets(p *pgconn.Config) error {
	home, _ := os.UserHomeDir() // "" as for the client
	keyed := p.TLSConfig != nil && len(p.TLSConfig.Certificates) > 0
	for _, f := range p.Fallbacks {
		keyed = keyed || f.TLSConfig != nil && len(f.TLSConfig.Certificates) > 0
	}
	if keyed {
		if _, err := secretfile.ReadGiven(c.setting("sslkey", "PGSSLKEY", filepath.Join(home, ".postgresql", "postgresql.key")), maxSecretFile); err != nil {
			return unreadable("sslkey, the client's key,", err)
		}
	}
	without := " passfile=''" // of two the later one counts
	if isURL(c.ConnectionString) {
		without = "&passfile="
		if !strings.Contains(c.ConnectionString, "?") {
			without = "?passfile="
		}
	}
	usual := filepath.Join(home, ".pgpass")
	path := c.setting("passfile", "PGPASSFILE", usual)
	if other, err := pgconn.ParseConfig(c.ConnectionString + without); path == "" || err == nil && other.Password != "" {
		return nil
	}
	if _, err := os.Stat(path); path == usual && err != nil {
		return nil
	}
	if _, err := secretfile.ReadGiven(path, maxSecretFile); err != nil {
		return unreadable("passfile, with the password,", err)
	}
	return nil
}

func unreadable(what string, err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f // its place or mode
	}
	return fault.New(fault.Precondition, "database_login", "%s cannot be read", what).Fix("check its path and permissions").Because(err)
}

func isURL(text string) bool {
	return strings.HasPrefix(text, "postgres://") || strings.HasPrefix(text, "postgresql://")
}

var (
	pair   = regexp.MustCompile(`(?s)([^\s=]+)\s*=\s*('(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)`) // of the form key=value
	escape = regexp.MustCompile(`(?s)\\(.)`)
)

// setting returns what the connection string says, or else the environment, or
// else what is usual, as the client reads them. The client tells nobody.
func (c Config) setting(key, variable, usual string) string {
	found := cmp.Or(os.Getenv(variable), usual)
	if isURL(c.ConnectionString) {
		_, query, _ := strings.Cut(c.ConnectionString, "?")
		for one := range strings.SplitSeq(query, "&") {
			name, value, _ := strings.Cut(one, "=")
			if name, err := url.PathUnescape(strings.Trim(name, " ")); err == nil && name == key {
				found, _ = url.PathUnescape(strings.Trim(value, " ")) // or the client had refused it
			}
		}
		return found
	}
	for _, m := range pair.FindAllStringSubmatch(c.ConnectionString, -1) {
		if value := m[2]; m[1] == key {
			if strings.HasPrefix(value, "'") {
				value = value[1 : len(value)-1]
			}
			found = escape.ReplaceAllString(value, "$1")
		}
	}
	return found
}
