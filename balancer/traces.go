package balancer

import (
	"context"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// Traces says which requests get a span, and begins it.
type Traces struct {
	// Static after construction.
	Tracer trace.Tracer // must sample whatever it is asked for
	Ratio  float64      // the share of requests that is sampled, 0 to 1
	// Parents are the networks of clients whose traceparent says by its flag whether a
	// request is sampled. From elsewhere the flag counts for nothing, since whoever can
	// reach the balancer could have all requests sampled; Ratio decides.
	Parents Networks
}

// samples reports whether a request gets a span. parent is the client's, not valid where it
// has none. The header of a request without a span goes on as it came.
func (t *Traces) samples(h *Head, cl *Client) (parent trace.SpanContext, yes bool) {
	if t == nil {
		return parent, false
	}
	parent, joins := parseTraceparent(h.Traceparent)
	if joins && cl.isFrom(t.Parents) {
		return parent, parent.IsSampled()
	}
	return parent, t.Ratio >= 1 || t.Ratio > 0 && rand.Float64() < t.Ratio
}

// begin begins the span of a request, and has the backend see it as its parent
// (https://www.w3.org/TR/trace-context/).
func (t *Traces) begin(d *Decision, parent trace.SpanContext, l *Line) trace.Span {
	joins := parent.IsValid()
	ctx := context.Background()
	if joins {
		ctx = trace.ContextWithRemoteSpanContext(ctx, parent)
	}
	attributes := []attribute.KeyValue{attribute.String("k8s.verb", l.Verb), attribute.String("audit-id", l.AuditID)} // as kube-apiserver names it
	what := l.Path
	if l.Resource != "" {
		what = l.Resource
		attributes = append(attributes, attribute.String("k8s.api.group", l.APIGroup), attribute.String("k8s.api.version", l.APIVersion),
			attribute.String("k8s.resource", l.Resource))
		if l.Subresource != "" {
			what += "/" + l.Subresource
			attributes = append(attributes, attribute.String("k8s.subresource", l.Subresource))
		}
		if l.Namespace != "" {
			attributes = append(attributes, attribute.String("k8s.namespace.name", l.Namespace))
		}
	}
	_, span := t.Tracer.Start(ctx, l.Verb+" "+what, trace.WithTimestamp(l.At), trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(attributes...))
	d.Edits.trace(span.SpanContext(), joins)
	return span
}

// trace has a backend see the span as its parent. The state of vendors goes on where the
// trace is that of the client.
func (e *Edits) trace(sc trace.SpanContext, joins bool) {
	e.dropTraceparent, e.dropTracestate = true, !joins
	e.Add = append(e.Add, Field{"Traceparent", "00-" + sc.TraceID().String() + "-" + sc.SpanID().String() + "-01"})
}

// parseTraceparent reads the header's values. One that is malformed, or there twice, is
// none.
func parseTraceparent(values []string) (parent trace.SpanContext, ok bool) {
	const length = len("00-00000000000000000000000000000000-0000000000000000-00")
	if len(values) != 1 || len(values[0]) < length {
		return parent, false
	}
	v := values[0]
	version, vok := hexByte(v[:2])
	flags, fok := hexByte(v[53:55])
	tid, terr := trace.TraceIDFromHex(v[3:35])
	sid, serr := trace.SpanIDFromHex(v[36:52])
	switch {
	case !vok || !fok || terr != nil || serr != nil || v[2] != '-' || v[35] != '-' || v[52] != '-':
		return parent, false
	case version == 0xff || version == 0 && len(v) != length || len(v) > length && v[length] != '-': // later versions may go on
		return parent, false
	}
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: tid, SpanID: sid, TraceFlags: trace.TraceFlags(flags) & trace.FlagsSampled, Remote: true}), true
}

// hexByte reads two lower-case hexadecimal digits.
func hexByte(s string) (b byte, ok bool) {
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			b = b<<4 | (c - '0')
		case 'a' <= c && c <= 'f':
			b = b<<4 | (c - 'a' + 10)
		default:
			return 0, false
		}
	}
	return b, true
}

// retry notes that the request is sent again after what happened at the backend.
func retry(span trace.Span, backend string, e Event) {
	span.AddEvent("retry", trace.WithAttributes(attribute.String("backend", backend), attribute.String("reason", e.String())))
}

// endSpan ends the span of a request that is over.
func endSpan(span trace.Span, l *Line) {
	attributes := []attribute.KeyValue{attribute.Int("apiserver_lb.retries", l.Retries)}
	if l.Code != 0 {
		attributes = append(attributes, attribute.Int("http.response.status_code", l.Code))
	}
	if l.Backend != "" {
		attributes = append(attributes, attribute.String("apiserver_lb.backend", l.Backend))
	}
	if l.Reason != "" {
		attributes = append(attributes, attribute.String("apiserver_lb.reason", l.Reason))
	}
	span.SetAttributes(attributes...)
	if l.Code >= 500 || l.Reason == ReasonBackendLost {
		span.SetStatus(otelcodes.Error, l.Reason)
	}
	span.End(trace.WithTimestamp(l.At.Add(max(l.Took, time.Microsecond))))
}
