package forward

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"time"

	"apiserver-lb/balancer"
)

// lapseGrace is how long what is ended because a client's certificate has lapsed may
// take to reach that client.
const lapseGrace = 2 * time.Second

// lapses knows the connections of net/http whose clients have shown certificates, and
// what runs on them.
type lapses struct {
	mu    sync.Mutex
	conns map[net.Conn]*certified
}

// certified is such a connection. It is known until net/http has let go of it and the
// last of its requests has returned, which for a tunnel is long after.
type certified struct {
	// Static after construction.
	conn   *tls.Conn
	client *balancer.Client
	chain  []*x509.Certificate

	// Guarded by lapses.mu.
	running map[*exchange]*grant
	lapsed  time.Time // when the certificate was first seen not to count any more; zero: it does
	left    bool      // net/http has let go of it
}

// grant is what a request that runs on such a connection was given, to be taken back.
type grant struct {
	end   context.CancelFunc
	ended bool // guarded by lapses.mu: end has been called
}

// open notes a connection that net/http begins to serve. It returns nil where the
// client has shown no certificate.
func (l *lapses) open(c net.Conn, client *balancer.Client) *certified {
	t, ok := c.(*tls.Conn)
	if !ok {
		return nil
	}
	chain := t.ConnectionState().PeerCertificates
	if len(chain) == 0 {
		return nil
	}
	e := &certified{conn: t, client: client, chain: chain, running: map[*exchange]*grant{}}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		l.conns = map[net.Conn]*certified{}
	}
	l.conns[c] = e
	return e
}

// closed notes that net/http has let go of a connection.
func (l *lapses) closed(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.conns[c]; e != nil {
		e.left = true
		l.forget(e)
	}
}

// forget lets go of a connection with which all is over. mu is held.
func (l *lapses) forget(e *certified) {
	if e.left && len(e.running) == 0 {
		delete(l.conns, e.conn)
	}
}

// enter notes a request that has been let in, and returns what is to be called at its
// end. Where the client has shown a certificate, the request's context ends when it
// is no longer allowed.
func (l *lapses) enter(x *exchange) (leave func()) {
	e := x.in.Context().Value(servedKey{}).(*served).certified
	if e == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(x.in.Context())
	x.in = x.in.WithContext(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	e.running[x] = &grant{end: cancel}
	return func() {
		cancel()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(e.running, x)
		l.forget(e)
	}
}

// EndLapsed ends what runs under client certificates that do not count any more, and
// closes these connections. It is to be called every few seconds, and when a CA, a CRL
// or the deny list has changed.
func (s *Server) EndLapsed() {
	l := &s.f.lapses
	for _, e := range balancer.AssertedFirst(l.all(), func(e *certified) *balancer.Client { return e.client }) {
		lapse := e.client.Lapsed(s.f.Core.Verifier, e.chain)
		if lapse == nil {
			continue
		}
		watches, others, over := l.end(e, lapse, time.Now())
		for range watches + others {
			s.f.Metrics.Refused(balancer.ReasonLapsed)
		}
		if watches+others > 0 {
			s.f.Refusals.Lapsed(lapse, e.client, watches, others)
		}
		if over {
			// Beneath TLS, which would wait until a client takes the alert.
			e.conn.NetConn().Close()
		}
	}
}

// all returns the connections that there are.
func (l *lapses) all() []*certified {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]*certified, 0, len(l.conns))
	for _, e := range l.conns {
		list = append(list, e)
	}
	return list
}

// end ends the requests that the lapse does not spare: a watch cleanly, so that nothing
// is lost where the client has another certificate to come with. It returns how many
// watches and others these were, and whether the connection is to be closed: what ran
// there has had its time to end.
func (l *lapses) end(e *certified, lapse *balancer.Lapse, now time.Time) (watches, others int, over bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.lapsed.IsZero() {
		e.lapsed = now
	}
	over = now.Sub(e.lapsed) >= lapseGrace
	for x, g := range e.running {
		if lapse.Spares(x.decision.Credential) {
			over = false
			continue
		}
		if g.ended {
			continue
		}
		g.ended = true
		g.end()
		if x.decision.Watch() {
			watches++
		} else {
			others++
		}
	}
	return watches, others, over
}

// CertificateUses tells of each connection as whose client certificate's user requests have
// come.
func (s *Server) CertificateUses(add func(balancer.CertificateUse)) {
	for _, e := range s.f.lapses.all() {
		if u, ok := e.client.CertificateUse(e.chain); ok {
			add(u)
		}
	}
}
