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

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

// HTTP2 carries the requests of client connections that have agreed on h2, in place
// of net/http. *relay.Relay is one.
type HTTP2 interface {
	// Suits reports whether it can: whether all backends speak HTTP/2.
	Suits() bool
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
}

// Server serves clients on one listener.
type Server struct {
	// Static after construction.
	f     *Forwarder
	http  *http.Server
	http2 HTTP2

	clients sync.Map // net.Conn -> *balancer.Client, while the connection is open
}

// maxStreams is how many requests one client connection may have in flight. Some
// controllers hold many hundreds of watches on a connection.
const maxStreams = 1000

// NewServer returns a server of the forwarder; it starts nothing.
func NewServer(f *Forwarder, o ServerOptions) *Server {
	s := &Server{f: f, http2: o.HTTP2}
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
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams,
			SendPingTimeout:      30 * time.Second,
			PingTimeout:          15 * time.Second,
		},
	}
	// It cannot fail: the suites of our TLS configuration are those of HTTP/2.
	if err := http2.ConfigureServer(s.http, nil); err != nil {
		panic(err)
	}
	viaHTTP1 := s.http.TLSNextProto[http2.NextProtoTLS]
	s.http.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
		http2.NextProtoTLS: func(hs *http.Server, c *tls.Conn, h http.Handler) {
			client, ok := s.clients.Load(c)
			if !ok || !s.http2.Suits() {
				viaHTTP1(hs, c, h) // some backend speaks HTTP/1.1 only
				return
			}
			s.http2.Serve(c, client.(*balancer.Client))
		},
	}
	return s
}

// connContext gives a new connection its Client.
func (s *Server) connContext(ctx context.Context, c net.Conn) context.Context {
	client := &balancer.Client{Peer: addrPortOf(c.RemoteAddr().String())}
	s.clients.Store(c, client)
	return context.WithValue(ctx, clientKey{}, client)
}

// connState follows connections to their end. One that is hijacked for an upgrade
// is a client's no more; the slot of the upgrade counts it.
func (s *Server) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.f.Metrics.ClientConnections(1)
	case http.StateHijacked, http.StateClosed:
		s.f.Metrics.ClientConnections(-1)
		if client, ok := s.clients.LoadAndDelete(c); ok {
			client.(*balancer.Client).Home.Leave()
		}
	}
}

// Serve accepts connections until Shutdown; it returns nil then.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
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
	spread := time.Duration(float64(grace) * spreadShare)
	s.f.drain.begin(spread)
	s.http2.Drain(spread)
	err := s.http.Shutdown(ctx)
	select {
	case <-s.f.drain.noTunnels():
	case <-ctx.Done():
	}
	s.clients.Range(func(any, any) bool { cut++; return true })
	if err != nil {
		s.http.Close()
	}
	cut += s.f.drain.finish()
	<-s.f.drain.noTunnels()
	return cut
}
