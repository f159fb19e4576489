package main

import (
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata/plot.svg anew")

var plotted = []plotRow{
	{"Small requests", 0.4, []bar{{ours, 0.42}, {"nginx", 1.3}, {"<caddy>", 4.567}}},
	{"TLS handshake", 1.05, []bar{{ours, 1.04}, {"nginx", 0.9}, {"<caddy>", 0}}},
}

// A browser shows whether testdata/plot.svg is good; this test shows whether
// it is what the program draws.
func TestPlot(t *testing.T) {
	const file = "testdata/plot.svg"
	got := plot(plotted, []string{noProxy, ours, reference, "nginx", "<caddy>"})
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("go test -update writes it anew (-want +got):\n%s", diff)
	}
	for d := xml.NewDecoder(strings.NewReader(got)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{
		"prefers-color-scheme: dark", `role="img"`,
		"Small requests: apiserver-lb 0.42, nginx 1.30, &lt;caddy&gt; 4.57 (goal 0.40). " +
			"TLS handshake: apiserver-lb 1.04, nginx 0.90, &lt;caddy&gt; no figure (goal 1.05).</desc>",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in it", want)
		}
	}
}

func TestPlotRows(t *testing.T) {
	r, cases := threeRuns()
	want := []plotRow{
		{"Small requests, 50 connections, 1 in flight", 0.4, []bar{{ours, 0.4}, {"nginx", 1.5}}},
		{"Added latency at 1,000 requests/s, p50", 0.8, []bar{{ours, 0.9}, {"nginx", 0}}},
		{"Added latency at 1,000 requests/s, p99", 0.8, []bar{{ours, 0}, {"nginx", 0}}},
	}
	near := cmp.Comparer(func(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 })
	got := plotRows(r, []string{noProxy, ours, reference, "nginx"}, cases)
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(plotRow{}, bar{}), near); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// All that is drawn is within the field, whatever the ratios are.
func TestScale(t *testing.T) {
	s := scaleOf([]plotRow{{"", 0.001, []bar{{"a", 700}, {"b", 0}}}})
	for _, ratio := range []float64{0.001, 1, 700} {
		if x := s.x(ratio); x <= plotLeft || x >= plotRight {
			t.Errorf("%v is at %v", ratio, x)
		}
	}
	if got := scaleOf(nil); got.x(0.5) <= plotLeft || got.x(2) >= plotRight {
		t.Errorf("the scale of nothing is %v", got)
	}
}
