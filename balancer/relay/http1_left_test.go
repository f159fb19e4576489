package relay

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
)

// TestHTTP1Left: what a reader has taken from a connection while its stream left gets no
// further: the stream may be somebody else's, or be waiting for another answer, by then.
func TestHTTP1Left(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(true, "GET", "/", badToken)
		w.apis[0].acceptedHTTP1().wantRequest("GET /")
		var conn *http1Conn
		var s *stream
		w.relay.each(func(sh *shard) {
			for _, p := range sh.pools {
				for _, conn = range p.http1 {
					s = conn.s
				}
			}
		})
		c.reset(id, http2.ErrCodeCancel)
		synctest.Wait()
		res := &http.Response{StatusCode: 200}
		if err := conn.headCame(s, res, true); !errors.Is(err, errLeft) {
			t.Errorf("the head of an answer: %v", err)
		}
		if err := conn.dataCame(s, []byte("x"), res, true); !errors.Is(err, errLeft) {
			t.Errorf("a piece of an answer: %v", err)
		}
		if n, err := conn.room(s); n != 0 || !errors.Is(err, errLeft) {
			t.Errorf("room for %d bytes: %v", n, err)
		}
	})
}

// TestHTTP1Buffered: a connection of which more has come than the answer carries no other
// request, whoever looks first.
func TestHTTP1Buffered(t *testing.T) {
	for _, rest := range []string{"", "x"} {
		c := &http1Conn{read: bufio.NewReader(strings.NewReader("." + rest))}
		if _, err := c.read.ReadByte(); err != nil {
			t.Fatal(err)
		}
		if c.wholeCame(false); c.spent || c.progress == answered {
			t.Error("the end of an answer that goes on")
		}
		if c.wholeCame(true); c.spent != (rest != "") || c.progress != answered {
			t.Errorf("with %q behind the answer: spent = %v", rest, c.spent)
		}
	}
}

// TestHTTP1CutWhenDialled: a connection that is of no use when its handshake ends is closed.
func TestHTTP1CutWhenDialled(t *testing.T) {
	var cut func(*backend.Backend)
	run(t, setup{backends: 2, options: func(o *Options) {
		opened := o.Opened
		o.Opened = func(b *backend.Backend, cr balancer.Credential, delta int64) {
			if opened(b, cr, delta); delta > 0 && cut != nil {
				f := cut
				cut = nil
				f(b)
			}
		}
	}}, func(w *world) {
		w.prefer(0)
		c := w.afterGoAway()
		cut = w.relay.Cut
		id := c.ask(true, "GET", "/", badToken)
		w.apis[0].acceptedHTTP1().wantEnd()
		b := w.apis[1].accepted()
		b.wantRequest(true, "GET", "/")
		b.finish(1, c, id)
	})
}

// TestHTTP1Slow: an answer may take its time.
func TestHTTP1Slow(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(true, "GET", "/", badToken)
		b := w.apis[0].acceptedHTTP1()
		b.wantRequest("GET /")
		b.say(unauthorized)
		c.wantUnauthorized(id)
		id = c.ask(true, "GET", "/1", badToken)
		b.wantRequest("GET /1")
		other := c.ask(true, "GET", "/2", badToken)
		b2 := w.apis[0].acceptedHTTP1()
		b2.wantRequest("GET /2")
		time.Sleep(2 * surplusAfter)
		b.say(unauthorized)
		c.wantUnauthorized(id)
		b2.say(unauthorized)
		c.wantUnauthorized(other)
	})
}

// TestHTTP1Credit: a client has its window back once its request has gone, answered or not.
func TestHTTP1Credit(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		const size = balancer.StrangerBodyBytes - 1
		var ids []uint32
		for sent := 0; sent < clientConnWindow/2; sent += size {
			id := c.ask(false, "POST", "/", badToken, fmt.Sprintf("content-length: %d", size))
			c.data(id, true, strings.Repeat("x", size))
			ids = append(ids, id)
		}
		c.wantWindowUpdate(0, uint32(len(ids))*size)
		for _, id := range ids {
			c.reset(id, http2.ErrCodeCancel)
		}
	})
}

// deafConn is a connection on which writing fails once broken is set.
type deafConn struct {
	net.Conn
	broken *atomic.Bool
}

func (c *deafConn) Write(p []byte) (int, error) {
	if c.broken.Load() {
		return 0, syscall.EPIPE
	}
	return c.Conn.Write(p)
}

// TestHTTP1WriteFails: a request that cannot be written goes elsewhere, also where the
// backend's own side still stands.
func TestHTTP1WriteFails(t *testing.T) {
	var broken atomic.Bool
	run(t, setup{backends: 2, options: wrapped(func(c net.Conn, address string) net.Conn {
		if strings.HasPrefix(address, "10.0.0.1:") {
			c = &deafConn{c, &broken}
		}
		return c
	})}, func(w *world) {
		w.prefer(0)
		c := w.afterGoAway()
		id := c.ask(true, "GET", "/", badToken)
		b := w.apis[0].acceptedHTTP1()
		b.wantRequest("GET /")
		b.say(unauthorized)
		c.wantUnauthorized(id)
		broken.Store(true)
		id = c.ask(true, "GET", "/", badToken)
		b.wantEnd()
		b2 := w.apis[1].accepted()
		b2.wantRequest(true, "GET", "/")
		b2.finish(1, c, id)
	})
}
