package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"apiserver-lb/configs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestChoose(t *testing.T) {
	valid := options{runs: 5, duration: 5e9, peers: "direct,apiserver-lb,HAProxy"}
	tests := []struct {
		name         string
		change       func(*options)
		peers, cases int
		err          string
	}{
		{"all", func(*options) {}, 3, len(allCases()), ""},
		{"some", func(o *options) { o.peers, o.cases = "HAProxy", "1 in flight" }, 1, 2, ""},
		{"an unknown peer", func(o *options) { o.peers = "direct,nginx" }, 0, 0, `no "nginx"`},
		{"an unknown case", func(o *options) { o.cases = "nothing" }, 0, 0, `none has "nothing"`},
		{"no run", func(o *options) { o.runs = 0 }, 0, 0, "want at least 1"},
		{"no time", func(o *options) { o.duration = 0 }, 0, 0, "want at least 1s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := valid
			tt.change(&o)
			peers, cases, err := o.choose()
			checkError(t, err, tt.err)
			if len(peers) != tt.peers || len(cases) != tt.cases {
				t.Errorf("%d peers and %d cases, want %d and %d", len(peers), len(cases), tt.peers, tt.cases)
			}
		})
	}
}

// The balancer takes the configuration that the benchmark writes.
func TestBalancerConfig(t *testing.T) {
	dir := t.TempDir()
	p, err := newPKI(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{dir: dir, pki: p, backends: []string{"127.0.0.1:1001", "127.0.0.1:1002"}, threads: 2}
	var config bytes.Buffer
	if err := balancerTemplate.Execute(&config, l.settings("127.0.0.1:2001", "127.0.0.1:2002")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configs.Load(file, configs.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, &config)
	}
	var backends []string
	for _, s := range c.Backends.Servers {
		backends = append(backends, s.Address)
	}
	if diff := cmp.Diff(l.backends, backends); diff != "" {
		t.Errorf("backends (-want +got):\n%s", diff)
	}
}

func TestHAProxyConfig(t *testing.T) {
	l := &lab{pki: pki{ca: "/ca", proxyBundle: "/bundle"}, backends: []string{"127.0.0.1:1001", "127.0.0.1:1002"}, threads: 7}
	var config strings.Builder
	if err := haproxyTemplate.Execute(&config, l.settings("127.0.0.1:2001", "")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"    nbthread 7\n",
		"    bind 127.0.0.1:2001 ssl crt /bundle alpn h2\n",
		" verify required ca-file /ca ",
		"\n    server apiserver0 127.0.0.1:1001\n    server apiserver1 127.0.0.1:1002\n",
	} {
		if !strings.Contains(config.String(), want) {
			t.Errorf("no %q in:\n%s", want, &config)
		}
	}
}

func TestBackend(t *testing.T) {
	handler := backendHandler()
	tests := []struct {
		path, token string
		status      int
		least, most int // bytes of the body
	}{
		{smallPath, token, http.StatusOK, 180, 220},
		{largePath, token, http.StatusOK, largeSize, largeSize},
		{smallPath, "other", http.StatusUnauthorized, 1, 100},
		{"/readyz", "", http.StatusOK, 2, 2},
		{"/livez", "", http.StatusOK, 2, 2},
		{"/other", token, http.StatusNotFound, 1, 100},
	}
	for _, tt := range tests {
		r := httptest.NewRequest(http.MethodGet, tt.path, nil)
		r.Header.Set("Authorization", "Bearer "+tt.token)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if n := w.Body.Len(); w.Code != tt.status || n < tt.least || n > tt.most {
			t.Errorf("%s with token %q: %d and %d bytes, want %d and %d to %d", tt.path, tt.token, w.Code, n, tt.status, tt.least, tt.most)
		}
	}
}

// A client that trusts the CA gets through to the backend over what the
// benchmark is about: TLS 1.3, AES-128-GCM, X25519, HTTP/2.
func TestBackendLeg(t *testing.T) {
	p, err := newPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(p.backendCert, p.backendKey)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(backendHandler())
	server.TLS = backendTLS(cert)
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()

	ca, err := os.ReadFile(p.ca)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: serverName}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	if err := ask(t.Context(), &http.Client{Transport: transport}, server.URL+smallPath); err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Get(server.URL + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	if resp.ProtoMajor != 2 || resp.TLS.Version != tls.VersionTLS13 || resp.TLS.CurveID != tls.X25519 {
		t.Errorf("the backend leg is %s, %s, %s", resp.Proto, tls.VersionName(resp.TLS.Version), resp.TLS.CurveID)
	}
}
