package forward

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
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
	"apiserver-lb/balancer/relay"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waiting, in the time of a bubble: what takes longer hangs.
const patience = 10 * time.Minute

const (
	frontAddress = "192.0.2.1:6443"
	clientIP     = "198.51.100.7"
)

// setup is what a world may have otherwise than usual.
type setup struct {
	backends   int    // 0: two
	h1         bool   // backends speak HTTP/1.1 only
	maxStreams int    // of a backend's HTTP/2 connection; 0: 250, as kube-apiserver
	maxHeld    int    // 0: 3 MiB
	share      string // "none": no retry budget
	policy     balancer.Policy
	trusted    balancer.Networks
	proxies    balancer.Networks // that speak the PROXY protocol
	guards     *balancer.Guards
	limits     *balancer.Limits
	raw        func(*world, *tls.Conn) // serves connections of the first backend instead of net/http, a goroutine for each
	rawALPN    []string                // of raw; none: h2
	sources    balancer.SourceLimits
	most       int           // connections; 0: any number
	latency    time.Duration // of the dialling of a backend by Pools
}

// world is a balancer between clients and fake kube-apiservers, in memory.
type world struct {
	*testing.T
	net     *memnet.Network
	pki     *testpki.PKI
	dir     string
	store   *tlsconf.Store
	apis    []*api
	core    *balancer.Core
	pools   *Pools
	relay   *relay.Relay
	f       *Forwarder
	srv     *Server
	front   *memnet.Listener
	reader  *sdkmetric.ManualReader
	log     *safeBuffer
	served  chan error // by the server's goroutine, once
	clients []io.Closer
	dummies []*backend.Home
	step    chan struct{} // for scripts to wait on

	stopTicking context.CancelFunc

	mu      sync.Mutex
	passive []string // "backend verdict", in order
}

// run runs a test in a bubble, in a world that must have come to rest at its end:
// no request counted in flight, no load, no connection, no goroutine.
func run(t *testing.T, s setup, test func(w *world)) {
	t.Helper()
	p := testpki.Certificates()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, s, p, dir)
		defer w.end()
		test(w)
	})
}

func newWorld(t *testing.T, s setup, p *testpki.PKI, dir string) *world {
	w := &world{T: t, net: memnet.New(), pki: p, dir: dir, store: testpki.OpenStore(t, dir, p), reader: sdkmetric.NewManualReader(),
		log: new(safeBuffer), served: make(chan error, 1), step: make(chan struct{})}
	if s.backends == 0 {
		s.backends = 2
	}
	if s.maxStreams == 0 {
		s.maxStreams = 250
	}
	if s.maxHeld == 0 {
		s.maxHeld = 3 << 20
	}
	share := 0.2
	if s.share == "none" {
		share = 0
	}
	var list []*backend.Backend
	for i := range s.backends {
		if i == 1 {
			s.raw = nil
		}
		a := newAPI(w, i, s)
		a.start()
		w.apis, list = append(w.apis, a), append(list, a.b)
	}
	set := backend.NewBackends(backend.NewSet(0, list...))
	ids := 0
	memory := new(balancer.Memory)
	w.core = &balancer.Core{
		Backends: set, Verifier: w.store, FrontProxy: func(time.Time) balancer.FrontProxy { return balancer.FrontProxyValid }, Headers: balancer.NewIdentityHeaders(nil, nil, nil, nil),
		Trusted: s.trusted, Guards: s.guards, Limits: s.limits, Policy: s.policy, Bound: pick.Bound{Factor: 1.25, Floor: 1000},
		Budget: balancer.NewBudget(share), Strangers: balancer.NewBudget(share), Tokens: balancer.NewTokens(1000, time.Hour),
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
		t.Fatal(err)
	}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		time.Sleep(s.latency)
		return w.net.Dial(ctx, network, address)
	}
	w.pools = NewPools(w.store, dial, 2*time.Second, func(b *backend.Backend, c balancer.Credential, delta int64) {
		metrics.BackendConnections(b.Name, c, delta)
	})
	w.store.Subscribe(w.retire)
	opened := func(b *backend.Backend, c balancer.Credential, delta int64) {
		metrics.BackendConnections(b.Name, c, delta)
	}
	passive := func(b *backend.Backend, v health.Verdict) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.passive = append(w.passive, b.Name+" "+v.String())
	}
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	refusals := balancer.NewRefusalLog(log)
	w.relay = relay.New(relay.Options{
		Core: w.core, Metrics: metrics, Refusals: refusals, Name: "lb-1", MaxHeldBody: s.maxHeld, Passive: passive, Log: log,
		TLS: w.store, Dial: w.net.Dial, DialTimeout: 2 * time.Second, Opened: opened,
		MaxHeaderBytes: 1 << 20, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 3 * time.Minute, StallTimeout: time.Minute,
		PingAfter: 2500 * time.Millisecond, PingTimeout: 2 * time.Second, Shards: 2,
		Limits: relay.Limits{Streams: 1000, ResetBurst: 500, ResetRate: 50, ControlBurst: 2000, ControlRate: 500},
	})
	for _, a := range w.apis {
		a.b.SpeaksHTTP2(!s.h1 && (a.setup.raw == nil || len(s.rawALPN) == 0))
	}
	ticking, stopTicking := context.WithCancel(context.Background())
	w.stopTicking = stopTicking
	go w.relay.Run(ticking)
	w.f = New(Options{
		Core: w.core, Pools: w.pools, Metrics: metrics, Refusals: refusals, Name: "lb-1", MaxHeldBody: s.maxHeld, Passive: passive, Log: log, StallTimeout: time.Minute,
	})
	w.srv = NewServer(w.f, ServerOptions{TLS: w.store.ListenerConfig(), HTTP2: w.relay, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 3 * time.Minute, MaxHeaderBytes: 1 << 20, MaxStreams: 1000,
		MaxConnections: s.most, Sources: balancer.NewSources(s.sources), ProxyProtocol: s.proxies})
	w.front = w.net.Listen(frontAddress)
	go func() { w.served <- w.srv.Serve(w.front) }()
	return w
}

// end checks that the world comes to rest, and takes it down.
func (w *world) end() {
	for _, c := range w.clients {
		c.Close()
	}
	for _, d := range w.dummies {
		d.Leave()
	}
	// Net/http gives up on what clients left behind in half a second.
	time.Sleep(2 * time.Second)
	synctest.Wait()
	w.atRest()
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	w.pools.Close()
	w.stopTicking()
	w.relay.Close()
	for _, a := range w.apis {
		a.stop()
	}
	w.srv.Shutdown(cancelled, time.Second)
	if err := <-w.served; err != nil {
		w.Errorf("Serve = %v", err)
	}
	synctest.Wait()
	for _, name := range []string{"apiserver_lb.backend.connections", "apiserver_lb.client.connections"} {
		for attributes, n := range w.metric(name) {
			if n != 0 {
				w.Errorf("%s{%s} = %d at the end", name, attributes, n)
			}
		}
	}
	if w.Failed() {
		log := w.log.String()
		w.Logf("end of the log:\n%s", log[max(0, len(log)-2000):])
	}
}

// cut ends all connections to a backend, as serve does when one is dead.
func (w *world) cut(a *api) {
	w.pools.Cut(a.b)
	w.relay.Cut(a.b)
}

// retire takes all connections to backends out of use, as serve does when a
// certificate has changed.
func (w *world) retire() {
	w.pools.Retire()
	w.relay.Retire()
}

// atRest checks that no request is counted anywhere, and no client connection.
func (w *world) atRest() {
	w.Helper()
	for _, a := range w.apis {
		if _, _, homed := a.b.Load(); homed != 0 {
			w.Errorf("%s is home to %d connections at rest", a.b.Name, homed)
		}
	}
	w.quiet()
}

// What is held has this room, in bytes.
const (
	answersRoom = 1 << 20  // answers
	bodiesRoom  = 64 << 20 // request bodies
)

// quiet checks that no request is counted anywhere, and no answer is held.
func (w *world) quiet() {
	w.Helper()
	for _, a := range w.apis {
		if short, long, _ := a.b.Load(); short != 0 || long != 0 {
			w.Errorf("load of %s at rest: %d short, %d long", a.b.Name, short, long)
		}
	}
	for attributes, n := range w.metric("apiserver_lb.requests.in_flight") {
		if n != 0 {
			w.Errorf("in flight at rest: %s %d", attributes, n)
		}
	}
	if !w.core.Answers.Take(answersRoom) {
		w.Error("at rest there is still an answer that takes room")
	} else {
		w.core.Answers.Give(answersRoom)
	}
	if !w.core.Bodies.Take(bodiesRoom) {
		w.Error("at rest there is still a request body that takes room")
	} else {
		w.core.Bodies.Give(bodiesRoom)
	}
	w.f.drain.mu.Lock()
	defer w.f.drain.mu.Unlock()
	if n := len(w.f.drain.ends); n != 0 || w.f.drain.tunnels != 0 {
		w.Errorf("the drain still knows %d requests, %d tunnels", n, w.f.drain.tunnels)
	}
	w.pools.mu.Lock()
	defer w.pools.mu.Unlock()
	for b, conns := range w.pools.raw {
		if len(conns) != 0 {
			w.Errorf("%d connections of upgrades to %s are still held", len(conns), b.Name)
		}
	}
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

// prefer makes new client connections choose the backend with the index given
// first, and then the others in order.
func (w *world) prefer(i int) {
	for k, a := range w.apis {
		for range (k - i + len(w.apis)) % len(w.apis) {
			h := new(backend.Home)
			h.Move(nil, a.b)
			w.dummies = append(w.dummies, h)
		}
	}
}

// dead gives a backend the state that its health checks would, as cmd does.
func (w *world) dead(a *api) {
	a.b.SetState(health.Dead, time.Now())
	w.cut(a)
}

// await receives from ch, or fails the test when nothing comes.
func await[T any](w *world, ch <-chan T, what string) (v T) {
	w.Helper()
	select {
	case v = <-ch:
	case <-time.After(patience):
		w.Fatalf("waited in vain for %s", what)
	}
	return v
}

// api is a fake kube-apiserver.
type api struct {
	w       *world
	b       *backend.Backend
	setup   setup
	ln      *memnet.Listener
	srv     *http.Server
	stopped chan struct{} // closed by stop; handlers that wait listen to it

	mu     sync.Mutex
	handle http.HandlerFunc // nil: reads the body and answers 200
	seen   []*seen
	conns  int
}

// seen is a request as a backend saw it.
type seen struct {
	Conn   int    // number of the connection, from 1
	Cert   string // common name of the certificate that the connection bears
	Proto  string
	Method string
	Target string
	Host   string
	Header http.Header

	body    safeBuffer
	trailer http.Header // after the handler has returned
	length  int64
}

func newAPI(w *world, i int, s setup) *api {
	b := &backend.Backend{Name: string(rune('a' + i)), Address: fmt.Sprintf("10.0.0.%d:6443", i+1), ServerName: "kubernetes", Weight: 1}
	b.SetState(health.Ready, time.Now())
	return &api{w: w, b: b, setup: s, stopped: make(chan struct{})}
}

type connKey struct{}

// start serves until stop or kill.
func (a *api) start() {
	a.ln = a.w.net.Listen(a.b.Address)
	config := &tls.Config{Certificates: []tls.Certificate{a.w.pki.Backend.Pair()}, ClientAuth: tls.RequestClientCert}
	if a.setup.raw != nil {
		config.NextProtos = a.setup.rawALPN
		if config.NextProtos == nil {
			config.NextProtos = []string{"h2"}
		}
		go a.serveRaw(config)
		return
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(!a.setup.h1)
	a.srv = &http.Server{
		TLSConfig: config, Protocols: protocols, Handler: http.HandlerFunc(a.serve), DisableGeneralOptionsHandler: true,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: a.setup.maxStreams},
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.conns++
			return context.WithValue(ctx, connKey{}, a.conns)
		},
	}
	go a.srv.ServeTLS(a.ln, "", "")
}

func (a *api) serveRaw(config *tls.Config) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := a.ln.Accept()
		if err != nil {
			return
		}
		a.mu.Lock()
		a.conns++
		a.mu.Unlock()
		wg.Go(func() {
			tc := tls.Server(c, config)
			defer tc.Close()
			tc.SetDeadline(time.Now().Add(patience))
			if tc.Handshake() == nil {
				a.setup.raw(a.w, tc)
			}
		})
	}
}

func (a *api) serve(w http.ResponseWriter, r *http.Request) {
	s := &seen{Conn: r.Context().Value(connKey{}).(int), Proto: r.Proto, Method: r.Method, Target: r.RequestURI, Host: r.Host,
		Header: r.Header.Clone(), length: r.ContentLength}
	if certs := r.TLS.PeerCertificates; len(certs) > 0 {
		s.Cert = certs[0].Subject.CommonName
	}
	a.mu.Lock()
	a.seen = append(a.seen, s)
	handle := a.handle
	a.mu.Unlock()
	if handle == nil {
		handle = a.answer
	}
	// A copy, for the server looks at its own.
	taped := r.WithContext(r.Context())
	taped.Body = struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r.Body, &s.body), r.Body}
	handle(w, taped)
	s.trailer = r.Trailer
}

// answer is what a backend does unless told otherwise.
func (a *api) answer(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"from":%q}`, a.b.Name)
}

// on sets what the backend does.
func (a *api) on(handle http.HandlerFunc) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.handle = handle
}

// pause waits until the test lets the backend go on.
func (a *api) pause() {
	select {
	case <-a.w.step:
	case <-a.stopped:
	}
}

// requests returns what the backend has seen so far.
func (a *api) requests() []*seen {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]*seen(nil), a.seen...)
}

// one returns the only request that the backend has seen.
func (a *api) one() *seen {
	a.w.Helper()
	all := a.requests()
	if len(all) != 1 {
		a.w.Fatalf("backend %s saw %d requests, want 1", a.b.Name, len(all))
	}
	return all[0]
}

// kill ends the backend as kill -9 does.
func (a *api) kill() {
	a.ln.Close()
	a.ln.ResetAll()
	if a.srv != nil {
		a.srv.Close()
	}
}

// stop takes the backend down at the end of the test.
func (a *api) stop() {
	close(a.stopped)
	a.kill()
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
