package relay

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// pool is the connections of a shard to one backend for one credential.
type pool struct {
	// Static after construction.
	sh         *shard
	backend    *backend.Backend
	credential balancer.Credential

	// Guarded by sh.mu.
	conns    []*backendConn
	waiting  []*stream
	dialing  *dialing        // the dial under way; nil: none
	dialled  time.Time       // when the last one began
	wentAway time.Time       // when a connection got GOAWAY last
	http1    []*http1Conn    // those of HTTP/1.1, or that will be
	dials    balancer.Bucket // of HTTP/1.1: see http1Dials
}

type dialing struct {
	cancel context.CancelFunc
	stale  bool  // what is dialled is out of use already
	dead   error // it is of no use, and those who wait are to go elsewhere
}

// pool returns the pool for a backend and a credential.
func (sh *shard) pool(b *backend.Backend, c balancer.Credential) *pool {
	key := poolKey{b, c}
	p := sh.pools[key]
	if p == nil {
		p = &pool{sh: sh, backend: b, credential: c}
		sh.pools[key] = p
	}
	return p
}

// carry sends a request to the backend, at once or as soon as there is a connection.
func (p *pool) carry(s *stream) {
	if p.endsWithEach() && s.suitsHTTP1() && p.carryHTTP1(s) {
		return
	}
	p.carryHTTP2(s)
}

func (p *pool) carryHTTP2(s *stream) {
	if bc := p.reserve(); bc != nil {
		bc.open(s)
		return
	}
	p.wait(s)
}

// endsWithEach reports whether the backend has of late ended connections of HTTP/2 because
// of those who have not shown who they are. Requests of theirs then go over HTTP/1.1 as far
// as they can (suitsHTTP1). The others share each connection of HTTP/2 that is made anew,
// and its handshake: see redialAfter.
func (p *pool) endsWithEach() bool {
	return p.credential.Stranger() && !p.wentAway.IsZero() && p.sh.now.Sub(p.wentAway) < http1For
}

// http1For is for how long, after a connection of HTTP/2 has ended, none is made for
// requests that can do without.
const http1For = 10 * time.Second

// reserve returns a connection that takes one more stream, or nil.
func (p *pool) reserve() *backendConn {
	if len(p.waiting) > 0 {
		return nil // those who came before are first
	}
	return p.free()
}

func (p *pool) free() *backendConn {
	for _, bc := range p.conns {
		if bc.hasPlace() && len(bc.out) < maxUnsent {
			return bc
		}
	}
	return nil
}

// wait puts a stream in line for a connection, and dials one unless that is being
// done: one at a time, and all who wait share its fate.
func (p *pool) wait(s *stream) {
	s.ask.pool = p
	p.waiting = append(p.waiting, s)
	p.dial()
}

func (p *pool) dial() {
	if p.dialing != nil || p.sh.closed {
		return
	}
	for _, bc := range p.conns {
		if bc.hasPlace() {
			return // it takes them as soon as it has written what waits
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.dialing = &dialing{cancel: cancel}
	var rest time.Duration
	if p.endsWithEach() {
		rest = max(0, p.dialled.Add(redialAfter).Sub(p.sh.now))
	}
	p.dialled = p.sh.now.Add(rest)
	go p.connect(ctx, p.dialing, rest)
}

// redialAfter is the least time between two connections of HTTP/2 where they end with each
// request.
const redialAfter = 100 * time.Millisecond

// forget takes a stream out of the line.
func (p *pool) forget(s *stream) {
	s.ask.pool = nil
	for i, w := range p.waiting {
		if w == s {
			p.waiting = append(p.waiting[:i], p.waiting[i+1:]...)
			return
		}
	}
}

// serveWaiting sends on those who wait, as far as there is room.
func (p *pool) serveWaiting() {
	for len(p.waiting) > 0 {
		bc := p.free()
		if bc == nil {
			p.dial()
			return
		}
		s := p.waiting[0]
		p.forget(s)
		bc.open(s)
	}
}

// connect dials for all who wait, and then reads what comes on the connection.
func (p *pool) connect(ctx context.Context, d *dialing, rest time.Duration) {
	defer d.cancel()
	select {
	case <-time.After(rest):
	case <-ctx.Done():
	}
	sh := p.sh
	t, err := sh.r.dialHTTP2(ctx, p.backend, p.credential)
	sh.lock()
	p.dialing = nil
	dialled := err == nil
	if d.dead != nil {
		err = d.dead
	}
	if err != nil || d.stale {
		waiting := p.waiting
		p.waiting = nil
		for _, s := range waiting {
			s.ask.pool = nil
		}
		for _, s := range waiting {
			switch {
			case err == nil:
				p.wait(s)
			case !s.done:
				s.failed(balancer.DialFailed, err)
			}
		}
		sh.unlockAndFlush()
		if dialled {
			sh.r.hangUp(p.backend, p.credential, t)
		}
		return
	}
	bc := &backendConn{pool: p, nextID: 1, maxStreams: assumedStreams}
	bc.init(sh, bc, t, t.NetConn().(*Sock), maxAnswerHead)
	bc.receivable, bc.creditAt = backendConnWindow, backendConnWindow/4
	p.conns = append(p.conns, bc)
	out := appendSettings(append(bc.begin(4*short), preface...),
		setting{settingEnablePush, 0},
		setting{settingInitialWindow, backendWindow},
		setting{settingMaxHeaderListSize, maxAnswerHead})
	bc.write(appendWindowUpdate(out, 0, backendConnWindow-defaultWindow))
	p.serveWaiting()
	sh.unlockAndFlush()

	err = bc.read("")
	sh.lock()
	bc.end(err)
	sh.unlockAndFlush()
	sh.r.hangUp(p.backend, p.credential, t)
	if !expected(err) {
		p.ended(err)
	}
}

// loss is what the end of a connection is to the requests on it.
func (p *pool) loss() balancer.Event {
	if p.backend.State() == health.Dead {
		return balancer.Died
	}
	return balancer.Lost
}

// ended says why a connection has.
func (p *pool) ended(err error) {
	p.sh.r.Log.Debug("backend connection ended", "backend", p.backend.Name, "credential", p.credential.String(), "err", err)
}

// dialTLS connects to the backend and proves that it is the one, within the dial
// timeout. Only connections of the asserted credential bear the front-proxy
// certificate. hangUp is owed for what it returns.
func (r *Relay) dialTLS(ctx context.Context, b *backend.Backend, c balancer.Credential, alpn ...string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, r.DialTimeout)
	defer cancel()
	nc, err := r.Dial(ctx, "tcp", b.Address)
	if err != nil {
		return nil, err
	}
	t := tls.Client(NewSock(nc), r.TLS.BackendConfig(b.ServerName, c == balancer.Asserted, alpn...))
	if err := t.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS to %s: %w", b.Address, err)
	}
	r.Opened(b, c, 1)
	return t, nil
}

// dialHTTP2 is dialTLS for HTTP/2. It notes whether the backend speaks that, and fails
// where it does not.
func (r *Relay) dialHTTP2(ctx context.Context, b *backend.Backend, c balancer.Credential) (*tls.Conn, error) {
	t, err := r.dialTLS(ctx, b, c, "h2", "http/1.1")
	if err != nil {
		return nil, err
	}
	speaks := t.ConnectionState().NegotiatedProtocol == "h2"
	if b.SpeaksHTTP2(speaks) && !speaks {
		r.Log.Warn("the backend speaks HTTP/1.1 only: HTTP/2 clients are served over HTTP/1.1 as well, at a higher cost", "backend", b.Name)
		go r.Resettle()
	}
	if !speaks {
		r.hangUp(b, c, t)
		return nil, fmt.Errorf("%s does not speak HTTP/2", b.Address)
	}
	return t, nil
}

// hangUp closes a connection that dialTLS has made.
func (r *Relay) hangUp(b *backend.Backend, c balancer.Credential, t *tls.Conn) {
	t.NetConn().Close()
	r.Opened(b, c, -1)
}

// Learn finds out whether the backend speaks HTTP/2 (Suits), where it can be reached
// at all: before the first clients come, and whenever it has come back.
func (r *Relay) Learn(ctx context.Context, b *backend.Backend) {
	if t, err := r.dialHTTP2(ctx, b, balancer.Anonymous); err == nil {
		_ = t.CloseWrite()
		r.hangUp(b, balancer.Anonymous, t)
	}
}

// tick asks a backend that is silent whether it is there. It is asked while
// requests wait, and from time to time when none does.
func (p *pool) tick() {
	now := p.sh.now
	for _, bc := range append([]*backendConn(nil), p.conns...) {
		bc.cooling = [2]int{0, bc.cooling[0]}
		if p.surplus(bc) {
			bc.retire()
			continue
		}
		after := p.sh.r.PingAfter
		if bc.streams.n == 0 {
			after = idlePingAfter
		}
		switch {
		case bc.pingLost(now, p.sh.r.PingTimeout):
			p.sh.r.Passive(p.backend, health.NoAnswer)
			bc.end(errSilent)
		case bc.pingSent.IsZero() && bc.silence(now) > after:
			bc.ping(now)
		}
	}
	for _, c := range slices.Clone(p.http1) {
		if c.idleTooLong(now) {
			c.end(errLeft)
		}
	}
	p.serveWaiting()
}

// surplusAfter is how long a connection that a burst has left may be idle.
const surplusAfter = 10 * time.Second

// surplus reports whether a connection has been idle for long beside another one that
// has a place.
func (p *pool) surplus(bc *backendConn) bool {
	if bc.streams.n > 0 || bc.cooling != [2]int{} || bc.silence(p.sh.now) < surplusAfter {
		return false
	}
	return slices.ContainsFunc(p.conns, func(other *backendConn) bool { return other != bc && other.hasPlace() })
}

// idlePingAfter is how long a connection without a stream may be silent.
const idlePingAfter = 30 * time.Second
