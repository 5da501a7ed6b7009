package memkeys

import (
	"testing"

	"github.com/plastron/plastron/internal/keys"
	"github.com/plastron/plastron/internal/keys/keystest"
)

func TestContract(t *testing.T) {
	keystest.Run(t, func(*testing.T) keys.Config { return &Config{} })
}
