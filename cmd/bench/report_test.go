package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestTable(t *testing.T) {
	const us, ms, mib = time.Microsecond, time.Millisecond, 1 << 20
	load := testCase{name: "load"}
	paced := testCase{name: "paced", rate: 1000}
	r := results{}
	for i := range 3 {
		d := time.Duration(i)
		r.add(noProxy, load.name, sample{rate: 20000})
		r.add(ours, load.name, sample{cpu: (18 + d) * us, rate: 30000, peakRSS: 40 * mib})
		r.add(reference, load.name, sample{cpu: (39 + d) * us, rate: 15000 + 500*float64(i), peakRSS: 20 * mib})
		r.add(noProxy, paced.name, sample{rate: 1000, p50: 1 * ms, p99: 2 * ms})
		r.add(ours, paced.name, sample{rate: 1000, cpu: 60 * us, p50: 1*ms + 250*us, p99: 4 * ms, peakRSS: 40 * mib})
		r.add(reference, paced.name, sample{rate: 1000, cpu: 120 * us, p50: 1*ms + 500*us, p99: 1 * ms, peakRSS: 20 * mib})
	}
	want := `| | | direct | apiserver-lb | HAProxy | apiserver-lb, of HAProxy's |
|---|---|---:|---:|---:|---:|
| load | CPU, µs per request | – | 19.0 (18.0 to 20.0) | 40.0 (39.0 to 41.0) | 0.47 |
|  | requests per second | 20,000 (20,000 to 20,000) | 30,000 (30,000 to 30,000) | 15,500 (15,000 to 16,000) | 1.94 |
|  | peak RSS, MiB | – | 40.0 (40.0 to 40.0) | 20.0 (20.0 to 20.0) | 2.00 |
| paced | CPU, µs per request | – | 60.0 (60.0 to 60.0) | 120 (120 to 120) | 0.50 |
|  | latency p50, ms | 1.00 (1.00 to 1.00) | 1.25 (1.25 to 1.25) | 1.50 (1.50 to 1.50) | 0.83 |
|  | latency p99, ms | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | 1.00 (1.00 to 1.00) | 4.00 |
|  | added latency p50, ms | – | 0.25 (0.25 to 0.25) | 0.50 (0.50 to 0.50) | 0.50 |
|  | added latency p99, ms | – | 2.00 (2.00 to 2.00) | -1.00 (-1.00 to -1.00) | – |
|  | peak RSS, MiB | – | 40.0 (40.0 to 40.0) | 20.0 (20.0 to 20.0) | 2.00 |
`
	got := table(r, []string{noProxy, ours, reference}, []testCase{load, paced})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Without the direct peer nothing is known of what a proxy adds; without the
// reference there is no ratio.
func TestTableOfOnePeer(t *testing.T) {
	paced := testCase{name: "paced", rate: 1000}
	r := results{}
	r.add(ours, paced.name, sample{rate: 1000, p50: time.Millisecond, p99: time.Millisecond})
	got := table(r, []string{ours}, []testCase{paced})
	for _, want := range []string{"| latency p50, ms | 1.00 | – |\n", "| added latency p50, ms | – | – |\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

func TestNumber(t *testing.T) {
	tests := map[float64]string{
		0: "0.00", 0.125: "0.12", 9.99: "9.99", 9.999: "10.0", -1.5: "-1.50", 12.34: "12.3", 99.96: "100",
		999.6: "1,000", 15936.33: "15,936", 1234567: "1,234,567", -1234: "-1,234",
	}
	for v, want := range tests {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestMedian(t *testing.T) {
	tests := []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3}, {[]float64{1, 2}, 1.5}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5},
	}
	for _, tt := range tests {
		if got := median(tt.values); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.values, got, tt.want)
		}
	}
}

func TestDescribe(t *testing.T) {
	got, err := describe(time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC), []string{"a 1", "b 2"})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(got, "2026-05-01, ") || !strings.HasSuffix(got, ".\na 1; b 2.\n") {
		t.Errorf("got %q", got)
	}
	if got, want := cpuModel([]byte("processor\t: 0\nmodel name\t: Some CPU @ 2:1\nmodel name\t: other\n")), "Some CPU @ 2:1"; got != want {
		t.Errorf("cpuModel: %q, want %q", got, want)
	}
}
