package configs

import (
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// OTLP is the export of traces and metrics to an OpenTelemetry collector, by OTLP over
// HTTP (https://opentelemetry.io/docs/specs/otlp/#otlphttp).
type OTLP struct {
	// Endpoint is the URL of the collector, to which v1/traces and v1/metrics are
	// appended. Empty: nothing is exported.
	Endpoint string `mapstructure:"endpoint"`

	// CAFile is a PEM bundle of the authorities of its certificate. Empty: those of the
	// system.
	CAFile string `mapstructure:"caFile"`

	// HeadersFile has headers for the collector, "Name: value" on each line. Empty: none.
	HeadersFile string `mapstructure:"headersFile"`

	// TraceRatio is the share of requests that have a span, 0 to 1.
	TraceRatio float64 `mapstructure:"traceRatio"`

	// TraceParents are the networks of clients whose traceparent decides that instead.
	TraceParents []netip.Prefix `mapstructure:"traceParents"`

	// MetricsInterval is the time between two exports of all metrics. 0: they are not
	// exported.
	MetricsInterval time.Duration `mapstructure:"metricsInterval"`
}

func checkOTLP(o *OTLP) Errors {
	var errs Errors
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		switch {
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
			errs.add(problem("otlp.endpoint", o.Endpoint, "this is no URL of a collector", "write one such as https://collector.example.com:4318"))
		case u.User != nil:
			errs.add(problem("otlp.endpoint", "", "there is a credential in this URL", "put an Authorization header into otlp.headersFile, and leave out what is before the @"))
		case u.Scheme == "http" && o.CAFile != "":
			errs.add(problem("otlp.caFile", o.CAFile, "otlp.endpoint is not https", "write https there, or remove otlp.caFile"))
		}
	} else if o.CAFile != "" || o.HeadersFile != "" || o.MetricsInterval != 0 || len(o.TraceParents) > 0 {
		errs.add(required("otlp.endpoint", "write the URL of a collector, such as https://collector.example.com:4318, or remove the other keys of otlp"))
	}
	errs = append(errs, ratio("otlp.traceRatio", o.TraceRatio)...)
	if o.MetricsInterval != 0 {
		errs = append(errs, between("otlp.metricsInterval", o.MetricsInterval, time.Second, time.Hour)...)
	}
	return errs
}

// URL returns the address for one kind of signal: "traces" or "metrics".
func (o *OTLP) URL(signal string) string {
	return strings.TrimSuffix(o.Endpoint, "/") + "/v1/" + signal
}
