package relay

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

const objectPath = "/api/v1/namespaces/n/configmaps/c"

// TestRelieve: the client for which most waits goes first, and no more than has to.
func TestRelieve(t *testing.T) {
	for _, tt := range []struct {
		name  string
		bytes int
		want  []int // which clients lose their connections
	}{
		{"a little", 1, []int{2}},
		{"more than the first has", 48*backendWindow + 1, []int{1, 2}},
		{"more than there is", 1 << 30, []int{1, 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				var clients []*peer
				var b *peer
				next := uint32(1)
				for _, streams := range []int{1, 44, 48} { // that the client does not read
					c := w.client(nil).greet(initialWindow(0))
					clients = append(clients, c)
					for range streams {
						id := c.ask(true, "GET", logPath)
						if b == nil {
							b = w.apis[0].accepted()
						}
						b.wantRequest(true, "GET", logPath)
						b.headers(next, false, ":status: 200")
						c.wantStatus(id, false, 200)
						b.data(next, false, strings.Repeat("x", backendWindow))
						next += 2
					}
					c.wantNothing()
				}
				if n := w.relay.Relieve(tt.bytes); n != len(tt.want) {
					t.Errorf("%d connections have ended, want %d", n, len(tt.want))
				}
				for i, c := range clients {
					if slices.Contains(tt.want, i) {
						c.hear("GOAWAY")
						c.wantEnd()
						continue
					}
					c.wantNothing()
				}
				b.drain()
			})
		})
	}
}

// TestRelieveHeads: heads of requests that wait for an answer, and of those that have not
// come whole, are what a client holds here too.
func TestRelieveHeads(t *testing.T) {
	big := "x-big: " + strings.Repeat("x", 300<<10)
	for _, tt := range []struct {
		name string
		do   func(c *peer)
	}{
		{"unanswered", func(c *peer) { c.ask(true, "GET", logPath, big) }},
		{"unfinished", func(c *peer) {
			block := c.encode(head("GET", logPath, big)...)
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:maxFrameSize]})
			for block = block[maxFrameSize:]; len(block) > maxFrameSize; block = block[maxFrameSize:] {
				c.fr.WriteContinuation(1, false, block[:maxFrameSize])
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil).greet()
				tt.do(c)
				c.wantNothing()
				if n := w.relay.Relieve(1); n != 1 {
					w.Errorf("%d connections have ended", n)
				}
				c.drain()
			})
		})
	}
}

// TestRelieveBodies: what is only kept to be sent again goes before anybody loses a
// connection.
func TestRelieveBodies(t *testing.T) {
	run(t, setup{options: func(o *Options) { o.MaxHeldBody = 1 << 20 }}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", objectPath)
		b := w.apis[0].accepted(initialWindow(1 << 20))
		b.wantRequest(false, "POST", objectPath)
		b.window(0, 1<<20)
		const frames, size = 20, 16 << 10
		for range frames {
			c.data(1, false, strings.Repeat("x", size))
			c.drain()
		}
		if n := total(b.drain())[1]; n != frames*size {
			t.Fatalf("%d bytes have come to the backend", n)
		}
		if n := w.relay.Relieve(frames * size); n != 0 {
			t.Errorf("%d connections have ended", n)
		}
		if !w.core.Bodies.Take(bodiesRoom) {
			t.Error("there is still a body that is kept")
		}
		w.core.Bodies.Give(bodiesRoom)
		c.data(1, true, "x")
		b.wantData(1, true, "x")
		b.headers(1, true, ":status: 201")
		c.wantStatus(1, true, 201)
	})
}

// TestBodiesAreShared: a client does not have all the room for bodies that are kept, and
// what finds none is sent once.
func TestBodiesAreShared(t *testing.T) {
	run(t, setup{}, func(w *world) {
		const size = 200 << 10
		w.core.Bodies.Take(bodiesRoom - 3*size)
		c := w.client(nil).greet()
		var b *peer
		for range 2 {
			id := c.ask(false, "POST", objectPath)
			if b == nil {
				b = w.apis[0].accepted(initialWindow(1 << 20))
				b.window(0, 1<<20)
			}
			b.wantRequest(false, "POST", objectPath)
			for sent := 0; sent < size; sent += size / 20 {
				c.data(id, false, strings.Repeat("x", size/20))
				c.drain()
			}
			if n := total(b.drain())[id]; n != size {
				w.Errorf("%d bytes have come to the backend", n)
			}
		}
		if !w.core.Bodies.Take(2 * size) {
			w.Error("one client has taken more room than it has left")
		} else {
			w.core.Bodies.Give(2 * size)
		}
		if w.core.Bodies.Take(2*size + 1) {
			w.Error("no body is kept at all")
		}
		for _, id := range []uint32{1, 3} {
			c.data(id, true, "")
			b.wantData(id, true, "")
			b.headers(id, true, ":status: 201")
			c.wantStatus(id, true, 201)
		}
		w.core.Bodies.Give(bodiesRoom - 3*size)
	})
}

// TestShort: while memory is short, small requests go on, and large ones are for later.
func TestShort(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", objectPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", objectPath)
		b.headers(1, true, ":status: 204")
		c.wantStatus(1, true, 204)

		w.core.Memory.SetShort(true)
		c.ask(true, "GET", objectPath)
		b.wantRequest(true, "GET", objectPath)
		b.headers(3, true, ":status: 204")
		c.wantStatus(3, true, 204)
		for _, fields := range [][]string{{"content-length: 1000000"}, nil} {
			id := c.ask(false, "POST", objectPath, fields...)
			e := c.wantStatus(id, false, 429)
			if e.get("retry-after") == "" {
				t.Errorf("%s: no Retry-After", e.text)
			}
			c.drain()
		}
		b.wantNothing()
		if n := w.metric("apiserver_lb.refusals")["reason="+balancer.ReasonMemory]; n != 2 {
			t.Errorf("%d refusals are counted", n)
		}
		w.core.Memory.SetShort(false)
	})
}
