//go:build linux

package postgres_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/test/parts"
)

// writeCertificates writes ca.pem, server.pem and server.key for a database at
// 127.0.0.1, and client.pem and client.key for the user plastron, all new.
func writeCertificates(t *testing.T, database, client string) {
	t.Helper()
	write := func(name, kind string, der []byte) {
		t.Helper()
		dir := database
		if strings.HasPrefix(name, "client") {
			dir = client
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		owner, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		st := owner.Sys().(*syscall.Stat_t)
		if err := os.Chown(path+".new", int(st.Uid), int(st.Gid)); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	var issuer *x509.Certificate
	var issuerKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 1), Subject: pkix.Name{CommonName: "plastron"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			BasicConstraintsValid: true, IsCA: i == 0,
		}
		if i == 0 {
			issuer, issuerKey, template.Subject.CommonName = template, key, rand.Text()
			template.KeyUsage = x509.KeyUsageCertSign
		} else {
			template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), issuerKey)
		if err != nil {
			t.Fatal(err)
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".pem", "CERTIFICATE", der)
		write(name+".key", "PRIVATE KEY", pkcs8)
	}
}

// The database and the store prove themselves by certificates; when all of them
// are replaced, the CA included, the store goes on without a restart. With a CA
// that does not vouch for the database it is refused.
func TestCertificatesReplaced(t *testing.T) {
	if absent != nil {
		t.Skip(absent)
	}
	own, err := parts.StartPostgres(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	old, client := t.TempDir(), t.TempDir()
	writeCertificates(t, old, old)
	writeCertificates(t, own.Dir, client)
	admin := func(sql string) {
		t.Helper()
		if err := own.Exec(limited(t), "postgres", sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	hba := filepath.Join(own.Dir, "data", "pg_hba.conf")
	if err := os.WriteFile(hba, []byte("local all all trust\nhostssl all all 127.0.0.1/32 cert\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"ssl_ca_file": "ca.pem", "ssl_cert_file": "server.pem", "ssl_key_file": "server.key"} {
		admin("ALTER SYSTEM SET " + name + " = '" + filepath.Join(own.Dir, file) + "'")
	}
	admin("ALTER SYSTEM SET ssl = on")
	if err := own.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := own.Start(limited(t)); err != nil {
		t.Fatal(err)
	}
	url := func(database, client string) string {
		return fmt.Sprintf("host=127.0.0.1 port=%s user=plastron dbname=postgres sslmode=verify-full sslrootcert=%s/ca.pem sslcert=%[3]s/client.pem sslkey=%[3]s/client.key", own.Port, database, client)
	}
	refuses(t, url(old, old), fault.Unavailable, "database_unreachable")
	if err := os.Chmod(filepath.Join(old, "client.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	refuses(t, url(old, old), fault.Precondition, "key_file_unsafe") // R113
	s := opened(t, url(own.Dir, client))
	at := commit(t, s, create("a", ""))

	writeCertificates(t, own.Dir, client)
	if err := own.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := own.Start(limited(t)); err != nil {
		t.Fatal(err)
	}
	ctx := limited(t)
	for {
		r := s.Commit(ctx, []store.Txn{create("b", "")})[0]
		if r.Err == nil {
			break
		}
		must(t, "Commit", r.Err, fault.Unavailable, "not_written")
	}
	for ctx.Err() == nil {
		err := error(nil)
		for b, e := range s.Watch(ctx, at) {
			if err = e; err == nil && b.Writes[0].Changes[0].Key == "b" {
				return
			}
			break
		}
		if err != nil && fault.KindOf(err) != fault.Unavailable {
			t.Fatal(err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	t.Error(context.Cause(ctx))
}
