package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const (
	smallPath = "/api/v1/namespaces/default/configmaps/x"
	largePath = "/api/v1/configmaps"
	watchPath = "/api/v1/namespaces/default/configmaps"
	// token is the credential that requests carry and the backends ask for, so
	// that a proxy which loses it is noticed.
	token     = "bench"
	largeSize = 1 << 20
	// backendCount is how many backends stand behind a proxy, as in a cluster
	// with a control plane of three.
	backendCount = 3
	// maxStreams is what a kube-apiserver allows per connection: the default
	// of --http2-max-streams-per-connection, apiserver/pkg/server/config.go.
	maxStreams = 100
)

// small is a typical small object.
var small = []byte(`{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"x","namespace":"default",` +
	`"uid":"6c1f2a52-6f0f-4c39-8a3e-0d7f3b6b4c11","resourceVersion":"4711"},"data":{"key":"` + strings.Repeat("v", 32) + `"}}`)

// backendHandler answers as a kube-apiserver would, from memory.
func backendHandler() http.Handler {
	large := []byte(`{"kind":"ConfigMapList","apiVersion":"v1","items":["`)
	const end = `"]}`
	large = append(large, strings.Repeat("x", largeSize-len(large)-len(end))...)
	large = append(large, end...)

	mux := http.NewServeMux()
	answer := func(path string, body []byte) {
		length := strconv.Itoa(len(body))
		mux.HandleFunc("GET "+path, authorized(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", length)
			_, _ = w.Write(body)
		}))
	}
	answer(smallPath, small)
	answer(largePath, large)
	mux.HandleFunc("GET "+watchPath, authorized(serveWatch))
	ok := func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }
	mux.HandleFunc("GET /livez", ok)
	mux.HandleFunc("GET /readyz", ok)
	return mux
}

// authorized refuses requests that have lost their token on the way.
func authorized(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+token {
			http.Error(w, "the bearer token is missing", http.StatusUnauthorized)
			return
		}
		next(w, r)
	}
}

// runBackends serves the backends until stdin ends, which is when the parent
// is gone. It prints their addresses as a JSON list.
func runBackends(certFile, keyFile string) error {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           backendHandler(),
		ReadHeaderTimeout: 10 * time.Second,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		TLSConfig:         backendTLS(cert),
		ErrorLog:          log.New(quietLog{os.Stderr}, "bench: backends: ", 0),
	}
	var addresses []string
	failed := make(chan error, backendCount+1)
	for range backendCount {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addresses = append(addresses, l.Addr().String())
		go func() { failed <- server.ServeTLS(l, "", "") }()
	}
	if err := json.NewEncoder(os.Stdout).Encode(addresses); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		failed <- server.Close()
	}()
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// quietLog leaves out that clients go away while they connect, as proxies do
// when they end.
type quietLog struct{ w io.Writer }

func (q quietLog) Write(line []byte) (int, error) {
	for _, gone := range []string{"EOF\n", "connection reset by peer\n", "broken pipe\n"} {
		if bytes.HasSuffix(line, []byte(gone)) {
			return len(line), nil
		}
	}
	return q.w.Write(line)
}

// startBackends starts this program again as the backends.
func startBackends(ctx context.Context, p pki) (addresses []string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, self, "backends", p.backendCert, p.backendKey)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop = func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	}
	if err := json.NewDecoder(stdout).Decode(&addresses); err != nil {
		stop()
		return nil, nil, fmt.Errorf("the backends did not start: %w", err)
	}
	return addresses, stop, nil
}
