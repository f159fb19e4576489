package passthrough

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// reason is why a connection was cut.
type reason uint8

const (
	backendDown reason = iota // its backend is down by its health checks
	draining                  // its backend gets no more connections
	tooOld                    // it has lasted as long as it may
	shutdown                  // the process ends
	reasonCount
)

var reasonNames = [reasonCount]string{backendDown: "backend_down", draining: "draining", tooOld: "age", shutdown: "shutdown"}

// Figures are what has passed to a backend and back since the process began.
type Figures struct {
	Connections  int64            `json:"connections"` // open now
	ToBackend    int64            `json:"toBackendBytes"`
	ToClients    int64            `json:"toClientsBytes"`
	DialFailures int64            `json:"dialFailures"`
	Cut          map[string]int64 `json:"cut"` // connections, by reason
}

// figures are Figures as they are counted.
type figures struct {
	connections, toBackend, toClients, dialFailures atomic.Int64
	cut                                             [reasonCount]atomic.Int64
}

func (f *figures) read() Figures {
	r := Figures{Connections: f.connections.Load(), ToBackend: f.toBackend.Load(), ToClients: f.toClients.Load(),
		DialFailures: f.dialFailures.Load(), Cut: map[string]int64{}}
	for i := range f.cut {
		if n := f.cut[i].Load(); n > 0 {
			r.Cut[reasonNames[i]] = n
		}
	}
	return r
}

// allFigures are those of all backends, by name.
type allFigures struct{ byName sync.Map }

func (a *allFigures) of(backend string) *figures {
	f, ok := a.byName.Load(backend)
	if !ok {
		f, _ = a.byName.LoadOrStore(backend, new(figures))
	}
	return f.(*figures)
}

func (a *allFigures) read() map[string]Figures {
	all := map[string]Figures{}
	a.byName.Range(func(name, f any) bool {
		all[name.(string)] = f.(*figures).read()
		return true
	})
	return all
}

// register makes the instruments, which are read when somebody asks.
func (a *allFigures) register(m metric.Meter) error {
	connections, err1 := m.Int64ObservableUpDownCounter("apiserver_lb.passthrough.connections",
		metric.WithDescription("Open connections that are passed through, by backend."))
	bytes, err2 := m.Int64ObservableCounter("apiserver_lb.passthrough", metric.WithUnit("By"),
		metric.WithDescription("Bytes that were passed through, by backend and direction (to_backend, to_clients)."))
	failures, err3 := m.Int64ObservableCounter("apiserver_lb.passthrough.dial_failures",
		metric.WithDescription("Connections to a backend that could not be made, or ended before it had answered."))
	cut, err4 := m.Int64ObservableCounter("apiserver_lb.passthrough.cut",
		metric.WithDescription("Connections that the balancer cut, by backend and reason (backend_down, draining, age, shutdown)."))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for name, f := range a.read() {
			backend := attribute.String("backend", name)
			o.ObserveInt64(connections, f.Connections, metric.WithAttributes(backend))
			o.ObserveInt64(bytes, f.ToBackend, metric.WithAttributes(backend, attribute.String("direction", "to_backend")))
			o.ObserveInt64(bytes, f.ToClients, metric.WithAttributes(backend, attribute.String("direction", "to_clients")))
			o.ObserveInt64(failures, f.DialFailures, metric.WithAttributes(backend))
			for why, n := range f.Cut {
				o.ObserveInt64(cut, n, metric.WithAttributes(backend, attribute.String("reason", why)))
			}
		}
		return nil
	}, connections, bytes, failures, cut)
	return err
}
