package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const us, ms, mib = time.Microsecond, time.Millisecond, 1 << 20

// threeRuns are results of two cases, each with a peer that failed.
func threeRuns() (*results, []testCase) {
	load := testCase{name: "50 connections, 1 in flight", measures: requestMeasures}
	paced := testCase{name: "1,000 requests/s, 10 connections", measures: pacedMeasures, rate: 1000}
	r := newResults()
	for i := range 3 {
		d := time.Duration(i)
		r.add(noProxy, load.name, sample{rate: 20000})
		r.add(ours, load.name, sample{cpu: (15 + d) * us, rate: 30000, peakRSS: 40 * mib})
		r.add(reference, load.name, sample{cpu: (39 + d) * us, rate: 15000 + 500*float64(i), peakRSS: 20 * mib})
		r.add("nginx", load.name, sample{cpu: 60 * us, rate: 10000, peakRSS: 20 * mib})
		r.add(noProxy, paced.name, sample{rate: 1000, p50: 1 * ms, p99: 2 * ms, p999: 3 * ms})
		r.add(ours, paced.name, sample{rate: 1000, cpu: 60 * us, p50: 1*ms + 450*us, p99: 4 * ms, p999: 4 * ms})
		r.add(reference, paced.name, sample{rate: 1000, cpu: 120 * us, p50: 1*ms + 500*us, p99: 1 * ms, p999: 5 * ms})
	}
	r.add("nginx", paced.name, sample{rate: 1000})
	r.fail("nginx", paced.name, errors.New("it ended:\nfor a reason"))
	return r, []testCase{load, paced}
}

func TestFigures(t *testing.T) {
	r, cases := threeRuns()
	want := `| | | direct | apiserver-lb | HAProxy | nginx |
|---|---|---:|---:|---:|---:|
| 50 connections, 1 in flight | CPU, µs per request | – | 16.0 (15.0 to 17.0) | 40.0 (39.0 to 41.0) | 60.0 (60.0 to 60.0) |
|  | requests per second | 20,000 (20,000 to 20,000) | 30,000 (30,000 to 30,000) | 15,500 (15,000 to 16,000) | 10,000 (10,000 to 10,000) |
|  | peak RSS, MiB | – | 40.0 (40.0 to 40.0) | 20.0 (20.0 to 20.0) | 20.0 (20.0 to 20.0) |
| 1,000 requests/s, 10 connections | latency p50, ms | 1.00 (1.00 to 1.00) | 1.45 (1.45 to 1.45) | 1.50 (1.50 to 1.50) | failed |
|  | latency p99, ms | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | 1.00 (1.00 to 1.00) | failed |
|  | latency p99.9, ms | 3.00 (3.00 to 3.00) | 4.00 (4.00 to 4.00) | 5.00 (5.00 to 5.00) | failed |
|  | added latency p50, ms | – | 0.45 (0.45 to 0.45) | 0.50 (0.50 to 0.50) | failed |
|  | added latency p99, ms | – | 2.00 (2.00 to 2.00) | -1.00 (-1.00 to -1.00) | failed |
|  | CPU, µs per request | – | 60.0 (60.0 to 60.0) | 120 (120 to 120) | failed |
`
	if diff := cmp.Diff(want, figures(r, []string{noProxy, ours, reference, "nginx"}, cases)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRatios(t *testing.T) {
	r, cases := threeRuns()
	want := `| of HAProxy's | | apiserver-lb | nginx | goal of apiserver-lb |
|---|---|---:|---:|---|
| 50 connections, 1 in flight | CPU, µs per request | 0.40 | 1.50 | 0.40: met |
|  | requests per second | 1.94 | 0.65 |  |
|  | peak RSS, MiB | 2.00 | 1.00 |  |
| 1,000 requests/s, 10 connections | latency p50, ms | 0.97 | – |  |
|  | latency p99, ms | 4.00 | – |  |
|  | latency p99.9, ms | 0.80 | – |  |
|  | added latency p50, ms | 0.90 | – | 0.80: missed |
|  | added latency p99, ms | – | – | 0.80 |
|  | CPU, µs per request | 0.50 | – |  |
`
	if diff := cmp.Diff(want, ratios(r, []string{noProxy, ours, reference, "nginx"}, cases)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Without the direct peer nothing is known of what a proxy adds; without the
// reference there is no ratio.
func TestReportOfOnePeer(t *testing.T) {
	r, cases := threeRuns()
	got := figures(r, []string{ours}, cases)
	r.fail(noProxy, cases[1].name, errors.New("failed"))
	r.fail(reference, cases[1].name, errors.New("failed"))
	got += figures(r, []string{ours}, cases[1:]) + ratios(r, []string{ours}, cases[1:])
	for _, want := range []string{"| latency p50, ms | 1.45 (1.45 to 1.45) |\n", "| added latency p50, ms | – |\n", "| added latency p50, ms | – | 0.80 |\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

// Each goal belongs to a row of the report.
func TestGoals(t *testing.T) {
	rows := map[string]bool{}
	for _, c := range allCases() {
		for _, m := range c.measures {
			rows[c.name+m.name] = true
		}
	}
	for _, g := range goals {
		if !rows[g.testCase+g.name] {
			t.Errorf("there is no row for %+v", g)
		}
	}
	if len(goals) != 9 {
		t.Errorf("%d goals", len(goals))
	}
}

func TestVerdict(t *testing.T) {
	g := goal{most: 0.4}
	for want, got := range map[string]string{
		"0.40: met": g.verdict(0.4, true), "0.40: missed": g.verdict(0.401, true), "0.40": g.verdict(0, false),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestNotes(t *testing.T) {
	r, cases := threeRuns()
	cases[0].connectionsHTTP1 = 7
	peers := slices.DeleteFunc(allPeers("", ""), func(p peer) bool { return p.name == "caddy" })
	got := notes(&lab{threads: 3, backends: []string{"", ""}}, peers, []string{"caddy is left out: no\napt-get"}, r, cases)
	for _, want := range []string{
		"TLS 1.3 with TLS_AES_128_GCM_SHA256 and X25519 on both legs", "; 2 backends", " 3 threads ",
		"\n- nginx: speaks HTTP/1.1 to the backends",
		"\n- 50 connections, 1 in flight, of nginx: 7 connections.\n",
		"\n- nginx failed, 1,000 requests/s, 10 connections: it ended: for a reason\n",
		"\n- caddy is left out: no apt-get\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if long := inShort(strings.Repeat("ü", 300)); long != strings.Repeat("ü", 200)+"…" {
		t.Errorf("in short: %q", long)
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

// Ours with other settings are set beside one another, and not beside other proxies.
func TestCosts(t *testing.T) {
	c := testCase{name: "c", measures: []measureOf{cpuMeasure(cpuPerRequest)}}
	r := newResults()
	for peer, cpu := range map[string]time.Duration{oursBare: 100, ours: 104, oursTold: 130, reference: 400} {
		r.add(peer, c.name, sample{cpu: cpu * time.Microsecond})
	}
	names := []string{ours, oursBare, oursTold, reference}
	const want = "| of that of apiserver-lb-bare | | apiserver-lb | apiserver-lb-told |\n|---|---|---:|---:|\n| c | CPU, µs per request | 1.04 | 1.30 |\n\n"
	if got := costs(r, names, []testCase{c}); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := compared(names); !slices.Equal(got, []string{ours}) {
		t.Errorf("compared with the reference: %q", got)
	}
	if got := costs(r, []string{ours, reference}, []testCase{c}); got != "" {
		t.Errorf("without the bare one: %q", got)
	}
}
