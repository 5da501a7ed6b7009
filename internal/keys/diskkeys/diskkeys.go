// Package diskkeys keeps keys in one file, readable by its owner only: a JSON
// object from key id to PKCS#8 in base64, the form of SPIRE's "disk" keeper.
// Whoever can read the file can be this authority; whoever can write it can
// make the server sign with a key of theirs once that key is in the bundle.
//
// What must always hold: the file is at every moment a whole old or a whole new
// one, and a key that Generate returned is in it (R71).
package diskkeys

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/secretfile"
	"github.com/plastron/plastron/internal/strictjson"
)

// maxFile bounds the size of the key file in bytes.
const maxFile = 1 << 20

// Config is the configuration of the keeper.
type Config struct {
	// Path is the key file. Its directory must exist and be writable by the
	// server's user only; the file is made with mode 0600 and refused with any
	// other owner or a wider mode. Losing it means new authorities.
	Path string `hcl:"keys_path"`
}

// Keeper holds the keys of one file. It prints as its name.
type Keeper struct {
	path string

	mu   sync.Mutex // guards keys and the file
	keys map[string]stored
}

type stored struct {
	key   keys.Key
	pkcs8 []byte
}

// String returns the type's name.
func (*Keeper) String() string { return "diskkeys.Keeper" }

// Format prints the type's name for every verb.
func (*Keeper) Format(s fmt.State, _ rune) { io.WriteString(s, "diskkeys.Keeper") }

// Open reads the file, if it exists. A file that cannot be read, or that others
// could have read or written, is an error and is left as it is.
func (c *Config) Open(context.Context) (keys.Keeper, error) {
	if c.Path == "" {
		return nil, fault.New(fault.Invalid, "keys_path_missing", "keys_path: must be set")
	}
	path, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, fmt.Errorf("key file %q: %w", c.Path, err)
	}
	if err := secretfile.CheckPlace(path); err != nil {
		return nil, err
	}
	k := &Keeper{path: path, keys: map[string]stored{}}
	data, err := secretfile.ReadOwn(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return nil, err
	}
	if err := k.load(data); err != nil {
		return nil, fault.New(fault.Precondition, "key_file_invalid", "the key file %s cannot be used: %v", path, err).
			Fix("restore it from a backup, or move it away to start with new authorities")
	}
	return k, nil
}

func (k *Keeper) load(data []byte) error {
	// The messages of strictjson and of keys never quote the input.
	document, err := strictjson.Object(data)
	if err != nil {
		return err
	}
	all, ok := document["keys"].(map[string]any)
	if !ok || len(document) != 1 {
		return fmt.Errorf(`it is not an object with the one member "keys"`)
	}
	for id, v := range all {
		text, _ := v.(string)
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return fmt.Errorf("key %q is not base64", id)
		}
		private, t, err := keys.ParsePrivate(der)
		if err != nil {
			return fmt.Errorf("key %q: %w", id, err)
		}
		k.keys[id] = stored{keys.Key{ID: id, Type: t, Signer: private}, der}
	}
	return nil
}

// Generate makes a key; when it returns the key is on disk.
func (k *Keeper) Generate(ctx context.Context, id string, t keys.Type) (keys.Key, error) {
	if err := keys.CheckID(id); err != nil {
		return keys.Key{}, err
	}
	if err := ctx.Err(); err != nil {
		return keys.Key{}, err
	}
	private, err := keys.NewPrivate(t)
	if err != nil {
		return keys.Key{}, err
	}
	der, err := private.PKCS8()
	if err != nil {
		return keys.Key{}, fmt.Errorf("encode key %q: %w", id, err)
	}
	key := keys.Key{ID: id, Type: t, Signer: private}
	err = k.change(func(all map[string]stored) { all[id] = stored{key, der} })
	if err != nil {
		return keys.Key{}, err
	}
	return key, nil
}

// Key returns the key of that id.
func (k *Keeper) Key(_ context.Context, id string) (keys.Key, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, ok := k.keys[id]
	if !ok {
		return keys.Key{}, keys.NotFound(id)
	}
	return s.key, nil
}

// Delete forgets a key, in the file too.
func (k *Keeper) Delete(_ context.Context, id string) error {
	return k.change(func(all map[string]stored) { delete(all, id) })
}

// change writes the changed keys to disk and then, only if that worked, makes
// them the keys in use.
func (k *Keeper) change(f func(map[string]stored)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := maps.Clone(k.keys)
	f(all)
	document := struct {
		Keys map[string][]byte `json:"keys"`
	}{map[string][]byte{}}
	for id, s := range all {
		document.Keys[id] = s.pkcs8
	}
	data, err := json.Marshal(document)
	if err != nil {
		return fmt.Errorf("encode keys: %w", err)
	}
	if err := replace(k.path, data); err != nil {
		return fault.New(fault.Unavailable, "key_file_unwritable", "the key file %s cannot be written", k.path).
			Fix("check free space and permissions of its directory").Because(err)
	}
	k.keys = all
	return nil
}

// replace puts data in place of the file (R71):
//
//	open path.tmp, write, fsync, rename to path, fsync the directory, read back
//
// A crash before the rename leaves the old file, after it the new one.
func replace(path string, data []byte) error {
	temporary := path + ".tmp"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // what a crash left
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	directory, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	if err := errors.Join(directory.Sync(), directory.Close()); err != nil {
		return err
	}
	back, err := secretfile.ReadOwn(path, maxFile)
	if err != nil {
		return err
	}
	if !bytes.Equal(back, data) {
		return fmt.Errorf("what was read back differs from what was written")
	}
	return nil
}
