package builtin

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/registry"
	"github.com/plastron/plastron/internal/store"
	"github.com/plastron/plastron/internal/store/etcd"
	"github.com/plastron/plastron/internal/store/postgres"
	"github.com/plastron/plastron/internal/store/sqlite"
)

// Store is a kind of DataStore.
type Store struct {
	Name string
	Doc  string
	New  func() StoreConfig
}

// Stores returns the stores. The first one serves when none is configured.
func Stores() []Store {
	return []Store{
		{"sqlite", "SQLite in a directory of this machine, for one server", func() StoreConfig { return new(sqliteStore) }},
		{"sql", "SPIRE's block: SQLite, or PostgreSQL for one server or several", func() StoreConfig { return new(sqlStore) }},
		{"etcd", "etcd, for one server or several", func() StoreConfig { return new(etcdStore) }},
	}
}

// StoreConfig is what a file says of a store, and opens it. One that has a
// method Validate() error is asked before anything else.
type StoreConfig interface {
	// Where says where the store of a server with this data_dir is. It is also
	// asked of a configuration that is not valid.
	Where(dataDir string) Where
	Open(ctx context.Context, env StoreEnv) (OpenStore, error)
	// Examine looks at a store without opening it, calls each for every live key, or
	// of one that is shared for those of registry.Marks, and changes nothing.
	Examine(ctx context.Context, dataDir string, each func(key string, value []byte) error) (Examined, error)
}

// Examined says what was found.
type Examined struct {
	store.Look
	Open bool // one that is not shared: some process has it open, or ended without closing it
}

// Where says what a store is and where. It holds no secret.
type Where struct {
	Kind    string // "sqlite", "postgres", "etcd"
	Dir     string // on this machine; empty: it is elsewhere
	Address string // elsewhere: hosts and what holds the store there
	Shared  bool   // several servers may have it open
}

// StoreEnv is what a store is opened with.
type StoreEnv struct {
	Dir  string         // data_dir
	Seen store.Position // the newest that this server remembers, if it is shared
	// Existing refuses (fault.NotFound, "store_not_found") to make a store that is not there.
	Existing bool
	Log      *slog.Logger
}

// OpenStore is an open store, with what its engine can do besides: nil is that
// it cannot.
type OpenStore struct {
	store.Store
	Where
	Size  func() int64 // bytes on disk
	Check func() error // reads all of it
	// KeepFormat: rows go on in the format in which they are written, so that one
	// can go back to the version before.
	KeepFormat bool
}

// sqliteStore is `DataStore "sqlite"`.
type sqliteStore struct {
	// Dir is the store's directory. Default: data_dir.
	Dir string `hcl:"dir"`
}

func (c *sqliteStore) Where(dataDir string) Where {
	dir := c.Dir
	if dir == "" {
		dir = dataDir
	}
	return Where{Kind: "sqlite", Dir: dir}
}

func (c *sqliteStore) Open(ctx context.Context, env StoreEnv) (OpenStore, error) {
	at := c.Where(env.Dir)
	st, err := sqlite.Config{Dir: at.Dir, Existing: env.Existing}.Open(ctx, env.Log)
	if err != nil {
		return OpenStore{}, err
	}
	return OpenStore{Store: st, Where: at, Size: st.Size, Check: st.Check}, nil
}

func (c *sqliteStore) Examine(ctx context.Context, dataDir string, each func(key string, value []byte) error) (Examined, error) {
	found, err := sqlite.Examine(ctx, c.Where(dataDir).Dir, each)
	return Examined{store.Look{Position: found.Position, Bytes: found.Bytes}, found.Open}, err
}

// sqlStore is `DataStore "sql"`, with SPIRE's keys. It prints as its name: its
// strings may hold passwords.
type sqlStore struct {
	DatabaseType       config.Node     `hcl:"database_type"`
	ConnectionString   string          `hcl:"connection_string"`
	ROConnectionString string          `hcl:"ro_connection_string"`
	RootCAPath         string          `hcl:"root_ca_path"`
	ClientCertPath     string          `hcl:"client_cert_path"`
	ClientKeyPath      string          `hcl:"client_key_path"`
	MaxOpenConns       *int            `hcl:"max_open_conns"`
	MaxIdleConns       *int            `hcl:"max_idle_conns"`
	ConnMaxLifetime    config.Duration `hcl:"conn_max_lifetime"`
	DisableMigration   bool            `hcl:"disable_migration"`
	LogSQL             bool            `hcl:"log_sql"`
}

func (*sqlStore) String() string   { return "builtin.sqlStore" }
func (*sqlStore) GoString() string { return "builtin.sqlStore" }

func (c *sqlStore) Validate() error {
	kind := c.DatabaseType.Name()
	invalid := func(format string, args ...any) *fault.Error {
		return fault.New(fault.Invalid, "plugin_invalid", format, args...)
	}
	instead := func(what, with string) error {
		return fault.New(fault.Unsupported, "plugin_invalid", "database_type %q is not offered", what).Fix("%s", with)
	}
	switch kind {
	case "sqlite3", "postgres":
	case "aws_postgres":
		return instead(kind, `use database_type = "postgres" with a connection string that has a password or a client certificate`)
	case "mysql", "aws_mysql":
		return instead(kind, `use database_type = "postgres", or DataStore "etcd"`)
	case "":
		return invalid("database_type: must be set").Fix("write sqlite3 or postgres")
	default:
		return instead(kind, "write sqlite3 or postgres")
	}
	if c.RootCAPath+c.ClientCertPath+c.ClientKeyPath != "" {
		return invalid("root_ca_path, client_cert_path and client_key_path are for MySQL").
			Fix("for PostgreSQL write sslrootcert, sslcert and sslkey into the connection string")
	}
	if kind == "sqlite3" {
		if strings.Contains(c.ConnectionString, ":memory:") || strings.Contains(c.ConnectionString, "mode=memory") {
			return invalid("connection_string: the store is never in memory alone").Fix("name a file, or leave it out")
		}
		return nil
	}
	if c.MaxOpenConns != nil && *c.MaxOpenConns > 0 && *c.MaxOpenConns < postgres.Needed {
		return invalid("max_open_conns: %d is fewer than the %d that a server may need", *c.MaxOpenConns, postgres.Needed).Fix("leave it out")
	}
	return c.postgres().Validate()
}

// Warnings names settings that have no effect here.
func (c *sqlStore) Warnings() (out []string) {
	for _, key := range []struct {
		set bool
		say string
	}{
		{c.ROConnectionString != "", "ro_connection_string: no replica is read, because a server answers from its own memory"},
		{c.ConnMaxLifetime != 0, "conn_max_lifetime: connections stay open as long as they work"},
		{c.LogSQL, "log_sql: statements are not logged"},
	} {
		if key.set {
			out = append(out, key.say)
		}
	}
	return out
}

func (c *sqlStore) Where(dataDir string) Where {
	if c.DatabaseType.Name() == "postgres" {
		return Where{Kind: "postgres", Address: c.postgres().Address(), Shared: true}
	}
	return c.sqlite().Where(dataDir)
}

func (c *sqlStore) Open(ctx context.Context, env StoreEnv) (OpenStore, error) {
	open := c.sqlite().Open
	if c.DatabaseType.Name() == "postgres" {
		open = c.openPostgres
	}
	opened, err := open(ctx, env)
	opened.KeepFormat = c.DisableMigration
	return opened, err
}

func (c *sqlStore) openPostgres(ctx context.Context, env StoreEnv) (OpenStore, error) {
	config := c.postgres()
	config.Seen, config.Existing = env.Seen, env.Existing
	st, err := config.Open(ctx, env.Log)
	if err != nil {
		return OpenStore{}, err
	}
	return OpenStore{Store: st, Where: c.Where(env.Dir)}, nil
}

func (c *sqlStore) Examine(ctx context.Context, dataDir string, each func(key string, value []byte) error) (Examined, error) {
	if c.DatabaseType.Name() != "postgres" {
		return c.sqlite().Examine(ctx, dataDir, each)
	}
	seen, err := c.postgres().Examine(ctx, registry.Marks(), each)
	return Examined{Look: seen}, err
}

func (c *sqlStore) postgres() postgres.Config {
	return postgres.Config{ConnectionString: c.ConnectionString}
}

// sqlite is the store in the directory of the file that SPIRE would use, which
// may be written as a URL. That file itself is left alone.
func (c *sqlStore) sqlite() *sqliteStore {
	path, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(c.ConnectionString, "file:"), "//"), "?")
	if path == "" {
		return &sqliteStore{}
	}
	return &sqliteStore{Dir: filepath.Dir(path)}
}

// etcdStore is `DataStore "etcd"`.
type etcdStore struct{ etcd.Config }

func (c *etcdStore) Where(string) Where {
	return Where{Kind: "etcd", Address: c.Address(), Shared: true}
}

func (c *etcdStore) Open(ctx context.Context, env StoreEnv) (OpenStore, error) {
	config := c.Config
	config.Seen, config.Existing = env.Seen, env.Existing
	st, err := config.Open(ctx, env.Log)
	if err != nil {
		return OpenStore{}, err
	}
	return OpenStore{Store: st, Where: c.Where(env.Dir)}, nil
}

func (c *etcdStore) Examine(ctx context.Context, _ string, each func(key string, value []byte) error) (Examined, error) {
	seen, err := c.Config.Examine(ctx, registry.Marks(), each)
	return Examined{Look: seen}, err
}
