// Program protogen writes the Go code of every proto file in the repository, or
// with -check says which of it is not what the proto files ask for.
//
//	go -C tools run ./protogen [-check]
//
// The compiler and both plugins are Go code pinned in tools/go.mod, so that no
// protoc is installed and every machine writes the same bytes.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/pluginpb"
)

const module = "github.com/plastron/plastron"

var (
	errDrift = errors.New("generated code has drifted: run go -C tools run ./protogen")

	// importRoots are where proto files live and what their imports are relative to.
	importRoots = []string{"internal/api", "api"}
	plugins     = []string{"protoc-gen-go", "protoc-gen-go-grpc"}
)

func main() {
	check := flag.Bool("check", false, "change nothing; list what differs and exit with status 1")
	root := flag.String("root", "..", "the repository")
	flag.Parse()
	if err := run(context.Background(), *root, *check); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, root string, check bool) error {
	want, err := generate(ctx, root)
	if err != nil {
		return err
	}
	have, err := find(root, ".pb.go")
	if err != nil {
		return err
	}
	drift := false
	for _, name := range slices.Sorted(maps.Keys(want)) {
		path := filepath.Join(root, name)
		old, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil && bytes.Equal(old, want[name]) {
			continue
		}
		drift = true
		fmt.Println("differs:", name)
		if check {
			continue
		}
		if err := os.WriteFile(path, want[name], 0o644); err != nil {
			return err
		}
	}
	for _, name := range have {
		if _, ok := want[name]; ok {
			continue
		}
		drift = true
		fmt.Println("has no proto file any more:", name)
		if check {
			continue
		}
		if err := os.Remove(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	if check && drift {
		return errDrift
	}
	return nil
}

// find returns the paths, relative to root, of the files under the import roots
// whose name ends in suffix.
func find(root, suffix string) ([]string, error) {
	var found []string
	for _, dir := range importRoots {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, suffix) {
				return err
			}
			rel, err := filepath.Rel(root, path)
			found = append(found, filepath.ToSlash(rel))
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// generate returns the content of every generated file by its path under root.
func generate(ctx context.Context, root string) (map[string][]byte, error) {
	request, err := compile(ctx, root)
	if err != nil {
		return nil, err
	}
	stdin, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	files := make(map[string][]byte)
	for _, plugin := range plugins {
		// The working directory is the tools module, whose tool lines pin the plugin.
		cmd := exec.CommandContext(ctx, "go", "tool", plugin)
		cmd.Stdin = bytes.NewReader(stdin)
		cmd.Stderr = os.Stderr
		stdout, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("run %s: %w", plugin, err)
		}
		var response pluginpb.CodeGeneratorResponse
		if err := proto.Unmarshal(stdout, &response); err != nil {
			return nil, fmt.Errorf("read the answer of %s: %w", plugin, err)
		}
		if response.Error != nil {
			return nil, fmt.Errorf("%s: %s", plugin, response.GetError())
		}
		for _, f := range response.File {
			files[f.GetName()] = []byte(f.GetContent())
		}
	}
	return files, nil
}

// compile returns the plugins' request for every proto file under root.
func compile(ctx context.Context, root string) (*pluginpb.CodeGeneratorRequest, error) {
	paths, err := find(root, ".proto")
	if err != nil {
		return nil, err
	}
	resolver := &protocompile.SourceResolver{}
	request := &pluginpb.CodeGeneratorRequest{Parameter: proto.String("module=" + module)}
	for _, dir := range importRoots {
		resolver.ImportPaths = append(resolver.ImportPaths, filepath.Join(root, dir))
		for _, path := range paths {
			if name, ok := strings.CutPrefix(path, dir+"/"); ok {
				request.FileToGenerate = append(request.FileToGenerate, name)
			}
		}
	}
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(resolver),
		SourceInfoMode: protocompile.SourceInfoStandard, // the comments
	}
	compiled, err := compiler.Compile(ctx, request.FileToGenerate...)
	if err != nil {
		return nil, err
	}

	// Plugins want each file after those that it imports.
	added := make(map[string]bool)
	var add func(protoreflect.FileDescriptor) error
	add = func(file protoreflect.FileDescriptor) error {
		if added[file.Path()] {
			return nil
		}
		added[file.Path()] = true
		for i := range file.Imports().Len() {
			if err := add(file.Imports().Get(i).FileDescriptor); err != nil {
				return err
			}
		}
		request.ProtoFile = append(request.ProtoFile, protodesc.ToFileDescriptorProto(file))
		return nil
	}
	for _, file := range compiled {
		if err := add(file); err != nil {
			return nil, err
		}
	}
	return request, nil
}
