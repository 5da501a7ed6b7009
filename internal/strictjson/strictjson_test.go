package strictjson

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	got, err := Parse([]byte(` {"a": [1, -0.5e+3, "x\u00e9\ud83d\ude00\n", true, false, null, {}, []], "A": {"b": "/"}} `))
	want := map[string]any{
		"a": []any{json.Number("1"), json.Number("-0.5e+3"), "xé😀\n", true, false, nil, map[string]any{}, []any{}},
		"A": map[string]any{"b": "/"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Parse() = %#v, %v, want %#v", got, err, want)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, in := range map[string]string{
		"empty": "", "word": "nul", "two values": "{} {}", "trailing comma": "[1,]", "unclosed": `{"a":1`, "unclosed string": `"a`,
		"member twice": `{"a":1,"a":1}`, "member twice, escaped": `{"a":1,"\u0061":1}`, "member twice, deep": `{"x":[{"a":1,"a":2}]}`,
		"leading zero": "01", "plus": "+1", "bare point": "1.", "bare exponent": "1e", "minus": "-", "NaN": "NaN",
		"control byte": "\"\n\"", "bad UTF-8": "\"\xff\"", "lone surrogate": `"\ud800"`, "lone low surrogate": `"\udc00"`,
		"two high surrogates": `"\ud800\ud800"`, "bad escape": `"\x"`, "short escape": `"\u12"`, "signed escape": `"\u+123"`,
		"byte order mark": "\xef\xbb\xbf{}", "UTF-16": "\xff\xfe{\x00}\x00", "name without quotes": "{a:1}",
		"deep arrays": strings.Repeat("[", 100_000), "deep objects": strings.Repeat(`{"a":`, 100_000),
	} {
		if v, err := Parse([]byte(in)); err == nil {
			t.Errorf("%s: Parse() = %v, want an error", name, v)
		}
	}
	if _, err := Object([]byte("[]")); err == nil {
		t.Errorf("Object([]) succeeds")
	}
}

// FuzzParse checks that what is accepted is JSON for encoding/json too, with
// the same meaning.
func FuzzParse(f *testing.F) {
	for _, s := range []string{`{"a":[1,2.5e-3,"\u00e9\ud83d\ude00"],"b":null}`, `[]`, `"\ud800"`, `{"a":1,"a":2}`, `-0`, ` true `} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(data)
		if err != nil {
			return
		}
		d := json.NewDecoder(strings.NewReader(string(data)))
		d.UseNumber()
		var want any
		if err := d.Decode(&want); err != nil {
			t.Fatalf("accepted what encoding/json refuses: %v", err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("Parse() = %#v, encoding/json %#v", got, want)
		}
	})
}
