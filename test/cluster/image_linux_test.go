//go:build kubernetes

package cluster_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
)

// busyboxArchive writes the one image that is not ours, under two names: that of the
// image that keeps a pod's namespaces, by a shell that waits, and its own.
func busyboxArchive(path string) error {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	programs := map[string][]byte{}
	for _, name := range []string{"sh", "sleep", "mkdir", "chmod", "chown"} {
		programs["bin/"+name] = busybox
	}
	layer, err := archive(programs)
	if err != nil {
		return err
	}
	config := fmt.Appendf(nil, `{"architecture":%q,"os":"linux","config":{"Env":["PATH=/bin"],"Cmd":["sh","-c","trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done"]},
		"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, runtime.GOARCH, sha256.Sum256(layer))
	manifest := fmt.Appendf(nil, `[{"Config":"config.json","RepoTags":[%q,%q],"Layers":["layer.tar"]}]`, pauseImage, busyboxImage)
	image, err := archive(map[string][]byte{"manifest.json": manifest, "config.json": config, "layer.tar": layer})
	if err != nil {
		return err
	}
	return os.WriteFile(path, image, 0o644)
}

func archive(files map[string][]byte) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}
