package main

import "time"

// measureOf is one row of the report within a case.
type measureOf struct {
	name string
	// proxy: there is no such figure without a proxy.
	proxy bool
	// added: the figure is what the proxy adds to the one without.
	added bool
	value func(s sample) float64
}

// The names that goals refer to.
const (
	cpuPerRequest   = "CPU, µs per request"
	cpuPerEvent     = "CPU, µs per event"
	cpuPerHandshake = "CPU, µs per handshake and request"
	rssEach         = "RSS, KiB per connection"
	addedP50        = "added latency p50, ms"
	addedP99        = "added latency p99, ms"
)

func cpuMeasure(name string) measureOf {
	return measureOf{name: name, proxy: true, value: func(s sample) float64 { return float64(s.cpu) / float64(time.Microsecond) }}
}

func rateMeasure(name string) measureOf {
	return measureOf{name: name, value: func(s sample) float64 { return s.rate }}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

var peakRSS = measureOf{name: "peak RSS, MiB", proxy: true, value: func(s sample) float64 { return float64(s.peakRSS) / (1 << 20) }}

// The rows of each kind of case.
var (
	requestMeasures = []measureOf{cpuMeasure(cpuPerRequest), rateMeasure("requests per second"), peakRSS}
	pacedMeasures   = []measureOf{
		{name: "latency p50, ms", value: func(s sample) float64 { return milliseconds(s.p50) }},
		{name: "latency p99, ms", value: func(s sample) float64 { return milliseconds(s.p99) }},
		{name: "latency p99.9, ms", value: func(s sample) float64 { return milliseconds(s.p999) }},
		{name: addedP50, proxy: true, added: true, value: func(s sample) float64 { return milliseconds(s.p50) }},
		{name: addedP99, proxy: true, added: true, value: func(s sample) float64 { return milliseconds(s.p99) }},
		cpuMeasure(cpuPerRequest),
	}
	// How many events come is the backends' doing.
	eventMeasures = []measureOf{
		cpuMeasure(cpuPerEvent),
		{name: "events per second", proxy: true, value: func(s sample) float64 { return s.rate }},
	}
	idleMeasures = []measureOf{
		{name: rssEach, proxy: true, value: func(s sample) float64 { return float64(s.rss) / (1 << 10) }},
	}
	handshakeMeasures = []measureOf{cpuMeasure(cpuPerHandshake), rateMeasure("connections per second")}
)
