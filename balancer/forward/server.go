package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"apiserver-lb/balancer"
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
	// MaxConnections is how many clients there may be at once; those that come then are
	// closed at once, so that they try again or elsewhere. 0: any number.
	MaxConnections int
}

// Server serves clients on one listener: it accepts connections, sees to their TLS
// handshakes and hands them to what speaks their protocol, HTTP2 or net/http.
type Server struct {
	ServerOptions // static after construction

	f        *Forwarder
	http     *http.Server
	accepted *handover // what net/http gets

	mu       sync.Mutex
	listener net.Listener
	closed   bool
	clients  map[net.Conn]*balancer.Client // nil: in its handshake
	turned   time.Time                     // when it was last logged that one was turned away
	idle     *sync.Cond                    // on mu: clients has shrunk
}

// NewServer returns a server of the forwarder; it starts nothing.
func NewServer(f *Forwarder, o ServerOptions) *Server {
	s := &Server{ServerOptions: o, f: f, accepted: newHandover(), clients: map[net.Conn]*balancer.Client{}}
	s.idle = sync.NewCond(&s.mu)
	s.http = &http.Server{
		Handler:                      f,
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
	s.mu.Unlock()
	if closed {
		return l.Close()
	}
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(s.accepted) }()
	err := s.accept(l)
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

// accept takes connections until the listener fails for good.
func (s *Server) accept(l net.Listener) error {
	var delay time.Duration
	for {
		c, err := l.Accept()
		if err == nil {
			delay = 0
			if t := tls.Server(s.HTTP2.Wrap(c), s.TLS); s.note(t) {
				go s.shakeHands(t)
			} else {
				c.Close()
			}
			continue
		}
		var ne net.Error
		if !errors.As(err, &ne) || !ne.Temporary() { //nolint:staticcheck // as net/http has it: EMFILE and its kin pass
			return err
		}
		delay = min(max(2*delay, minAcceptDelay), maxAcceptDelay)
		s.f.Log.Warn("a connection could not be accepted", "err", err, "retryIn", delay)
		time.Sleep(delay)
	}
}

// How long accept waits when the process has no file descriptor left.
const (
	minAcceptDelay = 5 * time.Millisecond
	maxAcceptDelay = time.Second
)

// shakeHands sees to the TLS handshake, and starts what the protocol asks for in a
// goroutine of its own: the stack that a handshake needs is large, and would stay
// with a connection for its whole life.
func (s *Server) shakeHands(t *tls.Conn) {
	c := t.NetConn()
	ctx, cancel := context.WithTimeout(context.Background(), s.ReadHeaderTimeout)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		s.forget(t)
		c.Close()
		s.f.Log.Debug("TLS handshake failed", "peer", c.RemoteAddr().String(), "err", err)
		return
	}
	client := &balancer.Client{Peer: addrPortOf(c.RemoteAddr().String())}
	s.mu.Lock()
	s.clients[t] = client
	s.mu.Unlock()
	s.f.Metrics.ClientConnections(1)
	if t.ConnectionState().NegotiatedProtocol == "h2" && s.HTTP2.Suits() {
		go s.serveHTTP2(t, client)
		return
	}
	if !s.accepted.give(t) {
		t.Close()
		s.left(t)
	}
}

func (s *Server) serveHTTP2(t *tls.Conn, client *balancer.Client) {
	s.HTTP2.Serve(t, client)
	t.Close()
	s.left(t)
}

// note adds a connection that begins; false: the server has been closed, or is full.
func (s *Server) note(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.MaxConnections > 0 && len(s.clients) >= s.MaxConnections {
		if now := time.Now(); now.Sub(s.turned) > turnedEvery {
			s.turned = now
			s.f.Log.Warn("clients are turned away: there are as many connections as file descriptors allow (LimitNOFILE in a systemd unit)", "connections", len(s.clients))
		}
		return false
	}
	s.clients[c] = nil
	return true
}

// turnedEvery is how often it is logged that clients are turned away.
const turnedEvery = 10 * time.Second

// forget removes a connection and returns its client, nil where there was none.
func (s *Server) forget(c net.Conn) *balancer.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	client := s.clients[c]
	delete(s.clients, c)
	s.idle.Broadcast()
	return client
}

// left is the end of a connection whose handshake has succeeded.
func (s *Server) left(c net.Conn) {
	if client := s.forget(c); client != nil {
		client.Home.Leave()
		s.f.Metrics.ClientConnections(-1)
	}
}

// connContext gives a connection of net/http its Client.
func (s *Server) connContext(ctx context.Context, c net.Conn) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return context.WithValue(ctx, clientKey{}, s.clients[c])
}

// connState follows connections of net/http to their end. One that is hijacked for
// an upgrade is a client's no more; the slot of the upgrade counts it.
func (s *Server) connState(c net.Conn, state http.ConnState) {
	if state == http.StateHijacked || state == http.StateClosed {
		s.left(c)
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
	spread := time.Duration(float64(grace) * spreadShare)
	s.f.drain.begin(spread)
	s.HTTP2.Drain(spread)
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

// awaitClients waits until no connection is left or ctx is done, closes those that
// are, and returns how many of them were clients'.
func (s *Server) awaitClients(ctx context.Context) (cut int) {
	defer context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.idle.Broadcast()
	})()
	s.mu.Lock()
	for len(s.clients) > 0 && ctx.Err() == nil {
		s.idle.Wait()
	}
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
