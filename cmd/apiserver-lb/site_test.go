package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"

	"apiserver-lb/configs"
)

func TestMain(m *testing.M) {
	// What systemd or an operator told the shell of the tests is not for them.
	os.Unsetenv("NOTIFY_SOCKET")
	os.Unsetenv("CREDENTIALS_DIRECTORY")
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "APISERVER_LB_") {
			os.Unsetenv(name)
		}
	}
	goleak.VerifyTestMain(m)
}

// site is a cluster and the configuration of a balancer in front of it.
type site struct {
	*testing.T
	dir  string
	pki  *pki
	apis []*apiserver
	tree map[string]any // the configuration

	descriptors int    // that a program may have open; 0: as many as the tests
	cgroup      string // that a program is in, a directory; empty: that of the tests
}

// newSite makes a site with n backends; the last ones, gated in number, are not
// ready until their gate is closed.
func newSite(t *testing.T, n, gated int) *site {
	t.Helper()
	s := &site{T: t, dir: t.TempDir(), pki: newPKI(t)}
	var servers []any
	for i := range n {
		a := newAPIServer(t, s.pki, fmt.Sprintf("api-%d", i), i >= n-gated)
		s.apis = append(s.apis, a)
		servers = append(servers, map[string]any{"address": a.address, "name": a.name, "serverName": "kubernetes"})
	}
	servingCert, servingKey := replacePair(t, s.dir, "tls", s.pki.serving)
	proxyCert, proxyKey := replacePair(t, s.dir, "front-proxy", s.pki.proxy)
	s.tree = map[string]any{
		"listen": "127.0.0.1:16443",
		"admin":  map[string]any{"listen": "127.0.0.1:19443"},
		"tls": map[string]any{"certFile": servingCert, "keyFile": servingKey,
			"clientCAFile": replace(t, s.dir, "client-ca.crt", certPEM(s.pki.clientCA))},
		"frontProxy": map[string]any{"certFile": proxyCert, "keyFile": proxyKey},
		"backends": map[string]any{"servers": servers, "slowStart": "0s",
			"caFile": replace(t, s.dir, "cluster-ca.crt", certPEM(s.pki.clusterCA))},
		// Probes come often and are patient: only what a test does makes them fail.
		"health": map[string]any{"interval": "50ms", "suspiciousInterval": "20ms", "timeout": "1m", "rise": 1, "fall": 2},
		"log":    map[string]any{"level": "debug", "format": "json"},
	}
	return s
}

// set sets a key of the configuration, such as "shutdown.delay".
func (s *site) set(path string, value any) {
	section, key, ok := strings.Cut(path, ".")
	if !ok {
		s.tree[path] = value
		return
	}
	in, ok := s.tree[section].(map[string]any)
	if !ok {
		in = map[string]any{}
		s.tree[section] = in
	}
	in[key] = value
}

// file writes the configuration and returns its path.
func (s *site) file() string {
	s.Helper()
	b, err := yaml.Marshal(s.tree)
	if err != nil {
		s.Fatal(err)
	}
	return replace(s.T, s.dir, "apiserver-lb.yaml", b)
}

// load loads the configuration, with listeners on ports that the kernel chooses.
func (s *site) load() *configs.Config {
	s.Helper()
	c, err := s.reload()
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// reload is load for a balancer that runs.
func (s *site) reload() (*configs.Config, error) {
	c, err := configs.Load(s.file(), configs.Options{})
	if err == nil {
		c.Listen, c.Admin.Listen = "127.0.0.1:0", "127.0.0.1:0"
	}
	return c, err
}

// running is a balancer that serves.
type running struct {
	*site
	log     *logbook
	signals *signals
	ended   chan struct{} // closed when serve has returned
	err     error         // of serve, once ended is closed
	clients string        // addresses
	admin   string
}

// start serves until the test ends.
func (s *site) start() *running {
	s.Helper()
	r := &running{site: s, log: new(logbook), ended: make(chan struct{}),
		signals: &signals{end: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)}}
	c := s.load()
	go func() {
		defer close(r.ended)
		r.err = serve(context.Background(), c, r.reload, r.signals, newLog(r.log, c.Log))
		r.log.bell.ring()
	}()
	s.Cleanup(func() {
		for range cap(r.signals.end) {
			select {
			case r.signals.end <- syscall.SIGTERM:
			default:
			}
		}
		if err := r.wait(); err != nil {
			s.Errorf("serve = %v", err)
		}
		if s.Failed() {
			s.Logf("log:\n%s", r.log)
		}
	})
	started := r.log.await(s.T, said("starting"))
	r.clients, r.admin = started["listen"].(string), started["admin"].(string)
	return r
}

// startReady serves, and waits until it is ready for clients.
func (s *site) startReady() *running {
	s.Helper()
	r := s.start()
	r.log.await(s.T, said("ready for clients"))
	return r
}

// wait waits for serve's return.
func (r *running) wait() error {
	r.Helper()
	select {
	case <-r.ended:
		return r.err
	case <-time.After(patience):
		r.Fatalf("serve has not returned in %s; log:\n%s", patience, r.log)
		return nil
	}
}

// hangUp sends SIGHUP and waits for what it has to say in the log.
func (r *running) hangUp(message string) map[string]any {
	r.Helper()
	n := len(r.log.list(said(message)))
	r.signals.reload <- syscall.SIGHUP
	return r.log.awaitNth(r.T, n, said(message))
}

const reloaded = "SIGHUP: all certificate files have been read again"

// client returns a client of the balancer, with a certificate or without (nil). Its
// connections are its own.
func (r *running) client(cert *issued) *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(r.pki.clusterCA.Certificate)
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if cert != nil {
		// Also where the balancer does not name its CA.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair := cert.pair()
			return &pair, nil
		}
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	r.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// answer is what came back for a request.
type answer struct {
	code int
	body string
	err  error
}

// get asks the balancer for a path.
func (r *running) get(c *http.Client, path string, header ...string) answer {
	req, err := http.NewRequest(http.MethodGet, "https://"+r.clients+path, nil)
	if err != nil {
		return answer{err: err}
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return do(c, req)
}

func do(c *http.Client, req *http.Request) answer {
	res, err := c.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, string(b), err}
}

// mustGet asks the balancer for a path and wants 200.
func (r *running) mustGet(c *http.Client, path string, header ...string) string {
	r.Helper()
	a := r.get(c, path, header...)
	if a.err != nil || a.code != http.StatusOK {
		r.Fatalf("GET %s: %d %s, %v", path, a.code, a.body, a.err)
	}
	return a.body
}

// ask asks the admin listener for a path.
func (r *running) ask(path string) answer {
	r.Helper()
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	req, err := http.NewRequest(http.MethodGet, "http://"+r.admin+path, nil)
	if err != nil {
		r.Fatal(err)
	}
	a := do(&http.Client{Transport: transport, Timeout: patience}, req)
	if a.err != nil {
		r.Fatalf("GET %s of the admin listener: %v", path, a.err)
	}
	return a
}

// served returns the certificate that the balancer serves to a new connection.
func (r *running) served() *x509.Certificate {
	r.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", r.clients, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		r.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0]
}

// logbook keeps what newLog's JSON handler writes.
type logbook struct {
	bell bell

	mu      sync.Mutex
	text    strings.Builder
	entries []map[string]any
}

// Write takes one record; slog writes each with one call.
func (l *logbook) Write(p []byte) (int, error) {
	var e map[string]any
	if err := json.Unmarshal(p, &e); err != nil {
		return 0, err
	}
	l.mu.Lock()
	l.text.Write(p)
	l.entries = append(l.entries, e)
	l.mu.Unlock()
	l.bell.ring()
	return len(p), nil
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// list returns the entries so far for which ok holds.
func (l *logbook) list(ok func(map[string]any) bool) (found []map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if ok(e) {
			found = append(found, e)
		}
	}
	return found
}

// await waits for an entry for which ok holds.
func (l *logbook) await(t *testing.T, ok func(map[string]any) bool) map[string]any {
	t.Helper()
	return l.awaitNth(t, 0, ok)
}

// awaitNth waits for the entry that follows n others for which ok holds.
func (l *logbook) awaitNth(t *testing.T, n int, ok func(map[string]any) bool) (e map[string]any) {
	t.Helper()
	l.bell.await(t, "an entry of the log", func() bool {
		found := l.list(ok)
		if len(found) > n {
			e = found[n]
		}
		return e != nil
	})
	return e
}

// said finds entries by the beginning of their message.
func said(message string) func(map[string]any) bool {
	return func(e map[string]any) bool {
		m, _ := e["msg"].(string)
		return strings.HasPrefix(m, message)
	}
}

// became finds a backend's change to a state.
func became(a *apiserver, state string) func(map[string]any) bool {
	return func(e map[string]any) bool {
		return said("backend state changed")(e) && e["backend"] == a.name && e["to"] == state
	}
}
