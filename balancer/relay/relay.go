// Package relay carries HTTP/2 requests frame by frame: from the streams of client
// connections to streams of a few connections to each backend, and the answers back.
// What is to happen with a request it asks package balancer.
//
// A request's way, top to bottom:
//
//	Relay.Serve            a client connection; conn.read, conn.arrived: frames, under the shard's lock
//	clientConn.headers     parseRequest -> stream.begin: Decide, Admit, and the head for the backend
//	stream.attempt         Pick; a connection of the pool, or wait for one to be dialled
//	backendConn.open       HEADERS to the backend; the body follows from stream.up
//	http1Conn.send         or, of those who are not known yet, all of it over HTTP/1.1
//	backendConn.headers    parseAnswer -> stream.answerCame: held for a moment, or sendHead
//	stream.dataCame        DATA, at once or from stream.down as the windows allow
//	stream.failed          after a failed attempt: Again, or what to say
//	stream.finish          gives everything back
//	shard.unlockAndFlush   what has come together is encrypted and written
//
// A goroutine reads each connection, none belongs to a stream, and a connection that
// is silent holds no buffer. Everything between reading and writing happens under
// the lock of a shard, of which there is about one for each core.
package relay

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// TLSConfigs gives the TLS configuration for connections to backends, fresh for
// each, so that reloaded CAs and certificates apply. *tlsconf.Store is one.
type TLSConfigs interface {
	BackendConfig(serverName string, frontProxy bool, alpn ...string) *tls.Config
}

// Options are what a Relay needs; all are required.
type Options struct {
	Core        *balancer.Core
	Metrics     *balancer.Metrics
	Refusals    *balancer.RefusalLog
	Name        string // of this balancer, for the Status errors that it writes itself
	MaxHeldBody int    // bytes of a request body that are kept to be sent again
	// Passive tells the health checks what traffic showed of a backend; it must not block.
	Passive func(*backend.Backend, health.Verdict)
	Log     *slog.Logger

	TLS         TLSConfigs
	Dial        func(ctx context.Context, network, address string) (net.Conn, error)
	DialTimeout time.Duration
	Opened      func(b *backend.Backend, c balancer.Credential, delta int64) // counts connections

	MaxHeaderBytes    int           // of a request's header list, decoded
	ReadHeaderTimeout time.Duration // of the preface, and of a header block in several frames
	IdleTimeout       time.Duration // of a client connection without a request
	// StallTimeout is how long a short request may stand still because of its client,
	// which sends nothing of its body, or takes nothing of its answer.
	StallTimeout time.Duration
	// A backend that was silent for PingAfter while requests wait is asked by an
	// HTTP/2 PING; one that does not answer within PingTimeout is taken for hung.
	PingAfter, PingTimeout time.Duration
	Limits                 Limits // of each client connection
	Shards                 int    // about one for each core
}

// Relay relays HTTP/2.
type Relay struct {
	Options
	shards  []*shard
	epoch   time.Time // what streams count their time from
	turn    atomic.Uint64
	windows *balancer.Room // for windows beyond the usual at backends
}

// New returns a Relay; it starts nothing.
func New(o Options) *Relay {
	r := &Relay{Options: o, epoch: time.Now(), windows: balancer.NewRoom(extraWindows, o.Core.Memory)}
	for range max(1, o.Shards) {
		r.shards = append(r.shards, newShard(r))
	}
	return r
}

// Run looks after time: pings, timeouts, the end of watches. It returns when ctx is
// done.
func (r *Relay) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, sh := range r.shards {
		wg.Go(func() { sh.run(ctx) })
	}
	wg.Wait()
	return nil
}

// each calls f for every shard, under its lock.
func (r *Relay) each(f func(sh *shard)) {
	for _, sh := range r.shards {
		sh.lock()
		f(sh)
		sh.unlockAndFlush()
	}
}

// Cut closes every connection to the backend at once: it is dead, and whatever
// waits on it must learn that now.
func (r *Relay) Cut(b *backend.Backend) {
	r.each(func(sh *shard) {
		for key, p := range sh.pools {
			if key.backend == b {
				p.cut(errDead)
			}
		}
	})
}

// Retire takes the connections to backends that stand now out of use for new
// requests and closes each when its last request ends: a certificate or a CA has
// changed.
func (r *Relay) Retire() {
	r.each(func(sh *shard) {
		for _, p := range sh.pools {
			for _, bc := range slices.Clone(p.conns) {
				bc.retire()
			}
			for _, c := range slices.Clone(p.http1) {
				c.retire()
			}
			if p.dialing != nil {
				p.dialing.stale = true // its handshake may be over
			}
		}
	})
}

// Suits reports whether requests can be relayed frame by frame: whether all backends
// speak HTTP/2, as far as is known.
func (r *Relay) Suits() bool { return r.Core.Backends.Set().HTTP2() }

// Resettle has all clients come again on new connections where requests cannot be
// relayed any more (Suits). It is to be called when a set of backends has taken the
// place of another; the relay calls it when it learns what a backend speaks.
func (r *Relay) Resettle() {
	if r.Suits() {
		return
	}
	r.each(func(sh *shard) {
		for cc := range sh.clients {
			cc.leave()
		}
	})
}

// Drain sends GOAWAY to all clients and ends watches spread over the time given.
// Requests in flight go on; each connection ends with its last.
func (r *Relay) Drain(spread time.Duration) {
	r.each(func(sh *shard) {
		sh.draining, sh.until = true, sh.now.Add(spread)
		for cc := range sh.clients {
			cc.leave()
		}
	})
}

// Close closes all connections, of clients and to backends.
func (r *Relay) Close() {
	r.each(func(sh *shard) {
		sh.closed = true
		for cc := range sh.clients {
			cc.end(net.ErrClosed)
		}
		for _, p := range sh.pools {
			p.cut(net.ErrClosed)
		}
	})
}

// cut ends all connections of a pool, and the dial under way. Those who wait for one go
// elsewhere.
func (p *pool) cut(err error) {
	waiting := p.waiting
	p.waiting = nil // before anything could dial for them again
	for _, bc := range slices.Clone(p.conns) {
		bc.end(err)
	}
	for _, c := range slices.Clone(p.http1) {
		c.lost(err)
	}
	if p.dialing != nil {
		p.dialing.dead = err
		p.dialing.cancel()
	}
	for _, s := range waiting {
		s.ask.pool = nil
	}
	for _, s := range waiting {
		if !s.done {
			s.failed(balancer.DialFailed, err)
		}
	}
}
