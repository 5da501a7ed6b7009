package etcd

import (
	"os"
	"path/filepath"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/storetest"
)

// A cluster over its quota refuses writes in one sentence, reads go on, and
// writing goes on once there is room.
func TestQuota(t *testing.T) {
	_, c := cluster(t, 1, "--quota-backend-bytes", "16777216")
	s := opened(t, c)
	begin := commit(t, s, put("first", ""))
	value := string(make([]byte, 256<<10))
	var err error
	last := begin
	for i := 0; i < 200 && err == nil; i++ {
		r := s.Commit(t.Context(), []store.Txn{put("k", value)})[0]
		if err = r.Err; err == nil {
			last = r.Position
		}
	}
	must(t, err, fault.Unavailable, "store_full")
	must(t, s.Commit(t.Context(), []store.Txn{put("small", "")})[0].Err, fault.Unavailable, "store_full")
	if rows, at := storetest.State(t, s); at != last || rows["k"].Rev != last.Revision {
		t.Fatalf("at %v, the last commit was at %v", at, last)
	}
	storetest.Replay(t, s, begin, last)
	if err := s.Compact(t.Context(), last.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Defragment(t.Context(), c.Endpoints[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.AlarmDisarm(t.Context(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	commit(t, s, put("small", ""))
}

// Users with passwords and roles: each refusal is told apart, and none shows the
// password.
func TestUsers(t *testing.T) {
	_, c := cluster(t, 1)
	root := opened(t, c).client
	for _, err := range []error{
		second(root.UserAdd(t.Context(), "root", "root")), second(root.UserGrantRole(t.Context(), "root", "root")),
		second(root.UserAdd(t.Context(), "server", "open sesame")), second(root.RoleAdd(t.Context(), "store")),
		second(root.RoleGrantPermission(t.Context(), "store", "/plastron/", clientv3.GetPrefixRangeEnd("/plastron/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(root.UserGrantRole(t.Context(), "server", "store")), second(root.AuthEnable(t.Context())),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.Username, c.PasswordFile = "server", filepath.Join(t.TempDir(), "password")
	password := func(text string) {
		if err := os.WriteFile(c.PasswordFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	password("open sesame\n")
	commit(t, opened(t, c), put("k", "1"))
	refuse := func(c Config, reason string) {
		t.Helper()
		s, err := c.open(t.Context(), slogTo(t), patient())
		if err == nil {
			s.Close()
		}
		must(t, err, fault.Precondition, reason)
	}
	other := c
	other.Prefix = "/other/"
	refuse(other, "store_denied")
	password("wrong")
	refuse(c, "store_login")
	password("")
	refuse(c, "store_login")
	c.Username, c.PasswordFile = "", ""
	refuse(c, "store_login")
}

func second[T any](_ T, err error) error { return err }
