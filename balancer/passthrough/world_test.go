package passthrough

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.opentelemetry.io/otel/metric/noop"
	"go.uber.org/goleak"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patientFor bounds waiting for what should happen.
const patientFor = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patientFor); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %s: %s", patientFor, what)
		}
	}
}

var (
	authority = testpki.Authority("ca")
	serving   = testpki.Issue(authority, pkix.Name{CommonName: "kube-apiserver"}, testpki.ServerOf("kubernetes"))
	roots     = func() *x509.CertPool {
		pool := x509.NewCertPool()
		pool.AddCert(authority.Certificate)
		return pool
	}()
)

// api is a backend: TLS, on which it says its name and then whatever it hears.
type api struct {
	*backend.Backend
	listener net.Listener
	before   func(net.Conn) net.Conn // TLS; nil: as it is. A nil connection is not served

	mu    sync.Mutex
	conns []net.Conn // guarded by mu
}

func newAPI(t *testing.T, name string) *api {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed below
	if err != nil {
		t.Fatal(err)
	}
	a := &api{Backend: &backend.Backend{Name: name, Address: l.Addr().String(), Weight: 1}, listener: l}
	a.SetState(health.Ready, time.Now())
	t.Cleanup(func() { a.stop() })
	return a
}

// serve accepts connections until the listener is closed.
func (a *api) serve() {
	for {
		c, err := a.listener.Accept()
		if err != nil {
			return
		}
		a.mu.Lock()
		a.conns = append(a.conns, c)
		a.mu.Unlock()
		go a.echo(c)
	}
}

func (a *api) echo(c net.Conn) {
	defer c.Close()
	if a.before != nil {
		if c = a.before(c); c == nil {
			return
		}
	}
	s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{serving.Pair()}, NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS12})
	if _, err := fmt.Fprintln(s, a.Name); err != nil {
		return
	}
	_, _ = io.Copy(s, s)
	s.Close()
}

// stop closes the listener and all connections.
func (a *api) stop() {
	a.listener.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.Close()
	}
}

func (a *api) accepted() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.conns)
}

// book keeps a log.
type book struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *book) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// world is a server with backends.
type world struct {
	*testing.T
	*Server
	apis    []*api
	address string
	log     *book
	passive atomic.Int64 // signals so far
	served  chan error
}

// newWorld serves n backends until the test ends.
func newWorld(t *testing.T, n int, edit func(*Options)) *world {
	t.Helper()
	w := &world{T: t, log: new(book), served: make(chan error, 1)}
	var all []*backend.Backend
	for i := range n {
		a := newAPI(t, fmt.Sprintf("api-%d", i))
		w.apis = append(w.apis, a)
		all = append(all, a.Backend)
	}
	metrics, err := balancer.NewMetrics(noop.NewMeterProvider().Meter(""))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Core:    &balancer.Core{Backends: backend.NewBackends(backend.NewSet(0, all...)), Policy: balancer.PolicyAffinity},
		Metrics: metrics, Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Dial: new(net.Dialer).DialContext, DialTimeout: 2 * time.Second, HandshakeTimeout: 10 * time.Second,
		Passive:  func(*backend.Backend, health.Verdict) { w.passive.Add(1) },
		MaxPipes: 64,
	}
	if edit != nil {
		edit(&o)
	}
	if w.Server, err = New(o, noop.NewMeterProvider().Meter("")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed by Shutdown
	if err != nil {
		t.Fatal(err)
	}
	w.address = l.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		w.Server.Run(ctx)
	}()
	go func() { w.served <- w.Serve(l) }()
	t.Cleanup(func() {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		w.Shutdown(now, 0)
		if err := <-w.served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		stop()
		<-ran
		w.Close()
		if n := w.door.Places.Taken(); n != 0 {
			t.Errorf("%d places are taken at the end", n)
		}
		if w.pipes.made != 0 {
			t.Errorf("%d pipes are left", w.pipes.made)
		}
		for _, b := range all {
			if short, long, homed := b.Load(); short != 0 || long != 0 || homed != 0 {
				t.Errorf("%s has %d, %d, %d at the end", b.Name, short, long, homed)
			}
		}
		if t.Failed() {
			t.Logf("log:\n%s", w.log)
		}
	})
	return w
}

// start has backends serve.
func (w *world) start() *world {
	for _, a := range w.apis {
		go a.serve()
	}
	return w
}

// session is a client's TLS connection.
type session struct {
	*tls.Conn
	raw   *net.TCPConn
	lines *bufio.Reader
	name  string // of the backend
}

func clientConfig(name string, protos ...string) *tls.Config {
	return &tls.Config{RootCAs: roots, ServerName: name, NextProtos: protos, MinVersion: tls.VersionTLS12}
}

// dial connects and learns which backend answers.
func (w *world) dial() *session {
	w.Helper()
	s, err := w.tryDial(clientConfig("kubernetes", "h2"))
	if err != nil {
		w.Fatal(err)
	}
	return s
}

func (w *world) tryDial(config *tls.Config) (*session, error) {
	w.Helper()
	raw, err := net.Dial("tcp", w.address) //nolint:noctx // closed below
	if err != nil {
		return nil, err
	}
	w.Cleanup(func() { raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(patientFor))
	s := &session{Conn: tls.Client(raw, config), raw: raw.(*net.TCPConn)}
	if err := s.Handshake(); err != nil {
		return nil, err
	}
	s.lines = bufio.NewReader(s)
	s.name, err = s.lines.ReadString('\n')
	s.name = strings.TrimSpace(s.name)
	return s, err
}

// say sends a line and wants it back.
func (s *session) say(t *testing.T, line string) {
	t.Helper()
	if _, err := fmt.Fprintln(s, line); err != nil {
		t.Fatal(err)
	}
	if got, err := s.lines.ReadString('\n'); err != nil || got != line+"\n" {
		t.Fatalf("%q, %v came back for %q", got, err, line)
	}
}

// ends waits for the end of a session.
func (s *session) ends(t *testing.T) error {
	t.Helper()
	_, err := s.lines.ReadByte()
	if err == nil {
		t.Fatal("a byte came, want the end")
	}
	return err
}
