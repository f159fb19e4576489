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
	retries  metric.Int64Counter
	refusals metric.Int64Counter
	clients  metric.Int64UpDownCounter
	backends metric.Int64UpDownCounter

	// What every request counts is counted here, and read when somebody asks: an
	// instrument that looks its attributes up anew costs a tenth of a small request.
	requests atomic.Pointer[map[requestKey]*requestSeries] // replaced as a whole, under mu
	figures  atomic.Pointer[map[string]*figures]           // likewise, by backend
	refused  sync.Map                                      // of *atomic.Int64, by reason
	open     atomic.Int64                                  // client connections
	mu       sync.Mutex
	inFlight [classCount]struct {
		n    atomic.Int64
		used atomic.Bool
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
	x.retries, errs[3] = m.Int64Counter("apiserver_lb.retries",
		metric.WithDescription("Requests sent to another backend, by the backend that failed and how it failed."))
	x.refusals, errs[4] = m.Int64Counter("apiserver_lb.refusals",
		metric.WithDescription("Requests that the balancer answered or ended itself, and client connections that it closed, by reason."))
	x.clients, errs[5] = m.Int64UpDownCounter("apiserver_lb.client.connections",
		metric.WithDescription("Open client connections."))
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
		return nil
	}, requests, inFlight)
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
func (m *Metrics) InFlight(c Class, delta int64) {
	f := &m.inFlight[c]
	f.n.Add(delta)
	if !f.used.Load() {
		f.used.Store(true)
	}
}

// Retried counts a request that is sent to another backend after the event.
func (m *Metrics) Retried(backend string, e Event) {
	m.figuresOf(backend).retried[e].Add(1)
	m.retries.Add(context.Background(), 1, metric.WithAttributeSet(attribute.NewSet(attribute.String("backend", backend), attribute.String("reason", e.String()))))
}

// Refused counts a request that the balancer answered or ended itself, or a connection
// that it closed.
func (m *Metrics) Refused(reason string) {
	n, ok := m.refused.Load(reason)
	if !ok {
		n, _ = m.refused.LoadOrStore(reason, new(atomic.Int64))
	}
	n.(*atomic.Int64).Add(1)
	m.refusals.Add(context.Background(), 1, metric.WithAttributeSet(attribute.NewSet(attribute.String("reason", reason))))
}

// ClientConnections counts client connections opened (1) and closed (-1).
func (m *Metrics) ClientConnections(delta int64) {
	m.open.Add(delta)
	m.clients.Add(context.Background(), delta)
}

// BackendConnections counts connections to a backend opened (1) and closed (-1).
func (m *Metrics) BackendConnections(backend string, c Credential, delta int64) {
	m.backends.Add(context.Background(), delta, metric.WithAttributeSet(attribute.NewSet(
		attribute.String("backend", backend), attribute.String("credential", c.String()))))
}
