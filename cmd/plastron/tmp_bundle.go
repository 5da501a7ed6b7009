package main

import (
	"errors"

	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
)

func bundleDocument(*spiretypes.Bundle) ([]byte, error) { return nil, errors.New("x") }
