package e2e

import (
	"cmp"
	"compress/gzip"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// collector gets spans, over HTTP and over gRPC.
type collector struct {
	coltracepb.UnimplementedTraceServiceServer

	mu    sync.Mutex
	spans map[string][]*tracepb.Span // guarded by mu: by service.name
}

func (c *collector) Export(_ context.Context, r *coltracepb.ExportTraceServiceRequest) (*coltracepb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, of := range r.ResourceSpans {
		service := ""
		for _, a := range of.Resource.GetAttributes() {
			if a.Key == "service.name" {
				service = a.Value.GetStringValue()
			}
		}
		for _, s := range of.ScopeSpans {
			c.spans[service] = append(c.spans[service], s.Spans...)
		}
	}
	return &coltracepb.ExportTraceServiceResponse{}, nil
}

// ServeHTTP is OTLP/HTTP.
func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		body = z
	}
	data, err := io.ReadAll(body)
	var request coltracepb.ExportTraceServiceRequest
	if err == nil && r.URL.Path == "/v1/traces" {
		err = proto.Unmarshal(data, &request)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = c.Export(r.Context(), &request) // it never fails
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// of returns a service's spans of a trace, or those of all traces for an empty one.
func (c *collector) of(service string, trace string) (list []*tracepb.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans[service] {
		if trace == "" || hex.EncodeToString(s.TraceId) == trace {
			list = append(list, s)
		}
	}
	return list
}

// Spans of the balancer and of kube-apiserver join: kube-apiserver's is a child of the
// balancer's, which is a child of the client's where that may decide.
func TestTraces(t *testing.T) {
	allReady(t)
	c := &collector{spans: map[string][]*tracepb.Span{}}
	web := httptest.NewServer(c)
	t.Cleanup(web.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rpc := grpc.NewServer()
	coltracepb.RegisterTraceServiceServer(rpc, c)
	t.Cleanup(rpc.Stop)
	go rpc.Serve(l) // until Stop

	file := filepath.Join(t.TempDir(), "tracing.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "apiVersion: apiserver.config.k8s.io/v1\nkind: TracingConfiguration\nendpoint: %s\nsamplingRatePerMillion: 0\n", l.Addr()), 0o600); err != nil {
		t.Fatal(err)
	}
	apiserver := shared.Apiserver(3)
	t.Cleanup(func() { repair(t, apiserver) })
	restart, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	if err := apiserver.Kill(); err != nil {
		t.Fatal(err)
	}
	apiserver.SetFlags("--tracing-config-file=" + file)
	err = apiserver.Restart(restart)
	apiserver.SetFlags() // the next start is without it
	if err != nil {
		t.Fatal(err)
	}

	own := ownBalancer(t, func(config map[string]any) {
		servers := section(config, "backends")["servers"].([]any)
		section(config, "backends")["servers"] = servers[2:]
		config["otlp"] = map[string]any{"endpoint": web.URL, "traceRatio": 1, "traceParents": []any{"127.0.0.0/8", "10.0.0.0/8"}}
	})
	const parent = "b7ad6b7169203331"
	http1 := client(t, shared.Admin().Certificate, "")
	transport := http1.Transport.(*http.Transport)
	transport.ForceAttemptHTTP2 = false
	transport.TLSClientConfig.NextProtos = []string{"http/1.1"}
	for trace, tt := range map[string]struct {
		name string
		http *http.Client
	}{
		"0af7651916cd43dd8448eb211c80319c": {"HTTP/2", client(t, shared.Admin().Certificate, "")},
		"1af7651916cd43dd8448eb211c80319c": {"HTTP/1.1", http1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const secret = "precious"
			if a := do(t, tt.http, "GET", own.URL+"/api/v1/namespaces/default/secrets/"+secret, "", http.Header{"Traceparent": {"00-" + trace + "-" + parent + "-01"}}); a.Code != http.StatusNotFound {
				t.Fatalf("%d %s", a.Code, a.Body)
			}
			eventually(t, 30*time.Second, "both have told of the request", func() error {
				ours := c.of("apiserver-lb", trace)
				if len(ours) != 1 {
					return fmt.Errorf("the balancer has told of %d spans", len(ours))
				}
				if got := hex.EncodeToString(ours[0].ParentSpanId); got != parent {
					t.Fatalf("the parent of the balancer's span is %s", got)
				}
				theirs := c.of("apiserver", trace)
				for _, s := range theirs {
					if string(s.ParentSpanId) == string(ours[0].SpanId) {
						return nil
					}
				}
				return fmt.Errorf("of %d spans of kube-apiserver (%d of all traces) none is a child of the balancer's", len(theirs), len(c.of("apiserver", "")))
			})
			got := map[string]string{}
			for _, a := range c.of("apiserver-lb", trace)[0].Attributes {
				got[a.Key] = cmp.Or(a.Value.GetStringValue(), fmt.Sprint(a.Value.GetIntValue()))
				if strings.Contains(a.String(), secret) {
					t.Errorf("%s names the secret", a.Key)
				}
			}
			for key, want := range map[string]string{"k8s.verb": "get", "k8s.resource": "secrets", "k8s.namespace.name": "default",
				"http.response.status_code": "404", "apiserver_lb.backend": "kube-apiserver-3"} {
				if got[key] != want {
					t.Errorf("%s is %q, want %q", key, got[key], want)
				}
			}
		})
	}
}
