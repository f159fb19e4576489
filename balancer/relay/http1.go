package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"apiserver-lb/balancer"
)

// http1Conn is a connection to a backend over HTTP/1.1, for one request at a time of those
// who have not shown who they are. kube-apiserver ends a connection of HTTP/2 with each
// request of theirs that it answers 401; this one goes on, which saves both sides a
// handshake for each. See pool.endsWithEach for when it is used.
type http1Conn struct {
	// Static after construction.
	pool     *pool
	cancel   context.CancelFunc // of the dial
	done     chan struct{}      // closed with over
	moreBody chan struct{}      // told when more of the request body has come
	moreRoom chan struct{}      // told when more of the answer may come

	// Static after the dial.
	tls *tls.Conn

	// Owned by the reader.
	in   io.LimitedReader // what comes on tls; the limit is for heads
	read *bufio.Reader

	// Guarded by sh.mu.
	s        *stream // whose request it carries; nil: nobody's
	writing  bool    // the last request has not been written
	progress progress
	spent    bool // no other request follows
	over     bool
	idleAt   time.Time // when the last request ended
}

// progress is how far the last request of a connection has come.
type progress uint8

const (
	unsent   progress = iota // nothing of it has gone to the backend
	sent                     // it is being written, or has been
	answered                 // all of its answer has come
)

var errUnasked = errors.New("the kube-apiserver says what it was not asked for")

// carryHTTP1 sends the request on an idle connection, or on one that it dials; false:
// there are as many as there may be, or they have been dialled too often of late.
func (p *pool) carryHTTP1(s *stream) bool {
	var c *http1Conn
	switch i := slices.IndexFunc(p.http1, (*http1Conn).idle); {
	case p.sh.closed:
		return false
	case i >= 0:
		c = p.http1[i]
	case len(p.http1) < maxHTTP1Conns && p.dials.Spend(1, http1Dials, p.sh.now):
		c = &http1Conn{pool: p, done: make(chan struct{}), moreBody: make(chan struct{}, 1), moreRoom: make(chan struct{}, 1)}
		p.http1 = append(p.http1, c)
	default:
		return false
	}
	c.s, c.writing, c.progress = s, true, unsent
	s.via, s.bid = c, 0
	s.down.receivable = backendWindow
	if c.tls != nil {
		go c.send(s)
		return true
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go c.connect(ctx, s)
	return true
}

// idle reports whether the connection, which is one of its pool's, takes a request: an
// answer may come before the last one has been written.
func (c *http1Conn) idle() bool { return c.s == nil && !c.writing }

// maxHTTP1Conns is how many connections of HTTP/1.1 a pool has at most.
const maxHTTP1Conns = 32

// http1Dials bounds how often they are dialled: each once a second, on the average. A request
// that is taken back costs a connection, and must not cost the backend a handshake each time.
var http1Dials = balancer.Refill{Burst: maxHTTP1Conns, Rate: maxHTTP1Conns}

// connect dials, sends the first request, and reads what comes on the connection.
func (c *http1Conn) connect(ctx context.Context, s *stream) {
	defer c.cancel()
	sh := c.pool.sh
	t, err := sh.r.dialTLS(ctx, c.pool.backend, c.pool.credential, "http/1.1")
	sh.lock()
	if err != nil {
		c.end(err)
		sh.unlockAndFlush()
		return
	}
	c.tls = t
	c.in = io.LimitedReader{R: t}
	c.read = bufio.NewReaderSize(&c.in, smallBuffer)
	over := c.over
	sh.unlockAndFlush()
	if over {
		sh.r.hangUp(c.pool.backend, c.pool.credential, t)
		return
	}
	go c.send(s)
	err = c.readAll()
	sh.lock()
	c.lost(err)
	sh.unlockAndFlush()
	sh.r.hangUp(c.pool.backend, c.pool.credential, t)
}

// send writes a request once all of it is here.
func (c *http1Conn) send(s *stream) {
	out := c.request(s)
	if out == nil {
		return
	}
	if _, err := c.tls.Write(out); err != nil {
		c.tls.NetConn().Close() // its reader finds out, and knows whether an answer has come
		return
	}
	sh := c.pool.sh
	sh.lock()
	if c.writing = false; c.s == nil {
		c.rest()
	}
	sh.unlockAndFlush()
}

// request returns the whole request; nil: the stream has left. One whose body does not come
// soon goes over HTTP/2 instead.
func (c *http1Conn) request(s *stream) []byte {
	sh := c.pool.sh
	var late <-chan time.Time
	for wait := true; ; {
		sh.lock()
		switch {
		case c.s != s:
			sh.mu.Unlock()
			return nil
		case c.spent: // certificates have changed meanwhile
			c.pool.carry(c.release())
			sh.unlockAndFlush()
			return nil
		case s.up.end:
			out := appendHTTP1(nil, s.ask.head, c.pool.backend.Address, s.declared())
			out = append(out, s.up.buf.take()...)
			s.up.ended, c.progress = true, sent
			s.sentUp()
			sh.unlockAndFlush()
			return out
		case !wait:
			c.pool.carryHTTP2(c.release())
			sh.unlockAndFlush()
			return nil
		}
		sh.mu.Unlock()
		if late == nil {
			late = time.After(balancer.StrangerBodyWait)
		}
		select {
		case <-c.moreBody:
		case <-late:
			wait = false
		case <-c.done:
			return nil
		}
	}
}

// release takes the stream off a connection to which nothing of its request has gone.
func (c *http1Conn) release() *stream {
	s := c.s
	c.s, s.via, c.writing = nil, nil, false
	c.rest()
	return s
}

// readAll reads answers until the connection ends, and returns why.
func (c *http1Conn) readAll() error {
	sh := c.pool.sh
	for {
		c.in.N = maxAnswerHead
		if _, err := c.read.Peek(1); err != nil {
			return err
		}
		sh.lock()
		s, method := c.s, ""
		asked := s != nil && c.progress == sent
		if asked {
			method = s.ask.method
		}
		sh.mu.Unlock()
		if !asked {
			return errUnasked
		}
		if err := c.readAnswer(s, method); err != nil {
			return err
		}
	}
}

// maxInterim is how many answers that are not final may come before the one that is.
const maxInterim = 10

// readAnswer reads the answer to the request of a stream and gives it to that.
func (c *http1Conn) readAnswer(s *stream, method string) error {
	var res *http.Response
	var whole bool
	for n := 0; res == nil || res.StatusCode < 200; n++ {
		if n > maxInterim {
			return errUnasked
		}
		var err error
		if res, err = http.ReadResponse(c.read, &http.Request{Method: method}); err != nil { //nolint:bodyclose // it is read to its end, or the connection is ended
			return fmt.Errorf("the head of the answer: %w", err)
		}
		whole = res.Body == http.NoBody
		if err := c.headCame(s, res, whole); err != nil {
			return err
		}
	}
	if whole {
		return nil
	}
	return c.readBody(s, res)
}

// readBody reads the body of an answer and gives it to the stream, as that has room.
func (c *http1Conn) readBody(s *stream, res *http.Response) error {
	c.in.N = 1 << 62
	buf := buffers.get(smallBuffer)
	defer buffers.put(buf)
	for {
		room, err := c.room(s)
		if err != nil {
			return err
		}
		n, err := res.Body.Read(buf[:min(cap(buf), room)])
		whole := errors.Is(err, io.EOF)
		if err != nil && !whole {
			return fmt.Errorf("the body of the answer: %w", err)
		}
		if err := c.dataCame(s, buf[:n], res, whole); err != nil || whole {
			return err
		}
	}
}

// headCame gives the head of an answer to the stream; whole: it has no body.
func (c *http1Conn) headCame(s *stream, res *http.Response, whole bool) error {
	sh := c.pool.sh
	sh.lock()
	defer sh.unlockAndFlush()
	if c.s != s {
		return errLeft
	}
	c.pool.backend.Answered(sh.now)
	fields := appendAnswer(sh.fields[:0], res)
	if len(fields) > maxFields {
		return errors.New("the head of the answer is too large")
	}
	sh.fields = fields
	h, problem := parseAnswer(sh.fields)
	if problem != "" {
		return errors.New("the head of the answer has " + problem)
	}
	if h.code < 200 {
		s.interim(&h)
		return nil
	}
	c.spent = c.spent || res.Close
	c.wholeCame(whole)
	s.answerCame(&h, whole)
	return nil
}

// errLeft says that the stream has left the connection, which is then of no use.
var errLeft = errors.New("the request has been given up")

// room returns how many bytes of the answer may come, and waits until there are some.
func (c *http1Conn) room(s *stream) (int, error) {
	for {
		c.pool.sh.lock()
		left, n := c.s != s, int(s.down.receivable)
		c.pool.sh.mu.Unlock()
		switch {
		case left:
			return 0, errLeft
		case n > 0:
			return n, nil
		}
		select {
		case <-c.moreRoom:
		case <-c.done:
			return 0, errLeft
		}
	}
}

// dataCame gives a piece of the answer to the stream, and its end.
func (c *http1Conn) dataCame(s *stream, p []byte, res *http.Response, whole bool) error {
	sh := c.pool.sh
	sh.lock()
	defer sh.unlockAndFlush()
	if c.s != s {
		return errLeft
	}
	c.pool.backend.Answered(sh.now)
	c.wholeCame(whole)
	s.down.receivable -= int32(len(p))
	trailers := whole && len(res.Trailer) > 0
	s.dataCame(p, whole && !trailers)
	if trailers && c.s == s {
		sh.fields = appendHeader(sh.fields[:0], res.Trailer)
		if problem := badTrailers(sh.fields); problem != "" {
			return errors.New(problem)
		}
		s.trailersCame(sh.fields)
	}
	s.leaveIfWhole(c)
	return nil
}

// wholeCame notes whether all of the answer has come. What follows it was not asked for.
func (c *http1Conn) wholeCame(whole bool) {
	if whole {
		c.progress = answered
		c.spent = c.spent || c.read.Buffered() > 0
	}
}

func (c *http1Conn) resume(*stream) { tell(c.moreBody) }

func (c *http1Conn) grant(*stream, int) { tell(c.moreRoom) }

func tell(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it has been told and has not looked yet
	}
}

// leave makes the connection idle, where request and answer are whole, and ends it
// otherwise: HTTP/1.1 has no other way to give a request up.
func (c *http1Conn) leave(_ *stream, how code) {
	c.s = nil
	if how != codeNone || c.progress != answered {
		c.end(errLeft)
		return
	}
	c.rest()
}

// rest is what follows when the connection may have become idle.
func (c *http1Conn) rest() {
	c.idleAt = c.pool.sh.now
	if c.spent && c.idle() {
		c.end(errLeft)
	}
}

// retire takes the connection out of use for other requests than the one that it carries.
func (c *http1Conn) retire() {
	if c.spent = true; c.s == nil {
		c.end(errLeft)
	}
}

// lost is the end of a connection that others than its stream have ended.
func (c *http1Conn) lost(err error) {
	if !c.over && !expected(err) {
		c.pool.ended(err)
	}
	c.end(err)
}

// end takes the connection out of use, once, and tells its stream. Its reader finds out, and
// closes it.
func (c *http1Conn) end(err error) {
	if c.over {
		return
	}
	c.over = true
	close(c.done)
	c.cancel()
	p := c.pool
	p.http1 = slices.DeleteFunc(p.http1, func(other *http1Conn) bool { return other == c })
	if c.tls != nil {
		p.sh.doomed = append(p.sh.doomed, c.tls.NetConn().(*Sock))
	}
	if c.s == nil {
		return
	}
	e := p.loss()
	switch {
	case c.tls == nil:
		e = balancer.DialFailed
	case c.progress == unsent:
		e = balancer.Refused
	}
	c.s.lost(e, err)
}

// idleTooLong reports whether the connection has had no request for a while. It is ended
// long before kube-apiserver would: what is sent at that moment is lost. One whose last
// request the backend has answered and does not read ends as well.
func (c *http1Conn) idleTooLong(now time.Time) bool {
	return c.s == nil && now.Sub(c.idleAt) >= surplusAfter
}
