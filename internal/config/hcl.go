package config

import (
	"github.com/hashicorp/hcl/hcl/scanner"
	"github.com/hashicorp/hcl/hcl/strconv"
	"github.com/hashicorp/hcl/hcl/token"
	"github.com/plastron/plastron/internal/fault"
)

// parser builds nodes from the tokens of the HCL library. The library's own
// parser is not used: it drops a key whose value is missing before a closing
// brace, accepts lists without commas, and recurses without a bound.
type parser struct {
	file    string
	scanner *scanner.Scanner
	tok     token.Token
	bad     *fault.Error // first thing the scanner could not read
}

func parseHCL(file string, src []byte) (Node, error) {
	p := &parser{file: file, scanner: scanner.New(src)}
	p.scanner.Error = func(pos token.Pos, message string) {
		if p.bad == nil {
			p.bad = invalid(file, pos.Line, "%s", message)
		}
	}
	p.next()
	root, err := p.body(Node{file: file, line: 1, kind: object}, token.EOF, 0)
	if p.bad != nil { // what the scanner says is nearer to the cause
		return Node{}, p.bad
	}
	if err != nil {
		return Node{}, err
	}
	return root, nil
}

func (p *parser) next() {
	for {
		p.tok = p.scanner.Scan()
		if p.bad != nil {
			p.tok.Type = token.EOF
		}
		if p.tok.Type != token.COMMENT {
			return
		}
	}
}

func (p *parser) fail(format string, args ...any) *fault.Error {
	return invalid(p.file, p.tok.Pos.Line, format, args...)
}

// found names the current token in an error. It never shows the text of a
// string, which may be a secret (corpus F15).
func (p *parser) found() string {
	switch p.tok.Type {
	case token.EOF:
		return "the end of the file"
	case token.STRING, token.HEREDOC:
		return "a string"
	}
	return quote(p.tok.Text)
}

// body reads items up to the token that ends them.
func (p *parser) body(block Node, end token.Type, depth int) (Node, error) {
	for p.tok.Type != end {
		if p.tok.Type == token.EOF {
			return Node{}, p.fail("the file ends inside the block that begins on line %d; } is missing", block.line)
		}
		next, err := p.item(depth)
		if err != nil {
			return Node{}, err
		}
		block.items = append(block.items, next)
		if p.tok.Type == token.COMMA { // allowed between items
			p.next()
		}
	}
	p.next()
	return block, nil
}

func (p *parser) item(depth int) (item, error) {
	type name struct {
		text string
		line int
	}
	var names []name
	for p.tok.Type == token.IDENT || p.tok.Type == token.STRING {
		text := p.tok.Text
		if p.tok.Type == token.STRING {
			var err error
			if text, err = p.unquote(); err != nil {
				return item{}, err
			}
		}
		names = append(names, name{text, p.tok.Pos.Line})
		if depth+len(names) > maxDepth {
			return item{}, p.tooDeep()
		}
		p.next()
	}
	if len(names) == 0 {
		return item{}, p.fail("a key is expected here, not %s", p.found())
	}
	key := names[0]
	var value Node
	var err error
	switch {
	case p.tok.Type == token.ASSIGN && len(names) == 1:
		p.next()
		value, err = p.value(depth + 1)
	case p.tok.Type == token.LBRACE:
		value, err = p.value(depth + len(names))
	default:
		return item{}, p.fail("after %s, = or { is expected, not %s", quote(key.text), p.found())
	}
	if err != nil {
		return item{}, err
	}
	for i := len(names) - 1; i > 0; i-- {
		inner := item{key: names[i].text, line: names[i].line, labelled: i < len(names)-1, value: value}
		value = Node{file: p.file, line: names[i].line, kind: object, items: []item{inner}}
	}
	return item{key: key.text, line: key.line, labelled: len(names) > 1, value: value}, nil
}

func (p *parser) value(depth int) (Node, error) {
	n := Node{file: p.file, line: p.tok.Pos.Line, text: p.tok.Text}
	if depth > maxDepth {
		return Node{}, p.tooDeep()
	}
	switch p.tok.Type {
	case token.LBRACE:
		p.next()
		n.kind = object
		return p.body(n, token.RBRACE, depth)
	case token.LBRACK:
		p.next()
		n.kind = list
		return p.elements(n, depth)
	case token.STRING:
		text, err := p.unquote()
		if err != nil {
			return Node{}, err
		}
		n.kind, n.text = str, text
	case token.HEREDOC:
		n.kind, n.text = str, heredoc(p.tok.Text)
	case token.NUMBER:
		n.kind = integer
	case token.FLOAT:
		n.kind = float
	case token.BOOL:
		n.kind = boolean
	case token.IDENT:
		return Node{}, p.fail("the value %s is a bare word; write it in quotes", quote(p.tok.Text))
	default:
		return Node{}, p.fail("a value is expected here, not %s", p.found())
	}
	p.next()
	return n, nil
}

func (p *parser) elements(n Node, depth int) (Node, error) {
	for p.tok.Type != token.RBRACK {
		element, err := p.value(depth + 1)
		if err != nil {
			return Node{}, err
		}
		n.list = append(n.list, element)
		if p.tok.Type == token.COMMA {
			p.next()
		} else if p.tok.Type != token.RBRACK {
			return Node{}, p.fail("in a list, a comma or ] is expected here, not %s", p.found())
		}
	}
	p.next()
	return n, nil
}

func (p *parser) tooDeep() *fault.Error {
	return p.fail("blocks and lists are nested more than %d deep", maxDepth)
}

func (p *parser) unquote() (string, error) {
	text, err := strconv.Unquote(p.tok.Text)
	if err != nil {
		return "", p.fail("a string here is not well formed; its escapes are those of Go")
	}
	return text, nil
}
