package balancer

import (
	"fmt"
	"strings"
	"testing"
)

func TestHoldsAnswer(t *testing.T) {
	const (
		list    = "/api/v1/pods"
		unknown = -1
	)
	tests := []struct {
		method, target string
		code           int
		contentType    string
		length         int64
		want           bool
	}{
		{"GET", list, 200, "application/json", unknown, true},
		{"GET", list, 200, "application/json", 1, true},
		{"GET", list, 200, "application/json", AnswerHoldBytes, true},
		{"GET", list, 200, "application/json", AnswerHoldBytes + 1, false},
		{"GET", list, 200, "application/json", 0, false},

		// Other methods, codes and places.
		{"HEAD", list, 200, "application/json", unknown, true},
		{"OPTIONS", "/", 200, "application/json", unknown, true},
		{"POST", list, 201, "application/json", unknown, false},
		{"PUT", list + "/p", 200, "application/json", 10, false},
		{"PATCH", list + "/p", 200, "application/json", 10, false},
		{"DELETE", list + "/p", 200, "application/json", 10, false},
		{"get", list, 200, "application/json", 10, false},
		{"GET", "/version", 200, "application/json", 10, true},
		{"GET", list, 404, "application/json", 10, true},
		{"GET", list, 500, "application/json", unknown, true},
		{"GET", list, 101, "application/json", 10, false},
		{"GET", list, 103, "application/json", 10, false},

		// Whoever follows something gets it as it comes, whatever it is.
		{"GET", list + "?watch=1", 200, "application/json", unknown, false},
		{"GET", list + "?watch=1", 410, "application/json", 10, false},
		{"GET", "/api/v1/watch/pods", 200, "application/vnd.kubernetes.protobuf;stream=watch", unknown, false},
		{"GET", "/api/v1/namespaces/n/pods/p/log", 200, "application/json", 10, false},
		{"GET", "/api/v1/namespaces/n/services/s/proxy/", 200, "application/json", 10, false},
		{"GET", "/api/v1/namespaces/n/pods/p/exec", 200, "application/json", 10, false},
		{"GET", "/debug/pprof/profile", 200, "application/json", 10, false},

		// With a length, the type does not matter.
		{"GET", "/readyz", 200, "text/plain; charset=utf-8", 2, true},
		{"GET", "/readyz", 200, "", 2, true},

		// Without one, it must be that of one object.
		{"GET", list, 200, "application/json; charset=utf-8", unknown, true},
		{"GET", list, 200, "Application/JSON", unknown, true},
		{"GET", list, 200, " application/json ;as=Table;v=v1", unknown, true},
		{"GET", list, 200, "application/yaml", unknown, true},
		{"GET", list, 200, "application/vnd.kubernetes.protobuf", unknown, true},
		{"GET", list, 200, "application/vnd.kubernetes.protobuf;type=x", unknown, true},
		{"GET", list, 200, "application/cbor", unknown, true},
		{"GET", "/openapi/v2", 200, "application/com.github.proto-openapi.spec.v2.v1.0+protobuf", unknown, true},
		{"GET", "/openapi/v2", 200, "application/com.github.proto-openapi.spec.v2@v1.0+protobuf", unknown, true},
		{"GET", list, 200, "application/merge-patch+json", unknown, true},
		{"GET", list, 200, "application/apply-patch+YAML", unknown, true},
		{"GET", list, 200, "application/x+cbor", unknown, true},
		{"GET", list, 200, "", unknown, false},
		{"GET", list, 200, ";", unknown, false},
		{"GET", "/metrics", 200, "text/plain; version=0.0.4", unknown, false},
		{"GET", list, 200, "text/event-stream", unknown, false},
		{"GET", list, 200, "text/json", unknown, false},
		{"GET", list, 200, "json", unknown, false},
		{"GET", list, 200, "text/plain;application/json", unknown, false},
		{"GET", list, 200, "application/octet-stream", unknown, false},
		// These are streams of objects.
		{"GET", list, 200, "application/json-seq", unknown, false},
		{"GET", list, 200, "application/cbor-seq", unknown, false},
		{"GET", list, 200, "application/x-ndjson", unknown, false},
		{"GET", list, 200, "application/geo+json-seq", unknown, false},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %s %d %s %d", tt.method, tt.target, tt.code, tt.contentType, tt.length), func(t *testing.T) {
			path, query, _ := strings.Cut(tt.target, "?")
			d := &Decision{Attributes: Attribute(tt.method, path, query)}
			if got := d.HoldsAnswer(tt.method, tt.code, tt.contentType, tt.length); got != tt.want {
				t.Errorf("held: %v, want %v", got, tt.want)
			}
		})
	}
}

// An answer to a request for another protocol is never held.
func TestHoldsNoUpgrade(t *testing.T) {
	d := &Decision{Attributes: Attributes{Verb: "get", Class: Upgrade}}
	if d.HoldsAnswer("GET", 200, "application/json", 10) {
		t.Error("it is held")
	}
}
