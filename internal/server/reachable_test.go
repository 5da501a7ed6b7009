package server

import (
	"errors"
	"net"
	"slices"
	"testing"
)

func TestReachable(t *testing.T) {
	named := func() (string, error) { return "Host.Example", nil }
	nameless := func() (string, error) { return "", errors.New("no name") }
	for _, tt := range []struct {
		listens  string
		hostname func() (string, error)
		want     []string
	}{
		{"192.0.2.1:8081", nameless, []string{"192.0.2.1:8081"}},
		{"[::ffff:192.0.2.1]:8081", nameless, []string{"192.0.2.1:8081"}},
		{"[2001:db8::1]:8081", nameless, []string{"[2001:db8::1]:8081"}},
		{"0.0.0.0:8081", named, []string{"host.example:8081"}},
		{"[::]:8081", named, []string{"host.example:8081"}},
		{"[::]:8081", nameless, nil},
	} {
		at, err := net.ResolveTCPAddr("tcp", tt.listens)
		if err != nil {
			t.Fatal(err)
		}
		if got := reachable(at, tt.hostname); !slices.Equal(got, tt.want) {
			t.Errorf("reachable(%s) = %v, want %v", tt.listens, got, tt.want)
		}
	}
}
