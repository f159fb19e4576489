package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// results holds the samples of each peer and case, in the order of the runs.
type results map[string]map[string][]sample

func (r results) add(peer, testCase string, s sample) {
	if r[peer] == nil {
		r[peer] = map[string][]sample{}
	}
	r[peer][testCase] = append(r[peer][testCase], s)
}

// measureOf is one row of the report within a case.
type measureOf struct {
	name string
	when func(c testCase) bool
	// proxy: there is no such figure without a proxy.
	proxy bool
	// added: the figure is what the proxy adds to the one without.
	added bool
	value func(s sample) float64
}

func always(testCase) bool        { return true }
func withRate(c testCase) bool    { return c.rate > 0 }
func withoutRate(c testCase) bool { return c.rate == 0 }

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

var measures = []measureOf{
	{name: "CPU, µs per request", when: always, proxy: true, value: func(s sample) float64 { return float64(s.cpu) / float64(time.Microsecond) }},
	{name: "requests per second", when: withoutRate, value: func(s sample) float64 { return s.rate }},
	{name: "latency p50, ms", when: withRate, value: func(s sample) float64 { return milliseconds(s.p50) }},
	{name: "latency p99, ms", when: withRate, value: func(s sample) float64 { return milliseconds(s.p99) }},
	{name: "added latency p50, ms", when: withRate, proxy: true, added: true, value: func(s sample) float64 { return milliseconds(s.p50) }},
	{name: "added latency p99, ms", when: withRate, proxy: true, added: true, value: func(s sample) float64 { return milliseconds(s.p99) }},
	{name: "peak RSS, MiB", when: always, proxy: true, value: func(s sample) float64 { return float64(s.peakRSS) / (1 << 20) }},
}

// values returns a measure's figure of each run; nil where there is none.
func (m measureOf) values(r results, peer, testCase string) []float64 {
	if m.proxy && peer == noProxy {
		return nil
	}
	direct := r[noProxy][testCase]
	var all []float64
	for i, s := range r[peer][testCase] {
		v := m.value(s)
		if m.added {
			// The run's own direct figure: what disturbs a run disturbs both.
			if i >= len(direct) {
				return nil
			}
			v -= m.value(direct[i])
		}
		all = append(all, v)
	}
	return all
}

// table writes the medians, each with the lowest and the highest figure, and in
// the last column ours as a share of the reference's.
func table(r results, peers []string, cases []testCase) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | | %s | %s, of %s's |\n", strings.Join(peers, " | "), ours, reference)
	fmt.Fprintf(&b, "|---|---|%s---:|\n", strings.Repeat("---:|", len(peers)))
	for _, c := range cases {
		label := c.name
		for _, m := range measures {
			if !m.when(c) {
				continue
			}
			fmt.Fprintf(&b, "| %s | %s |", label, m.name)
			for _, p := range peers {
				fmt.Fprintf(&b, " %s |", cell(m.values(r, p, c.name)))
			}
			fmt.Fprintf(&b, " %s |\n", ratio(m.values(r, ours, c.name), m.values(r, reference, c.name)))
			label = ""
		}
	}
	return b.String()
}

// cell is "median (lowest to highest)".
func cell(values []float64) string {
	if len(values) == 0 {
		return "–"
	}
	mid := number(median(values))
	if len(values) == 1 {
		return mid
	}
	return fmt.Sprintf("%s (%s to %s)", mid, number(slices.Min(values)), number(slices.Max(values)))
}

// ratio divides two medians. Where the divisor is not positive, as the added
// latency of a noisy run may be, there is none.
func ratio(a, b []float64) string {
	if len(a) == 0 || len(b) == 0 || median(b) <= 0 {
		return "–"
	}
	return strconv.FormatFloat(median(a)/median(b), 'f', 2, 64)
}

// median of at least one value; of an even number, the mean of the middle two.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// number writes three significant digits, and all digits before the point in
// groups of three.
func number(v float64) string {
	abs := math.Abs(v)
	switch {
	case abs < 9.995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case abs < 99.95:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	digits := strconv.FormatFloat(abs, 'f', 0, 64)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if v < 0 {
		return "-" + digits
	}
	return digits
}
