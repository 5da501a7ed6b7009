// Package engine is a container engine, Docker's or podman's, as far as it tells
// what a container was started as: GET /containers/ID/json on a Unix socket, with
// or without a version of the API. It refuses what a real one refuses, and counts.
package engine

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
)

// Container is a container of the engine.
type Container struct {
	ID, Image, ImageDigest string
	Labels                 map[string]string
	Env                    []string
}

// Engine is a running fake. Its methods may be called concurrently.
type Engine struct {
	Socket string

	t      testing.TB
	server *http.Server

	mu         sync.Mutex // guards everything below
	containers map[string]Container
	requests   int
	answer     http.HandlerFunc
}

// New starts an engine. It stops with the test.
func New(t testing.TB) *Engine {
	t.Helper()
	dir, err := os.MkdirTemp("", "e") // short: a socket lives in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &Engine{Socket: filepath.Join(dir, "engine.sock"), t: t, containers: map[string]Container{}}
	e.Revive()
	t.Cleanup(e.Kill)
	return e
}

// Put adds a container.
func (e *Engine) Put(c Container) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers[c.ID] = c
}

// Requests returns how many requests came.
func (e *Engine) Requests() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.requests
}

// Answer replaces what is answered; nil: the truth.
func (e *Engine) Answer(with http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answer = with
}

// Kill stops listening and removes the socket.
func (e *Engine) Kill() { e.server.Close() }

// Revive listens again.
func (e *Engine) Revive() {
	e.t.Helper()
	l, err := net.Listen("unix", e.Socket)
	if err != nil {
		e.t.Fatal(err)
	}
	e.server = &http.Server{Handler: http.HandlerFunc(e.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go e.server.Serve(l)
}

var inspect = regexp.MustCompile(`^(?:/v1\.([0-9]+))?/containers/([0-9a-f]{64})/json$`)

func (e *Engine) serve(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.requests++
	answer := e.answer
	m := inspect.FindStringSubmatch(r.URL.Path)
	var c Container
	known := false
	if m != nil {
		c, known = e.containers[m[2]]
	}
	e.mu.Unlock()
	say := func(code int, what any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(what)
	}
	switch {
	case answer != nil:
		answer(w, r)
	case m == nil || r.Method != http.MethodGet:
		say(http.StatusNotFound, map[string]string{"message": "page not found"})
	case len(m[1]) > 2 || m[1] > "41":
		say(http.StatusBadRequest, map[string]string{"message": "client version 1." + m[1] + " is too new. Maximum supported API version is 1.41"})
	case !known:
		say(http.StatusNotFound, map[string]string{"message": fmt.Sprintf("No such container: %s", m[2])})
	default:
		say(http.StatusOK, map[string]any{
			"Id": c.ID, "Created": "2026-01-02T03:04:05Z", "Name": "/web", "Image": c.ImageDigest, "State": map[string]any{"Status": "running", "Pid": 1},
			"Config": map[string]any{"Hostname": c.ID[:12], "Image": c.Image, "Labels": c.Labels, "Env": c.Env}, "HostConfig": map[string]any{"NetworkMode": "none"},
		})
	}
}
