package main

import (
	"compress/gzip"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// otlpReceiver is a collector that keeps what it is sent.
type otlpReceiver struct {
	server *httptest.Server
	bell   bell

	mu      sync.Mutex
	spans   []*tracev1.Span
	metrics map[string]bool // by name
	headers map[string]bool // of Authorization
	raw     strings.Builder // all messages, as text
}

func newOTLPReceiver(t *testing.T, p *pki) *otlpReceiver {
	t.Helper()
	r := &otlpReceiver{metrics: map[string]bool{}, headers: map[string]bool{}}
	r.server = httptest.NewUnstartedServer(r)
	r.server.TLS = &tls.Config{Certificates: []tls.Certificate{p.serving.pair()}, MinVersion: tls.VersionTLS12}
	r.server.StartTLS()
	t.Cleanup(r.server.Close)
	return r
}

func (r *otlpReceiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body := io.Reader(req.Body)
	if req.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body = z
	}
	b, err := io.ReadAll(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.bell.ring()
	r.headers[req.Header.Get("Authorization")] = true
	switch req.URL.Path {
	case "/v1/traces":
		var m collectortrace.ExportTraceServiceRequest
		if err := proto.Unmarshal(b, &m); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(&r.raw, m.String())
		for _, of := range m.ResourceSpans {
			for _, scope := range of.ScopeSpans {
				r.spans = append(r.spans, scope.Spans...)
			}
		}
	case "/v1/metrics":
		var m collectormetrics.ExportMetricsServiceRequest
		if err := proto.Unmarshal(b, &m); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(&r.raw, m.String())
		for _, of := range m.ResourceMetrics {
			for _, scope := range of.ScopeMetrics {
				for _, metric := range scope.Metrics {
					r.metrics[metric.Name] = true
				}
			}
		}
	default:
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// exports makes a site's balancer export everything to the receiver.
func (s *site) exports(r *otlpReceiver) {
	s.Helper()
	s.set("otlp.endpoint", r.server.URL)
	s.set("otlp.caFile", replace(s.T, s.dir, "collector-ca.crt", certPEM(s.pki.clusterCA)))
	s.set("otlp.headersFile", replace(s.T, s.dir, "collector-headers", []byte("Authorization: Bearer collectors-own\n")))
	s.set("otlp.traceRatio", 1)
	s.set("otlp.metricsInterval", "1s")
}

// TestOTLP follows a request that is sent twice, over each protocol, to the collector.
func TestOTLP(t *testing.T) {
	s := newSite(t, 2, 0)
	c := newOTLPReceiver(t, s.pki)
	s.exports(c)
	r := s.startReady()
	s.apis[0].mu.Lock()
	s.apis[0].lose = 1
	s.apis[0].mu.Unlock()
	s.apis[1].mu.Lock()
	s.apis[1].lose = 0
	s.apis[1].mu.Unlock()
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	for range 4 { // some of them come to api-0 first
		r.mustGet(r.client(s.pki.alice), objectPath, "Traceparent", parent, "Tracestate", "vendor=1")
	}
	c.bell.await(t, "spans and metrics", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.spans) >= 4 && c.metrics["apiserver_lb.requests"] && c.metrics["apiserver_lb.request.duration"]
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.headers) != 1 || !c.headers["Bearer collectors-own"] {
		t.Errorf("Authorization at the collector: %v", c.headers)
	}
	seenByBackends := map[string]bool{}
	for _, a := range s.apis {
		for _, q := range a.list(to(objectPath)) {
			seenByBackends[strings.Join(q.Header["Traceparent"], ",")] = true
			if got := q.Header.Get("Tracestate"); got != "vendor=1" {
				t.Errorf("Tracestate %q at the backend", got)
			}
		}
	}
	events := 0
	for _, span := range c.spans {
		if got := fmt.Sprintf("%x %x", span.TraceId, span.ParentSpanId); got != "0af7651916cd43dd8448eb211c80319c b7ad6b7169203331" || span.Name != "get configmaps" {
			t.Errorf("span %q of %s", span.Name, got)
		}
		if want := fmt.Sprintf("00-%x-%x-01", span.TraceId, span.SpanId); !seenByBackends[want] {
			t.Errorf("no backend has got %s; they got %v", want, seenByBackends)
		}
		events += len(span.Events)
	}
	if retries := series(r.scrape()["apiserver_lb_retries_total"]); float64(events) != retries[`backend="api-0" reason="lost"`] {
		t.Errorf("%d events of retries, %v counted", events, retries)
	}

	// An exemplar names a trace, for those who ask for OpenMetrics.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.admin+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	page := do(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, req)
	if !strings.Contains(page.body, `trace_id="0af7651916cd43dd8448eb211c80319c"`) {
		t.Errorf("no exemplar in %d bytes, %v", len(page.body), page.err)
	}
}

// TestOTLPUnusable names keys, and nothing of what stands in the files.
func TestOTLPUnusable(t *testing.T) {
	for _, tt := range []struct{ key, text, want string }{
		{"headersFile", "s3cret\n", "line 1 is no header; write Name: value"},
		{"headersFile", "A: b\nA b: s3cret\n", "line 2 is no header"},
		{"headersFile", "A: s3cret\x00\n", "line 1 is no header"},
		{"caFile", "s3cret", "holds no certificate"},
	} {
		s := newSite(t, 1, 0)
		s.set("otlp.endpoint", "https://127.0.0.1:1")
		s.set("otlp."+tt.key, replace(t, s.dir, "file", []byte(tt.text)))
		c := s.load()
		_, err := newCollector(&c.OTLP)
		if err == nil || !strings.Contains(err.Error(), "otlp."+tt.key) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", tt.text, err)
		}
	}
	s := newSite(t, 1, 0)
	s.set("otlp.endpoint", "https://127.0.0.1:1")
	s.set("otlp.headersFile", filepath.Join(s.dir, "none"))
	c := s.load()
	if _, err := newCollector(&c.OTLP); err == nil || !strings.Contains(err.Error(), "otlp.headersFile") {
		t.Error(err)
	}
}

// TestOTLPRelayed has a request that is relayed frame by frame bear its span.
func TestOTLPRelayed(t *testing.T) {
	s := newSite(t, 0, 0)
	got := make(chan http.Header, 1)
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		if q.URL.Path == objectPath && q.ProtoMajor == 2 {
			got <- q.Header
		}
	}))
	api.EnableHTTP2 = true
	api.TLS = &tls.Config{Certificates: []tls.Certificate{s.pki.backend.pair()}, MinVersion: tls.VersionTLS12}
	api.StartTLS()
	t.Cleanup(api.Close)
	s.set("backends.servers", []any{map[string]any{"address": api.Listener.Addr().String(), "name": "api-0", "serverName": "kubernetes"}})
	c := newOTLPReceiver(t, s.pki)
	s.exports(c)
	s.set("otlp.traceParents", []string{"127.0.0.1/32"})
	s.set("otlp.traceRatio", 0)
	r := s.startReady()
	const trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	r.mustGet(r.client(nil), objectPath, "Traceparent", "00-"+trace+"-"+parent+"-00")
	if h := <-got; h.Get("Traceparent") != "00-"+trace+"-"+parent+"-00" {
		t.Errorf("of a request that is not sampled the backend gets %v", h)
	}
	r.mustGet(r.client(nil), objectPath, "Traceparent", "00-"+trace+"-"+parent+"-01")
	h := <-got
	c.bell.await(t, "a span", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.spans) > 0
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	span := c.spans[0]
	if got := fmt.Sprintf("00-%x-%x-01", span.TraceId, span.SpanId); len(c.spans) != 1 || h.Get("Traceparent") != got || fmt.Sprintf("%x", span.ParentSpanId) != parent {
		t.Errorf("spans %v; the backend has got %v", c.spans, h["Traceparent"])
	}
}
