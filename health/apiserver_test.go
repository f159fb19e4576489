package health

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pki is a CA and the certificates of one backend. All are valid from 1990, as
// the clock of a synctest bubble starts in 2000.
type pki struct {
	roots, others  *x509.CertPool // others holds a CA that signed none of these
	leaf, outdated tls.Certificate
}

var testPKI = sync.OnceValue(func() pki {
	var p pki
	var ca, caKey = (*x509.Certificate)(nil), (*ecdsa.PrivateKey)(nil)
	serial := int64(0)
	issue := func(cn string, until int, isCA bool) (*x509.Certificate, tls.Certificate) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), nil)
		if err != nil {
			panic(err)
		}
		serial++
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: cn},
			NotBefore: time.Date(1990, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(until, 1, 1, 0, 0, 0, 0, time.UTC),
			IsCA: isCA, BasicConstraintsValid: true,
		}
		parent, signer := tmpl, key
		if isCA {
			tmpl.KeyUsage = x509.KeyUsageCertSign
		} else {
			tmpl.DNSNames = []string{"cp-1"}
			parent, signer = ca, caKey
		}
		der, err := x509.CreateCertificate(nil, tmpl, parent, key.Public(), signer)
		if err != nil {
			panic(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		return cert, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}
	}
	pool := func(cert *x509.Certificate) *x509.CertPool {
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		return pool
	}
	other, _ := issue("other CA", 2100, true)
	p.others = pool(other)
	root, rootPair := issue("CA", 2100, true)
	ca, caKey = root, rootPair.PrivateKey.(*ecdsa.PrivateKey)
	p.roots = pool(root)
	_, p.leaf = issue("cp-1", 2100, false)
	_, p.outdated = issue("cp-1", 1999, false)
	return p
})

// memListener is a net.Listener whose connections are net.Pipes.
type memListener struct {
	conns  chan net.Conn // written by dial, read by Accept, never closed
	closed chan struct{} // closed by Close
	once   sync.Once
}

func newMemListener() *memListener {
	return &memListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *memListener) Addr() net.Addr { return &net.IPAddr{} }

// dial is refused once the listener is closed, as by a kernel.
func (l *memListener) dial(ctx context.Context, network, address string) (net.Conn, error) {
	near, far := bufferedPipe()
	var err error
	select {
	case l.conns <- far:
		return near, nil
	case <-l.closed:
		err = &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	case <-ctx.Done():
		err = ctx.Err()
	}
	_ = near.Close()
	_ = far.Close()
	return nil, err
}

// bufferedConn is a connection whose writes wait for nobody for a while, as
// those of a kernel do. Without that, a client that breaks off a handshake and
// a server in the middle of its part would wait for one another.
type bufferedConn struct {
	net.Conn
	out    chan []byte   // written by Write, read by pump, never closed
	closed chan struct{} // closed by Close
	once   sync.Once
}

// bufferedPipe is net.Pipe with a buffer for what far writes.
func bufferedPipe() (near, far net.Conn) {
	near, end := net.Pipe()
	c := &bufferedConn{Conn: end, out: make(chan []byte, 64), closed: make(chan struct{})}
	go c.pump()
	return near, c
}

func (c *bufferedConn) Write(b []byte) (int, error) {
	select {
	case c.out <- bytes.Clone(b):
		return len(b), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *bufferedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// pump writes what is in the buffer, also after Close. What cannot be written
// is dropped; the server learns of it by its reads.
func (c *bufferedConn) pump() {
	defer c.Conn.Close()
	for {
		select {
		case b := <-c.out:
			_, _ = c.Conn.Write(b)
			continue
		default:
		}
		select {
		case b := <-c.out:
			_, _ = c.Conn.Write(b)
		case <-c.closed:
			if len(c.out) == 0 {
				return
			}
		}
	}
}

// apiserver is a backend in memory that logs what reaches it.
type apiserver struct {
	ln  *memListener
	srv *http.Server

	mu       sync.Mutex
	dials    int
	requests []string // method and URI
	headers  []http.Header
}

// startAPIServer serves handler over TLS, until the test ends.
func startAPIServer(t *testing.T, config *tls.Config, handler http.HandlerFunc) *apiserver {
	t.Helper()
	a := &apiserver{ln: newMemListener()}
	a.srv = &http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			a.mu.Lock()
			a.requests = append(a.requests, r.Method+" "+r.RequestURI)
			a.headers = append(a.headers, r.Header)
			a.mu.Unlock()
			handler(w, r)
		}),
		TLSConfig: config,
	}
	if config == nil {
		a.srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{testPKI().leaf}}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = a.srv.ServeTLS(a.ln, "", "") // ends by Close
	}()
	t.Cleanup(func() {
		_ = a.srv.Close()
		<-done
	})
	return a
}

func (a *apiserver) dial(ctx context.Context, network, address string) (net.Conn, error) {
	a.mu.Lock()
	a.dials++
	a.mu.Unlock()
	return a.ln.dial(ctx, network, address)
}

func (a *apiserver) log() (dials int, requests []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.dials, a.requests
}

// prober gives a prober of a. adjust may be nil.
func (a *apiserver) prober(t *testing.T, adjust func(*Target)) *Prober {
	target := Target{
		Address: "cp-1:6443",
		TLS:     func() *tls.Config { return &tls.Config{RootCAs: testPKI().roots} },
		Dial:    a.dial,
	}
	if adjust != nil {
		adjust(&target)
	}
	p := NewProber(target)
	t.Cleanup(p.Close)
	return p
}

// probe probes as a checker does.
func probe(t *testing.T, p *Prober) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	return p.Probe(ctx)
}

// paths answers each path by its own function; others with 404.
type paths map[string]http.HandlerFunc

func (p paths) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := p[r.URL.Path]; h != nil {
		h(w, r)
		return
	}
	http.NotFound(w, r)
}

func says(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// after answers late, unless the client has gone.
func after(d time.Duration, h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(d):
			h(w, r)
		case <-r.Context().Done():
		}
	}
}

// hangs never answers.
func hangs(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// writes sends raw bytes and ends the connection.
func writes(raw string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(conn, raw)
		// TLS would say goodbye otherwise.
		_ = conn.(*tls.Conn).NetConn().Close()
	}
}
