//go:build !linux

package agent

import "errors"

func bootID() (string, error) { return "", errors.ErrUnsupported }

func isMemory(string) (bool, error) { return false, nil }
