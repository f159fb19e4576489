// Package passthrough carries connections of clients to backends without ending their
// TLS: for clusters whose front-proxy key may not leave. What passes cannot be seen, so
// that a connection is what is balanced and counted, and all that can be done for one
// whose backend dies is to end it soon.
//
// A connection's way, top to bottom:
//
//	Server.begin     a place for it, and for the one to a backend
//	Server.hear      PROXY protocol, its turn, the ClientHello, the server name
//	Server.reach     a backend that answers: pick, dial, send the ClientHello, or the next one
//	Server.join      both ways at once, by splice(2); half-closes pass
//	Server.ended     places, counts and load are given back
package passthrough

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pires/go-proxyproto"
	"go.opentelemetry.io/otel/metric"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// Options are what a Server needs.
type Options struct {
	Core    *balancer.Core // of it, what picks a backend
	Metrics *balancer.Metrics
	Log     *slog.Logger
	// Dial makes TCP connections, *net.TCPConn.
	Dial        func(ctx context.Context, network, address string) (net.Conn, error)
	DialTimeout time.Duration
	// HandshakeTimeout bounds the time to the ClientHello, from there to the answer of a
	// backend, and from there to what the client says next.
	HandshakeTimeout time.Duration
	// Passive tells the health checks what traffic showed of a backend; it must not block.
	Passive func(*backend.Backend, health.Verdict)

	ServerNames   []string      // that clients may ask for; see SetServerNames
	MaxAge        time.Duration // of a connection; 0: any
	SendProxy     bool          // backends are told the client's address by the PROXY protocol, version 2
	Sources       *balancer.Sources
	ProxyProtocol balancer.Networks // of proxies in front; see admit.Options
	// MaxConnections is how many connections there may be at once, of clients and to
	// backends together; 0: any number. MaxPipes is how many pipes, of two file
	// descriptors each, there are beside them.
	MaxConnections, MaxPipes int
}

// Server passes the connections of one listener on.
type Server struct {
	Options // static after construction

	door     *admit.Door
	names    atomic.Pointer[names]
	pipes    *pipes
	buffers  sync.Pool
	figures  allFigures
	decision balancer.Decision // a connection is a long-running request

	mu          sync.Mutex
	listener    net.Listener
	closed      bool
	over        bool // what is accepted now is closed at once
	accepting   bool // Accept has not returned
	draining    bool
	drainBy     time.Time // by when connections end, where draining
	connections map[*connection]struct{}
	idle        *sync.Cond // on mu: accepting has ended; connections has shrunk
}

// New returns a Server, whose instruments are on the meter; it starts nothing.
func New(o Options, m metric.Meter) (*Server, error) {
	s := &Server{Options: o, pipes: &pipes{most: o.MaxPipes}, connections: map[*connection]struct{}{}}
	s.idle = sync.NewCond(&s.mu)
	s.buffers.New = func() any { b := make([]byte, bufferSize); return &b }
	s.decision.Class = balancer.Long
	s.SetServerNames(o.ServerNames)
	s.door = admit.NewDoor(admit.Options{Places: &admit.Places{Most: int64(o.MaxConnections)}, Memory: o.Core.Memory,
		Sources: o.Sources, ProxyProtocol: o.ProxyProtocol, Metrics: o.Metrics, Log: o.Log})
	return s, s.figures.register(m)
}

// bufferSize is that of the buffers which take the place of pipes, where there are none
// left: as much as a record of TLS.
const bufferSize = 16 << 10

// SetServerNames changes which server names new clients may ask for; none: any.
func (s *Server) SetServerNames(list []string) {
	n := names(list)
	s.names.Store(&n)
}

// Figures returns what has passed, by backend.
func (s *Server) Figures() map[string]Figures { return s.figures.read() }

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
	err := s.door.Accept(l, s.begin)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepting = false
	s.idle.Broadcast()
	if s.closed {
		return nil
	}
	return err
}

// Admitting is [admit.Door.Admitting].
func (s *Server) Admitting() time.Time { return s.door.Admitting() }

// begin is told of each connection that the door has accepted.
func (s *Server) begin(accepted net.Conn) {
	conn, ok := accepted.(*net.TCPConn)
	if !ok {
		accepted.Close()
		return
	}
	peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	c := &connection{conn: conn, begun: time.Now(),
		client: &balancer.Client{Peer: netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())}}
	total, ok := s.note(c)
	if !ok {
		conn.Close()
		return
	}
	if !s.door.IsProxy(c.client) && !s.door.Count(c.client, total) {
		s.ended(c)
		return
	}
	go s.hear(c)
}

// note adds a connection that begins, and returns how many there are; false: the server
// has drained, or is full.
func (s *Server) note(c *connection) (total int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || !s.door.Enter(len(s.connections)) {
		return 0, false
	}
	s.connections[c] = struct{}{}
	return len(s.connections), true
}

// hear finds out where a connection comes from and where it wants to go, and sees that it
// gets there. Its goroutine ends then: reading a ClientHello takes a large stack, which
// would stay with the connection for all its life.
func (s *Server) hear(c *connection) {
	defer s.survive(c)
	if !s.heard(c) || !s.placed(c) || !s.reach(c) {
		s.ended(c)
		return
	}
	go s.join(c)
}

// placed takes the place of the connection to a backend.
func (s *Server) placed(c *connection) bool {
	if c.placed = s.door.Places.Take(); !c.placed {
		s.refuse(c, balancer.ReasonConnections, "there are as many connections as file descriptors allow (LimitNOFILE in a systemd unit)")
	}
	return c.placed
}

// heard reports whether the connection is to be passed on.
func (s *Server) heard(c *connection) bool {
	deadline := c.begun.Add(s.HandshakeTimeout)
	if s.door.IsProxy(c.client) && (!s.door.Announced(c.conn, c.client, deadline) || !s.door.Count(c.client, s.count())) {
		return false
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	if away := c.client.Source.Wait(ctx); away != nil {
		s.door.TurnedAway(away)
		return false
	}
	_ = c.conn.SetReadDeadline(deadline) // it may be closed, and says so
	h, err := readHello(c.conn)
	if err != nil {
		s.Log.Debug("no ClientHello", "peer", c.client.Peer.String(), "err", err)
		return false
	}
	if !s.names.Load().allow(h.serverName) {
		_ = c.conn.SetWriteDeadline(deadline)
		_, _ = c.conn.Write(unrecognizedName) // it may be gone
		s.refuse(c, balancer.ReasonServerName, "clients may not ask for this server name (passthrough.serverNames in the configuration)", "serverName", balancer.Shorten(h.serverName))
		return false
	}
	c.hello = h
	return true
}

func (s *Server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.connections)
}

// refuse counts and logs that a connection is closed.
func (s *Server) refuse(c *connection, reason, why string, attrs ...any) {
	s.Metrics.Refused(reason)
	if s.door.Tell() {
		s.Log.Warn("connection refused: "+why, append(attrs, "reason", reason, "peer", c.client.Peer.String())...)
	}
}

// dial makes a connection to a backend.
func (s *Server) dial(b *backend.Backend) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.DialTimeout)
	defer cancel()
	c, err := s.Dial(ctx, "tcp", b.Address)
	if err != nil {
		return nil, err
	}
	to, ok := c.(*net.TCPConn)
	if !ok { // not with a net.Dialer, and tcp
		c.Close()
		return nil, net.UnknownNetworkError(c.RemoteAddr().Network())
	}
	return to, nil
}

// announcement is the header of the PROXY protocol with which a connection to a backend
// begins, empty where there is to be none.
func (s *Server) announcement(c *connection) []byte {
	if !s.SendProxy {
		return nil
	}
	header, err := proxyproto.HeaderProxyFromAddrs(2, net.TCPAddrFromAddrPort(c.client.Peer), c.conn.LocalAddr()).Format()
	if err != nil { // the addresses are those of TCP connections
		panic(err)
	}
	return header
}

// ended is the end of a connection, in whatever way. It may be called again.
func (s *Server) ended(c *connection) {
	s.mu.Lock()
	gone, to := c.gone, c.to
	c.gone, c.over = true, true
	s.mu.Unlock()
	if gone {
		return
	}
	c.conn.Close()
	if to != nil {
		to.Close()
	}
	if c.slot != nil {
		c.slot.Release()
	}
	c.client.Home.Leave()
	c.client.Source.Close(time.Now())
	if c.figures != nil {
		c.figures.connections.Add(-1)
		s.Metrics.ClientConnections(-1)
		s.Log.Debug("a connection has ended", "peer", c.client.Peer.String(), "backend", c.slot.Backend.Name, "seconds", time.Since(c.begun).Seconds(), "bytes", c.passed.Load())
	}
	if c.placed {
		s.door.Places.Give()
	}
	s.door.Places.Give()
	// At last, since a shutdown waits for it.
	s.mu.Lock()
	delete(s.connections, c)
	s.idle.Broadcast()
	s.mu.Unlock()
}

// survive ends a connection alone that has met a panic: what anybody may send must not end
// the process. It is to be deferred.
func (s *Server) survive(c *connection) {
	p := recover()
	if p == nil {
		return
	}
	s.Metrics.Refused(balancer.ReasonInternal)
	if s.door.Tell() {
		s.Log.Error("panic in a connection, which is closed", "panic", p, "peer", c.client.Peer.String(), "stack", string(debug.Stack()))
	}
	s.ended(c)
}

// Cut ends the connections to a backend that is down. Those that it has not answered yet
// go to another one.
func (s *Server) Cut(b *backend.Backend) {
	n := 0
	s.mu.Lock()
	for c := range s.connections {
		switch {
		case c.backend != b || c.over || c.to == nil:
		case c.joined:
			s.cut(c, backendDown)
			n++
		default:
			c.lost = true
			c.to.Close()
		}
	}
	s.mu.Unlock()
	if n > 0 {
		s.Log.Warn("connections cut, since their backend is down", "backend", b.Name, "connections", n)
	}
}

// stale is how long after its end a connection that is still there has not had to end: its
// backend had come back meanwhile.
const stale = time.Second

// EndConnections ends those connections to a backend that gets no more whose time has
// come: a random one until by, chosen when a connection is seen for the first time, and
// then a moment in which nothing passes, if there is one soon. It is to be called from time
// to time.
func (s *Server) EndConnections(b *backend.Backend, by time.Time) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.connections {
		if c.backend != b || !c.joined || c.over {
			continue
		}
		if c.leaving.from.IsZero() || now.Sub(c.leaving.by) > stale {
			c.leaving = spread(now, by, rand.Float64()) // #nosec G404 -- no secret
		}
		if c.leaving.due(now, c.look(now)) {
			s.cut(c, draining)
		}
	}
}

// Close frees what is left after Shutdown.
func (s *Server) Close() { s.pipes.close() }

// lookEvery is how often connections are looked at that are to end.
const lookEvery = 100 * time.Millisecond

// Run ends connections that are too old, until ctx is done.
func (s *Server) Run(ctx context.Context) {
	if s.MaxAge <= 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			s.endDue(now, tooOld, func(c *connection) ending { return c.age })
		case <-ctx.Done():
			return
		}
	}
}

// endDue ends connections whose ending is due.
func (s *Server) endDue(now time.Time, why reason, of func(*connection) ending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.connections {
		if e := of(c); c.joined && !c.over && e.begun(now) && e.due(now, c.look(now)) {
			s.cut(c, why)
		}
	}
}

// Shutdown drains: the listener closes, and connections are ended spread over the time
// given, each in a moment in which nothing passes, if there is one soon. What is left when
// ctx is done is cut. It returns the number of connections of which that is so.
func (s *Server) Shutdown(ctx context.Context, over time.Duration) (cut int) {
	now := time.Now()
	s.mu.Lock()
	s.closed = true
	if s.listener != nil {
		s.listener.Close()
	}
	s.draining, s.drainBy = true, now.Add(over)
	for c := range s.connections {
		if c.joined {
			c.leaving = spread(now, s.drainBy, rand.Float64()) // #nosec G404 -- no secret
		}
	}
	s.mu.Unlock()
	looking, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case now := <-tick.C:
				s.endDue(now, shutdown, func(c *connection) ending { return c.leaving })
			case <-looking.Done():
				return
			}
		}
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	admit.Await(ctx, s.idle, func() bool { return !s.accepting && len(s.connections) == 0 })
	s.over = true
	for c := range s.connections {
		if c.joined && !c.over {
			s.cut(c, shutdown)
			cut++
			continue
		}
		c.over = true
		c.conn.Close()
		if c.to != nil {
			c.to.Close()
		}
	}
	closed, cancel := context.WithTimeout(context.Background(), linger)
	defer cancel()
	admit.Await(closed, s.idle, func() bool { return len(s.connections) == 0 })
	return cut
}
