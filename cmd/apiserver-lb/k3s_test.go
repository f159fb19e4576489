package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"apiserver-lb/configs"
)

// organization puts a certificate's user into a group.
func organization(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.Subject.Organization = []string{name} }
}

// intermediate makes an authority that another issues.
func intermediate(t *testing.T, by *issued, name string) *issued {
	t.Helper()
	return issue(t, by, name, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
	})
}

// ecPEM is a key as k3s writes it.
func (i *issued) ecPEM(t *testing.T) []byte {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(i.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// k3sHost is /var/lib/rancher/k3s/server/tls of a server, after the names and the contents in
// k3s' source (pkg/daemons/control/deps): authorities of their own for clients, servers and
// the front proxy, certificates that are followed by their authority's, kubeconfigs that name
// files. serverCA begins with the authority that issues, its issuers follow.
func k3sHost(t *testing.T, p *pki, serverCA ...*issued) string {
	t.Helper()
	admin := issue(t, p.clientCA, "system:admin", organization("system:masters"))
	cluster := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if certs := r.TLS.PeerCertificates; len(certs) == 0 || !certs[0].Equal(admin.Certificate) {
			w.WriteHeader(http.StatusUnauthorized) // --anonymous-auth=false
			return
		}
		if r.URL.Path == endpointSlices {
			_, _ = io.WriteString(w, threeSlices)
		}
	}))
	cluster.TLS = &tls.Config{Certificates: []tls.Certificate{issue(t, serverCA[0], "kube-apiserver", server("kubernetes")).pair()}, ClientAuth: tls.RequestClientCert}
	cluster.StartTLS()
	t.Cleanup(cluster.Close)

	files := map[string][]byte{"tls/server-ca.crt": certPEM(serverCA...), "tls/server-ca.key": serverCA[0].ecPEM(t), "tls/server-ca.nochain.crt": certPEM(serverCA[0])}
	for name, ca := range map[string]*issued{"client-ca": p.clientCA, "request-header-ca": p.proxyCA} {
		files["tls/"+name+".crt"], files["tls/"+name+".key"] = certPEM(ca), ca.ecPEM(t)
	}
	for name, c := range map[string]*issued{"client-admin": admin, "client-kube-apiserver": issue(t, p.clientCA, "system:apiserver", organization("system:masters"))} {
		files["tls/"+name+".crt"], files["tls/"+name+".key"] = certPEM(c, p.clientCA), c.ecPEM(t)
	}
	proxy := issue(t, p.proxyCA, "system:auth-proxy")
	files["tls/client-auth-proxy.crt"], files["tls/client-auth-proxy.key"] = certPEM(proxy, p.proxyCA), proxy.ecPEM(t)
	dir := layOut(t, files)
	tlsDir := filepath.Join(dir, "tls")
	if err := os.Mkdir(filepath.Join(dir, "cred"), 0o700); err != nil {
		t.Fatal(err)
	}
	replace(t, filepath.Join(dir, "cred"), "admin.kubeconfig", fmt.Appendf(nil, `apiVersion: v1
clusters:
- cluster:
    server: %s
    certificate-authority: %[2]s/server-ca.crt
  name: local
contexts:
- context:
    cluster: local
    namespace: default
    user: user
  name: Default
current-context: Default
kind: Config
preferences: {}
users:
- name: user
  user:
    client-certificate: %[2]s/client-admin.crt
    client-key: %[2]s/client-admin.key
`, cluster.URL, tlsDir))
	return tlsDir
}

// TestInitK3s: the serving certificate is one that agents take too, who come through a balancer
// on their loopback address, and that whoever knows the root alone can verify.
func TestInitK3s(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	host := k3sHost(t, p, intermediate(t, p.clusterCA, "k3s-server-ca"), p.clusterCA)
	dir := t.TempDir()
	out, serving := filepath.Join(dir, "lb.yaml"), filepath.Join(dir, "serving")
	runProgram("init", "--from", host, "--serving-cert", serving, "--san", "lb.example.com", "--san", "127.0.0.1", "--output", out).wants(t, exitOK, nil, []string{"k3s agents"})
	if got := runProgram("check", "--config", out); got.code != exitOK {
		t.Errorf("check: %s", got.stderr)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(serving, "tls.crt"), filepath.Join(serving, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(p.clusterCA.Certificate)
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		between.AddCert(c)
	}
	for _, name := range []string{"lb.example.com", "127.0.0.1", "::1"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(pair.Certificate) != 2 || len(pair.Leaf.IPAddresses) != 2 {
		t.Errorf("%d certificates for %v, want two, the root left out, and each name once", len(pair.Certificate), pair.Leaf.IPAddresses)
	}

	if err := os.Remove(filepath.Join(host, "client-auth-proxy.key")); err != nil {
		t.Fatal(err)
	}
	runProgram("init", "--from", host, "--serving-cert", serving, "--output", out, "--force").wants(t, exitOK, nil, []string{"client-auth-proxy.crt or its key is missing", "--anonymous-auth=false", "health.tokenFile"})
	c, err := configs.Load(out, configs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if c.FrontProxy.Configured() {
		t.Errorf("%+v, want no front proxy", c.FrontProxy)
	}
}

// k3sSupervisor stands for what a k3s server has on the port of its kube-apiserver: it
// remembers what reaches it, and echoes what comes through a tunnel.
type k3sSupervisor struct {
	address string

	mu   sync.Mutex
	last *http.Request // of the last path that is not /readyz
	body string
}

func newK3sSupervisor(t *testing.T, p *pki) *k3sSupervisor {
	t.Helper()
	s := new(k3sSupervisor)
	srv := httptest.NewUnstartedServer(s)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{p.backend.pair()}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	s.address = srv.Listener.Addr().String()
	return s
}

func (s *k3sSupervisor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/readyz" {
		return
	}
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	s.last, s.body = r, string(body)
	s.mu.Unlock()
	if r.Header.Get("Upgrade") == "" {
		_, _ = io.WriteString(w, r.URL.Path)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err == nil {
		_, _ = io.Copy(conn, buffered)
	}
}

// TestK3sAgent: what a k3s agent asks a server for, beside kube-apiserver's, arrives as it does
// directly (k3s, pkg/clientaccess, pkg/agent/config and pkg/agent/tunnel), but that a
// certificate wins over the password beside it.
func TestK3sAgent(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, 0)
	supervisor := newK3sSupervisor(t, s.pki)
	s.set("backends.servers", []any{map[string]any{"address": supervisor.address, "serverName": "kubernetes"}})
	r := s.startReady()
	node := issue(t, s.pki.clientCA, "system:node:agent-1", organization("system:nodes"))
	expired := issue(t, s.pki.clientCA, "system:node:agent-1", organization("system:nodes"), until(time.Now().Add(-time.Minute)))
	const password = "Basic bm9kZTpzM2NyZXQ=" // node:s3cret
	names := http.Header{"K3s-Node-Name": {"agent-1"}, "K3s-Node-Password": {"p4ss"}, "K3s-Node-Ip": {"10.0.0.21"}}

	tests := []struct {
		name, method, path string
		certificate        *issued
		authorization      string
		header             http.Header
		body               string

		code int
		user string // asserted; then the password is dropped
	}{
		{"authorities", "GET", "/cacerts", nil, "", nil, "", 200, ""},
		{"ping", "GET", "/ping", nil, "", nil, "", 200, ""},
		{"configuration", "GET", "/v1-k3s/config", nil, password, nil, "", 200, ""},
		{"certificate", "POST", "/v1-k3s/serving-kubelet.crt", nil, password, names, "\x30\x82 a request in DER \x00\xff", 200, ""},
		{"certificate and password", "POST", "/v1-k3s/client-kubelet.crt", node, password, names, "\x30\x82", 200, "system:node:agent-1"},
		{"certificate alone", "GET", "/v1-k3s/readyz", node, "", nil, "", 200, "system:node:agent-1"},
		{"expired certificate and password", "GET", "/v1-k3s/config", expired, password, nil, "", 401, ""},
	}
	for _, tt := range tests {
		for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
			t.Run(tt.name+" "+protocol, func(t *testing.T) {
				c := r.client(tt.certificate)
				if protocol == "HTTP/1.1" {
					c.Transport.(*http.Transport).Protocols = new(http.Protocols)
					c.Transport.(*http.Transport).Protocols.SetHTTP1(true)
				}
				req, err := http.NewRequest(tt.method, "https://"+r.clients+tt.path, strings.NewReader(tt.body))
				if err != nil {
					t.Fatal(err)
				}
				maps.Copy(req.Header, tt.header)
				if tt.authorization != "" {
					req.Header.Set("Authorization", tt.authorization)
				}
				supervisor.mu.Lock()
				supervisor.last = nil
				supervisor.mu.Unlock()
				res, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				answer, err := io.ReadAll(res.Body)
				if err != nil || res.StatusCode != tt.code || res.Proto != protocol {
					t.Fatalf("%s %d %q, %v", res.Proto, res.StatusCode, answer, err)
				}
				supervisor.mu.Lock()
				got, body := supervisor.last, supervisor.body
				supervisor.mu.Unlock()
				if tt.code != http.StatusOK {
					if got != nil {
						t.Errorf("the server saw %s", got.URL)
					}
					return
				}
				want := tt.authorization
				if tt.user != "" {
					want = ""
				}
				if got.URL.Path != tt.path || string(answer) != tt.path || body != tt.body || got.Header.Get("Authorization") != want || got.Header.Get("X-Remote-User") != tt.user {
					t.Errorf("%s %q, %v, answer %q; want Authorization %q and user %q", got.URL, body, got.Header, answer, want, tt.user)
				}
				for name, values := range tt.header {
					if !slices.Equal(got.Header[name], values) {
						t.Errorf("%s: %q, want %q", name, got.Header[name], values)
					}
				}
			})
		}
	}

	t.Run("tunnel", func(t *testing.T) {
		config := r.client(node).Transport.(*http.Transport).TLSClientConfig.Clone()
		config.NextProtos = []string{"http/1.1"}
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", r.clients, config)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /v1-k3s/connect HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: bm9uY2Vub25jZW5vbmNlMQ==\r\n\r\n", r.clients)
		buffered := bufio.NewReader(conn)
		res, err := http.ReadResponse(buffered, nil)
		if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%+v, %v", res, err)
		}
		for _, frame := range []string{"\x82\x04dial", "\x82\x04data"} {
			if _, err := io.WriteString(conn, frame); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(frame))
			if _, err := io.ReadFull(buffered, got); err != nil || string(got) != frame {
				t.Fatalf("%q, %v, want %q", got, err, frame)
			}
		}
		supervisor.mu.Lock()
		defer supervisor.mu.Unlock()
		if got := supervisor.last; got.Header.Get("X-Remote-User") != "system:node:agent-1" || !slices.Equal(got.Header["X-Remote-Group"], []string{"system:nodes"}) {
			t.Errorf("the server saw %v", got.Header)
		}
	})
}

// TestK3sAgentGuarded: the password of an agent is nothing to kube-apiserver, so where the
// anonymous are refused agents cannot join, as configs/deployments/README.md says.
func TestK3sAgentGuarded(t *testing.T) {
	t.Parallel()
	s := newSite(t, 0, 0)
	s.set("backends.servers", []any{map[string]any{"address": newK3sSupervisor(t, s.pki).address, "serverName": "kubernetes"}})
	s.set("guards.anonymous", map[string]any{"refuse": true, "paths": []any{"/cacerts"}})
	r := s.startReady()
	r.mustGet(r.client(nil), "/cacerts")
	if a := r.get(r.client(nil), "/v1-k3s/config", "Authorization", "Basic bm9kZTpzM2NyZXQ="); a.code != http.StatusUnauthorized {
		t.Errorf("%+v, want 401", a)
	}
}
