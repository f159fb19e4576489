package balancer

import (
	"fmt"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// collect returns each series as "name{attributes} value", in order of name.
func collect(t *testing.T, reader metric.Reader) string {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	var lines []string
	add := func(m metricdata.Metrics, set attribute.Set, value any) {
		lines = append(lines, fmt.Sprintf("%s{%s} %v%s\n", m.Name, set.Encoded(attribute.DefaultEncoder()), value, m.Unit))
	}
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					add(m, p.Attributes, p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					add(m, p.Attributes, fmt.Sprintf("%d %v", p.Count, p.Sum))
				}
			default:
				t.Fatalf("%s is a %T", m.Name, m.Data)
			}
		}
	}
	sort.Strings(lines)
	return strings.Join(lines, "")
}

func TestMetrics(t *testing.T) {
	tests := []struct {
		name   string
		record func(*Metrics)
		want   string
	}{
		{"a request", func(m *Metrics) {
			m.Request(Observation{Verb: "list", Class: Short, Credential: Asserted, Backend: "a", Code: 200, Took: 250 * time.Millisecond})
			m.Request(Observation{Verb: "list", Class: Short, Credential: Token, Backend: "a", Code: 403, Took: 250 * time.Millisecond})
		}, `apiserver_lb.request.duration{backend=a,class=short,verb=list} 2 0.5s
apiserver_lb.requests{backend=a,class=short,code=200,credential=certificate,verb=list} 1
apiserver_lb.requests{backend=a,class=short,code=403,credential=token,verb=list} 1
`},
		{"verbs that nobody knows are one", func(m *Metrics) {
			for _, verb := range []string{"", "brew", "GET", "propfind", strings.Repeat("x", 1000), "\xff\n\"", "connect"} {
				m.Request(Observation{Verb: verb, Backend: "a", Code: 405})
			}
		}, `apiserver_lb.request.duration{backend=a,class=short,verb=other} 7 0s
apiserver_lb.requests{backend=a,class=short,code=405,credential=anonymous,verb=other} 7
`},
		{"codes that a proxied pod makes up are one", func(m *Metrics) {
			for _, code := range []int{299, 418, 599, 799, -1} {
				m.Request(Observation{Verb: "get", Backend: "a", Code: code})
			}
		}, `apiserver_lb.request.duration{backend=a,class=short,verb=get} 5 0s
apiserver_lb.requests{backend=a,class=short,code=other,credential=anonymous,verb=get} 5
`},
		{"a client that went away before there was a backend", func(m *Metrics) {
			m.Request(Observation{Verb: "watch", Class: Long, Credential: Unproven})
		}, `apiserver_lb.request.duration{backend=,class=long,verb=watch} 1 0s
apiserver_lb.requests{backend=,class=long,code=0,credential=unproven_token,verb=watch} 1
`},
		{"in flight", func(m *Metrics) {
			m.InFlight(Short, 1)
			m.InFlight(Short, 1)
			m.InFlight(Short, -1)
			m.InFlight(Upgrade, 1)
		}, `apiserver_lb.requests.in_flight{class=short} 1
apiserver_lb.requests.in_flight{class=upgrade} 1
`},
		{"retries and refusals", func(m *Metrics) {
			m.Retried("a", Lost)
			m.Retried("a", DialFailed)
			m.Refused(ReasonRevoked)
		}, `apiserver_lb.refusals{reason=certificate_revoked} 1
apiserver_lb.retries{backend=a,reason=dial_failed} 1
apiserver_lb.retries{backend=a,reason=lost} 1
`},
		{"connections", func(m *Metrics) {
			m.ClientConnections(1)
			m.ClientConnections(1)
			m.ClientConnections(-1)
			m.BackendConnections("a", Asserted, 1)
			m.BackendConnections("a", Anonymous, 1)
			m.BackendConnections("a", Anonymous, -1)
		}, `apiserver_lb.backend.connections{backend=a,credential=anonymous} 0
apiserver_lb.backend.connections{backend=a,credential=certificate} 1
apiserver_lb.client.connections{} 1
`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			reader := metric.NewManualReader()
			m, err := NewMetrics(metric.NewMeterProvider(metric.WithReader(reader)).Meter("test"))
			if err != nil {
				t.Fatal(err)
			}
			tt.record(m)
			if diff := cmp.Diff(tt.want, collect(t, reader)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// Every verb that Attribute makes of a usual request stands in metrics as it is.
func TestMetricsKnowUsualVerbs(t *testing.T) {
	for _, request := range []string{
		"GET /api/v1/pods", "GET /api/v1/pods?watch", "GET /api/v1/nodes/n", "POST /api/v1/pods", "PUT /api/v1/nodes/n", "PATCH /api/v1/nodes/n",
		"DELETE /api/v1/nodes/n", "DELETE /api/v1/pods", "GET /api/v1/proxy/nodes/n", "GET /healthz", "HEAD /healthz", "OPTIONS *", "POST /x", "PUT /x",
	} {
		method, target, _ := strings.Cut(request, " ")
		path, query, _ := strings.Cut(target, "?")
		if a := Attribute(method, path, query); !verbs[a.Verb] {
			t.Errorf("%s: the verb %q counts as other", request, a.Verb)
		}
	}
}

func TestMetricsOnNoopMeter(t *testing.T) {
	m, err := NewMetrics(noop.Meter{})
	if err != nil {
		t.Fatal(err)
	}
	m.Request(Observation{Verb: "get", Code: 200})
}
