package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// patience bounds waiting for what should happen: what takes longer hangs.
const patience = 20 * time.Second

// bell wakes those who wait for a change of something.
type bell struct {
	mu   sync.Mutex
	rung chan struct{} // guarded by mu; closed by ring
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung != nil {
		close(b.rung)
		b.rung = nil
	}
}

func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung == nil {
		b.rung = make(chan struct{})
	}
	return b.rung
}

// await waits until ok, which is asked again after each ring.
func (b *bell) await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		rung := b.next()
		if ok() {
			return
		}
		select {
		case <-rung:
		case <-timeout.C:
			t.Fatalf("not in %s: %s", patience, what)
		}
	}
}

// eventually asks again and again, for what tells nobody that it changes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not in %s: %s", patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// seen is a request as a kube-apiserver got it.
type seen struct {
	Path   string
	Remote string // tells connections apart
	Peer   string // id of the client certificate, empty without
	Header http.Header
}

// apiserver is a small fake of kube-apiserver.
type apiserver struct {
	name, address string
	server        *http.Server
	gate          chan struct{} // /readyz answers once it is closed
	release       chan struct{} // so do requests for the object "held"
	bell          bell

	mu            sync.Mutex
	readyz, livez int      // status codes
	requests      []seen   // all, in order
	endpoints     []string // the kube-apiservers that are ready, for slicesPath
	lose          int      // requests that get no answer, but the end of their connection
}

// newAPIServer starts a fake that ends with the test. With gated, its /readyz
// waits for the gate.
func newAPIServer(t *testing.T, p *pki, name string, gated bool) *apiserver {
	t.Helper()
	a := &apiserver{name: name, gate: make(chan struct{}), release: make(chan struct{}), readyz: 200, livez: 200}
	if !gated {
		close(a.gate)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.address = l.Addr().String()
	// HTTP/1.1, so that a connection can be ended in the middle.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	a.server = &http.Server{
		Handler:   a,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{p.backend.pair()}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12},
		Protocols: &protocols,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- a.server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		a.server.Close()
		<-served
	})
	return a
}

// set changes the answers to /readyz and /livez.
func (a *apiserver) set(readyz, livez int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.readyz, a.livez = readyz, livez
}

// list returns the requests so far for which ok holds.
func (a *apiserver) list(ok func(seen) bool) []seen {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(a.requests), func(r seen) bool { return !ok(r) })
}

// await waits for a request, from the number of those given on, for which ok holds.
func (a *apiserver) await(t *testing.T, what string, from int, ok func(seen) bool) (r seen) {
	t.Helper()
	a.bell.await(t, what, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		i := slices.IndexFunc(a.requests[min(from, len(a.requests)):], ok)
		if i >= 0 {
			r = a.requests[from+i]
		}
		return i >= 0
	})
	return r
}

// count returns the number of requests so far.
func (a *apiserver) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.requests)
}

func to(path string) func(seen) bool { return func(r seen) bool { return r.Path == path } }

const (
	objectPath = "/api/v1/namespaces/default/configmaps/settings"
	heldPath   = "/api/v1/namespaces/default/configmaps/held"
	watchPath  = "/api/v1/namespaces/default/configmaps"
)

func (a *apiserver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := seen{Path: r.URL.Path, Remote: r.RemoteAddr, Header: r.Header.Clone()}
	expired := false
	if certs := r.TLS.PeerCertificates; len(certs) > 0 {
		s.Peer = certs[0].SerialNumber.String()
		expired = time.Now().After(certs[0].NotAfter)
	}
	a.mu.Lock()
	a.requests = append(a.requests, s)
	readyz, livez := a.readyz, a.livez
	lose := a.lose > 0 && r.URL.Path == objectPath
	if lose {
		a.lose--
	}
	a.mu.Unlock()
	a.bell.ring()

	switch {
	case expired:
		// An error of one authenticator rules out the anonymous user.
		w.WriteHeader(http.StatusUnauthorized)
	case lose:
		c, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			c.Close()
		}
	case r.URL.Path == "/readyz":
		select {
		case <-a.gate:
			check(w, readyz)
		case <-r.Context().Done():
		}
	case r.URL.Path == "/livez":
		check(w, livez)
	case r.URL.Path == slicesPath:
		a.serveSlices(w, r)
	case r.URL.Path == watchPath:
		fmt.Fprintln(w, `{"type":"ADDED","object":{"kind":"ConfigMap"}}`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case r.URL.Path == heldPath:
		select {
		case <-a.release:
			a.object(w, r)
		case <-r.Context().Done():
		}
	default:
		a.object(w, r)
	}
}

// check answers for /readyz and /livez.
func check(w http.ResponseWriter, code int) {
	w.WriteHeader(code)
	if code == http.StatusOK {
		fmt.Fprint(w, "ok")
		return
	}
	fmt.Fprint(w, "[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed\n")
}

func (a *apiserver) object(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":%q},"data":{"from":%q}}`,
		r.Header.Get("X-Remote-User"), a.name)
}
