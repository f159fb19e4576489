package relay

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

// TestFloods: what brings nothing and costs something ends the connection when its
// budget is spent, and not before; a slower pace is no flood.
func TestFloods(t *testing.T) {
	for _, tt := range []struct {
		name  string
		once  func(c *peer)
		burst int // how many go well at once
		rate  int // and each second
	}{
		{"rapid reset", func(c *peer) { c.reset(c.ask(true, "GET", "/"), http2.ErrCodeCancel) }, 500, 50},
		{"requests that are malformed", func(c *peer) { c.ask(true, "GET", "relative", "X-Upper: 1") }, 100, 10},
		{"WINDOW_UPDATE of 0", func(c *peer) { c.window(c.ask(true, "GET", "/"), 0) }, 100, 10},
		{"windows that overflow", func(c *peer) { c.window(c.ask(true, "GET", "/"), 1<<31-1) }, 100, 10},
		{"DATA on a half-closed stream", func(c *peer) { c.data(c.ask(true, "GET", "/"), true, "x") }, 100, 10},
		{"HEADERS on a half-closed stream", func(c *peer) { c.headers(c.ask(true, "GET", "/"), true, "x-a: b") }, 100, 10},
		{"a wrong length", func(c *peer) { c.data(c.ask(false, "GET", "/", "content-length: 5"), true, "x") }, 100, 10},
		{"PING", func(c *peer) { c.ping("12345678") }, 2000, 500},
		{"PING ACK", func(c *peer) { c.pong("12345678") }, 2000, 500},
		{"SETTINGS", func(c *peer) { c.settings() }, 200, 50},
		{"SETTINGS ACK", func(c *peer) { c.settingsAck() }, 2000, 500},
		{"PRIORITY", func(c *peer) { c.frame(http2.FramePriority, 0, 1, "\x00\x00\x00\x03x") }, 2000, 500},
		{"WINDOW_UPDATE", func(c *peer) { c.window(0, 1) }, 2000, 500},
		{"unknown frames", func(c *peer) { c.frame(0xbb, 0, 0, "x") }, 2000, 500},
		{"GOAWAY", func(c *peer) { c.goAway(0, http2.ErrCodeNo) }, 2000, 500},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{still: true}, func(w *world) {
				c := w.client(nil)
				c.hello()
				c.drain()
				slow := 0
				for ; slow < 3*tt.burst && !c.ended(); slow++ {
					tt.once(c)
					if slow%10 == 0 {
						c.drain() // and whatever the backend hears
						time.Sleep(10 * time.Second / time.Duration(tt.rate))
					}
				}
				if c.ended() {
					w.Errorf("the end came after %d at a rate of %d/s", slow, tt.rate)
				}
				time.Sleep(time.Minute)
				n := 0
				for ; n < 3*tt.burst; n++ {
					tt.once(c)
					if n%100 == 0 {
						if strings.Contains(texts(c.drain()), "GOAWAY") {
							break
						}
					}
				}
				if n < tt.burst-1 || n > tt.burst+201 {
					w.Errorf("the end came after %d, want about %d", n, tt.burst)
				}
				time.Sleep(2 * linger)
				if !c.ended() {
					w.Error("the connection stands")
				}
			})
		})
	}
}

// TestEmptyData: DATA that carries nothing is a flood as well.
func TestEmptyData(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		for range 1900 {
			c.data(1, false, "")
		}
		c.wantNothing()
		for range 200 {
			c.data(1, false, "")
		}
		c.wantGoAway(1, http2.ErrCodeEnhanceYourCalm)
		c.wantEnd()
		b.wantRST(1, http2.ErrCodeCancel)
	})
}

// TestNoAbuse: what looks like abuse and is not.
func TestNoAbuse(t *testing.T) {
	t.Run("watches", func(t *testing.T) {
		// A controller cancels 1,000 watches at once.
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(true, "GET", watchPath)
			b := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2000})
			for range 999 {
				c.ask(true, "GET", watchPath)
			}
			for _, e := range b.drain() {
				b.headers(e.id, false, ":status: 200")
			}
			if n := len(c.drain()); n != 1000 {
				w.Errorf("%d answers", n)
			}
			for id := uint32(1); id < 2000; id += 2 {
				c.reset(id, http2.ErrCodeCancel)
			}
			c.ask(true, "GET", "/")
			if got := b.drain(); len(got) != 1001 {
				w.Errorf("backend hears %d frames", len(got))
			}
			b.headers(2001, true, ":status: 200")
			c.wantStatus(2001, true, 200)
		})
	})
	t.Run("WINDOW_UPDATE for each piece", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(true, "GET", logPath)
			b := w.apis[0].accepted()
			b.wantRequest(true, "GET", logPath)
			b.headers(1, false, ":status: 200")
			c.wantStatus(1, false, 200)
			for range 3000 {
				b.data(1, false, "a line")
				c.wantData(1, false, "a line")
				c.window(1, 6)
				c.window(0, 6)
				b.maybe(http2.FrameWindowUpdate)
			}
			b.data(1, true, "")
			c.wantData(1, true, "")
		})
	})
	t.Run("resets that cross answers", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			var b *peer
			for range 2000 {
				id := c.ask(true, "GET", "/")
				if b == nil {
					b = w.apis[0].accepted()
				}
				b.until("HEADERS")
				b.headers(id, true, ":status: 200")
				c.wantStatus(id, true, 200)
				c.reset(id, http2.ErrCodeCancel)
			}
			c.wantNothing()
		})
	})
}

// maybe takes an event of the type given, if it is the next.
func (p *peer) maybe(typ http2.FrameType) {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.heard) > 0 && p.heard[0].typ == typ {
		p.heard = p.heard[1:]
	}
}

// TestSourceBudget: what a source has spent is not to be had again by connecting anew,
// nor by many connections at once; a connection that has no part in it goes on.
func TestSourceBudget(t *testing.T) {
	var s balancer.SourceLimits
	s.Abuse[balancer.AbuseResets] = balancer.Refill{Burst: 1000, Rate: 10}
	s.Abuse[balancer.AbuseControl] = balancer.Refill{Burst: 5000, Rate: 10}
	for _, tt := range []struct {
		name  string
		once  func(c *peer)
		burst int // of a connection
		all   int // of its source
	}{
		{"rapid reset", func(c *peer) { c.reset(c.ask(true, "GET", "/"), http2.ErrCodeCancel) }, 500, 1000},
		{"PING", func(c *peer) { c.ping("12345678") }, 2000, 5000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{still: true, sources: s}, func(w *world) {
				innocent := w.client(nil)
				innocent.hello()
				innocent.drain()
				spent, last := 0, 0
				for range 6 {
					c := w.client(nil)
					c.hello()
					c.drain()
					for last = 0; last < tt.burst-50 && !c.ended(); last++ {
						tt.once(c)
						if last%10 == 0 {
							c.drain()
						}
					}
					spent += last
					c.conn.NetConn().Close()
				}
				if most := tt.all + 4*tt.burst/10 + 100; spent > most {
					w.Errorf("%d went well, want no more than about %d", spent, most)
				}
				if most := tt.burst/10 + 20; last > most {
					w.Errorf("the last connection was ended after %d, want about %d", last, most)
				}
				if n := w.metric("apiserver_lb.refusals")["reason="+balancer.ReasonAbuse]; n == 0 {
					w.Error("the metrics know of nothing")
				}
				tt.once(innocent)
				innocent.drain()
				if innocent.ended() {
					w.Error("a connection that did next to nothing is ended with the others")
				}
			})
		})
	}
}
