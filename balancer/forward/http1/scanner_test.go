package http1

import (
	"fmt"
	"strings"
	"testing"

	"apiserver-lb/balancer/internal/rawhttp"
)

// requests are what all layers are tested with, and those that are too large for a file.
var requests = append(rawhttp.Requests(),
	rawhttp.Case{Input: "GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 60<<10) + "\r\n\r\n", Passed: 1},
	rawhttp.Case{Input: "GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", Code: 431},
	rawhttp.Case{Input: "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: y\r\n", 20<<10), Code: 431},
	rawhttp.Case{Input: "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: y\r\n", 1999) + "\r\n", Passed: 1},
	rawhttp.Case{Input: "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: y\r\n", 2000), Code: 431, Mentions: "fields"},
	rawhttp.Case{Input: "POST / HTTP/1.1\r\nHost: h\r\nTrailer: " + strings.Repeat("x,", 2000) + "\r\n", Code: 431, Mentions: "fields"},
	rawhttp.Case{Input: strings.Repeat("x", 64<<10) + "x", Code: 414},
	rawhttp.Case{Input: chunked(strings.Repeat("3;"+strings.Repeat("a", 1000)+"\r\nabc\r\n", 10)), Code: 400, Mentions: "too many"},
	rawhttp.Case{Input: chunked("0\r\nA: " + strings.Repeat("b", 3<<10) + "\r\n\r\n"), Code: 400, Mentions: "too long"},
)

// chunked is a POST with the body given, in chunks.
func chunked(body string) string {
	return "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body
}

func TestRequests(t *testing.T) {
	for _, c := range requests {
		t.Run(fmt.Sprintf("%.60q", c.Input), func(t *testing.T) {
			for _, step := range []int{1, 2, 3, 7, len(c.Input) + 1} {
				s := NewRequests(64 << 10)
				var refused string
				code := 0
				for at := 0; at < len(c.Input); {
					k := min(step, len(c.Input)-at)
					n, refusal := s.Scan([]byte(c.Input[at : at+k]))
					if refusal != nil {
						refused, code = refusal.Message, refusal.Code
						break
					}
					at += n
				}
				if code != c.Code || !strings.Contains(refused, c.Mentions) {
					t.Errorf("%d bytes at a time: %d %q, want %d %q", step, code, refused, c.Code, c.Mentions)
				}
			}
			o := scan(t, []byte(c.Input), one)
			passed, begin := 0, 0
			for _, end := range o.ends {
				if c.Input[begin:end] != "\r\n" { // that is passed over after a POST
					passed++
				}
				begin = end
			}
			if o.state == rest {
				passed++
			}
			if passed != c.Passed {
				t.Errorf("%d requests pass, want %d", passed, c.Passed)
			}
			agrees(t, []byte(c.Input), o)
		})
	}
}

// BenchmarkRequests is what a request of kubectl costs.
func BenchmarkRequests(b *testing.B) {
	input := []byte("GET /api/v1/namespaces/default/pods?limit=500 HTTP/1.1\r\nHost: kubernetes.example.com:6443\r\nUser-Agent: kubectl/v1.36.0 (linux/amd64) kubernetes/0123456\r\n" +
		"Accept: application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json\r\n" +
		"Authorization: Bearer " + strings.Repeat("x", 900) + "\r\nKubectl-Command: kubectl get\r\nKubectl-Session: 01234567-89ab-cdef-0123-456789abcdef\r\nAccept-Encoding: gzip\r\n\r\n")
	s := NewRequests(1 << 20)
	b.SetBytes(int64(len(input)))
	b.ReportAllocs()
	for b.Loop() {
		if _, refusal := s.Scan(input); refusal != nil {
			b.Fatal(refusal)
		}
	}
}
