package config

import "strings"

// Expand replaces $VAR and ${VAR} by what lookup says and $$ by one $. A variable
// that is not set is an error that names it (corpus F16); all of them are reported
// at once. Comments are left as they are. Any other $ stands for itself.
func Expand(file string, src []byte, lookup func(string) (string, bool)) ([]byte, error) {
	found := &faults{file: file}
	var out strings.Builder
	text, line := string(src), 1
	for len(text) > 0 {
		size, comment := segment(text)
		if comment {
			out.WriteString(text[:size])
		} else {
			expandInto(&out, text[:size], line, found, lookup)
		}
		line += strings.Count(text[:size], "\n")
		text = text[size:]
		if out.Len() > MaxSize {
			return nil, tooLarge(file)
		}
	}
	if err := found.err(); err != nil {
		return nil, err
	}
	return []byte(out.String()), nil
}

// segment returns the length of what text begins with: a comment, a string, a
// here-document, or whatever stands before the next of these.
func segment(text string) (size int, comment bool) {
	switch {
	case strings.HasPrefix(text, "#"), strings.HasPrefix(text, "//"):
		return through(text, 1, "\n"), true
	case strings.HasPrefix(text, "/*"):
		return through(text, 2, "*/"), true
	case text[0] == '"':
		for i := 1; i < len(text); i++ {
			switch text[i] {
			case '\\':
				i++
			case '"', '\n':
				return i + 1, false
			}
		}
		return len(text), false
	case strings.HasPrefix(text, "<<"):
		return heredocLength(text), false
	}
	if next := strings.IndexAny(text[1:], `"#/<`); next >= 0 {
		return 1 + next, false
	}
	return len(text), false
}

// through returns the length of text up to and with the first end at or after from.
func through(text string, from int, end string) int {
	if at := strings.Index(text[from:], end); at >= 0 {
		return from + at + len(end)
	}
	return len(text)
}

// heredocLength returns the length of the here-document that text begins with, or
// 1 if it is none.
func heredocLength(text string) int {
	first, _, _ := strings.Cut(text, "\n")
	marker := strings.TrimSpace(strings.TrimPrefix(first[len("<<"):], "-"))
	if marker == "" || nameLength(marker) != len(marker) {
		return 1
	}
	size := len(first)
	for size < len(text) {
		line, _, _ := strings.Cut(text[size+1:], "\n")
		size += 1 + len(line)
		if strings.TrimSpace(line) == marker {
			break
		}
	}
	return min(size, len(text))
}

// expandInto writes text, which begins at the given line, with its variables replaced.
func expandInto(out *strings.Builder, text string, line int, found *faults, lookup func(string) (string, bool)) {
	for {
		at := strings.IndexByte(text, '$')
		if at < 0 {
			out.WriteString(text)
			return
		}
		out.WriteString(text[:at])
		line += strings.Count(text[:at], "\n")
		text = text[at:]
		name, size := variable(text)
		text = text[size:]
		switch name {
		case "$":
			out.WriteByte('$')
			continue
		case "":
			found.add(line, "", "after ${ a variable's name and } are expected; write $$ for a plain $")
			continue
		}
		value, set := lookup(name)
		if !set {
			found.add(line, "", "the environment variable %s is not set; set it, or write $$ for a plain $", quote(name))
		}
		if out.Len()+len(value) > MaxSize {
			value = value[:min(len(value), MaxSize+1-min(out.Len(), MaxSize+1))] // Expand refuses it
		}
		out.WriteString(value)
	}
}

// variable reads the reference at the start of text and returns the name and how
// many bytes the reference takes. The name is "$" for a plain $, and empty if the
// reference is not well formed.
func variable(text string) (name string, size int) {
	if strings.HasPrefix(text, "${") {
		n := nameLength(text[2:])
		if n == 0 || !strings.HasPrefix(text[2+n:], "}") {
			return "", 2
		}
		return text[2 : 2+n], n + 3
	}
	if strings.HasPrefix(text, "$$") {
		return "$", 2
	}
	if n := nameLength(text[1:]); n > 0 {
		return text[1 : 1+n], n + 1
	}
	return "$", 1
}

func nameLength(text string) int {
	for i := range len(text) {
		c := text[i]
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			return i
		}
	}
	return len(text)
}
