package balancer

import (
	"context"
	"errors"
	"maps"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// Metrics are the instruments of the data path. Their names and units follow
// OpenTelemetry's conventions; the Prometheus exporter adds the unit and _total.
// No attribute takes a value that a client chooses freely: paths, user names,
// namespaces and user agents stay out, and unknown verbs are "other".
type Metrics struct {
	duration metric.Float64Histogram
	backends metric.Int64UpDownCounter

	// The rest is counted here, and read when somebody asks (Totals, the instruments): one
	// that looks its attributes up anew costs a tenth of a small request.
	requests atomic.Pointer[map[requestKey]*requestSeries] // replaced as a whole, under mu
	figures  atomic.Pointer[map[string]*figures]           // likewise, by backend
	refused  sync.Map                                      // of *atomic.Int64, by reason
	open     level                                         // client connections
	mu       sync.Mutex
	inFlight [classCount]level
}

// level is a number that goes up and down. Until it first does it is not told.
type level struct {
	n    atomic.Int64
	used atomic.Bool
}

func (l *level) add(delta int64) {
	l.n.Add(delta)
	if !l.used.Load() {
		l.used.Store(true)
	}
}

// requestKey names one series of requests; requestSeries is what it comes to.
type requestKey struct {
	verb, code, backend string
	class               Class
	credential          Credential
}

type requestSeries struct {
	count      atomic.Int64
	attributes []metric.ObserveOption // of the count
	duration   []metric.RecordOption  // of its series of durations, which has fewer
	figures    *figures               // of its backend
}

// durationBounds are in seconds; long-running requests last beyond them.
var durationBounds = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// NewMetrics makes the instruments on the meter given.
func NewMetrics(m metric.Meter) (*Metrics, error) {
	var x Metrics
	var errs [8]error
	x.requests.Store(&map[requestKey]*requestSeries{})
	x.figures.Store(&map[string]*figures{})
	requests, err := m.Int64ObservableCounter("apiserver_lb.requests",
		metric.WithDescription("Requests that have ended, by verb, class, status code, backend and credential."))
	errs[0] = err
	x.duration, errs[1] = m.Float64Histogram("apiserver_lb.request.duration", metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(durationBounds[:]...),
		metric.WithDescription("Time from the request head to the end of the answer."))
	inFlight, err := m.Int64ObservableUpDownCounter("apiserver_lb.requests.in_flight",
		metric.WithDescription("Requests in flight, by class."))
	errs[2] = err
	retries, err := m.Int64ObservableCounter("apiserver_lb.retries",
		metric.WithDescription("Requests sent to another backend, by the backend that failed and how it failed."))
	errs[3] = err
	refusals, err := m.Int64ObservableCounter("apiserver_lb.refusals",
		metric.WithDescription("Requests that the balancer answered or ended itself, and client connections that it closed, by reason."))
	errs[4] = err
	clients, err := m.Int64ObservableUpDownCounter("apiserver_lb.client.connections",
		metric.WithDescription("Open client connections."))
	errs[5] = err
	x.backends, errs[6] = m.Int64UpDownCounter("apiserver_lb.backend.connections",
		metric.WithDescription("Open connections to backends, by backend and credential."))
	_, errs[7] = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for _, s := range *x.requests.Load() {
			o.ObserveInt64(requests, s.count.Load(), s.attributes...)
		}
		for c := range x.inFlight {
			if f := &x.inFlight[c]; f.used.Load() {
				o.ObserveInt64(inFlight, f.n.Load(), metric.WithAttributes(attribute.String("class", Class(c).String())))
			}
		}
		for backend, f := range *x.figures.Load() {
			for e := range f.retried {
				if n := f.retried[e].Load(); n > 0 {
					o.ObserveInt64(retries, n, metric.WithAttributes(attribute.String("backend", backend), attribute.String("reason", eventNames[e])))
				}
			}
		}
		x.refused.Range(func(reason, n any) bool {
			o.ObserveInt64(refusals, n.(*atomic.Int64).Load(), metric.WithAttributes(attribute.String("reason", reason.(string))))
			return true
		})
		if x.open.used.Load() {
			o.ObserveInt64(clients, x.open.n.Load())
		}
		return nil
	}, requests, inFlight, retries, refusals, clients)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return &x, nil
}

// Observation is a request that has ended.
type Observation struct {
	Verb       string
	Class      Class
	Credential Credential
	Backend    string // empty: none was reached
	Code       int    // 0: the client went away before an answer
	Took       time.Duration
	Span       trace.SpanContext // valid where the request is sampled for a trace
}

// verbs are those that stand in metrics as they are.
var verbs = map[string]bool{"get": true, "list": true, "watch": true, "create": true, "update": true, "patch": true,
	"delete": true, "deletecollection": true, "proxy": true, "post": true, "put": true, "head": true, "options": true}

// Request counts a request that has ended.
func (m *Metrics) Request(o Observation) {
	if !verbs[o.Verb] {
		o.Verb = "other"
	}
	s := m.series(requestKey{verb: o.Verb, code: codeLabel(o.Code), backend: o.Backend, class: o.Class, credential: o.Credential})
	s.count.Add(1)
	s.figures.ended(&o)
	ctx := context.Background()
	if o.Span.IsValid() {
		ctx = trace.ContextWithSpanContext(ctx, o.Span) // for an exemplar
	}
	m.duration.Record(ctx, o.Took.Seconds(), s.duration...)
}

// series returns the series with the key, a new one where there is none yet.
func (m *Metrics) series(k requestKey) *requestSeries {
	if s := (*m.requests.Load())[k]; s != nil {
		return s
	}
	f := m.figuresOf(k.backend)
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(*m.requests.Load())
	s := all[k]
	if s == nil {
		verb, class, backend := attribute.String("verb", k.verb), attribute.String("class", k.class.String()), attribute.String("backend", k.backend)
		s = &requestSeries{
			figures: f,
			attributes: []metric.ObserveOption{metric.WithAttributeSet(attribute.NewSet(verb, class, backend,
				attribute.String("code", k.code), attribute.String("credential", k.credential.String())))},
			duration: []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(verb, class, backend))},
		}
		all[k] = s
		m.requests.Store(&all)
	}
	return s
}

// codes are the status codes that kube-apiserver and the balancer give, as they
// stand in metrics. A pod behind the proxy verb may give any.
var codes = codeNames(0, 101, 200, 201, 202, 204, 206, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 406,
	408, 409, 410, 412, 413, 414, 415, 416, 422, 429, 431, 500, 501, 502, 503, 504)

func codeNames(list ...int) map[int]string {
	names := make(map[int]string, len(list))
	for _, c := range list {
		names[c] = strconv.Itoa(c)
	}
	return names
}

// codeLabel returns the code as it stands in metrics: "other" where it is unusual.
func codeLabel(code int) string {
	if s, ok := codes[code]; ok {
		return s
	}
	return "other"
}

// InFlight counts requests in (1) and out (-1).
func (m *Metrics) InFlight(c Class, delta int64) { m.inFlight[c].add(delta) }

// Retried counts a request that is sent to another backend after the event.
func (m *Metrics) Retried(backend string, e Event) { m.figuresOf(backend).retried[e].Add(1) }

// Refused counts a request that the balancer answered or ended itself, or a connection
// that it closed.
func (m *Metrics) Refused(reason string) {
	n, ok := m.refused.Load(reason)
	if !ok {
		n, _ = m.refused.LoadOrStore(reason, new(atomic.Int64))
	}
	n.(*atomic.Int64).Add(1)
}

// ClientConnections counts client connections opened (1) and closed (-1).
func (m *Metrics) ClientConnections(delta int64) { m.open.add(delta) }

// BackendConnections counts connections to a backend opened (1) and closed (-1).
func (m *Metrics) BackendConnections(backend string, c Credential, delta int64) {
	m.backends.Add(context.Background(), delta, metric.WithAttributeSet(attribute.NewSet(
		attribute.String("backend", backend), attribute.String("credential", c.String()))))
}
