package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestParseDeclarations(t *testing.T) {
	const one = "\n  - {spiffe_id: spiffe://td/w, parent_id: spiffe://td/p, selectors: [unix:uid:1]"
	entry := func(more string) string { return "entries:" + one + more + "}\n" }
	rule := func(template string) string {
		return "rules:\n  - {id_template: '" + strings.Replace(template, ",", "',", 1) + strings.Repeat("'", 1-strings.Count(template, ",")) + ", parent_id: spiffe://td/p, selectors: [a:b], trust: agent}\n"
	}
	for name, c := range map[string]struct{ text, want string }{
		"yaml":                  {entry(", hint: a"), ""},
		"json":                  {`{"entries": [{"spiffe_id": "spiffe://td/w", "parent_id": "spiffe://td/p", "selectors": ["unix:uid:1", {"type": "k8s", "value": "a:b"}]}]}`, ""},
		"json with everything":  {"{\"owner\": \"o\",\n\t\"entries\":\t[]}", ""},
		"nothing":               {"", "f is empty"},
		"a comment":             {"# nothing\n", "f is empty"},
		"only a document mark":  {"---\n", "f:2: want an object of keys and values"},
		"a list":                {"- a\n", "f:1: want an object of keys and values"},
		"no entries":            {"owner: a\n", "f:1: there are neither entries nor rules"},
		"rules alone":           {"rules: []\n", ""},
		"null":                  {"entries:\n", "f:1: entries: want a list"},
		"unknown key":           {"entries: []\nowners: a\n", `f:2: unknown key "owners"`},
		"unknown key, json":     {"{\"entries\": [],\n\n\"owners\": 1}", `f:3: unknown key "owners"`},
		"key twice":             {"entries: []\nowner: a\nowner: b\n", `f:3: the key "owner" is there already, in line 2`},
		"key twice, json":       {`{"entries": [], "entries": []}`, "f: JSON at byte"},
		"in an entry":           {entry(", hints: a"), `f:2: entries: unknown key "hints"`},
		"missing":               {"entries:\n- spiffe_id: spiffe://td/w\n  selectors: [a:b]\n", `f:2: entries: the key "parent_id" is missing`},
		"text":                  {entry(", hint: 1"), "f:2: want text; write it in quotes"},
		"text that is a date":   {entry(", hint: 2024-01-01"), "f:2: want text"},
		"text that is nothing":  {entry(", hint: "), "f:2: want text"},
		"text that is a list":   {entry(", hint: [a]"), "f:2: want text"},
		"number":                {entry(", x509_svid_ttl: a"), "f:2: want a whole number from 0 to 2147483647"},
		"number as text":        {entry(", x509_svid_ttl: '1'"), "f:2: want a whole number"},
		"negative":              {entry(", x509_svid_ttl: -1"), "f:2: want a whole number"},
		"octal":                 {entry(", x509_svid_ttl: 010"), "f:2: want a whole number"},
		"with underscores":      {entry(", x509_svid_ttl: 1_0"), "f:2: want a whole number"},
		"too large":             {entry(", x509_svid_ttl: 2147483648"), "f:2: want a whole number"},
		"fraction":              {entry(", x509_svid_ttl: 1.5"), "f:2: want a whole number"},
		"fraction, json":        {`{"entries": [{"spiffe_id": "spiffe://td/w", "parent_id": "spiffe://td/p", "selectors": ["a:b"], "x509_svid_ttl": 1e3}]}`, "f:1: want a whole number"},
		"yes":                   {entry(", admin: yes"), "f:2: want true or false"},
		"True":                  {entry(", admin: True"), "f:2: want true or false"},
		"selector":              {strings.Replace(entry(", hint: a"), "unix:uid:1", "unix", 1), `f:2: the selector "unix" has no colon`},
		"selector object":       {strings.Replace(entry(""), "unix:uid:1", "{type: a}", 1), `f:2: selectors: the key "value" is missing`},
		"selector empty":        {strings.Replace(entry(""), "unix:uid:1", "", 1), "f:2: "},
		"SPIFFE ID":             {strings.Replace(entry(""), "//td/w", "//td/../w", 1), "f:2: "},
		"the same content":      {"entries:" + one + "}" + one + ", hint: a}\n", "f:3: what stands in line 2 has this parent, SPIFFE ID or template, and selectors too"},
		"the same id":           {"entries:" + one + ", entry_id: a}" + strings.ReplaceAll(one, "uid:1", "uid:2") + ", entry_id: a}\n", `f:3: what stands in line 2 has the id "a" too`},
		"a rule":                {rule("spiffe://td/u/{unix.user}"), ""},
		"a rule and an entry":   {entry("") + rule("spiffe://td/u/{unix.user}"), ""},
		"the same rule":         {rule("spiffe://td/u/{unix.user}") + rule("spiffe://td/u/{unix.user}")[len("rules:\n"):], "f:3: what stands in line 2"},
		"rule's template":       {rule("spiffe://td/u"), "f:2: "},
		"key of entries":        {rule("spiffe://td/u/{unix.user}, admin: true"), `f:2: rules: unknown key "admin"`},
		"id of both":            {"entries:" + one + ", entry_id: a}\nrules:\n  - {id_template: 'spiffe://td/u/{unix.user}', parent_id: spiffe://td/p, selectors: [a:b], trust: agent, rule_id: a}\n", `f:4: what stands in line 2 has the id "a" too`},
		"end of a rule":         {rule("spiffe://td/u/{unix.user}, ruleExpiry: 4000000000"), ""},
		"end of an entry":       {rule("spiffe://td/u/{unix.user}, entryExpiry: 4000000000"), `f:2: rules: unknown key "entryExpiry"`},
		"anchor":                {"entries: &a []\n", "f:1: anchors and aliases are not read"},
		"alias":                 {"owner: a\nentries: *a\n", "f: unknown anchor"},
		"merge":                 {"<<: {owner: a}\nentries: []\n", `f:1: unknown key "<<"`},
		"tag":                   {"entries: !!seq []\n", "f:1: tags such as !!seq are not read"},
		"own tag":               {"entries: !mine []\n", "f:1: tags such as !mine are not read"},
		"two documents":         {"entries: []\n---\nentries: []\n", "the file holds more than one document"},
		"broken second":         {"entries: []\n---\n[", "the file holds more than one document"},
		"not YAML":              {"a: [\n", "f: line 1"},
		"not UTF-8":             {"entries: []\nowner: \xff\n", "f is not UTF-8 text"},
		"key that is an object": {"? {a: b}\n: c\n", "f:1: unknown key"},
		"after the value, json": {`{"entries": []} x`, "f: JSON at byte"},
		"lone surrogate, json":  {`{"owner": "\ud800", "entries": []}`, "f: JSON at byte"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := parseDeclarations("f", []byte(c.text))
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && err == nil:
				t.Errorf("accepted: %v", d)
			case c.want != "" && !strings.Contains(err.Error(), c.want):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// Files that are made to be expensive are refused, or read, in bounded time.
func TestParseDeclarationsBombs(t *testing.T) {
	laughs := "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := 1; i < 12; i++ {
		laughs += fmt.Sprintf("a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 10), ","))
	}
	for name, text := range map[string]string{
		"laughs": laughs, "deep": strings.Repeat("[", 200_000), "deep maps": strings.Repeat("{a: ", 50_000),
		"deep json": `{"entries": ` + strings.Repeat("[", 200_000), "many keys": strings.Repeat("? ", 50_000),
		"merges": "a: &a {b: c}\n" + strings.Repeat("d: {<<: *a}\n", 1000),
	} {
		began := time.Now()
		if _, err := parseDeclarations("f", []byte(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

func FuzzParseDeclarations(f *testing.F) {
	f.Add("owner: a\nentries:\n- {spiffe_id: spiffe://td/w, parent_id: spiffe://td/p, selectors: [unix:uid:1]}\n")
	f.Add(`{"entries": [{"spiffe_id": "spiffe://td/w", "parent_id": "spiffe://td/p", "selectors": [{"type": "a", "value": "b"}]}]}`)
	f.Add("&a a: *a\n<<: {}\n--- !!x\n")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseDeclarations("f", []byte(text))
		if err != nil && !strings.HasPrefix(err.Error(), "f") {
			t.Errorf("the error does not name the file: %v", err)
		}
		if err == nil {
			for _, one := range d.items {
				if one.line == 0 || len(one.item.GetEntry().GetSelectors())+len(one.item.GetRule().GetSelectors()) == 0 {
					t.Errorf("accepted: %v", one)
				}
			}
		}
	})
}
