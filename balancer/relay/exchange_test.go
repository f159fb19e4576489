package relay

import (
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// TestExchange is a request and its answer, literally.
func TestExchange(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/api/v1/pods?x=y", "content-type: application/json", "content-length: 5", "x-a: b")
		b := w.apis[0].accepted()
		b.wantHeaders(1, false, ":method: POST", ":scheme: https", ":authority: balancer.example", ":path: /api/v1/pods?x=y",
			"content-type: application/json", "content-length: 5", "x-a: b", "x-forwarded-for: "+clientIP, "audit-id: audit-1")
		c.data(1, true, "hello")
		b.wantData(1, true, "hello")
		b.headers(1, false, ":status: 201", "content-type: text/plain", "audit-id: audit-1")
		c.wantHeaders(1, false, ":status: 201", "content-type: text/plain", "audit-id: audit-1")
		b.data(1, true, "world")
		c.wantData(1, true, "world")

		// Without a body, on the same connections, and with trailers.
		c.ask(true, "GET", "/version")
		b.wantRequest(true, "GET", "/version")
		b.headers(3, false, ":status: 200", "trailer: x-t")
		c.wantHeaders(3, false, ":status: 200", "trailer: x-t")
		b.data(3, false, "x")
		c.wantData(3, false, "x")
		b.headers(3, true, "x-t: 1")
		c.wantHeaders(3, true, "x-t: 1")
		c.wantNothing()
		b.wantNothing()
	})
}

// TestInterim: 1xx passes, and does not begin the answer.
func TestInterim(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/", "expect: 100-continue")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		for range 3 {
			b.headers(1, false, ":status: 103", "link: x")
			c.wantHeaders(1, false, ":status: 103", "link: x")
		}
		b.headers(1, false, ":status: 100")
		c.wantHeaders(1, false, ":status: 100")
		c.data(1, true, "x")
		b.wantData(1, true, "x")
		b.headers(1, true, ":status: 204")
		c.wantHeaders(1, true, ":status: 204")
	})
}

// TestNoBody: what has a Content-Length and no body by its nature.
func TestNoBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		var b *peer
		for _, tt := range []struct{ method, status string }{{"HEAD", "200"}, {"GET", "304"}} {
			id := c.ask(true, tt.method, "/")
			if b == nil {
				b = w.apis[0].accepted()
			}
			b.wantRequest(true, tt.method, "/")
			b.headers(id, true, ":status: "+tt.status, "content-length: 1000")
			c.wantHeaders(id, true, ":status: "+tt.status, "content-length: 1000")
		}
		// END_STREAM may come apart; until then the answer is held, as any short one is.
		id := c.ask(true, "HEAD", "/")
		b.wantRequest(true, "HEAD", "/")
		b.headers(id, false, ":status: 200", "content-length: 1000")
		c.wantNothing()
		b.data(id, true, "")
		c.wantHeaders(id, true, ":status: 200", "content-length: 1000")
		for _, path := range []string{"/", logPath} {
			id = c.ask(true, "GET", path)
			b.wantRequest(true, "GET", path)
			b.headers(id, false, ":status: 304", "content-length: 1000")
			b.data(id, true, "")
			if e := c.wantStatus(id, path == "/", 304); e.get("content-length") != "1000" {
				w.Errorf("answer = %s", e.text)
			}
			if path != "/" {
				c.wantData(id, true, "")
			}
		}
		c.wantNothing()
	})
}

// TestManyContinuations: header blocks come and go in many frames.
func TestManyContinuations(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		long := "x-long: " + strings.Repeat("~", 100_000) // 13 bits each as Huffman has it: sent as it is
		c.ask(true, "GET", "/", long)
		b := w.apis[0].accepted()
		if e := b.wantRequest(true, "GET", "/"); e.parts != 7 || e.get("x-long") != long[8:] {
			w.Errorf("the request came in %d frames", e.parts)
		}
		b.headers(1, true, ":status: 200", long)
		if e := c.wantStatus(1, true, 200); e.parts != 7 || e.get("x-long") != long[8:] {
			w.Errorf("the answer came in %d frames", e.parts)
		}
		// A small piece first, and padding and a priority with it.
		block := c.encode(head("GET", "/", long)...)
		c.raw(frameOf(http2.FrameHeaders, http2.FlagHeadersEndStream|http2.FlagHeadersPadded|http2.FlagHeadersPriority, 3,
			"\x04"+"\x00\x00\x00\x00\x10"+string(block[:10])+"\x00\x00\x00\x00"))
		c.fr.WriteContinuation(3, false, block[10:9000])
		for rest := block[9000:]; len(rest) > 0; {
			n := min(len(rest), maxFrameSize)
			c.fr.WriteContinuation(3, false, rest[:n])
			rest = rest[n:]
		}
		b.wantNothing()
		c.fr.WriteContinuation(3, true, nil)
		b.wantRequest(true, "GET", "/")
		b.headers(3, true, ":status: 200")
		c.wantStatus(3, true, 200)
	})
}

// TestPadding: padding counts in flow control, is credited at once, and does not
// travel on.
func TestPadding(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		pad := make([]byte, 255)
		for range 1000 { // 262,144 bytes, more than the stream's window
			c.fr.WriteDataPadded(1, false, []byte("x"), pad[:254])
		}
		c.fr.WriteDataPadded(1, true, nil, pad)
		got := 0
		for _, e := range b.drain() {
			got += len(e.data)
		}
		if got != 1000 {
			w.Errorf("%d bytes arrived, want 1000", got)
		}
		c.drain()
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		for range 100 {
			b.fr.WriteDataPadded(1, false, []byte("y"), pad[:254])
		}
		b.fr.WriteDataPadded(1, true, []byte("z"), pad)
		if n := total(c.drain())[1]; n != 101 {
			w.Errorf("%d bytes of the answer arrived, want 101", n)
		}
	})
}

// frameOf makes a frame with any flags.
func frameOf(typ http2.FrameType, flags http2.Flags, id uint32, payload string) []byte {
	return append(appendFrameHeader(nil, len(payload), frameType(typ), uint8(flags), id), payload...)
}
