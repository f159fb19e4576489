package relay

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	netpack "golang.org/x/net/http2/hpack"

	"apiserver-lb/balancer/relay/hpack"
)

// allocations of the hot path, per operation. Those of the peers are not among them
// where the benchmark is of one function.

// BenchmarkExchange is a small request and its answer over real sockets. Both ends
// are of net/http, which takes most of the allocations.
func BenchmarkExchange(b *testing.B) {
	w := newWorld(b, setup{loopback: true, handler: func(*world, *kubeAPIServer) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Type", "application/json")
			io.WriteString(rw, `{"kind":"Pod"}`)
		})
	}})
	defer w.end()
	tr := w.transport("")
	defer tr.CloseIdleConnections()
	ask := func() {
		r, _ := http.NewRequest("GET", "https://h/api/v1/namespaces/n/pods/p", nil)
		res, err := tr.RoundTrip(r)
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if res.StatusCode != 200 {
			b.Fatalf("code %d", res.StatusCode)
		}
	}
	ask()
	b.ReportAllocs()
	for b.Loop() {
		ask()
	}
}

// BenchmarkBody is a MiB from a backend to a client over real sockets.
func BenchmarkBody(b *testing.B) {
	const size = 1 << 20
	body := make([]byte, size)
	w := newWorld(b, setup{loopback: true, handler: func(*world, *kubeAPIServer) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.Write(body) })
	}})
	defer w.end()
	tr := w.transport("")
	defer tr.CloseIdleConnections()
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		r, _ := http.NewRequest("GET", "https://h/", nil)
		res, err := tr.RoundTrip(r)
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, res.Body); n != size || err != nil {
			b.Fatal(n, err)
		}
		res.Body.Close()
	}
}

// usualHead is what kubectl sends.
func usualHead() []hpack.Field {
	return fieldsOf(head("GET", "/api/v1/namespaces/kube-system/pods?limit=500", "accept: application/json",
		"authorization: Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9", "accept-encoding: gzip",
		"user-agent: kubectl/v1.36.0 (linux/amd64) kubernetes/0000000", "audit-id: 0d5a1b3e-4f3c-4a51-9d7f-6f1f0d5c2f11")...)
}

// BenchmarkHead decodes the head of a request, decides nothing, and encodes it for a
// backend.
func BenchmarkHead(b *testing.B) {
	var wire bytes.Buffer
	enc := netpack.NewEncoder(&wire)
	for _, f := range usualHead() {
		// Never indexed, so that the block can be decoded again and again.
		enc.WriteField(netpack.HeaderField{Name: f.Name, Value: f.Value, Sensitive: true})
	}
	dec, to := hpack.NewDecoder(hpack.NewStrings(), 1<<20), hpack.NewEncoder()
	edits := func() requestHead { h, _ := parseRequest(usualHead()); return h }()
	d := decide(b, &edits)
	var list hpack.List
	var block []byte
	var out []hpack.Field
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if list, err = dec.Decode(wire.Bytes(), list.Fields[:0], 1<<20, maxFields); err != nil {
			b.Fatal(err)
		}
		h, problem := parseRequest(list.Fields)
		if problem != "" {
			b.Fatal(problem)
		}
		out = h.outgoing(&d.Edits, out[:0])
		block = to.Begin(block[:0])
		for i := range out {
			block = to.Append(block, &out[i])
		}
	}
}

// BenchmarkData is a DATA frame that is parsed, waits in a stream, and is written.
func BenchmarkData(b *testing.B) {
	in := appendData(nil, 1, make([]byte, 16384), false)
	out := make([]byte, 0, 32<<10)
	var buf buffer
	b.SetBytes(16384)
	b.ReportAllocs()
	for b.Loop() {
		f, _, err := parseFrame(in)
		if err != nil {
			b.Fatal(err)
		}
		p, err := f.unpad()
		if err != nil {
			b.Fatal(err)
		}
		buf.add(p)
		q := buf.next(len(p))
		out = appendData(out[:0], 3, q, false)
		buf.advance(len(q))
	}
}

// TestAllocations guards what BenchmarkExchange cannot show for its peers: what the
// pure parts of the hot path allocate.
func TestAllocations(t *testing.T) {
	list := usualHead()
	h, _ := parseRequest(list)
	d := decide(t, &h)
	ping := appendPing(nil, 0, []byte("12345678"))
	out := make([]byte, 0, 4096)
	for _, tt := range []struct {
		name string
		max  float64
		do   func()
	}{
		{"parseRequest", 0, func() { parseRequest(list) }},
		{"outgoing", 3, func() { h.outgoing(&d.Edits, nil) }}, // the list, and names in lower case
		{"a frame", 0, func() { f, _, _ := parseFrame(ping); out = appendPing(out[:0], flagAck, f.payload) }},
		{"HEADERS", 0, func() { out = appendHeaders(out[:0], 1, ping, true, maxFrameSize) }},
		{"DATA", 0, func() { out = appendData(out[:0], 1, ping, true) }},
	} {
		if n := testing.AllocsPerRun(100, tt.do); n > tt.max {
			t.Errorf("%s: %v allocations, want no more than %v", tt.name, n, tt.max)
		}
	}
}
