//go:build linux

package postgres_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/plastron/plastron/internal/fault"
)

// The password's file, however it is named, is the one that the client reads, and it
// counts only while nobody else can read it (R113). One that is not there is not
// passed over, nor does one that is not needed matter.
func TestPasswordFile(t *testing.T) {
	name := database(t)
	full := cluster.NetworkURL(name, cluster.Password)
	u, err := url.Parse(full)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User("plastron")
	bare := u.String()
	pairs := fmt.Sprintf("host = %s port=%s user=plastron dbname='%s'", u.Hostname(), u.Port(), name)
	home := t.TempDir()
	path := filepath.Join(home, "it's & here")
	usual := filepath.Join(home, ".pgpass")
	for i, c := range []struct{ text, variable, path string }{
		{bare + "?sslmode=disable&passfile=" + url.PathEscape("/absent") + "&passfile=" + strings.ReplaceAll(url.QueryEscape(path), "+", "%20"), "", path},
		{pairs + " passfile='" + strings.ReplaceAll(path, "'", `\'`) + "' application_name='passfile=/absent'", "", path},
		{pairs + " passfile = /absent passfile = " + strings.NewReplacer("'", `\'`, " ", `\ `).Replace(path), "", path},
		{bare, path, path},
		{pairs, "", usual},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Setenv("PGPASSFILE", c.variable)
			t.Setenv("HOME", home)
			if err := os.WriteFile(c.path, []byte("*:*:*:plastron:"+cluster.Password+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			open(t, c.text).Close()
			if err := os.Chmod(c.path, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := refuses(t, c.text, fault.Precondition, "key_file_unsafe"); !strings.Contains(err.Error(), c.path) || strings.Contains(err.Error(), cluster.Password) {
				t.Errorf("%v", err)
			}
			if c.variable != "" || c.path == usual {
				open(t, full).Close()
			}
			if err := os.Remove(c.path); err != nil {
				t.Fatal(err)
			}
			refuses(t, c.text, fault.Precondition, "database_login")
		})
	}
}
