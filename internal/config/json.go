package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"

	"github.com/plastron/plastron/internal/fault"
)

// jsonParser builds nodes from JSON. The HCL library's JSON parser is not used:
// it drops booleans and lists inside lists and never asks for closing braces.
type jsonParser struct {
	file    string
	src     []byte
	decoder *json.Decoder
	counted int // src up to here has `lines` line ends
	lines   int
}

func parseJSON(file string, src []byte) (Node, error) {
	p := &jsonParser{file: file, src: src, decoder: json.NewDecoder(bytes.NewReader(src))}
	p.decoder.UseNumber()
	root, err := p.value(0)
	if err != nil {
		return Node{}, err
	}
	if _, err := p.decoder.Token(); err != io.EOF {
		return Node{}, p.fail("something follows the closing brace of the file")
	}
	return root, nil
}

// line returns the line of the token just read.
func (p *jsonParser) line() int {
	if end := min(int(p.decoder.InputOffset()), len(p.src)); end > p.counted {
		p.lines += bytes.Count(p.src[p.counted:end], []byte("\n"))
		p.counted = end
	}
	return p.lines + 1
}

func (p *jsonParser) fail(format string, args ...any) *fault.Error {
	return invalid(p.file, p.line(), format, args...)
}

func (p *jsonParser) token() (json.Token, error) {
	tok, err := p.decoder.Token()
	if err == nil {
		return tok, nil
	}
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		return nil, invalid(p.file, lineAt(p.src, int(syntax.Offset)), "%v", syntax)
	}
	return nil, p.fail("the file ends in the middle of a value")
}

func (p *jsonParser) value(depth int) (Node, error) {
	tok, err := p.token()
	if err != nil {
		return Node{}, err
	}
	n := Node{file: p.file, line: p.line()}
	if depth > maxDepth {
		return Node{}, p.fail("blocks and lists are nested more than %d deep", maxDepth)
	}
	switch v := tok.(type) {
	case json.Delim:
		if v == '{' {
			n.kind = object
			return p.object(n, depth)
		}
		n.kind = list
		return p.array(n, depth)
	case string:
		n.kind, n.text = str, v
	case json.Number:
		n.kind, n.text = integer, v.String()
		if bytes.ContainsAny([]byte(n.text), ".eE") {
			n.kind = float
		}
	case bool:
		n.kind, n.text = boolean, "false"
		if v {
			n.text = "true"
		}
	default:
		return Node{}, p.fail("null has no meaning here; leave the key out")
	}
	return n, nil
}

func (p *jsonParser) object(n Node, depth int) (Node, error) {
	for p.decoder.More() {
		tok, err := p.token()
		if err != nil {
			return Node{}, err
		}
		key, ok := tok.(string)
		if !ok {
			return Node{}, p.fail("a key in quotes is expected here")
		}
		line := p.line()
		value, err := p.value(depth + 1)
		if err != nil {
			return Node{}, err
		}
		n.items = append(n.items, item{key: key, line: line, value: value})
	}
	_, err := p.token() // the closing brace
	return n, err
}

func (p *jsonParser) array(n Node, depth int) (Node, error) {
	for p.decoder.More() {
		element, err := p.value(depth + 1)
		if err != nil {
			return Node{}, err
		}
		n.list = append(n.list, element)
	}
	_, err := p.token() // the closing bracket
	return n, err
}
