package relay

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

const (
	watchPath = "/api/v1/pods?watch=true"
	logPath   = "/api/v1/namespaces/n/pods/p/log"
)

func initialWindow(n uint32) http2.Setting {
	return http2.Setting{ID: http2.SettingInitialWindowSize, Val: n}
}

// TestUploadWindow: a body moves on as the backend's windows allow.
func TestUploadWindow(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted(initialWindow(0))
		b.wantRequest(false, "POST", "/")
		c.data(1, true, "hello, world")
		b.wantNothing()
		b.window(1, 1)
		b.wantData(1, false, "h")
		b.settings(initialWindow(3))
		b.wantSettingsAck()
		b.wantData(1, false, "ell")
		// A window may become negative.
		b.settings(initialWindow(1))
		b.wantSettingsAck()
		b.window(1, 2)
		b.wantNothing()
		b.window(1, 1)
		b.wantData(1, false, "o")
		b.window(1, 100)
		b.wantData(1, true, ", world")

		// The end of a body needs no window.
		b.settings(initialWindow(0))
		b.wantSettingsAck()
		id := c.ask(false, "POST", "/")
		b.wantRequest(false, "POST", "/")
		c.data(id, true, "")
		b.wantData(id, true, "")
		for _, id := range []uint32{1, id} {
			b.headers(id, true, ":status: 200")
			c.wantStatus(id, true, 200)
		}
	})
}

// TestDownloadWindow: an answer moves on as the client's windows allow, and the
// windows of its stream at the backend follow.
func TestDownloadWindow(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(0))
		c.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", watchPath)
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		b.data(1, false, "hello, world")
		c.wantNothing()
		c.window(1, 1)
		c.wantData(1, false, "h")
		c.settings(initialWindow(3))
		c.wantSettingsAck()
		c.wantData(1, false, "ell")
		c.settings(initialWindow(1))
		c.wantSettingsAck()
		c.window(1, 2)
		c.wantNothing()
		c.window(1, 1)
		c.wantData(1, false, "o")
		c.window(1, 100)
		c.wantData(1, false, ", world")

		// What the client does not take is not asked for.
		c.settings(initialWindow(0)) // which leaves 100-7-1
		c.wantSettingsAck()
		b.data(1, false, strings.Repeat("x", backendWindow-12))
		if n := total(c.drain())[1]; n != 92 {
			w.Errorf("the client got %d bytes, want 92", n)
		}
		b.wantNothing()
		c.window(1, 1<<20)
		c.drain()
		if e := b.hear("WINDOW_UPDATE"); e.typ != http2.FrameWindowUpdate || e.id != 1 || e.n < backendWindow {
			w.Errorf("backend hears %s", e.text)
		}
		b.data(1, true, "")
		c.wantData(1, true, "")
	})
}

// TestNobodyElseWaits: a stream without a window holds up neither others nor what
// is not DATA.
func TestNobodyElseWaits(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(0))
		c.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		b.data(1, true, strings.Repeat("x", 5000))
		for range 3 {
			id := c.ask(true, "GET", logPath)
			c.window(id, 100)
			b.wantRequest(true, "GET", logPath)
			b.headers(id, false, ":status: 200")
			c.wantStatus(id, false, 200)
			b.data(id, true, "passes")
			c.wantData(id, true, "passes")
		}
		c.ping("12345678")
		c.want("PING ack=true 12345678")
		c.window(1, 5000)
		c.wantData(1, true, strings.Repeat("x", 5000))
		c.wantNothing()
	})
}

// TestConnectionWindow: without a window of the connection DATA waits, and nothing
// else does.
func TestConnectionWindow(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(1 << 20))
		c.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		text := strings.Repeat("0123456789abcdef", 5000)[:65535+1000]
		b.pour(1, text)
		if n := total(c.drain())[1]; n != 65535 {
			w.Errorf("%d bytes came, want 65535", n)
		}
		// The head of another answer passes, its body does not.
		id := c.ask(true, "GET", logPath)
		b.wantRequest(true, "GET", logPath)
		b.headers(id, false, ":status: 200")
		c.wantStatus(id, false, 200)
		b.data(id, true, "short")
		c.ping("12345678")
		c.want("PING ack=true 12345678")
		c.wantNothing()
		c.window(0, 1000) // for what is left of stream 1, in however many frames
		if n := total(c.drain())[1]; n != 1000 {
			w.Errorf("%d bytes more came, want 1000", n)
		}
		c.window(0, 3)
		c.wantData(id, false, "sho")
		c.window(0, 3)
		c.wantData(id, true, "rt")
	})
}

// pour sends a body as the windows of its stream allow, from the usual one on.
func (p *peer) pour(id uint32, text string) {
	window := backendWindow
	for text != "" {
		n := min(window, len(text), maxFrameSize)
		if n == 0 {
			for _, e := range p.drain() {
				if e.typ == http2.FrameWindowUpdate && e.id == id {
					window += int(e.n)
				}
			}
			if window == 0 {
				p.w.Fatalf("backend: no window for the last %d bytes", len(text))
			}
			continue
		}
		p.data(id, n == len(text), text[:n])
		text, window = text[n:], window-n
	}
	p.drain()
}

// TestRoundRobin: streams that wait for a window of the connection get it in turn,
// in whatever pieces their bodies came.
func TestRoundRobin(t *testing.T) {
	for _, piece := range []int{maxFrameSize, 1000} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(false, "POST", "/")
			b := w.apis[0].accepted(initialWindow(1 << 20))
			c.ask(false, "POST", "/")
			c.ask(false, "POST", "/")
			body := strings.Repeat("x", 100_000)
			for id := uint32(1); id <= 5; id += 2 {
				for rest := body; rest != ""; {
					n := min(len(rest), piece)
					c.data(id, n == len(rest), rest[:n])
					rest = rest[n:]
				}
			}
			b.drain() // 65,535 bytes
			b.window(0, 6*maxFrameSize)
			for id, n := range total(b.drain()) {
				// A turn is a frame's worth, or a little more or less.
				if n < maxFrameSize/2 || n > 3*maxFrameSize {
					w.Errorf("pieces of %d: stream %d got %d bytes", piece, id, n)
				}
			}
			b.window(0, 1<<20)
			b.drain()
			for id := uint32(1); id <= 5; id += 2 {
				b.headers(id, true, ":status: 200")
			}
		})
	}
}

// TestReceivedWindows: windows that the relay gave are enforced.
func TestReceivedWindows(t *testing.T) {
	t.Run("client's stream", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(false, "POST", "/")
			b := w.apis[0].accepted(initialWindow(0))
			b.wantRequest(false, "POST", "/")
			c.data(1, false, strings.Repeat("x", clientWindow))
			c.wantNothing()
			c.data(1, false, "x")
			c.wantRST(1, http2.ErrCodeFlowControl)
			b.wantRST(1, http2.ErrCodeCancel)
			c.data(1, true, "on its way")
			c.wantNothing()
		})
	})
	t.Run("client's connection", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			var b *peer
			for i := range clientConnWindow / clientWindow {
				id := c.ask(false, "POST", "/")
				if i == 0 {
					b = w.apis[0].accepted(initialWindow(0))
				}
				b.wantRequest(false, "POST", "/")
				c.data(id, false, strings.Repeat("x", clientWindow))
			}
			c.wantNothing()
			id := c.ask(false, "POST", "/")
			c.data(id, false, "x")
			c.wantGoAway(id, http2.ErrCodeFlowControl)
			c.wantEnd()
		})
	})
	t.Run("backend's stream", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet(initialWindow(0))
			c.ask(true, "GET", logPath)
			b := w.apis[0].accepted()
			c.ask(true, "GET", logPath)
			for id := uint32(1); id <= 3; id += 2 {
				b.wantRequest(true, "GET", logPath)
				b.headers(id, false, ":status: 200")
				c.wantStatus(id, false, 200)
				b.data(id, false, strings.Repeat("x", backendWindow))
			}
			c.wantNothing()
			b.data(1, false, "x")
			b.wantRST(1, http2.ErrCodeFlowControl)
			c.wantRST(1, http2.ErrCodeInternal)
			c.window(3, 1<<20)
			if n := total(c.drain())[3]; n != backendWindow {
				w.Errorf("the other stream got %d bytes", n)
			}
			c.reset(3, http2.ErrCodeCancel)
		})
	})
}

// TestWindowOverflow: windows beyond 2^31-1 end what they are of.
func TestWindowOverflow(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		c.window(1, 1<<31-1)
		c.wantRST(1, http2.ErrCodeFlowControl)
		b.wantRST(1, http2.ErrCodeCancel)
		id := c.ask(true, "GET", logPath)
		b.wantRequest(true, "GET", logPath)
		c.window(id, 1<<31-1-65535)
		c.wantNothing()
		c.settings(initialWindow(65536))
		c.wantGoAway(id, http2.ErrCodeFlowControl)
		c.wantEnd()
		b.wantRST(id, http2.ErrCodeCancel)

		c = w.client(nil).greet()
		c.window(0, 1<<31-1-65535)
		c.wantNothing()
		c.window(0, 1)
		c.wantGoAway(0, http2.ErrCodeFlowControl)
		c.wantEnd()
	})
}

// TestManyUnread: the answers that a client asks for and does not take cost no more
// than a small window each.
func TestManyUnread(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(0))
		c.ask(true, "GET", logPath)
		b := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1000})
		for range 199 {
			c.ask(true, "GET", logPath)
		}
		got := 0
		for _, e := range b.drain() {
			b.headers(e.id, false, ":status: 200")
			b.data(e.id, false, strings.Repeat("x", backendWindow))
		}
		for _, e := range b.drain() {
			if e.typ == http2.FrameWindowUpdate && e.id != 0 {
				got += int(e.n)
			}
		}
		if got != 0 {
			w.Errorf("the backend may send %d bytes more", got)
		}
		c.drain()
		for id := uint32(1); id <= 399; id += 2 {
			c.window(id, backendWindow)
		}
		c.window(0, 200*backendWindow)
		for id, n := range total(c.drain()) {
			if n != backendWindow {
				w.Errorf("stream %d got %d bytes", id, n)
			}
		}
		for id := uint32(1); id <= 399; id += 2 {
			b.data(id, true, "")
		}
		c.drain()
	})
}

// TestDeafClient: a client that grants windows and does not read stops its own
// streams, within a bound, and nobody else's.
func TestDeafClient(t *testing.T) {
	run(t, setup{}, func(w *world) {
		deaf, other := w.client(nil).greet(initialWindow(1<<30)), w.client(nil).greet()
		deaf.window(0, 1<<30)
		synctest.Wait()
		deaf.setDeaf(true)
		deaf.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		b.headers(1, false, ":status: 200")
		sent, window := 0, backendWindow
		for window > 0 {
			n := min(window, maxFrameSize)
			b.data(1, false, strings.Repeat("x", n))
			sent, window = sent+n, window-n
			for _, e := range b.drain() {
				if e.typ == http2.FrameWindowUpdate && e.id == 1 {
					window += int(e.n)
				}
			}
		}
		// 128 KB are in the network's buffers, and as much in the relay's.
		if limit := 1 << 20; sent > limit {
			w.Errorf("the backend sent %d bytes for a client that does not read, want no more than %d", sent, limit)
		}
		for range 50 {
			id := other.ask(true, "GET", logPath)
			e := b.wantRequest(true, "GET", logPath)
			b.headers(e.id, false, ":status: 200")
			b.data(e.id, true, "passes")
			other.wantStatus(id, false, 200)
			other.wantData(id, true, "passes")
		}
		deaf.setDeaf(false)
		if n := total(deaf.drain())[1]; n != sent {
			w.Errorf("%d bytes came of %d", n, sent)
		}
		b.drain()
		b.data(1, true, "the end")
		deaf.wantData(1, true, "the end")
	})
}

// TestDeafBackend: the same for a backend that does not read.
func TestDeafBackend(t *testing.T) {
	run(t, setup{backends: 2, options: func(o *Options) { o.PingAfter = time.Hour }}, func(w *world) {
		w.prefer(0)
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted(initialWindow(1 << 30))
		b.wantRequest(false, "POST", "/")
		b.window(0, 1<<30)
		synctest.Wait()
		b.setDeaf(true)
		sent, window, conn := 0, clientWindow, clientConnWindow
		for window > 0 && conn > 0 {
			n := min(window, conn, maxFrameSize)
			c.data(1, false, strings.Repeat("x", n))
			sent, window, conn = sent+n, window-n, conn-n
			for _, e := range c.drain() {
				switch {
				case e.typ == http2.FrameWindowUpdate && e.id == 1:
					window += int(e.n)
				case e.typ == http2.FrameWindowUpdate:
					conn += int(e.n)
				}
			}
		}
		if limit := 1 << 20; sent > limit {
			w.Errorf("the client sent %d bytes for a backend that does not read, want no more than %d", sent, limit)
		}
		c.ping("12345678")
		c.want("PING ack=true 12345678")
		b.setDeaf(false)
		if n := total(b.drain())[1]; n != sent {
			w.Errorf("%d bytes came of %d", n, sent)
		}
		c.data(1, true, "the end")
		b.wantData(1, true, "the end")
		b.headers(1, true, ":status: 200")
		c.drain()
	})
}

// TestLargeBodies: bodies much larger than any window arrive whole, in both
// directions at once.
func TestLargeBodies(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(1 << 20))
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted(initialWindow(10_000))
		b.wantRequest(false, "POST", "/")
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		const size = 2 << 20
		up, down := new(strings.Builder), new(strings.Builder)
		for i := 0; up.Len() < size; i++ {
			fmt.Fprintf(up, "up %d,", i)
			fmt.Fprintf(down, "down %d,", i)
		}
		cs, bs := &sender{p: c, id: 1, rest: up.String(), window: clientWindow, conn: clientConnWindow}, &sender{p: b, id: 1, rest: down.String(), window: backendWindow, conn: backendConnWindow}
		for idle := 0; !cs.done || !bs.done; idle++ {
			if cs.send() || bs.send() {
				idle = 0
			}
			if idle > 20 {
				w.Fatalf("nobody can go on: %d and %d bytes are left", len(cs.rest), len(bs.rest))
			}
		}
		c.data(1, true, "")
		for range 20 {
			bs.hear()
		}
		b.data(1, true, "")
		for range 20 {
			cs.hear()
		}
		if bs.got.String() != up.String() || cs.got.String() != down.String() {
			w.Errorf("%d bytes of %d went up, %d of %d down", bs.got.Len(), up.Len(), cs.got.Len(), down.Len())
		}
	})
}

// sender is one end of a stream that sends as it may, and lets the other end send
// all that it likes.
type sender struct {
	p            *peer
	id           uint32
	rest         string
	window, conn int
	got          strings.Builder
	done         bool
}

// hear takes what has come.
func (s *sender) hear() {
	for _, e := range s.p.drain() {
		switch {
		case e.typ == http2.FrameWindowUpdate && e.id == 0:
			s.conn += int(e.n)
		case e.typ == http2.FrameWindowUpdate && e.id == s.id:
			s.window += int(e.n)
		case e.typ == http2.FrameData && e.id == s.id:
			s.got.Write(e.data)
			if len(e.data) > 0 {
				s.p.window(0, uint32(len(e.data)))
				s.p.window(s.id, uint32(len(e.data)))
			}
		}
	}
}

// send sends what it may, and reports whether that was anything.
func (s *sender) send() bool {
	s.hear()
	n := min(s.window, s.conn, len(s.rest), maxFrameSize)
	if n == 0 {
		return false
	}
	s.p.data(s.id, false, s.rest[:n])
	s.rest, s.window, s.conn = s.rest[n:], s.window-n, s.conn-n
	s.done = s.rest == ""
	return true
}
