package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/net/http/httpguts"
	"golang.org/x/time/rate"

	"apiserver-lb/balancer"
	"apiserver-lb/configs"
	"apiserver-lb/tlsconf"
)

// collector is how an OpenTelemetry collector is reached.
type collector struct {
	tls     *tls.Config // nil: the defaults
	headers map[string]string
}

// exportTimeout bounds one export; shutdown waits for the last one a second at most.
const exportTimeout = 10 * time.Second

// newCollector reads the files of the configuration.
func newCollector(c *configs.OTLP) (*collector, error) {
	var k collector
	if c.CAFile != "" {
		text, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, &usageError{fmt.Errorf("otlp.caFile: %w", err)}
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(text) {
			return nil, &usageError{fmt.Errorf("otlp.caFile: %q holds no certificate; name a PEM bundle", c.CAFile)}
		}
		k.tls = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	if c.HeadersFile != "" {
		text, err := tlsconf.ReadSecret(c.HeadersFile)
		if err != nil {
			return nil, &usageError{fmt.Errorf("otlp.headersFile: %w; keep it in a regular file that only this process can read (chmod 600)", err)}
		}
		if k.headers, err = parseHeaders(string(text)); err != nil {
			return nil, &usageError{fmt.Errorf("otlp.headersFile: %q: %w", c.HeadersFile, err)}
		}
	}
	return &k, nil
}

// parseHeaders reads "Name: value" lines. Its errors name lines, and nothing that stands
// in them.
func parseHeaders(text string) (map[string]string, error) {
	headers := map[string]string{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		if !ok || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return nil, fmt.Errorf("line %d is no header; write Name: value", n)
		}
		headers[name] = value
	}
	if lines.Err() != nil {
		return nil, errors.New("a line is too long to be a header")
	}
	return headers, nil
}

// newResource says whose spans and metrics these are.
func newResource() *resource.Resource {
	host, _ := os.Hostname() // a balancer without a name has others' word for where it is
	return resource.NewSchemaless(attribute.String("service.name", "apiserver-lb"), attribute.String("service.version", version), attribute.String("host.name", host))
}

// newMetricReader exports all metrics from time to time.
func (k *collector) newMetricReader(c *configs.OTLP) (sdkmetric.Reader, error) {
	options := []otlpmetrichttp.Option{otlpmetrichttp.WithEndpointURL(c.URL("metrics")), otlpmetrichttp.WithHeaders(k.headers), otlpmetrichttp.WithTimeout(exportTimeout)}
	if k.tls != nil {
		options = append(options, otlpmetrichttp.WithTLSClientConfig(k.tls))
	}
	exporter, err := otlpmetrichttp.New(context.Background(), options...)
	if err != nil {
		return nil, err
	}
	return sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(c.MetricsInterval), sdkmetric.WithTimeout(exportTimeout)), nil
}

// newTracerProvider exports spans in batches. Those that find its queue full are lost,
// and nobody waits.
func (k *collector) newTracerProvider(c *configs.OTLP) (*sdktrace.TracerProvider, error) {
	options := []otlptracehttp.Option{otlptracehttp.WithEndpointURL(c.URL("traces")), otlptracehttp.WithHeaders(k.headers), otlptracehttp.WithTimeout(exportTimeout)}
	if k.tls != nil {
		options = append(options, otlptracehttp.WithTLSClientConfig(k.tls))
	}
	exporter, err := otlptracehttp.New(context.Background(), options...)
	if err != nil {
		return nil, err
	}
	return sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(newResource()),
		sdktrace.WithSampler(sdktrace.AlwaysSample())), nil // balancer.Traces has decided
}

// newTraces says which requests have spans; nil: none.
func newTraces(c *configs.OTLP, t *telemetry) *balancer.Traces {
	if t.traces == nil {
		return nil
	}
	return &balancer.Traces{Tracer: t.traces.Tracer("apiserver-lb"), Ratio: c.TraceRatio, Parents: c.TraceParents}
}

// tellExportErrors has what goes wrong with exports logged, now and then.
func tellExportErrors(log *slog.Logger) {
	limiter := rate.NewLimiter(rate.Every(time.Minute), 3)
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		if limiter.Allow() {
			log.Warn("traces or metrics could not be exported (otlp.endpoint)", "err", err)
		}
	}))
}
