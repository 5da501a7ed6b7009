package serverapi_test

import (
	"net/url"
	"testing"
)

func uris(t *testing.T, texts ...string) (out []*url.URL) {
	t.Helper()
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, u)
	}
	return out
}
