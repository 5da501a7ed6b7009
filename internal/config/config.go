// Package config reads configuration files strictly. It decides what a file
// says: HCL version 1 as SPIRE writes it, or JSON. What the values mean together
// is left to the role that owns the struct.
//
// A file is bounded before it is read (size, encoding, nesting), and every key
// in it must have a place in the struct: an unknown, duplicate or mistyped key is
// an error that names file, line, key and the nearest valid name. All faults of a
// file are reported at once. A struct that came with an error holds what could be
// read: more faults may be looked for in it, but it must not be put to use.
package config

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/plastron/plastron/internal/fault"
)

// Bounds of a file (corpus F17).
const (
	MaxSize  = 1 << 20
	maxDepth = 32
)

// Load reads the file at path into dst, a pointer to a struct. See Decode.
func Load(path string, dst any) error {
	src, err := ReadFile(path)
	if err != nil {
		return err
	}
	return Decode(path, src, dst)
}

// ReadFile returns the text of a file of at most MaxSize bytes.
func ReadFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "config_unreadable", "the configuration file cannot be read: %v", err).
			Fix("check its path and its mode")
	}
	defer file.Close()
	src, err := io.ReadAll(io.LimitReader(file, MaxSize+1))
	if err != nil {
		return nil, fault.New(fault.Invalid, "config_unreadable", "the configuration file cannot be read: %v", err)
	}
	if len(src) > MaxSize {
		return nil, tooLarge(path)
	}
	return src, nil
}

// Decode parses src and stores it in dst, a pointer to a struct whose fields bear
// `hcl:"key"` tags. The name of the file is used in errors only. What dst holds
// beforehand are the defaults of keys that are absent.
//
// Fields may be strings, integers, booleans, floats, types with UnmarshalText,
// slices of those, pointers to any of them (nil when the key is absent), structs
// and pointers to structs (blocks), map[string]T (blocks with a label), slices of
// structs (repeated blocks, whose leading labels go to the fields tagged
// `hcl:",label"`), and Node (kept as it is, for later). `hcl:"key,required"`
// makes the absence of a key an error.
func Decode(file string, src []byte, dst any) error {
	node, err := Parse(file, src)
	if err != nil {
		return err
	}
	return node.Decode(dst)
}

// Parse checks the bounds and the syntax of src and returns its content.
func Parse(file string, src []byte) (Node, error) {
	if len(src) > MaxSize {
		return Node{}, tooLarge(file)
	}
	src, err := plainText(file, src)
	if err != nil {
		return Node{}, err
	}
	if trimmed := bytes.TrimLeft(src, " \t\n\r"); len(trimmed) > 0 && trimmed[0] == '{' {
		return parseJSON(file, src)
	}
	return parseHCL(file, src)
}

// plainText accepts UTF-8 with or without a byte order mark and either kind of
// line end, and refuses every other encoding by name (corpus F18).
func plainText(file string, src []byte) ([]byte, error) {
	if bytes.HasPrefix(src, []byte("\xff\xfe")) || bytes.HasPrefix(src, []byte("\xfe\xff")) {
		return nil, invalid(file, 1, "the file is UTF-16").Fix("save it as UTF-8")
	}
	src = bytes.TrimPrefix(src, []byte("\xef\xbb\xbf"))
	src = bytes.ReplaceAll(src, []byte("\r\n"), []byte("\n"))
	if at := bytes.IndexByte(src, 0); at >= 0 {
		return nil, invalid(file, lineAt(src, at), "the file holds a zero byte, so it is not text").Fix("save it as UTF-8")
	}
	for at := 0; at < len(src); {
		r, size := utf8.DecodeRune(src[at:])
		if r == utf8.RuneError && size == 1 {
			return nil, invalid(file, lineAt(src, at), "the file is not UTF-8").Fix("save it as UTF-8")
		}
		at += size
	}
	return src, nil
}

func lineAt(src []byte, offset int) int {
	return 1 + bytes.Count(src[:min(offset, len(src))], []byte("\n"))
}

func tooLarge(file string) *fault.Error {
	return fault.New(fault.Invalid, "config_too_large", "%s is larger than %d bytes, the limit of a configuration file", file, MaxSize)
}

// invalid returns a fault of the whole file at one line.
func invalid(file string, line int, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "config_invalid", "%s", fmt.Sprintf("%s:%d: ", file, line)+fmt.Sprintf(format, args...))
}

// maxFaults is how many faults one error spells out; a file that is not a
// configuration at all would otherwise fill the screen.
const maxFaults = 20

// faults collects what is wrong with one file.
type faults struct {
	file  string
	found []located
	count int
}

type located struct {
	line int
	text string
}

func (f *faults) add(line int, block, format string, args ...any) {
	f.count++
	if len(f.found) >= maxFaults {
		return
	}
	text := fmt.Sprintf(format, args...)
	if block != "" {
		text = block + ": " + text
	}
	f.found = append(f.found, located{line, fmt.Sprintf("%s:%d: %s", f.file, line, text)})
}

// unknown adds an unknown key. The search for the nearest name is left out when
// it would not be shown.
func (f *faults) unknown(line int, block, key string, names []string) {
	hint := ""
	if len(f.found) < maxFaults {
		hint = suggestion(key, names)
	}
	f.add(line, block, "unknown key %s; %s", quote(key), hint)
}

func (f *faults) err() error {
	slices.SortStableFunc(f.found, func(a, b located) int { return cmp.Compare(a.line, b.line) })
	var text strings.Builder
	switch f.count {
	case 0:
		return nil
	case 1:
		text.WriteString(f.found[0].text)
	default:
		fmt.Fprintf(&text, "%s has %d faults:", f.file, f.count)
		for _, one := range f.found {
			text.WriteString("\n  " + one.text)
		}
		if more := f.count - len(f.found); more > 0 {
			fmt.Fprintf(&text, "\n  and %d more", more)
		}
	}
	return fault.New(fault.Invalid, "config_invalid", "%s", text.String())
}
