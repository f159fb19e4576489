package balancer

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
)

func TestTotals(t *testing.T) {
	m, err := NewMetrics(sdkmetric.NewMeterProvider().Meter("test"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []Observation{
		{Verb: "get", Backend: "a", Code: 200, Took: time.Millisecond},
		{Verb: "get", Backend: "a", Code: 200, Took: time.Millisecond + 1},
		{Verb: "list", Backend: "a", Code: 504, Took: time.Hour},
		{Verb: "watch", Class: Long, Backend: "a", Code: 200, Took: time.Hour},
		{Verb: "create", Backend: "b", Code: 409},
		{Verb: "get", Code: 503},
	} {
		m.Request(o)
	}
	m.Retried("b", Lost)
	m.Retried("b", Lost)
	m.Refused(ReasonNoBackend)
	m.ClientConnections(2)
	m.ClientConnections(-1)
	m.InFlight(Long, 1)
	durations := func(set map[int]int64) []int64 {
		all := make([]int64, len(DurationBounds())+1)
		for i, n := range set {
			all[i] = n
		}
		return all
	}
	want := Totals{Clients: 1, InFlight: map[string]int64{"short": 0, "long": 1, "upgrade": 0}, Refusals: map[string]int64{ReasonNoBackend: 1}, Backends: map[string]Figures{
		"a": {Durations: durations(map[int]int64{0: 1, 1: 1, len(DurationBounds()): 1}), Failed: 1, Retried: map[string]int64{}},
		"b": {Durations: durations(map[int]int64{0: 1}), Retried: map[string]int64{"lost": 2}},
	}}
	if d := cmp.Diff(want, m.Totals()); d != "" {
		t.Error(d)
	}
	n := testing.AllocsPerRun(100, func() { m.Request(Observation{Verb: "get", Backend: "a", Code: 200, Took: time.Second}) })
	if n > 0 {
		t.Errorf("%v allocations for a request", n)
	}
}

func TestQuantile(t *testing.T) {
	bounds := DurationBounds()
	within := func(set map[float64]int64) []int64 {
		d := make([]int64, len(bounds)+1)
		for bound, n := range set {
			i := len(bounds)
			for k, b := range bounds {
				if b == bound {
					i = k
				}
			}
			d[i] = n
		}
		return d
	}
	for _, tt := range []struct {
		name string
		d    []int64
		q    float64
		want float64 // seconds
	}{
		{"none", within(nil), 0.99, 0},
		{"all in the first", within(map[float64]int64{.001: 100}), 0.5, .0005},
		{"in the second", within(map[float64]int64{.001: 50, .0025: 50}), 0.75, .00175},
		{"an empty one between", within(map[float64]int64{.001: 50, .005: 50}), 0.75, .00375},
		{"beyond the last", within(map[float64]int64{.001: 1, math.Inf(1): 9}), 0.99, 60},
		{"the bound itself", within(map[float64]int64{.25: 1}), 1, .25},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Quantile(tt.d, tt.q).Seconds(); math.Abs(got-tt.want) > 1e-9 {
				t.Errorf("Quantile = %v, want %v", got, tt.want)
			}
		})
	}
}
