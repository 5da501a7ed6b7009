// Package kube speaks to Kubernetes: to an API server and to a node's kubelet, for
// the few questions that attestation asks. It believes an answer only over a
// verified connection, up to a stated size, and keeps no copy of the cluster.
package kube

import (
	"errors"
	"fmt"
	"io"
	"os"
)

var errTooLarge = errors.New("larger than it can be")

func readBounded(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = errTooLarge
	}
	return data, err
}

// readSmall reads a file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readBounded(f, limit)
	if errors.Is(err, errTooLarge) {
		err = fmt.Errorf("%s is %w", path, err)
	}
	return data, err
}
