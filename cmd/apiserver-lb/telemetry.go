package main

import (
	"context"
	"log/slog"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/configs"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

// maxSeries bounds the series of one instrument.
const maxSeries = 20000

// telemetry is the process's metrics: OpenTelemetry instruments, read by
// Prometheus.
type telemetry struct {
	provider *sdkmetric.MeterProvider
	traces   *sdktrace.TracerProvider // nil: there are none
	meter    metric.Meter
	registry *prometheus.Registry
	handler  http.Handler
}

// newTelemetry builds the metrics pipeline of this process; nothing is global.
func newTelemetry(c *configs.OTLP, log *slog.Logger) (*telemetry, error) {
	var traces *sdktrace.TracerProvider
	options := []sdkmetric.Option{sdkmetric.WithCardinalityLimit(maxSeries), sdkmetric.WithResource(newResource())}
	if c.Endpoint != "" {
		k, err := newCollector(c)
		if err != nil {
			return nil, err
		}
		if traces, err = k.newTracerProvider(c); err != nil {
			return nil, err
		}
		if c.MetricsInterval > 0 {
			reader, err := k.newMetricReader(c)
			if err != nil {
				return nil, err
			}
			options = append(options, sdkmetric.WithReader(reader))
		}
		tellExportErrors(log)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	exporter, err := otelprometheus.New(
		otelprometheus.WithRegisterer(registry),
		otelprometheus.WithoutScopeInfo(),
		otelprometheus.WithoutTargetInfo(),
	)
	if err != nil {
		return nil, err
	}
	// No attribute takes a value of a client's choosing (balancer.Metrics), so that
	// series are bounded by verbs, codes, backends and credentials. The SDK's own
	// limit of 2,000 could be met by traffic that is merely varied, and would then
	// hide what is new.
	provider := sdkmetric.NewMeterProvider(append(options, sdkmetric.WithReader(exporter))...)
	return &telemetry{
		provider: provider,
		traces:   traces,
		meter:    provider.Meter("apiserver-lb"),
		registry: registry,
		handler:  promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}),
	}, nil
}

// shutdown exports what is left, within ctx. A collector that is not there does not make
// the end of the process a failure.
func (t *telemetry) shutdown(ctx context.Context) error {
	if t.traces != nil {
		_ = t.traces.Shutdown(ctx)
		_ = t.provider.Shutdown(ctx)
		return nil
	}
	return t.provider.Shutdown(ctx)
}

// probeBounds are the bucket bounds of probe durations, in seconds.
var probeBounds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}

// probeMetrics counts what probes see.
type probeMetrics struct {
	results  metric.Int64Counter
	duration metric.Float64Histogram
}

func newProbeMetrics(m metric.Meter) (*probeMetrics, error) {
	var p probeMetrics
	var err error
	if p.results, err = m.Int64Counter("apiserver_lb.probes",
		metric.WithDescription("Health probes, by backend and verdict.")); err != nil {
		return nil, err
	}
	p.duration, err = m.Float64Histogram("apiserver_lb.probe.duration", metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(probeBounds...),
		metric.WithDescription("Duration of health probes, by backend."))
	return &p, err
}

// observe counts one probe.
func (p *probeMetrics) observe(backend string, r health.Result) {
	ctx, name := context.Background(), attribute.String("backend", backend)
	p.results.Add(ctx, 1, metric.WithAttributes(name, attribute.String("verdict", r.Verdict.String())))
	p.duration.Record(ctx, r.Took.Seconds(), metric.WithAttributes(name))
}

// registerGauges registers what is read when somebody asks: the state and load of
// backends, panic mode, the expiry of certificates.
func registerGauges(m metric.Meter, backends *backend.Backends, store *tlsconf.Store, memory *balancer.Memory) error {
	state, err := m.Int64ObservableGauge("apiserver_lb.backend.state",
		metric.WithDescription("1 for the state that a backend is in, 0 for the others."))
	if err != nil {
		return err
	}
	info, err := m.Int64ObservableGauge("apiserver_lb.backend.info",
		metric.WithDescription("Always 1; the labels tell what is configured of a backend."))
	if err != nil {
		return err
	}
	load, err := m.Int64ObservableGauge("apiserver_lb.backend.in_flight",
		metric.WithDescription("Requests in flight, by backend and class (short, long)."))
	if err != nil {
		return err
	}
	homed, err := m.Int64ObservableGauge("apiserver_lb.backend.homed_connections",
		metric.WithDescription("Client connections whose requests go to the backend while they may."))
	if err != nil {
		return err
	}
	panicking, err := m.Int64ObservableGauge("apiserver_lb.panic_mode",
		metric.WithDescription("1 while no backend is ready and those that fail their checks are used all the same."))
	if err != nil {
		return err
	}
	drained, err := m.Int64ObservableGauge("apiserver_lb.backend.drained",
		metric.WithDescription("1 while an operator keeps new requests from the backend."))
	if err != nil {
		return err
	}
	short, err := m.Int64ObservableGauge("apiserver_lb.memory_short",
		metric.WithDescription("1 while memory is short: new clients are turned away, large requests are answered 429."))
	if err != nil {
		return err
	}
	expiry, err := m.Int64ObservableGauge("apiserver_lb.certificate.expiry.timestamp", metric.WithUnit("s"),
		metric.WithDescription("When a certificate expires, in seconds since the epoch, by use and file; the earliest in the file."))
	if err != nil {
		return err
	}
	build, err := m.Int64ObservableGauge("apiserver_lb.build_info",
		metric.WithDescription("Always 1; the labels tell what is running."))
	if err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		set := backends.Set()
		for _, b := range set.All() {
			settings := b.Settings()
			o.ObserveInt64(info, 1, metric.WithAttributes(attribute.String("backend", b.Name), attribute.String("address", b.Address),
				attribute.String("zone", settings.Zone), attribute.Int("weight", settings.Weight)))
			name := attribute.String("backend", b.Name)
			current := b.State()
			for _, s := range health.States() {
				o.ObserveInt64(state, bit(s == current), metric.WithAttributes(name, attribute.String("state", s.String())))
			}
			brief, long, home := b.Load()
			o.ObserveInt64(load, brief, metric.WithAttributes(name, attribute.String("class", "short")))
			o.ObserveInt64(load, long, metric.WithAttributes(name, attribute.String("class", "long")))
			o.ObserveInt64(homed, home, metric.WithAttributes(name))
			o.ObserveInt64(drained, bit(!b.Drained().IsZero()), metric.WithAttributes(name))
		}
		o.ObserveInt64(build, 1, metric.WithAttributes(attribute.String("version", version), attribute.String("goversion", runtime.Version())))
		o.ObserveInt64(panicking, bit(set.Panicking()))
		o.ObserveInt64(short, bit(memory.Short()))
		for file, at := range earliestExpiries(store.Expiries()) {
			o.ObserveInt64(expiry, at.Unix(), metric.WithAttributes(attribute.String("use", file.Use), attribute.String("file", file.File)))
		}
		return nil
	}, info, state, load, homed, drained, panicking, short, expiry, build)
	return err
}

// expiryKey names one series of certificate expiry.
type expiryKey struct{ Use, File string }

// registerAccessLog registers what is lost of the access log; nil: there is none.
func registerAccessLog(m metric.Meter, l *accessLog) error {
	if l == nil {
		return nil
	}
	_, err := m.Int64ObservableCounter("apiserver_lb.access_log.dropped",
		metric.WithDescription("Lines of the access log that were dropped: they came faster than they could be written, or writing failed."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(l.dropped.Load())
			return nil
		}))
	return err
}

// earliestExpiries returns for each file the expiry that comes first.
func earliestExpiries(all []tlsconf.Expiry) map[expiryKey]time.Time {
	first := map[expiryKey]time.Time{}
	for _, e := range all {
		k := expiryKey{e.Use, e.File}
		if at, ok := first[k]; !ok || e.NotAfter.Before(at) {
			first[k] = e.NotAfter
		}
	}
	return first
}

func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
