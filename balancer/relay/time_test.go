package relay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/health"
)

// alive keeps a client's connection for d, as its PINGs do.
func (p *peer) alive(d time.Duration) {
	for end := time.Now().Add(d); ; time.Sleep(10 * time.Second) {
		if left := time.Until(end); left <= 10*time.Second {
			time.Sleep(left)
			return
		}
		p.pong("notasked")
	}
}

// TestPingClient: a client that is silent is asked whether it is there.
func TestPingClient(t *testing.T) {
	run(t, setup{options: patientWithBackends}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", watchPath)
		for range 3 {
			time.Sleep(clientPingAfter - time.Second)
			c.wantNothing()
			time.Sleep(2 * time.Second)
			c.want("PING ack=false alive?!?")
			c.pong("alive?!?")
		}
		time.Sleep(clientPingAfter + time.Second)
		c.want("PING ack=false alive?!?")
		begun := time.Now()
		for !c.ended() && time.Since(begun) < time.Minute {
			time.Sleep(time.Second)
		}
		c.wantEnd()
		if took := time.Since(begun); took > clientPingTimeout+time.Second {
			w.Errorf("it took %v", took)
		}
		b.until("RST_STREAM 1 CANCEL")
	})
}

// patientWithBackends lets backends be silent for as long as a test takes.
func patientWithBackends(o *Options) { o.PingAfter = 24 * time.Hour }

// ended reports whether the connection has ended.
func (p *peer) ended() bool {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err != nil
}

// TestHungBackend: a backend that says nothing while requests wait is known for it
// within 5 s. What can be sent again is, a watch ends cleanly, the rest is an error.
func TestHungBackend(t *testing.T) {
	run(t, setup{backends: 2}, func(w *world) {
		w.prefer(0)
		c := w.client(nil).greet()
		watch := c.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		log := c.ask(true, "GET", logPath)
		for range 2 {
			e := b.hear("a request")
			b.headers(e.id, false, ":status: 200")
			b.data(e.id, false, "begun")
		}
		list := c.ask(true, "GET", "/api/v1/pods")
		post := c.ask(true, "POST", "/")
		b.until("HEADERS 7")
		c.drain()
		begun := time.Now()
		time.Sleep(2 * time.Second)
		c.wantNothing()
		b.wantNothing()
		time.Sleep(time.Second)
		b.want("PING ack=false alive?!?")
		c.wantNothing()
		time.Sleep(2 * time.Second)
		b.wantEnd()
		got := texts(c.drain())
		for _, want := range []string{
			fmt.Sprintf("\n\tDATA %d end=true \"\"", watch),
			fmt.Sprintf("\n\tRST_STREAM %d INTERNAL_ERROR", log),
			fmt.Sprintf("\n\tHEADERS %d end=false [\":status: 504\"", post),
		} {
			if !strings.Contains(got, want) {
				w.Errorf("%v after the backend hung, the client hears %s\nwant %s", time.Since(begun), got, want)
			}
		}
		b2 := w.apis[1].accepted()
		b2.wantRequest(true, "GET", "/api/v1/pods")
		b2.finish(1, c, list)
		if v := fmt.Sprint(w.verdicts()); v != "[a no_answer]" {
			w.Errorf("health heard %s", v)
		}
	})
}

// TestSlowBackend: one that answers its PINGs may take its time.
func TestSlowBackend(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two("/")
		for range 20 {
			time.Sleep(3 * time.Second)
			c.pong("notasked")
			b.want("PING ack=false alive?!?")
			b.pong("alive?!?")
		}
		b.finish(1, c, 1)
		b.finish(3, c, 3)
		// Without a request it is asked from time to time.
		c.alive(idlePingAfter - time.Second)
		b.wantNothing()
		c.alive(2 * time.Second)
		b.want("PING ack=false alive?!?")
		c.alive(3 * time.Second)
		b.wantEnd()
		id := c.ask(true, "GET", "/")
		b = w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		b.finish(1, c, id)
	})
}

// TestWatchEnds: a watch whose backend is lost ends cleanly, mid-event or not, in
// whatever way the backend is lost.
func TestWatchEnds(t *testing.T) {
	for name, lose := range map[string]func(w *world, b *peer){
		"killed":        func(w *world, _ *peer) { w.apis[0].kill() },
		"closed":        func(_ *world, b *peer) { b.conn.Close() },
		"reset":         func(_ *world, b *peer) { b.reset(1, http2.ErrCodeInternal) },
		"GOAWAY":        func(_ *world, b *peer) { b.goAway(0, http2.ErrCodeNo) },
		"broken":        func(_ *world, b *peer) { b.data(0, false, "x") },
		"declared dead": func(w *world, _ *peer) { w.apis[0].b.SetState(health.Dead, time.Now()); w.relay.Cut(w.apis[0].b) },
		"a bad stream":  func(_ *world, b *peer) { b.headers(1, false, "x-a: b") },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil).greet(initialWindow(5))
				c.ask(true, "GET", watchPath)
				b := w.apis[0].accepted()
				b.wantRequest(true, "GET", watchPath)
				b.headers(1, false, ":status: 200")
				b.data(1, false, `{"type":"ADD`)
				c.wantStatus(1, false, 200)
				c.wantData(1, false, `{"typ`)
				lose(w, b)
				// What is here already comes before the end.
				c.wantNothing()
				c.window(1, 1000)
				c.wantData(1, true, `e":"ADD`)
				c.wantNothing()
			})
		})
	}
}

// TestWatchThatFailed: an answer to a watch that is none breaks off as any other.
func TestWatchThatFailed(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", watchPath)
		b.headers(1, false, ":status: 410")
		b.data(1, false, "part of a Stat")
		c.wantStatus(1, false, 410)
		c.wantData(1, false, "part of a Stat")
		b.conn.Close()
		c.wantRST(1, http2.ErrCodeInternal)
	})
}

// TestDrain: two GOAWAYs, no request lost, watches that end within the time given,
// and the end of the connection with its last request.
func TestDrain(t *testing.T) {
	run(t, setup{}, func(w *world) {
		const spread = 20 * time.Second
		c := w.client(nil).greet()
		b, watches := c.openWatches(w.apis[0], 20)
		other := w.client(nil).greet() // without a request
		long := c.ask(true, "GET", logPath)
		b.wantRequest(true, "GET", logPath)
		b.headers(long, false, ":status: 200")
		c.wantStatus(long, false, 200)

		begun := time.Now()
		w.relay.Drain(spread)
		c.wantGoAway(1<<31-1, http2.ErrCodeNo)
		other.wantGoAway(1<<31-1, http2.ErrCodeNo)
		id := c.ask(true, "GET", "/") // was on its way
		b.until("HEADERS 43")
		b.finish(43, c, id)
		time.Sleep(1500 * time.Millisecond)
		other.wantGoAway(0, http2.ErrCodeNo)
		other.wantEnd()
		if got := texts(c.all()); !strings.Contains(got, fmt.Sprintf("\n\tGOAWAY %d NO_ERROR", id)) {
			w.Errorf("client hears %s", got)
		}
		ignored := c.ask(true, "GET", "/")
		half := 0
		for range 30 {
			time.Sleep(time.Second)
			b.pong("alive?!?")
			c.pong("notasked")
			if time.Since(begun) < spread/2 {
				half = len(c.endOf(watches))
			}
		}
		if ended := c.endOf(watches); len(ended) != len(watches) {
			w.Errorf("%d watches of %d have ended: %v", len(ended), len(watches), ended)
		}
		if half < 2 || half > 18 {
			w.Errorf("%d watches of 20 ended in the first half of the time", half)
		}
		if c.ended() {
			w.Error("the connection ended before its last request")
		}
		b.data(long, true, "the end")
		c.until(fmt.Sprintf("DATA %d end=true", long))
		c.wantEnd()
		for _, e := range b.drain() {
			if e.typ == http2.FrameHeaders {
				w.Errorf("backend hears %s, for stream %d", e.text, ignored)
			}
		}

		// Who comes now is sent on at once, and served meanwhile.
		late := w.client(nil)
		late.raw([]byte(http2.ClientPreface))
		late.settings()
		late.until("GOAWAY 2147483647 NO_ERROR")
		id = late.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		late.until("SETTINGS ACK")
		b.finish(45, late, id)
		time.Sleep(2 * time.Second)
		late.wantGoAway(1, http2.ErrCodeNo)
		late.wantEnd()
	})
}

// all returns what has come, and leaves it there.
func (p *peer) all() []event {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.heard)
}

// endOf returns which of the streams have ended cleanly so far.
func (p *peer) endOf(ids []uint32) (ended []uint32) {
	for _, e := range p.all() {
		if slices.Contains(ids, e.id) && e.text == dataText(e.id, true, nil) {
			ended = append(ended, e.id)
		}
	}
	return ended
}

// TestIdleTimeout: a connection without a request ends in time, one with a request
// does not.
func TestIdleTimeout(t *testing.T) {
	run(t, setup{options: patientWithBackends}, func(w *world) {
		c, busy := w.client(nil).greet(), w.client(nil).greet()
		busy.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", watchPath)
		id := c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.finish(3, c, id)
		for range 17 {
			time.Sleep(10 * time.Second)
			c.pong("notasked")
			busy.pong("notasked")
		}
		c.wantNothing()
		for range 2 {
			time.Sleep(10 * time.Second)
			busy.pong("notasked")
		}
		c.wantGoAway(1<<31-1, http2.ErrCodeNo)
		c.wantGoAway(id, http2.ErrCodeNo)
		c.wantEnd()
		for _, e := range busy.drain() {
			w.Errorf("the other client hears %s", e.text)
		}
		busy.reset(1, http2.ErrCodeCancel)
	})
}

// TestReadHeaderTimeout: what begins and does not go on is ended.
func TestReadHeaderTimeout(t *testing.T) {
	for name, begin := range map[string]func(c *peer){
		"no preface":          func(*peer) {},
		"half a preface":      func(c *peer) { c.raw([]byte(http2.ClientPreface[:10])) },
		"no SETTINGS":         func(c *peer) { c.raw([]byte(http2.ClientPreface)) },
		"half a header block": func(c *peer) { c.hello(); c.frame(http2.FrameHeaders, 1, 1, "\x82") },
		"half a frame":        func(c *peer) { c.hello(); c.raw(frameOf(http2.FrameHeaders, 5, 1, "\x82\x87\x84")[:10]) },
		"a frame byte by byte": func(c *peer) {
			c.hello()
			for _, x := range frameOf(http2.FrameHeaders, 5, 1, strings.Repeat("x", 1000))[:9] {
				c.raw([]byte{x})
				time.Sleep(time.Second)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil)
				begun := time.Now()
				begin(c)
				c.drain()
				for c.silent() && time.Since(begun) < time.Minute {
					time.Sleep(250 * time.Millisecond)
				}
				if took := time.Since(begun); took < 9*time.Second || took > 11*time.Second {
					w.Errorf("it took %v", took)
				}
				c.wantGoAway(0, http2.ErrCodeProtocol)
				time.Sleep(2 * time.Second)
				c.wantEnd()
			})
		})
	}
	// A body may take its time.
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		frame := frameOf(http2.FrameData, 1, 1, "hello")
		c.raw(frame[:11])
		for range 20 {
			time.Sleep(time.Second)
			b.pong("notasked")
		}
		c.raw(frame[11:])
		b.until(`DATA 1 end=true "hello"`)
		b.finish(1, c, 1)
	})
}

// hello is what a client begins with.
func (p *peer) hello() {
	p.raw([]byte(http2.ClientPreface))
	p.settings()
}

// TestDialTimeout: a backend that cannot be reached costs no more than the timeout.
func TestDialTimeout(t *testing.T) {
	run(t, setup{backends: 2}, func(w *world) {
		w.prefer(0)
		w.net.Swallow(w.apis[0].b.Address, true)
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		c.data(1, true, "body")
		begun := time.Now()
		for c.silent() && time.Since(begun) < 2100*time.Millisecond {
			time.Sleep(100 * time.Millisecond)
		}
		b := w.apis[1].accepted()
		b.wantRequest(false, "POST", "/")
		b.wantData(1, true, "body")
		b.finish(1, c, 1)
		if v := fmt.Sprint(w.verdicts()); v != "[a dial_failed]" {
			w.Errorf("health heard %s", v)
		}
	})
}

// TestClientThatDoesNotClose: a connection that the relay ends is gone soon, whether
// the peer reads or not.
func TestClientThatDoesNotClose(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.setDeaf(deaf)
			c.window(0, 0)
			time.Sleep(2 * linger)
			synctest.Wait()
			for _, sh := range w.relay.shards {
				sh.mu.Lock()
				if n := len(sh.clients); n != 0 {
					w.Errorf("deaf=%v: %d clients", deaf, n)
				}
				sh.mu.Unlock()
			}
			c.setDeaf(false)
		})
	}
}
