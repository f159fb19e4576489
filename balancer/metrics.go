package balancer

import (
	"context"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Metrics are the instruments of the data path. Their names and units follow
// OpenTelemetry's conventions; the Prometheus exporter adds the unit and _total.
// No attribute takes a value that a client chooses freely: paths, user names,
// namespaces and user agents stay out, and unknown verbs are "other".
type Metrics struct {
	requests metric.Int64Counter
	duration metric.Float64Histogram
	inFlight metric.Int64UpDownCounter
	retries  metric.Int64Counter
	refusals metric.Int64Counter
	clients  metric.Int64UpDownCounter
	backends metric.Int64UpDownCounter
}

// durationBounds are in seconds; long-running requests last beyond them.
var durationBounds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// NewMetrics makes the instruments on the meter given.
func NewMetrics(m metric.Meter) (*Metrics, error) {
	var x Metrics
	var errs [7]error
	x.requests, errs[0] = m.Int64Counter("apiserver_lb.requests",
		metric.WithDescription("Requests that have ended, by verb, class, status code, backend and credential."))
	x.duration, errs[1] = m.Float64Histogram("apiserver_lb.request.duration", metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(durationBounds...),
		metric.WithDescription("Time from the request head to the end of the answer."))
	x.inFlight, errs[2] = m.Int64UpDownCounter("apiserver_lb.requests.in_flight",
		metric.WithDescription("Requests in flight, by class."))
	x.retries, errs[3] = m.Int64Counter("apiserver_lb.retries",
		metric.WithDescription("Requests sent to another backend, by the backend that failed and how it failed."))
	x.refusals, errs[4] = m.Int64Counter("apiserver_lb.refusals",
		metric.WithDescription("Requests that the balancer answered itself, by reason."))
	x.clients, errs[5] = m.Int64UpDownCounter("apiserver_lb.client.connections",
		metric.WithDescription("Open client connections."))
	x.backends, errs[6] = m.Int64UpDownCounter("apiserver_lb.backend.connections",
		metric.WithDescription("Open connections to backends, by backend and credential."))
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
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
}

// verbs are those that stand in metrics as they are.
var verbs = map[string]bool{"get": true, "list": true, "watch": true, "create": true, "update": true, "patch": true,
	"delete": true, "deletecollection": true, "proxy": true, "post": true, "put": true, "head": true, "options": true}

// Request counts a request that has ended.
func (m *Metrics) Request(o Observation) {
	if !verbs[o.Verb] {
		o.Verb = "other"
	}
	ctx := context.Background()
	m.requests.Add(ctx, 1, metric.WithAttributeSet(attribute.NewSet(
		attribute.String("verb", o.Verb),
		attribute.String("class", o.Class.String()),
		attribute.String("code", codeLabel(o.Code)),
		attribute.String("backend", o.Backend),
		attribute.String("credential", o.Credential.String()),
	)))
	m.duration.Record(ctx, o.Took.Seconds(), metric.WithAttributeSet(attribute.NewSet(
		attribute.String("verb", o.Verb),
		attribute.String("class", o.Class.String()),
		attribute.String("backend", o.Backend),
	)))
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
	m.inFlight.Add(context.Background(), delta, metric.WithAttributeSet(attribute.NewSet(attribute.String("class", c.String()))))
}

// Retried counts a request that is sent to another backend after the event.
func (m *Metrics) Retried(backend string, e Event) {
	m.retries.Add(context.Background(), 1, metric.WithAttributeSet(attribute.NewSet(attribute.String("backend", backend), attribute.String("reason", e.String()))))
}

// Refused counts a request that the balancer answered itself.
func (m *Metrics) Refused(reason string) {
	m.refusals.Add(context.Background(), 1, metric.WithAttributeSet(attribute.NewSet(attribute.String("reason", reason))))
}

// ClientConnections counts client connections opened (1) and closed (-1).
func (m *Metrics) ClientConnections(delta int64) { m.clients.Add(context.Background(), delta) }

// BackendConnections counts connections to a backend opened (1) and closed (-1).
func (m *Metrics) BackendConnections(backend string, c Credential, delta int64) {
	m.backends.Add(context.Background(), delta, metric.WithAttributeSet(attribute.NewSet(
		attribute.String("backend", backend), attribute.String("credential", c.String()))))
}
