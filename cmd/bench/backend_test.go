package main

import (
	"bytes"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

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
		{watchPath, token, http.StatusBadRequest, 1, 100},
		{watchPath + "?watch=true&every=-1s", token, http.StatusBadRequest, 1, 100},
		{idleWatch, "other", http.StatusUnauthorized, 1, 100},
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

// testBackend serves the backend over what the benchmark is about, and returns
// its address and the configuration of a client's leg.
func testBackend(t *testing.T) (string, *tls.Config) {
	t.Helper()
	p, err := newPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(p.backendCert, p.backendKey)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := p.roots()
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(backendHandler())
	server.TLS = backendTLS(cert)
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.Listener.Addr().String(), clientTLS(roots)
}

// A client that trusts the CA gets through to the backend over TLS 1.3,
// AES-128-GCM, X25519 and HTTP/2.
func TestBackendLeg(t *testing.T) {
	address, config := testBackend(t)
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	if err := ask(t.Context(), client, "https://"+address+smallPath); err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get("https://" + address + "/readyz")
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

// Another leg than that is refused by either end.
func TestVerifyLeg(t *testing.T) {
	good := tls.ConnectionState{CipherSuite: tls.TLS_AES_128_GCM_SHA256, CurveID: tls.X25519}
	checkError(t, verifyLeg(good), "")
	other := good
	other.CipherSuite = tls.TLS_CHACHA20_POLY1305_SHA256
	checkError(t, verifyLeg(other), "TLS_CHACHA20_POLY1305_SHA256")
	other = good
	other.CurveID = tls.X25519MLKEM768
	checkError(t, verifyLeg(other), "X25519MLKEM768")
	checkError(t, clientTLS(nil).VerifyConnection(good), "not HTTP/2")
}

func TestQuietLog(t *testing.T) {
	var log bytes.Buffer
	for _, line := range []string{
		"bench: http: TLS handshake error from 127.0.0.1:1: EOF\n",
		"bench: http: TLS handshake error from 127.0.0.1:1: read tcp 127.0.0.1:2->127.0.0.1:1: read: connection reset by peer\n",
		"bench: http2: server: error reading preface from client 127.0.0.1:1: write: broken pipe\n",
		"bench: http: TLS handshake error from 127.0.0.1:1: a connection has another cipher\n",
		"bench: http2: something else\n",
	} {
		if n, err := (quietLog{&log}).Write([]byte(line)); n != len(line) || err != nil {
			t.Error(n, err)
		}
	}
	want := "bench: http: TLS handshake error from 127.0.0.1:1: a connection has another cipher\nbench: http2: something else\n"
	if diff := cmp.Diff(want, log.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
