package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.uber.org/goleak"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/internal/memnet"
	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	frontAddress = "192.0.2.1:6443"
	clientIP     = "198.51.100.7"
	answersRoom  = 1 << 20
	bodiesRoom   = 64 << 20
)

// setup is what a world may have otherwise than usual.
type setup struct {
	backends int                                       // 0: one
	handler  func(*world, *kubeAPIServer) http.Handler // served by net/http; nil: backends do what the test says
	loopback bool                                      // over sockets of the kernel, instead of in memory
	still    bool                                      // no Relay.Run: nothing is done about time
	store    *tlsconf.Store                            // nil: one is opened
	options  func(*Options)
	sources  balancer.SourceLimits
	shards   int // 0: one
}

// wrapped has each connection that is dialled, to the address given, replaced by wrap.
func wrapped(wrap func(c net.Conn, address string) net.Conn) func(*Options) {
	return func(o *Options) {
		dial := o.Dial
		o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return wrap(c, address), nil
		}
	}
}

// world is a relay between clients and backends.
type world struct {
	testing.TB
	setup
	pki    *testpki.PKI
	net    *memnet.Network
	store  *tlsconf.Store
	core   *balancer.Core
	relay  *Relay
	front  net.Listener
	apis   []*kubeAPIServer
	reader *sdkmetric.ManualReader
	log    *safeBuffer
	stop   context.CancelFunc
	served sync.WaitGroup // client connections, and who accepts them

	clientTLS *tls.Config // for those without a certificate

	mu      sync.Mutex
	passive []string // "backend verdict", in order
	conns   map[string]int64
	peers   []*peer
}

// run runs a test in a bubble. At its end all must have come to rest.
func run(t *testing.T, s setup, test func(w *world)) {
	t.Helper()
	if s.store == nil {
		s.store = testpki.OpenStore(t, t.TempDir(), testpki.Certificates())
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s)
		defer w.end()
		test(w)
	})
}

func newWorld(tb testing.TB, s setup) *world {
	w := &world{TB: tb, setup: s, pki: testpki.Certificates(), net: memnet.New(), store: s.store,
		reader: sdkmetric.NewManualReader(), log: new(safeBuffer), conns: map[string]int64{}}
	if w.store == nil {
		w.store = testpki.OpenStore(tb, tb.TempDir(), w.pki)
	}
	var list []*backend.Backend
	for i := range max(1, s.backends) {
		a := newKubeAPIServer(w, i)
		a.start()
		w.apis, list = append(w.apis, a), append(list, a.b)
	}
	ids := 0
	memory := new(balancer.Memory)
	w.core = &balancer.Core{
		Backends: backend.NewBackends(backend.NewSet(0, list...)), Verifier: w.store,
		FrontProxy: func(time.Time) balancer.FrontProxy { return balancer.FrontProxyValid },
		Headers:    balancer.NewIdentityHeaders(nil, nil, nil, nil), Bound: pick.Bound{Factor: 1.25, Floor: 100_000},
		Budget: balancer.NewBudget(0.2), Strangers: balancer.NewBudget(0.2), Tokens: balancer.NewTokens(1000, time.Hour),
		Answers: balancer.NewRoom(answersRoom, nil),
		Bodies:  balancer.NewRoom(bodiesRoom, memory),
		Memory:  memory,
		NewAuditID: func() string {
			w.mu.Lock()
			defer w.mu.Unlock()
			ids++
			return fmt.Sprintf("audit-%d", ids)
		},
	}
	metrics, err := balancer.NewMetrics(sdkmetric.NewMeterProvider(sdkmetric.WithReader(w.reader)).Meter("test"))
	if err != nil {
		tb.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	o := Options{
		Core: w.core, Metrics: metrics, Refusals: balancer.NewRefusalLog(log), Name: "lb-1", MaxHeldBody: 3 << 20, Log: log,
		Passive: func(b *backend.Backend, v health.Verdict) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.passive = append(w.passive, b.Name+" "+v.String())
		},
		TLS: w.store, Dial: w.net.Dial, DialTimeout: 2 * time.Second,
		Opened: func(b *backend.Backend, c balancer.Credential, delta int64) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.conns[b.Name+" "+c.String()] += delta
		},
		MaxHeaderBytes: 1 << 20, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 3 * time.Minute, StallTimeout: time.Minute,
		PingAfter: 2500 * time.Millisecond, PingTimeout: 2 * time.Second, Shards: max(1, s.shards),
		Limits: Limits{Streams: 1000, ResetBurst: 500, ResetRate: 50, ControlBurst: 2000, ControlRate: 500},
	}
	if s.loopback {
		o.Dial = new(net.Dialer).DialContext
	}
	if s.options != nil {
		s.options(&o)
	}
	w.relay = New(o)
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	if !s.still {
		w.served.Go(func() { w.relay.Run(ctx) })
	}
	w.front = w.listen(frontAddress)
	w.served.Go(w.serve)
	w.clientTLS = w.clientConfig(nil)
	return w
}

// listen listens on the address given, or on any where sockets are of the kernel.
func (w *world) listen(address string) net.Listener {
	if !w.loopback {
		return w.net.Listen(address)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.Fatal(err)
	}
	return l
}

// serve accepts clients as package forward does.
func (w *world) serve() {
	config := w.store.ListenerConfig()
	sources := balancer.NewSources(w.sources)
	for {
		c, err := w.front.Accept()
		if err != nil {
			return
		}
		w.served.Go(func() {
			defer c.Close()
			t := tls.Server(NewSock(c), config)
			if t.Handshake() != nil {
				return
			}
			peer, _ := netip.ParseAddrPort(c.RemoteAddr().String())
			client := &balancer.Client{Peer: peer}
			client.Source, _ = sources.Open(peer.Addr(), 1, time.Now())
			defer func() { client.Source.Close(time.Now()) }()
			defer client.Home.Leave()
			w.relay.Serve(t, client)
		})
	}
}

// cheap is for handshakes that take little time, of which there are thousands.
var cheap = []tls.CurveID{tls.X25519}

// clientConfig is the TLS configuration of a client with the certificate given
// (nil: none).
func (w *world) clientConfig(cert *testpki.Issued) *tls.Config {
	config := &tls.Config{RootCAs: w.pki.Pool, ServerName: "balancer.example", NextProtos: []string{"h2"}, CurvePreferences: cheap}
	if cert != nil {
		pair := cert.Pair()
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config
}

// dial connects to the relay.
func (w *world) dial(ctx context.Context) (net.Conn, error) {
	if w.loopback {
		return new(net.Dialer).DialContext(ctx, "tcp", w.front.Addr().String())
	}
	return w.net.DialFrom(ctx, netip.MustParseAddr(clientIP), frontAddress)
}

// end checks that all comes to rest, and takes the world down.
func (w *world) end() {
	if !w.Failed() {
		w.atRest()
	}
	w.mu.Lock()
	peers := w.peers
	w.mu.Unlock()
	for _, p := range peers {
		p.conn.NetConn().Close()
	}
	w.front.Close()
	w.relay.Close()
	w.stop()
	for _, a := range w.apis {
		a.kill()
	}
	w.served.Wait()
	w.eventually("closed", func() string {
		w.mu.Lock()
		defer w.mu.Unlock()
		for key, n := range w.conns {
			if n != 0 {
				return fmt.Sprintf("%d connections to backend %s", n, key)
			}
		}
		return ""
	})
	if w.Failed() {
		log := w.log.String()
		w.Logf("end of the log:\n%s", log[max(0, len(log)-2000):])
	}
}

// atRest waits until no request is in flight any more, and checks that all is given
// back: load, room, and windows on connections that stand.
func (w *world) atRest() {
	w.Helper()
	w.eventually("at rest", w.unrest)
}

// eventually waits until problem finds none.
func (w *world) eventually(what string, problem func() string) {
	w.Helper()
	var p string
	for range 100 {
		if p = problem(); p == "" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.Errorf("not %s: %s", what, p)
}

// unrest says what is not at rest, empty where all is.
func (w *world) unrest() string {
	for _, a := range w.apis {
		if short, long, _ := a.b.Load(); short != 0 || long != 0 {
			return fmt.Sprintf("load of %s: %d short, %d long", a.b.Name, short, long)
		}
	}
	for attributes, n := range w.metric("apiserver_lb.requests.in_flight") {
		if n != 0 {
			return fmt.Sprintf("in flight: %s %d", attributes, n)
		}
	}
	if !w.core.Answers.Take(answersRoom) {
		return "an answer takes room"
	}
	w.core.Answers.Give(answersRoom)
	if !w.core.Bodies.Take(bodiesRoom) {
		return "a request body takes room"
	}
	w.core.Bodies.Give(bodiesRoom)
	if !w.relay.windows.Take(extraWindows) {
		return "a stream has a window beyond the usual"
	}
	w.relay.windows.Give(extraWindows)
	for _, sh := range w.relay.shards {
		if problem := sh.unrest(); problem != "" {
			return problem
		}
	}
	return ""
}

func (sh *shard) unrest() string {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for cc := range sh.clients {
		if n := cc.streams.n; n != 0 {
			return fmt.Sprintf("%d streams of a client", n)
		}
		if got := cc.receivable + cc.owed; got != clientConnWindow && !cc.over && !cc.closing {
			return fmt.Sprintf("a client has a connection window of %d, want %d", got, clientConnWindow)
		}
		if cc.held != 0 {
			return fmt.Sprintf("a client has %d bytes of answers that are held", cc.held)
		}
		if cc.extra != 0 {
			return fmt.Sprintf("a client has %d bytes of window beyond the usual", cc.extra)
		}
	}
	for key, p := range sh.pools {
		if n := len(p.waiting); n != 0 {
			return fmt.Sprintf("%d wait for a connection to %s", n, key.backend.Name)
		}
		for _, c := range p.http1 {
			if c.s != nil {
				return "a request on a connection of HTTP/1.1 to " + key.backend.Name
			}
		}
		for _, bc := range p.conns {
			if n := bc.streams.n; n != 0 {
				return fmt.Sprintf("%d streams at %s", n, key.backend.Name)
			}
			if got := bc.receivable + bc.owed; got != backendConnWindow {
				return fmt.Sprintf("%s has a connection window of %d, want %d", key.backend.Name, got, backendConnWindow)
			}
		}
	}
	return ""
}

// metric returns an instrument's sums by attributes, in the form "a=b c=d".
func (w *world) metric(name string) map[string]int64 {
	w.Helper()
	var all metricdata.ResourceMetrics
	if err := w.reader.Collect(context.Background(), &all); err != nil {
		w.Fatal(err)
	}
	sums := map[string]int64{}
	for _, scope := range all.ScopeMetrics {
		for _, m := range scope.Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if m.Name != name || !ok {
				continue
			}
			for _, p := range sum.DataPoints {
				var attributes []string
				for _, kv := range p.Attributes.ToSlice() {
					attributes = append(attributes, string(kv.Key)+"="+kv.Value.String())
				}
				sums[strings.Join(attributes, " ")] = p.Value
			}
		}
	}
	return sums
}

// verdicts returns what traffic has told the health checks, and forgets it.
func (w *world) verdicts() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.passive
	w.passive = nil
	return v
}

// prefer makes new client connections choose the backend with the index given.
func (w *world) prefer(i int) {
	for k, a := range w.apis {
		if k != i {
			new(backend.Home).Move(nil, a.b)
		}
	}
}

// kubeAPIServer is a backend.
type kubeAPIServer struct {
	w  *world
	b  *backend.Backend
	ln net.Listener

	handler http.Handler // nil: a script
	srv     *http.Server
	config  *tls.Config

	mu    sync.Mutex
	fresh []*peer      // connections that the test has not asked for yet
	http1 []*http1Peer // the same over HTTP/1.1
}

func newKubeAPIServer(w *world, i int) *kubeAPIServer {
	a := &kubeAPIServer{w: w, b: &backend.Backend{Name: string(rune('a' + i)), ServerName: "kubernetes", Weight: 1}}
	if !w.loopback {
		a.b.Address = fmt.Sprintf("10.0.0.%d:6443", i+1)
	}
	a.b.SetState(health.Ready, time.Now())
	a.b.SpeaksHTTP2(true)
	a.config = &tls.Config{Certificates: []tls.Certificate{w.pki.Backend.Pair()}, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2", "http/1.1"}, CurvePreferences: cheap}
	if w.handler != nil {
		a.handler = w.handler(w, a)
	}
	return a
}

// start serves, until kill.
func (a *kubeAPIServer) start() {
	if a.b.Address != "" && a.w.loopback { // again
		l, err := net.Listen("tcp", a.b.Address)
		if err != nil {
			a.w.Error(err)
			return
		}
		a.ln = l
	} else {
		a.ln = a.w.listen(a.b.Address)
		if a.b.Address == "" {
			a.b.Address = a.ln.Addr().String()
		}
	}
	if a.handler == nil {
		a.w.served.Go(a.accept)
		return
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetHTTP1(true)
	a.srv = &http.Server{TLSConfig: a.config.Clone(), Protocols: protocols, Handler: a.handler, DisableGeneralOptionsHandler: true,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), MaxHeaderBytes: 1 << 20,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250}}
	srv, ln := a.srv, a.ln
	a.w.served.Go(func() {
		if err := srv.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			a.w.Errorf("%s: %v", a.b.Name, err)
		}
	})
}

// accept hands connections to the test.
func (a *kubeAPIServer) accept() {
	ln := a.ln
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		a.w.served.Go(func() {
			t := tls.Server(c, a.config)
			if t.Handshake() != nil {
				c.Close()
				return
			}
			if t.ConnectionState().NegotiatedProtocol == "http/1.1" {
				a.serveHTTP1(t)
				return
			}
			p := newPeer(a.w, "backend "+a.b.Name, t)
			a.mu.Lock()
			a.fresh = append(a.fresh, p)
			a.mu.Unlock()
			p.read(true)
		})
	}
}

// kill ends the backend as kill -9 does.
func (a *kubeAPIServer) kill() {
	a.ln.Close()
	if l, ok := a.ln.(*memnet.Listener); ok {
		l.ResetAll()
	}
	if a.srv != nil {
		a.srv.Close()
	}
}

// safeBuffer is a bytes.Buffer for several goroutines.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
