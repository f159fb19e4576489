package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
	"apiserver-lb/balancer/backend"
)

// HTTP2 carries the requests of client connections that have agreed on h2, in place
// of net/http. *relay.Relay is one.
type HTTP2 interface {
	// Suits reports whether it can: whether all backends speak HTTP/2.
	Suits() bool
	// Wrap is called with each connection before its TLS handshake.
	Wrap(c net.Conn) net.Conn
	// Serve returns when the connection, whose handshake is over, has ended.
	Serve(c *tls.Conn, client *balancer.Client)
	// Drain lets connections end, and ends watches spread over the time given.
	Drain(spread time.Duration)
}

// ServerOptions are the limits of the client side.
type ServerOptions struct {
	TLS               *tls.Config
	HTTP2             HTTP2
	ReadHeaderTimeout time.Duration // of a request head, and of the TLS handshake
	IdleTimeout       time.Duration // of a connection without a request
	MaxHeaderBytes    int
	MaxStreams        int // of a connection over net/http's HTTP/2
	// MaxConnections is how many clients there may be at once, with the connections that
	// upgrades have to backends; clients that come then are closed at once, so that they try
	// again or elsewhere. 0: any number.
	MaxConnections int
	// ProxyProtocol are the networks from which connections begin with a header of the
	// PROXY protocol, which says where they come from. One without it is closed.
	ProxyProtocol balancer.Networks
	// Sources limits what comes from one address; nil: nothing does.
	Sources *balancer.Sources
}

// Server serves clients on one listener: it accepts connections, sees to their TLS
// handshakes and hands them to what speaks their protocol, HTTP2 or net/http.
type Server struct {
	ServerOptions // static after construction

	f        *Forwarder
	door     *admit.Door
	http     *http.Server
	accepted *handover // what net/http gets

	mu        sync.Mutex
	listener  net.Listener
	closed    bool
	over      bool                          // what is accepted now is closed at once
	accepting bool                          // accept has not returned
	clients   map[net.Conn]*balancer.Client // nil: in its handshake
	young     map[net.Conn]struct{}         // of these, those that nobody has begun to serve
	idle      *sync.Cond                    // on mu: accepting has ended; clients or young has shrunk
}

// NewServer returns a server of the forwarder; it starts nothing.
func NewServer(f *Forwarder, o ServerOptions) *Server {
	s := &Server{ServerOptions: o, f: f, accepted: newHandover(), clients: map[net.Conn]*balancer.Client{}, young: map[net.Conn]struct{}{}}
	s.idle = sync.NewCond(&s.mu)
	f.places.Most = int64(o.MaxConnections)
	s.door = admit.NewDoor(admit.Options{Places: &f.places, Memory: f.Core.Memory, Sources: o.Sources, ProxyProtocol: o.ProxyProtocol, Metrics: f.Metrics, Log: f.Log})
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.serveHTTP),
		TLSConfig:                    o.TLS,
		ReadHeaderTimeout:            o.ReadHeaderTimeout,
		IdleTimeout:                  o.IdleTimeout,
		MaxHeaderBytes:               o.MaxHeaderBytes,
		DisableGeneralOptionsHandler: true, // OPTIONS * is kube-apiserver's to answer
		ErrorLog:                     slog.NewLogLogger(f.Log.Handler(), slog.LevelDebug),
		ConnContext:                  s.connContext,
		ConnState:                    s.connState,
		HTTP2: &http.HTTP2Config{ // for clients of backends that speak HTTP/1.1 only
			MaxConcurrentStreams: o.MaxStreams,
			SendPingTimeout:      30 * time.Second,
			PingTimeout:          15 * time.Second,
		},
	}
	return s
}

// Serve accepts connections until Shutdown; it returns nil then.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	s.listener = l
	closed := s.closed
	s.accepting = !closed
	s.mu.Unlock()
	if closed {
		return l.Close()
	}
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.accepted) }()
	err := s.door.Accept(l, s.begin)
	s.mu.Lock()
	s.accepting = false
	s.idle.Broadcast()
	s.mu.Unlock()
	if errors.Is(err, net.ErrClosed) && s.isClosed() {
		err = nil
	} else {
		_ = s.accepted.Close()
	}
	if herr := <-served; err == nil && !errors.Is(herr, http.ErrServerClosed) {
		err = herr
	}
	return err
}

// begin is told of each connection that the door has accepted.
func (s *Server) begin(c net.Conn) {
	t := tls.Server(s.HTTP2.Wrap(c), s.TLS)
	if client := s.admit(t); client != nil {
		go s.shakeHands(t, client)
	} else {
		c.Close()
	}
}

// Admitting is [admit.Door.Admitting].
func (s *Server) Admitting() time.Time { return s.door.Admitting() }

// shakeHands finds out where a connection comes from, sees to its TLS handshake, and
// starts what the protocol asks for in a goroutine of its own: the stack that a
// handshake needs is large, and would stay with a connection for its whole life.
func (s *Server) shakeHands(t *tls.Conn, client *balancer.Client) {
	defer s.survive(t, client)
	c := t.NetConn()
	deadline := time.Now().Add(s.ReadHeaderTimeout)
	if s.door.IsProxy(client) && (!s.door.Announced(c, client, deadline) || !s.count(client)) {
		s.drop(t, client)
		return
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	if away := client.Source.Wait(ctx); away != nil {
		s.door.TurnedAway(away)
		s.drop(t, client)
		return
	}
	if err := t.HandshakeContext(ctx); err != nil {
		s.drop(t, client)
		s.f.Log.Debug("TLS handshake failed", "peer", client.Peer.String(), "err", err)
		return
	}
	if away := client.Source.Shown(t.ConnectionState().PeerCertificates, time.Now()); away != nil {
		s.door.TurnedAway(away)
		s.drop(t, client)
		return
	}
	h2 := t.ConnectionState().NegotiatedProtocol == "h2" && s.HTTP2.Suits()
	s.mu.Lock()
	s.clients[t] = client
	s.mu.Unlock()
	s.f.Metrics.ClientConnections(1)
	if h2 {
		s.begun(t)
		go s.serveHTTP2(t, client)
		return
	}
	var conn net.Conn = t
	if t.ConnectionState().NegotiatedProtocol != "h2" {
		admit.Patient(t)
		conn = newGuard(t, s.MaxHeaderBytes, func(r *balancer.Refusal, method string) []byte { return s.f.unread(r, method, client) })
	}
	if !s.accepted.give(conn) {
		t.Close()
		s.ended(t)
	}
}

// drop closes a connection that has not become a client's.
func (s *Server) drop(t *tls.Conn, client *balancer.Client) {
	s.forget(t)
	client.Source.Close(time.Now())
	t.NetConn().Close()
}

func (s *Server) serveHTTP2(t *tls.Conn, client *balancer.Client) {
	s.HTTP2.Serve(t, client)
	t.Close()
	s.ended(t)
}

// admit adds a connection and returns its client; nil: it is to be closed. What comes
// through a proxy is counted when that has said where it comes from.
func (s *Server) admit(t *tls.Conn) *balancer.Client {
	if !s.note(t) {
		return nil
	}
	client := &balancer.Client{Peer: addrPortOf(t.NetConn().RemoteAddr().String())}
	if !s.door.IsProxy(client) && !s.count(client) {
		s.forget(t)
		return nil
	}
	return client
}

// count counts a connection that has been noted at its source; false: the source has
// enough of them.
func (s *Server) count(client *balancer.Client) bool {
	s.mu.Lock()
	total := len(s.clients)
	s.mu.Unlock()
	return s.door.Count(client, total)
}

// note adds a connection that begins; false: the server has drained, or is full. One
// that was accepted just before the listener closed is served: where the listener is
// systemd's, its client has no reason to expect anything else.
func (s *Server) note(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return false
	}
	if !s.door.Enter(len(s.clients)) {
		return false
	}
	s.clients[c], s.young[c] = nil, struct{}{}
	return true
}

// begun notes that a connection has come to those who serve it to its end.
func (s *Server) begun(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.young, c)
	s.idle.Broadcast()
}

// forget removes a connection and returns its client, nil where there was none.
func (s *Server) forget(c net.Conn) *balancer.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	client, noted := s.clients[c]
	if noted {
		s.f.places.Give()
	}
	delete(s.clients, c)
	delete(s.young, c)
	s.idle.Broadcast()
	return client
}

// left takes leave of a connection whose handshake has succeeded, and returns its
// client, nil where that was done before.
func (s *Server) left(c net.Conn) *balancer.Client {
	client := s.forget(c)
	if client != nil {
		client.Home.Leave()
		s.f.Metrics.ClientConnections(-1)
	}
	return client
}

// ended is the end of such a connection.
func (s *Server) ended(c net.Conn) {
	if client := s.left(c); client != nil {
		client.Source.Close(time.Now())
	}
}

// connContext gives a connection of net/http its Client.
func (s *Server) connContext(ctx context.Context, c net.Conn) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	ctx = context.WithValue(ctx, servedKey{}, &served{conn: accepted(c), certified: s.f.lapses.open(accepted(c), s.clients[accepted(c)])})
	return context.WithValue(ctx, clientKey{}, s.clients[accepted(c)])
}

// accepted returns the connection that was accepted, of one that net/http serves.
func accepted(c net.Conn) net.Conn {
	if g, ok := c.(*guard); ok {
		return g.Conn
	}
	return c
}

// served is a connection of net/http.
type served struct {
	conn      net.Conn
	certified *certified  // nil: the client has shown no certificate
	begun     atomic.Bool // a request has come on it
	left      atomic.Bool // one has come that asked to leave HTTP
}

type servedKey struct{}

// serveHTTP notes the first request of a connection, and what must be its last one.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	c := r.Context().Value(servedKey{}).(*served)
	if !c.begun.Load() && !c.begun.Swap(true) {
		s.begun(c.conn)
		clientOf(r).Source.Begun()
	}
	if r.ProtoMajor == 1 {
		if c.left.Load() {
			// Its guard looks at nothing any more; what refuses an upgrade closes the
			// connection, so this is not to be reached.
			panic(http.ErrAbortHandler)
		}
		c.left.Store(upgradeOf(r) != "")
	}
	s.f.ServeHTTP(w, r)
}

// connState follows connections of net/http to their end. One that is hijacked for
// an upgrade is a client's no more; the slot of the upgrade counts it, and its source
// and its place until the tunnel ends.
func (s *Server) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateIdle:
		_ = c.SetWriteDeadline(time.Time{}) // timeRest
	case http.StateHijacked:
		s.f.lapses.closed(accepted(c))
		s.left(accepted(c))
	case http.StateClosed:
		s.f.lapses.closed(accepted(c))
		s.ended(accepted(c))
	}
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// spreadShare is the share of the grace period over which watches are ended; the
// rest is for the last ones to finish.
const spreadShare = 0.8

// Spread returns the part of a grace period over which watches are ended.
func Spread(grace time.Duration) time.Duration { return time.Duration(float64(grace) * spreadShare) }

// EndWatches ends watches of a backend that gets no more requests: cleanly, and each at
// a random time until by. It is to be called from time to time, for it ends those that
// are due.
func (s *Server) EndWatches(b *backend.Backend, by time.Time) { s.f.drain.endWatches(b, by) }

// Unstall sends requests that wait for an answer of the backend elsewhere, where they may
// be sent again (balancer.Stalled).
func (s *Server) Unstall(b *backend.Backend) { s.f.waiters.move(b) }

// youngFor bounds how long a shutdown waits for connections that have been accepted and
// have brought no request yet, before it tells net/http, which would close them.
const youngFor = 2 * time.Second

// Shutdown drains: the listener closes, HTTP/2 clients get GOAWAY, keep-alives
// end, requests in flight finish, watches are ended spread over the grace period,
// and what is left at its end (or when ctx is done) is cut. It returns the number
// of connections that were cut, 0 after a complete drain.
func (s *Server) Shutdown(ctx context.Context, grace time.Duration) (cut int) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	s.mu.Lock()
	s.closed = true
	if s.listener != nil {
		s.listener.Close()
	}
	s.mu.Unlock()
	spread := Spread(grace)
	s.f.drain.begin(spread)
	s.HTTP2.Drain(spread)
	s.http.SetKeepAlivesEnabled(false)
	s.awaitYoung(ctx, min(youngFor, grace-spread))
	err := s.http.Shutdown(ctx)
	select {
	case <-s.f.drain.noTunnels():
	case <-ctx.Done():
	}
	cut = s.awaitClients(ctx)
	if err != nil {
		s.http.Close()
	}
	cut += s.f.drain.finish()
	<-s.f.drain.noTunnels()
	return cut
}

// awaitYoung waits until all that was accepted is served. net/http, once it shuts down,
// drops a request whose head it reads, where a new connection has no second chance.
func (s *Server) awaitYoung(ctx context.Context, atMost time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	admit.Await(ctx, s.idle, func() bool { return !s.accepting && len(s.young) == 0 })
}

// awaitClients waits until no connection is left or ctx is done, closes those that
// are, and returns how many of them were clients'.
func (s *Server) awaitClients(ctx context.Context) (cut int) {
	s.mu.Lock()
	admit.Await(ctx, s.idle, func() bool { return !s.accepting && len(s.clients) == 0 })
	s.over = true
	var left []net.Conn
	for c, client := range s.clients {
		if client != nil {
			cut++
		}
		left = append(left, c.(*tls.Conn).NetConn())
	}
	s.mu.Unlock()
	for _, c := range left {
		c.Close()
	}
	return cut
}

// handover is a listener that yields the connections it is given.
type handover struct {
	conns  chan net.Conn // never closed
	closed chan struct{} // closed by Close
	once   sync.Once
}

func newHandover() *handover {
	return &handover{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// give hands a connection over; false: nobody takes it any more.
func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close makes Accept return; it never fails.
func (h *handover) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handover) Addr() net.Addr { return &net.TCPAddr{} }
