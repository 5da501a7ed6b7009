package serverlink

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// An address that swallows packets does not take the time of those after it.
func TestInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dialled []string
		dial := inTurn(func(ctx context.Context, address string) (net.Conn, error) {
			dialled = append(dialled, address)
			switch address {
			case "hole":
				<-ctx.Done()
				return nil, ctx.Err()
			case "closed":
				return nil, errors.New("refused")
			}
			ours, theirs := net.Pipe()
			theirs.Close()
			return ours, nil
		}, []string{"closed", "open", "never"})
		ctx, cancel := context.WithTimeout(t.Context(), dialTimeout) // as grpc gives
		defer cancel()
		began := time.Now()
		conn, err := dial(ctx, "hole")
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if took := time.Since(began); took > dialTimeout/2 || !slices.Equal(dialled, []string{"hole", "closed", "open"}) {
			t.Errorf("dialled %v in %v", dialled, took)
		}
		if _, err := inTurn(func(context.Context, string) (net.Conn, error) { return nil, net.ErrClosed }, []string{"b"})(ctx, "a"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("all closed: %v", err)
		}
	})
}
