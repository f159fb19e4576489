package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"time"
)

// lab is what all peers of a run share.
type lab struct {
	dir      string
	pki      pki
	backends []string
	threads  int // that a proxy may use
	// clientThreads is how many threads h2load may use.
	clientThreads int
	client        *http.Client // trusts the CA, speaks HTTP/2
	clientTLS     *tls.Config  // of this program's own load
	collector     string       // URL of one for OTLP, which forgets what it gets
}

// openLab makes the certificates and starts the backends.
func openLab(ctx context.Context) (*lab, func(), error) {
	dir, err := os.MkdirTemp("", "apiserver-lb-bench-")
	if err != nil {
		return nil, nil, err
	}
	fail := func(err error) (*lab, func(), error) {
		_ = os.RemoveAll(dir)
		return nil, nil, err
	}
	p, err := newPKI(dir)
	if err != nil {
		return fail(err)
	}
	roots, err := p.roots()
	if err != nil {
		return fail(err)
	}
	backends, stop, err := startBackends(ctx, p)
	if err != nil {
		return fail(err)
	}
	l := &lab{
		dir:           dir,
		pki:           p,
		backends:      backends,
		threads:       runtime.NumCPU(),
		clientThreads: max(1, runtime.NumCPU()/2),
		client: &http.Client{
			Timeout: 2 * time.Second,
			Transport: &http.Transport{
				TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
				ForceAttemptHTTP2: true,
				DisableKeepAlives: true,
			},
		},
		clientTLS: clientTLS(roots),
	}
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // an exporter that breaks off tries again
	}))
	l.collector = collector.URL
	return l, func() {
		collector.Close()
		stop()
		_ = os.RemoveAll(dir)
	}, nil
}

// curve is group in the words of crypto/tls.
const curve = tls.X25519

// clientTLS pins the client leg of the load that this program makes itself.
// Without a session cache, every handshake is a full one.
func clientTLS(roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		RootCAs:          roots,
		ServerName:       serverName,
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{curve},
		NextProtos:       []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			if state.NegotiatedProtocol != "h2" {
				return errors.New("the client leg is not HTTP/2")
			}
			return verifyLeg(state)
		},
	}
}

// backendTLS pins the backend leg.
func backendTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:     []tls.Certificate{cert},
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{curve},
		NextProtos:       []string{"h2", "http/1.1"},
		VerifyConnection: verifyLeg,
	}
}

// verifyLeg refuses a connection that would not be comparable. crypto/tls does
// not let a program choose among the ciphers of TLS 1.3; with AES in the
// processor it takes AES-128-GCM.
func verifyLeg(state tls.ConnectionState) error {
	if got := tls.CipherSuiteName(state.CipherSuite); got != cipher {
		return fmt.Errorf("a connection has %s, want %s: does this processor have AES?", got, cipher)
	}
	if state.CurveID != curve {
		return fmt.Errorf("a connection has the curve %v, want %v", state.CurveID, curve)
	}
	return nil
}
