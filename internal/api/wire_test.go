// Package api_test pins what our protos look like on the wire.
package api_test

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/plastron/plastron/api/plastron/apply/v1"
	_ "github.com/plastron/plastron/api/plastron/authority/v1"
	_ "github.com/plastron/plastron/api/plastron/cutoff/v1"
	_ "github.com/plastron/plastron/api/plastron/issue/v1"
	_ "github.com/plastron/plastron/api/plastron/join/v1"
	_ "github.com/plastron/plastron/api/plastron/lifetime/v1"
	_ "github.com/plastron/plastron/api/plastron/node/v1"
	_ "github.com/plastron/plastron/api/plastron/receipt/v1"
	_ "github.com/plastron/plastron/api/plastron/rule/v1"
	_ "github.com/plastron/plastron/api/plastron/status/v1"
	_ "github.com/plastron/plastron/api/plastron/store/v1"
	_ "github.com/plastron/plastron/api/plastron/sync/v1"
	_ "github.com/plastron/plastron/api/plastron/why/v1"
	_ "github.com/plastron/plastron/internal/api/plastron/state/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/agent/logger/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/agent/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/bundle/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/entry/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/localauthority/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	_ "github.com/plastron/plastron/internal/api/spire/api/server/svid/v1"

	// What else the binary registers. Two protos with one name end the process as
	// soon as both are linked, so that this test would not even start.
	_ "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	_ "google.golang.org/grpc/health/grpc_health_v1"
)

var update = flag.Bool("update", false, "rewrite the golden file")

// TestWire compares every name, number and type that a peer or a stored value
// depends on with testdata/wire.golden. A difference there that is not an
// addition breaks clients or stores that exist.
func TestWire(t *testing.T) {
	var got bytes.Buffer
	for _, path := range protoFiles(t) {
		file, err := protoregistry.GlobalFiles.FindFileByPath(path)
		if err != nil {
			t.Errorf("%s is not linked into this test; import its package: %v", path, err)
			continue
		}
		fmt.Fprintf(&got, "package %s\n", file.Package())
		for i := range file.Services().Len() {
			writeService(&got, file.Services().Get(i))
		}
		writeEnums(&got, file.Enums())
		writeMessages(&got, file.Messages())
		got.WriteByte('\n')
	}
	golden := filepath.Join("testdata", "wire.golden")
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got.String(), "\n")); diff != "" {
		t.Errorf("the wire has changed; if that is meant, run with -update (-golden +now):\n%s", diff)
	}
}

// protoFiles returns the import paths of the repository's proto files.
func protoFiles(t *testing.T) []string {
	t.Helper()
	var paths []string
	for _, root := range []string{".", filepath.Join("..", "..", "api")} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".proto" {
				return err
			}
			rel, err := filepath.Rel(root, path)
			paths = append(paths, filepath.ToSlash(rel))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(paths)
	return paths
}

func writeService(w *bytes.Buffer, s protoreflect.ServiceDescriptor) {
	fmt.Fprintf(w, "service %s\n", s.FullName())
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		fmt.Fprintf(w, "  %s(%s%s) %s%s\n", m.Name(),
			stream(m.IsStreamingClient()), m.Input().FullName(), stream(m.IsStreamingServer()), m.Output().FullName())
	}
}

func stream(yes bool) string {
	if yes {
		return "stream "
	}
	return ""
}

func writeEnums(w *bytes.Buffer, enums protoreflect.EnumDescriptors) {
	for i := range enums.Len() {
		e := enums.Get(i)
		fmt.Fprintf(w, "enum %s\n", e.FullName())
		for j := range e.Values().Len() {
			fmt.Fprintf(w, "  %d %s\n", e.Values().Get(j).Number(), e.Values().Get(j).Name())
		}
	}
}

func writeMessages(w *bytes.Buffer, messages protoreflect.MessageDescriptors) {
	for i := range messages.Len() {
		m := messages.Get(i)
		if m.IsMapEntry() {
			continue // told by the field
		}
		fmt.Fprintf(w, "message %s\n", m.FullName())
		for j := range m.Fields().Len() {
			f := m.Fields().Get(j)
			fmt.Fprintf(w, "  %d %s %s", f.Number(), f.Name(), fieldType(f))
			if one := f.ContainingOneof(); one != nil {
				fmt.Fprintf(w, " oneof %s", one.Name())
			}
			w.WriteByte('\n')
		}
		writeEnums(w, m.Enums())
		writeMessages(w, m.Messages())
	}
}

func fieldType(f protoreflect.FieldDescriptor) string {
	switch {
	case f.IsMap():
		return fmt.Sprintf("map<%s, %s>", fieldType(f.MapKey()), fieldType(f.MapValue()))
	case f.IsList():
		return "repeated " + elementType(f)
	}
	return elementType(f)
}

func elementType(f protoreflect.FieldDescriptor) string {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return string(f.Message().FullName())
	case protoreflect.EnumKind:
		return string(f.Enum().FullName())
	}
	return f.Kind().String()
}
