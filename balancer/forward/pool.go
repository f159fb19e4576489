package forward

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
)

// TLSConfigs gives the TLS configuration for connections to backends, fresh for
// each, so that reloaded CAs and certificates apply. *tlsconf.Store is one.
type TLSConfigs interface {
	BackendConfig(serverName string, frontProxy bool, alpn ...string) *tls.Config
}

// Dial opens a TCP connection; address is host:port.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// dialError is a failure before anything of a request was sent.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// Pools holds the connections to all backends: for each backend one pool for each
// credential, never mixed, another one of HTTP/1.1 for each that is a stranger's, and
// the connections of upgraded requests.
type Pools struct {
	// Static after construction.
	tls         TLSConfigs
	dial        Dial
	dialTimeout time.Duration
	opened      func(b *backend.Backend, c balancer.Credential, delta int64) // counts connections

	mu    sync.Mutex
	pools map[poolKey]*pool
	raw   map[*backend.Backend]map[net.Conn]struct{} // of upgraded requests
}

type poolKey struct {
	backend    *backend.Backend
	credential balancer.Credential
	http1      bool
}

// NewPools makes pools without a connection. opened is told of each connection
// that is opened (1) and closed (-1).
func NewPools(t TLSConfigs, dial Dial, dialTimeout time.Duration, opened func(*backend.Backend, balancer.Credential, int64)) *Pools {
	return &Pools{tls: t, dial: dial, dialTimeout: dialTimeout, opened: opened,
		pools: map[poolKey]*pool{}, raw: map[*backend.Backend]map[net.Conn]struct{}{}}
}

// dialTLS connects to the backend and proves that it is the one, within the dial
// timeout. Only connections of the asserted credential bear the front-proxy
// certificate. closed is called once when the connection is closed on this side.
func (p *Pools) dialTLS(ctx context.Context, b *backend.Backend, c balancer.Credential, closed func(), alpn ...string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.dialTimeout)
	defer cancel()
	nc, err := p.dial(ctx, "tcp", b.Address)
	if err != nil {
		return nil, &dialError{err}
	}
	counted := &countedConn{Conn: nc, backend: b, closed: func() {
		p.opened(b, c, -1)
		closed()
	}}
	tc := tls.Client(counted, p.tls.BackendConfig(b.ServerName, c == balancer.Asserted, alpn...))
	p.opened(b, c, 1)
	if err := tc.HandshakeContext(ctx); err != nil {
		tc.Close()
		return nil, &dialError{fmt.Errorf("TLS to %s: %w", b.Address, err)}
	}
	counted.established.Store(true)
	return tc, nil
}

// countedConn tells once when it is closed, and the backend when something comes
// from it. What counts is the arrival here: bytes that a slow client takes out of a
// buffer of ours say nothing of a backend that hangs. A handshake is no answer.
type countedConn struct {
	net.Conn
	backend     *backend.Backend
	established atomic.Bool
	once        sync.Once
	closed      func()
}

// NetConn returns the connection that is counted.
func (c *countedConn) NetConn() net.Conn { return c.Conn }

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.established.Load() {
		c.backend.Answered(time.Now())
	}
	return n, err
}

func (c *countedConn) Close() error {
	c.once.Do(c.closed)
	return c.Conn.Close()
}

// get returns a connection on which one request may be made at once, of HTTP/1.1 where
// that is asked for. An error is a *dialError, or that of ctx.
func (p *Pools) get(ctx context.Context, b *backend.Backend, c balancer.Credential, http1 bool) (*clientConn, error) {
	p.mu.Lock()
	key := poolKey{b, c, http1}
	pl := p.pools[key]
	if pl == nil {
		pl = &pool{
			connect: p.connector(key),
			single:  func() bool { return http1 || !b.HTTP2() },
			dialing: map[*dialing]struct{}{},
		}
		p.pools[key] = pl
	}
	p.mu.Unlock()
	return pl.get(ctx)
}

// maxResponseHeader bounds the head of a backend's answer, in bytes.
const maxResponseHeader = 1 << 20

// pingAfter and pingTimeout bound how long a dead path to a backend goes
// unnoticed while requests wait on it; a hung backend is noticed sooner, by its
// health checks.
const (
	pingAfter   = 10 * time.Second
	pingTimeout = 5 * time.Second
)

// maxIdle is how long a connection of HTTP/1.1 is kept without a request: there are as
// many as there were requests at once. kube-apiserver closes it after 90 s
// (k8s.io/apiserver/pkg/server/secure_serving.go, IdleTimeout), and may not be the first
// to: a request that is sent at that moment is lost. HTTP/2 says GOAWAY instead.
const maxIdle = 30 * time.Second

// clientConn is a connection to a backend.
type clientConn struct {
	*http.ClientConn
	http1 bool
	// gone ends with the connection. What HTTP/1.1 of net/http is still reading of a
	// request body must be closed then: it waits for that before it tells of the end.
	gone context.Context
}

// dialledKey is for the context of http.Transport.NewClientConn: the connection.
type dialledKey struct{}

// connector returns the function that opens one connection of a pool: HTTP/2, or
// HTTP/1.1 where that is asked for or the backend speaks nothing else
// (--disable-http2-serving).
func (p *Pools) connector(key poolKey) func(context.Context) (*clientConn, error) {
	b, c := key.backend, key.credential
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	alpn := []string{"http/1.1"}
	if !key.http1 {
		protocols.SetHTTP2(true)
		alpn = []string{"h2", "http/1.1"}
	}
	t := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return ctx.Value(dialledKey{}).(*tls.Conn), nil
		},
		Protocols:             protocols,
		DisableCompression:    true, // what the client did not ask for must not be asked for
		ExpectContinueTimeout: time.Second,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: pingAfter,
			PingTimeout:     pingTimeout,
			// What a slow client leaves unread of an answer stays with the backend,
			// apart from this much, which is enough for 100 MB/s a millisecond away.
			MaxReceiveBufferPerStream: 128 << 10,
		},
		MaxResponseHeaderBytes: maxResponseHeader,
	}
	return func(ctx context.Context) (*clientConn, error) {
		gone, end := context.WithCancel(context.Background())
		tc, err := p.dialTLS(ctx, b, c, end, alpn...)
		if err != nil {
			end()
			return nil, err
		}
		cc, err := t.NewClientConn(context.WithValue(ctx, dialledKey{}, tc), "https", b.Address)
		if err != nil {
			tc.Close() // which ends gone
			return nil, &dialError{err}
		}
		return &clientConn{cc, tc.ConnectionState().NegotiatedProtocol != "h2", gone}, nil
	}
}

// Cut closes every connection to the backend at once: it is dead, and whatever
// waits on it must learn that now.
func (p *Pools) Cut(b *backend.Backend) {
	p.mu.Lock()
	var pools []*pool
	for key, pl := range p.pools {
		if key.backend == b {
			pools = append(pools, pl)
		}
	}
	var raw []net.Conn
	for c := range p.raw[b] {
		raw = append(raw, c)
	}
	p.mu.Unlock()
	for _, pl := range pools {
		pl.cut()
	}
	for _, c := range raw {
		c.Close()
	}
}

// Forget closes what connections there are to a backend that has been taken out of the
// configuration, as Cut does, and lets go of it.
func (p *Pools) Forget(b *backend.Backend) {
	p.Cut(b)
	p.mu.Lock()
	defer p.mu.Unlock()
	for key := range p.pools {
		if key.backend == b {
			delete(p.pools, key)
		}
	}
	if len(p.raw[b]) == 0 {
		delete(p.raw, b)
	}
}

// Retire takes the connections that stand now out of use for new requests and
// closes each when its last request ends: a certificate or a CA has changed.
func (p *Pools) Retire() {
	p.mu.Lock()
	pools := make([]*pool, 0, len(p.pools))
	for _, pl := range p.pools {
		pools = append(pools, pl)
	}
	p.mu.Unlock()
	for _, pl := range pools {
		pl.retire()
	}
}

// Close closes every connection to every backend.
func (p *Pools) Close() {
	p.mu.Lock()
	seen := map[*backend.Backend]bool{}
	for key := range p.pools {
		seen[key.backend] = true
	}
	for b := range p.raw {
		seen[b] = true
	}
	p.mu.Unlock()
	for b := range seen {
		p.Cut(b)
	}
}

// hold notes the connection of an upgraded request, so that Cut finds it, and
// returns what forgets it again.
func (p *Pools) hold(b *backend.Backend, c net.Conn) (forget func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.raw[b] == nil {
		p.raw[b] = map[net.Conn]struct{}{}
	}
	p.raw[b][c] = struct{}{}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.raw[b], c)
	}
}

// pool is the connections to one backend for one credential.
type pool struct {
	// Static after construction.
	connect func(context.Context) (*clientConn, error)
	single  func() bool // whether a connection carries one request at a time, as far as is known

	mu      sync.Mutex
	conns   []*clientConn
	retired []*clientConn         // open until their last request ends
	dialing map[*dialing]struct{} // the dials under way
	shared  *dialing              // the one of them for which anybody may wait, or nil
}

// dialing is a dial under way.
type dialing struct {
	ctx    context.Context // of the dial
	cancel context.CancelFunc
	done   chan struct{} // closed by open, after err is set
	err    error
	stale  bool // guarded by pool.mu: what is dialled is out of use already
}

// get reserves a place for one request on a connection, and opens another one where none
// has any. Over HTTP/2 that is one dial at a time: those who come meanwhile wait for it,
// and fail with it. Over HTTP/1.1 each would keep the connection to itself, so each dials.
func (p *pool) get(ctx context.Context) (*clientConn, error) {
	for {
		p.mu.Lock()
		if c := p.reserve(); c != nil {
			p.mu.Unlock()
			return c, nil
		}
		if p.single() {
			d := p.begin(ctx)
			p.mu.Unlock()
			switch c := p.open(d); {
			case c != nil:
				return c, nil
			case ctx.Err() != nil:
				return nil, ctx.Err()
			case d.err != nil:
				return nil, d.err
			}
			continue
		}
		d := p.shared
		if d == nil {
			// The dial outlives a client that goes away: others wait for it too.
			d = p.begin(context.WithoutCancel(ctx))
			p.shared = d
			go p.open(d)
		}
		p.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// begin notes a dial, for open. p.mu is held.
func (p *pool) begin(ctx context.Context) *dialing {
	d := &dialing{done: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(ctx)
	p.dialing[d] = struct{}{}
	return d
}

// open dials. Unless the dial is shared it returns the connection, with a place reserved:
// those who come meanwhile do not get it. It is nil with an error, and where the connection
// was retired at once, so that another one is needed. p.mu is not held.
func (p *pool) open(d *dialing) *clientConn {
	defer d.cancel()
	c, err := p.connect(d.ctx)
	p.mu.Lock()
	shared := p.shared == d
	if shared {
		p.shared = nil
	}
	delete(p.dialing, d)
	if err == nil && d.ctx.Err() != nil { // it was cut just when it had succeeded, or nobody waits
		err = &dialError{d.ctx.Err()}
	}
	if err == nil && !shared && !d.stale {
		if reserveErr := c.Reserve(); reserveErr != nil { // it has ended already
			err = &dialError{reserveErr}
		}
	}
	fit := err == nil && !d.stale
	if fit {
		p.conns = append(p.conns, c)
		if c.http1 {
			p.expire(c)
		}
	}
	d.err = err
	p.mu.Unlock()
	close(d.done)
	if !fit && c != nil {
		c.Close()
	}
	if !fit || shared {
		return nil
	}
	return c
}

// expire has the connection closed when it has been idle for maxIdle.
func (p *pool) expire(c *clientConn) {
	idle := time.AfterFunc(maxIdle, func() { p.closeIdle(c) })
	c.SetStateHook(func(cc *http.ClientConn) { // a request has ended, or the connection
		if cc.Err() != nil {
			idle.Stop()
			return
		}
		idle.Reset(maxIdle)
	})
}

// closeIdle closes the connection unless a request is on it. p.mu is not held.
func (p *pool) closeIdle(c *clientConn) {
	p.mu.Lock()
	i := slices.Index(p.conns, c)
	if i < 0 || c.InFlight() > 0 {
		p.mu.Unlock()
		return
	}
	p.conns = slices.Delete(p.conns, i, i+1)
	p.mu.Unlock()
	c.Close()
}

// reserve takes a place on the first connection that has one, and drops those
// that have ended. One that got GOAWAY gives no place, and ends by itself with its
// last request. p.mu is held.
func (p *pool) reserve() *clientConn {
	p.sweepRetired()
	kept := p.conns[:0]
	var chosen *clientConn
	for _, c := range p.conns {
		if c.Err() != nil {
			c.Close()
			continue
		}
		kept = append(kept, c)
		if chosen == nil && c.Reserve() == nil {
			chosen = c
		}
	}
	clear(p.conns[len(kept):])
	p.conns = kept
	return chosen
}

// retire takes all connections out of use for new requests. p.mu is not held.
func (p *pool) retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.SetStateHook(func(c *http.ClientConn) {
			if c.InFlight() == 0 {
				c.Close()
			}
		})
	}
	p.retired = append(p.retired, p.conns...)
	p.conns = nil
	for d := range p.dialing {
		d.stale = true // its handshake may be over
	}
	p.sweepRetired()
}

// sweepRetired closes the retired connections that have become idle. p.mu is held.
func (p *pool) sweepRetired() {
	kept := p.retired[:0]
	for _, c := range p.retired {
		if c.InFlight() == 0 {
			c.Close()
			continue
		}
		kept = append(kept, c)
	}
	clear(p.retired[len(kept):])
	p.retired = kept
}

// cut closes all connections, and ends the dials under way, so that those who wait
// for them go elsewhere. p.mu is not held.
func (p *pool) cut() {
	p.mu.Lock()
	all := append(p.conns, p.retired...)
	p.conns, p.retired = nil, nil
	for d := range p.dialing {
		d.cancel()
	}
	p.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}
