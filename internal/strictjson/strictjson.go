// Package strictjson reads JSON on which trust depends. encoding/json lets pass
// what two readers may understand differently: a member twice, names that
// differ in case, broken UTF-8. Here a member name may be there once, names are
// compared byte by byte, text is valid UTF-8 without lone surrogates, nothing
// follows the value, and nesting is bounded. The size is bounded by the caller.
package strictjson

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds the nesting; no document of ours is deeper than ten.
const maxDepth = 32

// Parse reads exactly one JSON value: map[string]any, []any, string,
// json.Number, bool or nil. Numbers keep their text.
func Parse(data []byte) (any, error) {
	p := parser{data: data}
	v, err := p.value(maxDepth)
	if err != nil {
		return nil, fmt.Errorf("JSON at byte %d: %w", p.pos, err)
	}
	if p.space(); p.pos != len(p.data) {
		return nil, fmt.Errorf("JSON at byte %d: something follows the value", p.pos)
	}
	return v, nil
}

// Object reads exactly one JSON object.
func Object(data []byte) (map[string]any, error) {
	v, err := Parse(data)
	if err != nil {
		return nil, err
	}
	o, ok := v.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("JSON: not an object")
	}
	return o, nil
}

type parser struct {
	data []byte
	pos  int
}

var errSyntax = errors.New("syntax error")

func (p *parser) space() {
	for p.pos < len(p.data) && strings.IndexByte(" \t\r\n", p.data[p.pos]) >= 0 {
		p.pos++
	}
}

// take consumes c, after white space.
func (p *parser) take(c byte) bool {
	p.space()
	if p.pos < len(p.data) && p.data[p.pos] == c {
		p.pos++
		return true
	}
	return false
}

func (p *parser) value(depth int) (any, error) {
	if depth == 0 {
		return nil, fmt.Errorf("nested too deep")
	}
	p.space()
	if p.pos == len(p.data) {
		return nil, errSyntax
	}
	switch c := p.data[p.pos]; {
	case c == '{':
		return p.object(depth)
	case c == '[':
		return p.array(depth)
	case c == '"':
		return p.string()
	case c == '-' || '0' <= c && c <= '9':
		return p.number()
	}
	for word, v := range map[string]any{"true": true, "false": false, "null": nil} {
		if strings.HasPrefix(string(p.data[p.pos:min(p.pos+5, len(p.data))]), word) {
			p.pos += len(word)
			return v, nil
		}
	}
	return nil, errSyntax
}

func (p *parser) object(depth int) (any, error) {
	p.pos++ // '{'
	o := map[string]any{}
	if p.take('}') {
		return o, nil
	}
	for {
		p.space()
		name, err := p.string()
		if err != nil {
			return nil, err
		}
		if _, twice := o[name]; twice {
			return nil, fmt.Errorf("a member is there twice")
		}
		if !p.take(':') {
			return nil, errSyntax
		}
		if o[name], err = p.value(depth - 1); err != nil {
			return nil, err
		}
		if p.take('}') {
			return o, nil
		}
		if !p.take(',') {
			return nil, errSyntax
		}
	}
}

func (p *parser) array(depth int) (any, error) {
	p.pos++ // '['
	a := []any{}
	if p.take(']') {
		return a, nil
	}
	for {
		v, err := p.value(depth - 1)
		if err != nil {
			return nil, err
		}
		a = append(a, v)
		if p.take(']') {
			return a, nil
		}
		if !p.take(',') {
			return nil, errSyntax
		}
	}
}

// number takes the longest number of the JSON grammar.
func (p *parser) number() (any, error) {
	start := p.pos
	digits := func() int {
		from := p.pos
		for p.pos < len(p.data) && '0' <= p.data[p.pos] && p.data[p.pos] <= '9' {
			p.pos++
		}
		return p.pos - from
	}
	next := func(set string) bool {
		if p.pos < len(p.data) && strings.IndexByte(set, p.data[p.pos]) >= 0 {
			p.pos++
			return true
		}
		return false
	}
	next("-")
	zero := p.pos < len(p.data) && p.data[p.pos] == '0'
	if n := digits(); n == 0 || zero && n > 1 {
		return nil, errSyntax
	}
	if next(".") && digits() == 0 {
		return nil, errSyntax
	}
	if next("eE") {
		next("+-")
		if digits() == 0 {
			return nil, errSyntax
		}
	}
	return json.Number(p.data[start:p.pos]), nil
}

func (p *parser) string() (string, error) {
	if p.pos == len(p.data) || p.data[p.pos] != '"' {
		return "", errSyntax
	}
	p.pos++
	var b []byte
	for p.pos < len(p.data) {
		switch c := p.data[p.pos]; {
		case c == '"':
			p.pos++
			return string(b), nil
		case c < 0x20:
			return "", fmt.Errorf("control byte in a string")
		case c == '\\':
			r, err := p.escape()
			if err != nil {
				return "", err
			}
			b = utf8.AppendRune(b, r)
		default:
			r, n := utf8.DecodeRune(p.data[p.pos:])
			if r == utf8.RuneError && n == 1 {
				return "", fmt.Errorf("text is not UTF-8")
			}
			b = append(b, p.data[p.pos:p.pos+n]...)
			p.pos += n
		}
	}
	return "", errSyntax
}

func (p *parser) escape() (rune, error) {
	if p.pos+1 >= len(p.data) {
		return 0, errSyntax
	}
	c := p.data[p.pos+1]
	if c == 'u' {
		r, err := p.unit()
		if err != nil || !utf16.IsSurrogate(r) {
			return r, err
		}
		if p.pos+1 < len(p.data) && p.data[p.pos] == '\\' && p.data[p.pos+1] == 'u' {
			low, err := p.unit()
			if err != nil {
				return 0, err
			}
			if r = utf16.DecodeRune(r, low); r != utf8.RuneError {
				return r, nil
			}
		}
		return 0, fmt.Errorf("lone surrogate")
	}
	i := strings.IndexByte(`"\/bfnrt`, c)
	if i < 0 {
		return 0, errSyntax
	}
	p.pos += 2
	return rune("\"\\/\b\f\n\r\t"[i]), nil
}

// unit reads \uXXXX.
func (p *parser) unit() (rune, error) {
	if p.pos+6 > len(p.data) {
		return 0, errSyntax
	}
	n, err := strconv.ParseUint(string(p.data[p.pos+2:p.pos+6]), 16, 16)
	if err != nil {
		return 0, errSyntax
	}
	p.pos += 6
	return rune(n), nil
}
