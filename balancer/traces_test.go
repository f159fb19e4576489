package balancer

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"apiserver-lb/tlsconf"
)

const (
	theirTrace   = "0af7651916cd43dd8448eb211c80319c"
	theirSpan    = "b7ad6b7169203331"
	theirSampled = "00-" + theirTrace + "-" + theirSpan + "-01"
	theirSilent  = "00-" + theirTrace + "-" + theirSpan + "-00"
)

func TestTraceSampling(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		ratio   float64
		trusted bool
		parent  []string
		want    string // our span's trace: theirs, new, or empty for none
	}{
		{"none", 0, false, nil, ""},
		{"all", 1, false, nil, "new"},
		{"a parent from anywhere has no say", 0, false, []string{theirSampled}, ""},
		{"nor has it to be silent", 1, false, []string{theirSilent}, "theirs"},
		{"a parent that is trusted", 0, true, []string{theirSampled}, "theirs"},
		{"a parent that is trusted and silent", 1, true, []string{theirSilent}, ""},
		{"trusted, without a parent", 1, true, nil, "new"},
		{"two parents", 1, true, []string{theirSampled, theirSampled}, "new"},
		{"a malformed parent", 1, true, []string{strings.ToUpper(theirSampled)}, "new"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			spans := tracetest.NewSpanRecorder()
			provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans), sdktrace.WithSampler(sdktrace.AlwaysSample()))
			traces := &Traces{Tracer: provider.Tracer("t"), Ratio: tt.ratio}
			if tt.trusted {
				traces.Parents = Networks{netip.MustParsePrefix("192.0.2.0/24")}
			}
			h := Head{Method: "GET", Path: "/api/v1/namespaces/shop/secrets/s3cret", Traceparent: tt.parent}
			cl, d := clientAt("192.0.2.7"), new(Decision)
			if refusal := decider(tlsconf.Verdict{}).DecideInto(d, &h, cl, t0); refusal != nil {
				t.Fatal(refusal)
			}
			x := (&Records{Traces: traces}).Begin(d, &h, cl, t0)
			x.Retried("a", Lost)
			o := Observation{Code: 502, Backend: "b", Took: time.Second, Span: x.Span()}
			x.Refused(ReasonBackendLost)
			x.End(&o)

			passed := ""
			for _, f := range d.Edits.Add {
				if f.Name == "Traceparent" {
					passed = f.Value
				}
			}
			ended := spans.Ended()
			if tt.want == "" {
				if x != nil || len(ended) != 0 || passed != "" || d.Edits.Drop("traceparent") || d.Edits.Drop("tracestate") || o.Span.IsValid() {
					t.Errorf("record %v, %d spans, %q for the backend: want nothing, and the header to stay", x, len(ended), passed)
				}
				return
			}
			if len(ended) != 1 {
				t.Fatalf("%d spans", len(ended))
			}
			s := ended[0]
			got := "new"
			if s.SpanContext().TraceID().String() == theirTrace && s.Parent().SpanID().String() == theirSpan && s.Parent().IsRemote() {
				got = "theirs"
			} else if s.Parent().IsValid() {
				got = "strange"
			}
			if got != tt.want {
				t.Errorf("trace %s, want %s", got, tt.want)
			}
			if want := fmt.Sprintf("00-%s-%s-01", s.SpanContext().TraceID(), s.SpanContext().SpanID()); passed != want {
				t.Errorf("the backend gets %q, want %q", passed, want)
			}
			if !d.Edits.Drop("Traceparent") || d.Edits.Drop("TraceState") == (tt.want == "theirs") {
				t.Error("what the client says of traces beside ours")
			}
			attributes := map[string]string{}
			for _, a := range s.Attributes() {
				attributes[string(a.Key)] = a.Value.String()
			}
			if d := cmp.Diff(map[string]string{"k8s.verb": "get", "k8s.api.group": "", "k8s.api.version": "v1", "k8s.resource": "secrets", "k8s.namespace.name": "shop", "audit-id": "new-id",
				"apiserver_lb.retries": "1", "apiserver_lb.backend": "b", "apiserver_lb.reason": "backend_lost", "http.response.status_code": "502"}, attributes); d != "" {
				t.Errorf("attributes (-want +got):\n%s", d)
			}
			if s.Name() != "get secrets" || s.EndTime().Sub(s.StartTime()) != time.Second || len(s.Events()) != 1 || s.Events()[0].Name != "retry" || !o.Span.Equal(s.SpanContext()) {
				t.Errorf("span %q, %v, events %v", s.Name(), s.EndTime().Sub(s.StartTime()), s.Events())
			}
			if strings.Contains(fmt.Sprint(s), "s3cret") {
				t.Error("the name of an object in a span")
			}
		})
	}
}

// FuzzTraceparent takes no header for another trace than OpenTelemetry's own reader does,
// which refuses flags that are not known yet.
func FuzzTraceparent(f *testing.F) {
	for _, s := range []string{"", theirSampled, theirSilent, theirSampled + "-more", "01" + theirSampled[2:] + "-more", "01" + theirSampled[2:] + "more", "ff" + theirSampled[2:],
		"00-" + strings.Repeat("0", 32) + "-" + theirSpan + "-01", strings.ToUpper(theirSampled), theirSampled[:54] + "f", " " + theirSampled} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, ok := parseTraceparent([]string{s})
		if ok != got.IsValid() {
			t.Fatalf("%q: ok is %v, valid %v", s, ok, got.IsValid())
		}
		theirs := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(t.Context(), propagation.MapCarrier{"traceparent": s}))
		if strings.HasPrefix(s, "ff") && ok {
			t.Fatalf("%q: a version that there is not", s)
		}
		if ok && theirs.IsValid() && (got.TraceID() != theirs.TraceID() || got.SpanID() != theirs.SpanID() || got.IsSampled() != theirs.IsSampled()) {
			t.Fatalf("%q is %v, to OpenTelemetry %v", s, got, theirs)
		}
	})
}
