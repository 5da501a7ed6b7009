package kube

import (
	"errors"
	"strings"
	"testing"
)

func TestReadBounded(t *testing.T) {
	for text, want := range map[string]error{"": nil, "1234": nil, "12345": errTooLarge, strings.Repeat("x", 100): errTooLarge} {
		if data, err := readBounded(strings.NewReader(text), 4); !errors.Is(err, want) || len(data) > 5 || err == nil && string(data) != text {
			t.Errorf("%q: %q, %v", text, data, err)
		}
	}
}
