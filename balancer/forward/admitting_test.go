package forward

import (
	"crypto/tls"
	"log/slog"
	"net"
	"testing"
	"time"

	"go.opentelemetry.io/otel/metric/noop"

	"apiserver-lb/balancer"
)

// stuck holds whoever accepts a connection until it is let go.
type stuck struct {
	HTTP2
	entered, leave chan struct{}
}

func (s stuck) Wrap(c net.Conn) net.Conn {
	s.entered <- struct{}{}
	<-s.leave
	return c
}

func (stuck) Drain(time.Duration) {}

// TestAdmitting wants a server that hangs with a connection to be told from one that
// waits for the next.
func TestAdmitting(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it is closed by Shutdown
	if err != nil {
		t.Fatal(err)
	}
	h := stuck{entered: make(chan struct{}), leave: make(chan struct{})}
	metrics, err := balancer.NewMetrics(noop.NewMeterProvider().Meter(""))
	if err != nil {
		t.Fatal(err)
	}
	f := New(Options{Core: new(balancer.Core), Metrics: metrics, Log: slog.New(slog.DiscardHandler)})
	s := NewServer(f, ServerOptions{HTTP2: h, TLS: new(tls.Config), ReadHeaderTimeout: time.Second})
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	if since := s.Admitting(); !since.IsZero() {
		t.Errorf("it admits since %v before anybody came", since)
	}
	for range 2 {
		before := time.Now()
		c, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // closed below
		if err != nil {
			t.Fatal(err)
		}
		<-h.entered
		if since := s.Admitting(); since.Before(before.Truncate(0)) || since.After(time.Now()) {
			t.Errorf("it admits since %v, want after %v", since, before)
		}
		c.Close()
		h.leave <- struct{}{}
	}
	for wait := time.Now(); !s.Admitting().IsZero(); time.Sleep(time.Millisecond) {
		if time.Since(wait) > 10*time.Second {
			t.Fatal("it hangs although it was let go")
		}
	}
	s.Shutdown(t.Context(), time.Second)
	if err := <-served; err != nil {
		t.Error(err)
	}
}
