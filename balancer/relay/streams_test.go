package relay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

const token = "authorization: Bearer good"

// two opens two requests of one client, and returns both ends.
func (w *world) two(path string) (c, b *peer) {
	w.Helper()
	c = w.client(nil).greet()
	c.ask(true, "GET", path)
	b = w.apis[0].accepted()
	c.ask(true, "GET", path)
	b.wantRequest(true, "GET", path)
	b.wantRequest(true, "GET", path)
	return c, b
}

// finish answers a request and checks that the client gets it.
func (p *peer) finish(bid uint32, c *peer, id uint32) {
	p.w.Helper()
	p.headers(bid, true, ":status: 200")
	c.wantHeaders(id, true, ":status: 200")
}

// TestClientReset: a request that is taken back is taken back at the backend at once,
// whatever has been done of it.
func TestClientReset(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted(initialWindow(0))
		b.wantRequest(false, "POST", "/")
		c.data(1, false, "waits")
		c.reset(1, http2.ErrCodeCancel)
		b.wantRST(1, http2.ErrCodeCancel)

		c.ask(true, "GET", watchPath)
		b.wantRequest(true, "GET", watchPath)
		b.headers(3, false, ":status: 200")
		b.data(3, false, "event")
		c.wantStatus(3, false, 200)
		c.wantData(3, false, "event")
		c.reset(3, http2.ErrCodeCancel)
		b.wantRST(3, http2.ErrCodeCancel)
		// What was on its way is ignored, its head is decoded all the same.
		b.data(3, false, "late")
		b.headers(3, true, "x-late: 1")

		// A short answer that is held.
		c.ask(true, "GET", "/api/v1/pods")
		b.wantRequest(true, "GET", "/api/v1/pods")
		b.headers(5, false, ":status: 200", "content-type: application/json")
		b.data(5, false, "half")
		c.wantNothing()
		c.reset(5, http2.ErrCodeCancel)
		b.wantRST(5, http2.ErrCodeCancel)

		id := c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.headers(7, true, ":status: 200", "x-late: 1")
		c.wantHeaders(id, true, ":status: 200", "x-late: 1")
		c.wantNothing()
		b.wantNothing()
	})
}

// TestClientCloses: when the connection of a client ends, so do its requests.
func TestClientCloses(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two(watchPath)
		other := w.client(nil).greet()
		other.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		c.conn.Close()
		synctest.Wait()
		var got []string
		for _, e := range b.drain() {
			got = append(got, e.text)
		}
		slices.Sort(got)
		if !slices.Equal(got, []string{"RST_STREAM 1 CANCEL", "RST_STREAM 3 CANCEL"}) {
			w.Errorf("backend hears %q", got)
		}
		b.finish(5, other, 1)
	})
}

// TestEarlyAnswer: an answer that does not wait for the end of the body.
func TestEarlyAnswer(t *testing.T) {
	for _, again := range []bool{false, true} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(false, "POST", "/")
			b := w.apis[0].accepted()
			b.wantRequest(false, "POST", "/")
			c.data(1, false, "a part")
			b.wantData(1, false, "a part")
			b.headers(1, true, ":status: 413")
			if again { // as RFC 9113, section 8.1, has it
				b.reset(1, http2.ErrCodeNo)
			}
			c.wantStatus(1, true, 413)
			c.wantRST(1, http2.ErrCodeNo)
			b.wantRST(1, http2.ErrCodeCancel)
			c.data(1, false, "was on its way")
			c.data(1, true, "")
			id := c.ask(true, "GET", "/")
			b.wantRequest(true, "GET", "/")
			b.finish(3, c, id)
			c.wantNothing()
		})
	}
}

// TestEarlyAnswerBody: such an answer with a body, part of which waits for the
// client.
func TestEarlyAnswerBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(initialWindow(3))
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted(initialWindow(0))
		b.wantRequest(false, "POST", "/")
		c.data(1, false, "waits for ever")
		b.headers(1, false, ":status: 413")
		c.wantStatus(1, false, 413)
		b.data(1, true, "too large")
		c.wantData(1, false, "too")
		b.reset(1, http2.ErrCodeNo)
		c.wantNothing()
		c.window(1, 100)
		c.wantData(1, true, " large")
		c.wantRST(1, http2.ErrCodeNo)
	})
}

// TestHalfClosed: what comes on a stream after its end.
func TestHalfClosed(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two("/")
		c.data(1, false, "more")
		c.wantRST(1, http2.ErrCodeStreamClosed)
		b.wantRST(1, http2.ErrCodeCancel)
		c.headers(3, true, "x-trailer: 1")
		c.wantRST(3, http2.ErrCodeStreamClosed)
		b.wantRST(3, http2.ErrCodeCancel)

		id := c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.finish(5, c, id)
		c.window(id, 100) // may have been on its way
		c.reset(id, http2.ErrCodeCancel)
		c.wantNothing()
		c.data(id, true, "x")
		c.wantRST(id, http2.ErrCodeStreamClosed)
		id = c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.finish(7, c, id)
		c.headers(id, true, head("GET", "/")...)
		c.wantGoAway(id, http2.ErrCodeStreamClosed)
		c.wantEnd()
	})
}

// TestTrailersOfRequest end the body and stay behind.
func TestTrailersOfRequest(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/", "trailer: x-remote-user")
		b := w.apis[0].accepted()
		if e := b.wantRequest(false, "POST", "/"); e.get("trailer") != "" {
			w.Errorf("trailers are announced: %s", e.text)
		}
		c.data(1, false, "body")
		b.wantData(1, false, "body")
		c.headers(1, true, "x-remote-user: admin", "x-other: 1")
		b.wantData(1, true, "")
		b.finish(1, c, 1)
	})
}

// TestGoAway: what the backend has not processed goes on on another connection, the
// rest ends where it is.
func TestGoAway(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two(logPath)
		b.headers(1, false, ":status: 200")
		c.wantStatus(1, false, 200)
		b.goAway(1, http2.ErrCodeNo)
		time.Sleep(redialAfter)
		b2 := w.apis[0].accepted()
		b2.wantRequest(true, "GET", logPath)
		b2.finish(1, c, 3)
		b.data(1, false, "goes on")
		c.wantData(1, false, "goes on")
		id := c.ask(true, "GET", logPath)
		b2.wantRequest(true, "GET", logPath)
		b2.finish(3, c, id)
		b.data(1, true, "")
		c.wantData(1, true, "")
		b.wantEnd()
		c.wantNothing()
		if v := w.verdicts(); len(v) != 0 {
			w.Errorf("health heard %q", v)
		}
	})
}

// TestGoAwayTwice: a graceful end in two steps, as net/http's server does it.
func TestGoAwayTwice(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two(logPath)
		b.goAway(1<<31-1, http2.ErrCodeNo)
		b.wantNothing()
		b.goAway(1, http2.ErrCodeNo)
		time.Sleep(redialAfter)
		b2 := w.apis[0].accepted()
		b2.wantRequest(true, "GET", logPath)
		b2.finish(1, c, 3)
		b.finish(1, c, 1)
		b.wantEnd()
	})
}

// TestGoAwayBeforeBody: a body that has been sent in part is sent again from its
// beginning.
func TestGoAwayBeforeBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		c.data(1, false, "first,")
		b.wantData(1, false, "first,")
		b.goAway(0, http2.ErrCodeNo)
		b.wantEnd()
		time.Sleep(redialAfter)
		b2 := w.apis[0].accepted()
		b2.wantRequest(false, "POST", "/")
		b2.wantData(1, false, "first,")
		c.data(1, true, "second")
		b2.wantData(1, true, "second")
		b2.finish(1, c, 1)
	})
}

// TestRefusedStream: a refusal costs nobody anything, until it is one too many.
func TestRefusedStream(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		c.data(1, true, "body")
		b := w.apis[0].accepted()
		for id := uint32(1); id <= 7*2; id += 2 {
			b.wantRequest(false, "POST", "/")
			b.wantData(id, true, "body")
			b.reset(id, http2.ErrCodeRefusedStream)
		}
		e := c.wantStatus(1, false, 503)
		if e.get("retry-after") != "1" {
			w.Errorf("answer = %s", e.text)
		}
		c.drain()
		b.wantNothing()
		if diff := w.metric("apiserver_lb.retries"); diff["backend=a reason=refused"] != 6 {
			w.Errorf("retries = %v", diff)
		}
	})
}

// TestStreamLimit: beyond the backend's limit there is another connection.
func TestStreamLimit(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", "/")
		b := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
		b.wantRequest(true, "GET", "/")
		c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		w.apis[0].wantNoConn()
		c.ask(true, "GET", "/")
		b.wantNothing()
		b2 := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
		b2.wantRequest(true, "GET", "/")

		// Whatever has room first takes the next.
		open := w.net.Gate(w.apis[0].b.Address)
		c.ask(true, "GET", "/")
		b.wantNothing()
		b.finish(1, c, 1)
		b.wantRequest(true, "GET", "/")
		c.ask(true, "GET", "/")
		b.settings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 3})
		if got := texts(b.drain()); !strings.Contains(got, "HEADERS 7") {
			w.Errorf("backend hears %s", got)
		}
		open()
		for _, id := range []uint32{3, 5, 7} {
			b.headers(id, true, ":status: 200")
		}
		b2.headers(1, true, ":status: 200")
		if n := len(c.drain()); n != 4 {
			w.Errorf("%d answers", n)
		}
	})
}

// TestHeaderTableSize: a peer that wants no compression table gets none.
func TestHeaderTableSize(t *testing.T) {
	none := http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(none)
		c.dec.SetAllowedMaxDynamicTableSize(0)
		c.enc.SetMaxDynamicTableSize(0)
		c.ask(true, "GET", "/", "x-a: b")
		b := w.apis[0].accepted(none)
		b.wantRequest(true, "GET", "/")
		b.dec.SetAllowedMaxDynamicTableSize(0)
		b.enc.SetMaxDynamicTableSize(0)
		b.headers(1, true, ":status: 200", "x-a: b")
		c.wantHeaders(1, true, ":status: 200", "x-a: b")
		for id := uint32(3); id < 10; id += 2 {
			c.ask(true, "GET", "/", "x-a: b")
			if e := b.wantRequest(true, "GET", "/"); e.get("x-a") != "b" {
				w.Errorf("request = %s", e.text)
			}
			b.headers(id, true, ":status: 200", "x-a: b")
			c.wantHeaders(id, true, ":status: 200", "x-a: b")
		}
		// And one again, when it changes its mind.
		more := http2.Setting{ID: http2.SettingHeaderTableSize, Val: 1 << 20}
		c.settings(more)
		b.settings(more)
		c.wantSettingsAck()
		b.wantSettingsAck()
		c.dec.SetAllowedMaxDynamicTableSize(4096)
		b.dec.SetAllowedMaxDynamicTableSize(4096)
		for id := uint32(11); id < 20; id += 2 {
			c.ask(true, "GET", "/", "x-a: b")
			b.wantRequest(true, "GET", "/")
			b.headers(id, true, ":status: 200", "x-a: b")
			c.wantHeaders(id, true, ":status: 200", "x-a: b")
		}
	})
}

// TestMaxHeaderList: a backend's limit on header lists is kept, what is beyond it is
// refused here.
func TestMaxHeaderList(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", "/")
		b := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1000})
		b.wantRequest(true, "GET", "/")
		b.finish(1, c, 1)
		id := c.ask(true, "GET", "/", "x-long: "+strings.Repeat("x", 1000))
		c.wantStatus(id, false, 431)
		c.drain()
		b.wantNothing()
		id = c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.finish(3, c, id)
	})
}

// TestHeaderTooLarge: a header list beyond http.maxHeaderBytes is answered, one far
// beyond it ends the connection.
func TestHeaderTooLarge(t *testing.T) {
	run(t, setup{options: func(o *Options) { o.MaxHeaderBytes = 10_000 }}, func(w *world) {
		c := w.client(nil)
		c.raw([]byte(http2.ClientPreface))
		c.settings()
		c.drain()
		id := c.ask(true, "GET", "/", "x-long: "+strings.Repeat("x", 9900))
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		b.finish(1, c, id)
		id = c.ask(true, "GET", "/", "x-long: "+strings.Repeat("x", 10_400))
		c.wantStatus(id, false, 431)
		c.drain()
		id = c.ask(true, "GET", "/", "x-a: "+strings.Repeat("~", 8000), "x-b: "+strings.Repeat("x", 8000), "x-c: "+strings.Repeat("x", 8000))
		c.wantGoAway(id-2, http2.ErrCodeEnhanceYourCalm)
		c.wantEnd()
	})
}

// TestNeverIndexed: what is a secret or says who somebody is stays out of the
// compression table, which a backend's connection shares between clients.
func TestNeverIndexed(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(w.pki.Alice).greet()
		c.ask(true, "GET", "/", "authorization: Bearer x", "impersonate-user: u", "cookie: c", "x-plain: p")
		b := w.apis[0].accepted()
		e := b.wantRequest(true, "GET", "/")
		if e.get("x-remote-user") != "alice" || e.get("authorization") != "" {
			w.Errorf("request = %s", e.text)
		}
		b.finish(1, c, 1)
		other := w.client(nil).greet()
		other.ask(true, "GET", "/", token)
		b2 := w.apis[0].accepted()
		b2.wantRequest(true, "GET", "/")
		b2.finish(1, other, 1)
		for _, name := range []string{"x-remote-user", "x-remote-group", "impersonate-user", "cookie"} {
			if !b.unsafe[name] {
				w.Errorf("%s may be indexed", name)
			}
		}
		if !b2.unsafe["authorization"] {
			w.Error("authorization may be indexed")
		}
		if b.unsafe["x-plain"] {
			w.Error("x-plain may not be indexed")
		}
	})
}

// TestPools: requests of different credentials never share a connection.
func TestPools(t *testing.T) {
	run(t, setup{}, func(w *world) {
		alice, bob, nobody := w.client(w.pki.Alice).greet(), w.client(w.pki.Bob).greet(), w.client(nil).greet()
		alice.ask(true, "GET", "/")
		asserted := w.apis[0].accepted()
		bob.ask(true, "GET", "/")
		nobody.ask(true, "GET", "/")
		anonymous := w.apis[0].accepted()
		nobody.ask(true, "GET", "/", token)
		unproven := w.apis[0].accepted()
		unproven.wantRequest(true, "GET", "/")
		unproven.finish(1, nobody, 3)
		nobody.ask(true, "GET", "/", token)
		proven := w.apis[0].accepted()
		proven.wantRequest(true, "GET", "/")
		for _, user := range []string{"alice", "bob"} {
			if e := asserted.wantRequest(true, "GET", "/"); e.get("x-remote-user") != user {
				w.Errorf("%s is %q", user, e.get("x-remote-user"))
			}
		}
		anonymous.wantRequest(true, "GET", "/")
		for i, p := range []*peer{asserted, anonymous, unproven, proven} {
			certs := p.conn.ConnectionState().PeerCertificates
			if (len(certs) > 0) != (i == 0) {
				w.Errorf("connection %d bears %d certificates", i, len(certs))
			}
		}
		asserted.finish(1, alice, 1)
		asserted.finish(3, bob, 1)
		anonymous.finish(1, nobody, 1)
		proven.finish(1, nobody, 5)
		for _, p := range []*peer{asserted, anonymous, unproven, proven} {
			p.wantNothing()
		}
	})
}

// TestRetire: connections are replaced when certificates change; what is in flight
// ends on them.
func TestRetire(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c, b := w.two("/")
		w.relay.Retire()
		id := c.ask(true, "GET", "/")
		b2 := w.apis[0].accepted()
		b2.wantRequest(true, "GET", "/")
		b.finish(1, c, 1)
		b.finish(3, c, 3)
		b.wantEnd()
		b2.finish(1, c, id)
	})
}

// TestCut: connections to a dead backend end at once, and so do dials.
func TestCut(t *testing.T) {
	run(t, setup{backends: 2}, func(w *world) {
		w.prefer(0)
		c, b := w.two("/")
		open := w.net.Gate(w.apis[0].b.Address)
		defer open()
		other := w.client(nil).greet()
		other.ask(true, "GET", "/", token) // waits for a connection
		synctest.Wait()
		w.relay.Cut(w.apis[0].b)
		b.wantEnd()
		first, second := w.apis[1].accepted(), w.apis[1].accepted()
		for range 2 {
			first.drain()
			second.drain()
		}
		for _, p := range []*peer{first, second} {
			p.headers(1, true, ":status: 200")
		}
		synctest.Wait()
		for _, p := range []*peer{first, second} {
			p.headers(3, true, ":status: 200") // one of them has only one
		}
		n := len(c.drain()) + len(other.drain())
		if n < 2 {
			w.Errorf("%d answers", n)
		}
	})
}

// TestShutdownAnswer: the answer of a kube-apiserver that shuts down is not passed on
// while there is another.
func TestShutdownAnswer(t *testing.T) {
	const says = "The apiserver is shutting down, please try again later.\n"
	run(t, setup{backends: 2}, func(w *world) {
		w.prefer(0)
		c := w.client(nil).greet()
		c.ask(false, "POST", "/")
		b := w.apis[0].accepted()
		b.wantRequest(false, "POST", "/")
		c.data(1, false, "first,")
		b.wantData(1, false, "first,")
		b.headers(1, false, ":status: 429", "retry-after: 5")
		b.data(1, false, says[:10])
		c.wantNothing()
		b.data(1, true, says[10:])
		b.wantRST(1, http2.ErrCodeCancel)
		b2 := w.apis[1].accepted()
		b2.wantRequest(false, "POST", "/")
		b2.wantData(1, false, "first,")
		c.data(1, true, "second")
		b2.wantData(1, true, "second")
		// From the last one it is passed on.
		b2.headers(1, false, ":status: 429", "retry-after: 5")
		b2.data(1, true, says)
		c.wantHeaders(1, false, ":status: 429", "retry-after: 5")
		c.wantData(1, true, says)
		if v := fmt.Sprint(w.verdicts()); v != "[a shutdown_announced b shutdown_announced]" {
			w.Errorf("health heard %s", v)
		}
	})
}

// TestPeekIsBounded: what only begins like a shutdown goes on to the client.
func TestPeekIsBounded(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", watchPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", watchPath)
		b.headers(1, false, ":status: 503", "retry-after: 5")
		text := strings.Repeat("x", balancer.ShutdownBodyBytes)
		b.data(1, false, text[1:])
		c.wantNothing()
		b.data(1, false, "y")
		c.wantHeaders(1, false, ":status: 503", "retry-after: 5")
		if n := total(c.drain())[1]; n != balancer.ShutdownBodyBytes {
			w.Errorf("%d bytes", n)
		}
		b.headers(1, true, "x-trailer: 1")
		c.wantHeaders(1, true, "x-trailer: 1")
	})
}

// TestTrailersOfHeldAnswer come after its body.
func TestTrailersOfHeldAnswer(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", "/api/v1/pods")
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/api/v1/pods")
		b.headers(1, false, ":status: 200", "content-type: application/json")
		b.data(1, false, "{}")
		c.wantNothing()
		b.headers(1, true, "x-trailer: 1")
		c.wantHeaders(1, false, ":status: 200", "content-type: application/json")
		c.wantData(1, false, "{}")
		c.wantHeaders(1, true, "x-trailer: 1")
		// And without a body.
		id := c.ask(true, "GET", "/api/v1/pods")
		b.wantRequest(true, "GET", "/api/v1/pods")
		b.headers(3, false, ":status: 200", "content-type: application/json")
		b.headers(3, true, "x-trailer: 1")
		c.wantHeaders(id, false, ":status: 200", "content-type: application/json")
		c.wantHeaders(id, true, "x-trailer: 1")
	})
}
