package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
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
// credential, never mixed, and the connections of upgraded requests.
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

// get returns a connection on which one request may be made at once. An error is
// a *dialError, or that of ctx.
func (p *Pools) get(ctx context.Context, b *backend.Backend, c balancer.Credential) (*clientConn, error) {
	p.mu.Lock()
	key := poolKey{b, c}
	pl := p.pools[key]
	if pl == nil {
		pl = &pool{connect: p.connector(b, c)}
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

// clientConn is a connection to a backend.
type clientConn struct {
	*http.ClientConn
	// gone ends with the connection. What HTTP/1.1 of net/http is still reading of a
	// request body must be closed then: it waits for that before it tells of the end.
	gone context.Context
}

// goneKey is for the context of a dial: what ends clientConn.gone.
type goneKey struct{}

// connector returns the function that opens one connection of a pool: HTTP/2, or
// HTTP/1.1 where the backend speaks nothing else (--disable-http2-serving).
func (p *Pools) connector(b *backend.Backend, c balancer.Credential) func(context.Context) (*clientConn, error) {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	t := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return p.dialTLS(ctx, b, c, ctx.Value(goneKey{}).(context.CancelFunc), "h2", "http/1.1")
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
		cc, err := t.NewClientConn(context.WithValue(ctx, goneKey{}, end), "https", b.Address)
		if err != nil {
			end()
			var de *dialError
			if errors.As(err, &de) {
				return nil, de
			}
			return nil, &dialError{err}
		}
		return &clientConn{cc, gone}, nil
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
	connect func(context.Context) (*clientConn, error) // static

	mu      sync.Mutex
	conns   []*clientConn
	retired []*clientConn // open until their last request ends
	dialing *dialing      // the one dial under way, or nil
}

// dialing is a dial that several requests may wait for.
type dialing struct {
	cancel context.CancelFunc
	done   chan struct{} // closed by the dialling goroutine, after err is set
	err    error
	stale  bool // guarded by pool.mu: what is dialled is out of use already
}

// get reserves a place for one request on a connection, and opens another one
// where all are at the backend's limit of streams. One dial at a time: those who
// come meanwhile wait for it, and fail with it.
func (p *pool) get(ctx context.Context) (*clientConn, error) {
	for {
		p.mu.Lock()
		if c := p.reserve(); c != nil {
			p.mu.Unlock()
			return c, nil
		}
		d := p.dialing
		if d == nil {
			// The dial outlives a client that goes away: others wait for it too.
			dialCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
			d = &dialing{cancel: cancel, done: make(chan struct{})}
			p.dialing = d
			go p.open(dialCtx, d)
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

// open dials for all who wait.
func (p *pool) open(ctx context.Context, d *dialing) {
	defer d.cancel()
	c, err := p.connect(ctx)
	p.mu.Lock()
	stale := d.stale
	if err == nil && !stale {
		p.conns = append(p.conns, c)
	}
	d.err, p.dialing = err, nil
	p.mu.Unlock()
	if err == nil && stale {
		c.Close() // those who wait dial anew
	}
	close(d.done)
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
	if p.dialing != nil {
		p.dialing.stale = true // its handshake may be over
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

// cut closes all connections, and ends the dial under way, so that those who wait
// for it go elsewhere. p.mu is not held.
func (p *pool) cut() {
	p.mu.Lock()
	all := append(p.conns, p.retired...)
	p.conns, p.retired = nil, nil
	if p.dialing != nil {
		p.dialing.stale = true
		p.dialing.cancel()
	}
	p.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}
