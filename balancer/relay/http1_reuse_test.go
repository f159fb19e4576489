package relay

import (
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// TestHTTP1Unasked: what comes before anything of a request has gone is not its answer. The
// request is sent again, whatever its method.
func TestHTTP1Unasked(t *testing.T) {
	for name, do := range map[string]func(b *http1Peer){
		"an answer": func(b *http1Peer) { b.say(unauthorized) },
		"a long answer": func(b *http1Peer) {
			b.say(strings.Replace(unauthorized, "3\r\n\r\nbad", "5000\r\n\r\n"+strings.Repeat("x", 5000), 1))
		},
		"the beginning of one": func(b *http1Peer) {
			b.say("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhe")
		},
		"the end": func(b *http1Peer) { b.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.afterGoAway()
				c.settings(initialWindow(0)) // an answer would wait here
				c.wantSettingsAck()
				id := c.ask(false, "POST", "/", badToken, "content-length: 5")
				b := w.apis[0].acceptedHTTP1()
				do(b)
				b.wantEnd()
				b = w.apis[0].acceptedHTTP1()
				c.data(id, true, "hello")
				if heard := b.soFar(); !strings.HasSuffix(heard, "\r\n\r\nhello") {
					w.Errorf("the backend hears %q", heard)
				}
				b.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				c.wantStatus(id, true, 200)
				if v := w.verdicts(); len(v) != 0 {
					w.Errorf("health heard %q", v)
				}
			})
		})
	}
}

// TestHTTP1Handshakes: a client that takes its requests back makes no more handshakes with
// a backend than connections of HTTP/2 would cost it.
func TestHTTP1Handshakes(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		for range 400 {
			id := c.ask(true, "GET", "/", badToken)
			synctest.Wait()
			c.reset(id, http2.ErrCodeCancel)
			synctest.Wait()
		}
		w.apis[0].mu.Lock()
		n := len(w.apis[0].http1)
		w.apis[0].mu.Unlock()
		if n > maxHTTP1Conns {
			w.Errorf("%d handshakes at once, want %d at most", n, maxHTTP1Conns)
		}
	})
}

// TestHTTP1NeverRead: a connection whose request the backend has answered and does not read
// ends in the end.
func TestHTTP1NeverRead(t *testing.T) {
	var last *gatedConn // that was dialled
	run(t, setup{options: gated(&last)}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(false, "POST", "/", badToken, "content-length: 5")
		b := w.apis[0].acceptedHTTP1()
		open := last.shut()
		defer open()
		c.data(id, true, "hello")
		synctest.Wait()
		b.say(unauthorized)
		c.wantUnauthorized(id)
		time.Sleep(surplusAfter + 2*tickEvery)
		b.wantEnd()
	})
}

// closeConn tells when it is closed.
type closeConn struct {
	net.Conn
	closing func()
}

func (c *closeConn) Close() error {
	c.closing()
	return c.Conn.Close()
}

// TestHTTP1Close: no system call is made under a shard's lock.
func TestHTTP1Close(t *testing.T) {
	var locked atomic.Bool
	var sh atomic.Pointer[shard]
	run(t, setup{options: wrapped(func(c net.Conn, _ string) net.Conn {
		return &closeConn{c, func() {
			for range 1000 {
				if mu := &sh.Load().mu; mu.TryLock() {
					mu.Unlock()
					return
				}
				runtime.Gosched()
			}
			locked.Store(true)
		}}
	})}, func(w *world) {
		sh.Store(w.relay.shards[0])
		c := w.afterGoAway()
		id := c.ask(true, "GET", "/", badToken)
		b := w.apis[0].acceptedHTTP1()
		b.wantRequest("GET /")
		c.reset(id, http2.ErrCodeCancel)
		b.wantEnd()
		if locked.Load() {
			w.Error("a connection is closed under the lock")
		}
	})
}

// TestHTTP1Retired: a connection that was being dialled, or waited for a body, when
// certificates changed carries nothing.
func TestHTTP1Retired(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		open := w.net.Gate(w.apis[0].b.Address)
		id := c.ask(false, "POST", "/", badToken, "content-length: 5")
		synctest.Wait()
		w.relay.Retire()
		open()
		w.apis[0].acceptedHTTP1().wantEnd()
		b := w.apis[0].acceptedHTTP1()
		w.relay.Retire()
		c.data(id, true, "hello")
		b.wantEnd()
		b = w.apis[0].acceptedHTTP1()
		synctest.Wait()
		b.say(unauthorized)
		c.wantUnauthorized(id)
	})
}
