package relay

import (
	"crypto/tls"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/relay/hpack"
)

// outLimit is how many bytes of frames wait for a connection before DATA is left
// in its stream, so that a slow reader stops its own streams and nobody else's.
// They fit into a buffer that is lent (largeBuffer), with what TLS adds.
const outLimit = 4 * 16384

// leg is what is different between the two sides: a connection of a client, or one
// to a backend. All but prepare run under the shard's lock.
type leg interface {
	// prepare is called before the shard's lock is taken for what has come.
	prepare()
	// headers gets a decoded header block in sh.fields.
	headers(id uint32, end bool) error
	// data gets a DATA frame's payload; size is what it counts in flow control.
	data(id uint32, p []byte, size int, end bool) error
	reset(id uint32, c code) error
	// streamWindow gets a WINDOW_UPDATE for a stream.
	streamWindow(id, increment uint32) error
	goAway(last uint32, c code)
	// windowChanged gets a change of the initial window by the peer.
	windowChanged(delta int64) error
	// lastID returns the last stream of the peer's that has been seen, for GOAWAY.
	lastID() uint32
	// idle reports whether the id is of a stream that nobody has opened yet.
	idle(id uint32) bool
	// spend accounts for a frame that may be abuse.
	spend(f frame) error
	// pump moves DATA that waits in streams to out.
	pump()
	// ended is called once, when the connection is of no use any more.
	ended(err error)
}

// conn is what both legs share: an HTTP/2 connection over TLS.
type conn struct {
	// Static after construction.
	sh   *shard
	leg  leg
	sock *Sock
	tls  *tls.Conn

	// Owned by the reader.
	awaited string // what must come before the first frame
	rest    []byte // the beginning of a frame whose end has not come yet

	lastRead atomic.Int64 // nanoseconds since the epoch; noted before the lock is waited for

	// Guarded by sh.mu.
	out      []byte // frames to be sent; nil: none
	dirty    bool   // on sh.dirty
	busy     bool   // somebody writes
	over     bool   // ended has been called
	closing  bool   // the socket is shut down once out is written
	cut      bool   // it has been
	overrun  bool   // out has become too long: the socket is closed
	enc      hpack.Encoder
	dec      hpack.Decoder
	block    []byte // of a header block whose end has not come yet
	blockID  uint32 // of its stream; 0: none
	blockEnd bool   // its HEADERS bore END_STREAM
	parts    int    // CONTINUATION frames of it
	since    time.Time

	listLimit  int       // of a decoded header list, in bytes (RFC 9113, 6.5.2)
	frameSize  int       // the peer's SETTINGS_MAX_FRAME_SIZE, no more than is useful
	initial    int64     // the peer's SETTINGS_INITIAL_WINDOW_SIZE
	window     int64     // that the peer granted for the connection
	receivable int       // bytes that the peer may still send
	owed       int       // bytes that came, are dealt with, and are not credited yet
	creditAt   int       // how many of those make a WINDOW_UPDATE
	partSince  time.Time // since when part of a frame has waited for the rest; zero: none does
	pingSent   time.Time // zero: none is under way
	settled    bool      // the peer's SETTINGS have come
	ready      []*stream // with something to send on this leg, in turn
	unanswered int       // SETTINGS and PINGs whose answers wait in out
}

func (c *conn) init(sh *shard, l leg, t *tls.Conn, s *Sock, listLimit int) {
	c.sh, c.leg, c.tls, c.sock = sh, l, t, s
	c.listLimit = listLimit
	c.enc, c.dec = hpack.NewEncoder(), hpack.NewDecoder(sh.strings, 2*listLimit)
	c.frameSize, c.initial, c.window = minMaxFrameSize, defaultWindow, defaultWindow
	c.lastRead.Store(time.Now().UnixNano())
	s.take()
}

// read reads frames until the connection ends, and returns why. awaited is what must
// come before the first of them, the preface or nothing.
func (c *conn) read(awaited string) error {
	c.awaited = awaited
	if err := c.take(); err != nil { // what came with the end of the handshake
		return err
	}
	return c.sock.readAll(c.take)
}

// take handles all that TLS can make of what has come.
func (c *conn) take() error {
	for drained := false; !drained; {
		buf := append(buffers.get(c.expected()), c.rest...)
		var err error
		for err == nil && len(buf) < cap(buf) {
			var n int
			n, err = c.tls.Read(buf[len(buf):cap(buf)])
			buf = buf[:len(buf)+n]
		}
		drained = errors.Is(err, errWouldBlock)
		p := buf
		if c.awaited != "" {
			if p, c.awaited = expect(p, c.awaited); p == nil {
				return errPreface
			}
		}
		if c.awaited == "" {
			if p, err = c.arrived(p, err); err != nil {
				return err
			}
		} else if !drained {
			return err
		}
		c.keepRest(p)
		buffers.put(buf)
	}
	return nil
}

// expected returns how large a buffer for what is to be read should be: as large as
// what TLS will make of it, and always larger than the rest of the last time.
func (c *conn) expected() int {
	if n := len(c.rest) + len(c.sock.unread); n > 0 {
		return n + 1
	}
	return smallBuffer
}

// keepRest keeps the beginning of a frame for the next time.
func (c *conn) keepRest(p []byte) {
	if len(p) == 0 {
		c.rest = nil
		return
	}
	c.rest = append(make([]byte, 0, len(p)), p...)
}

// errPreface is for a connection that does not begin as HTTP/2 does.
var errPreface = &connError{codeProtocol, "no HTTP/2 connection preface"}

// expect takes the preface, as far as it has come, from p. It returns nil where
// something else has.
func expect(p []byte, begin string) (rest []byte, missing string) {
	n := min(len(p), len(begin))
	if string(p[:n]) != begin[:n] {
		return nil, begin
	}
	return p[n:], begin[n:]
}

// arrived handles all whole frames of p under the shard's lock, sends what follows
// from them, and returns what is left of p. readErr is how reading ended.
func (c *conn) arrived(p []byte, readErr error) (rest []byte, err error) {
	if errors.Is(readErr, errWouldBlock) {
		readErr = nil
	}
	sh := c.sh
	c.lastRead.Store(time.Now().UnixNano())
	c.leg.prepare()
	sh.lock()
	for err == nil && !c.over && !c.closing {
		var f frame
		var n int
		if f, n, err = parseFrame(p); err != nil || n == 0 {
			break
		}
		p = p[n:]
		err = c.handle(&f)
	}
	if c.over || c.closing {
		p = nil // nobody listens any more; kept, it could fill take's buffer and leave no room to read
	}
	c.noteRest(p)
	if err != nil {
		var ce *connError
		if errors.As(err, &ce) {
			c.sayGoAway(ce)
			err = nil // it is read until the peer has had time to see why
		}
	}
	if c.sock.pending() {
		c.markDirty() // TLS itself has something to say
	}
	if err == nil {
		err = readErr
	}
	sh.unlockAndFlush()
	return p, err
}

// noteRest notes since when a frame has been incomplete. A piece of a body may take
// as long as its network does; whoever has gone is found by pings.
func (c *conn) noteRest(p []byte) {
	switch {
	case len(p) == 0 || len(p) > 3 && frameType(p[3]) == frameData:
		c.partSince = time.Time{}
	case c.partSince.IsZero():
		c.partSince = c.sh.now
	}
}

// maxBacklog is how many bytes of frames may wait for a peer who does not read. DATA
// stops long before (outLimit); heads of answers and errors do not wait in streams.
const maxBacklog = 4 << 20

// begin returns out with room for n bytes more, to append to; write takes it back.
func (c *conn) begin(n int) []byte {
	c.out = buffers.room(c.out, n)
	return c.out
}

// short is room enough for any control frame.
const short = 64

func (c *conn) write(out []byte) {
	c.out = out
	if len(out) > maxBacklog && !c.overrun {
		c.overrun = true
		c.doom()
	}
	c.markDirty()
}

// doom has the socket ended. Its reader finds out, and ends the connection; until then
// no new stream may be put on it.
func (c *conn) doom() {
	c.sh.doomed = append(c.sh.doomed, c.sock)
	if bc, ok := c.leg.(*backendConn); ok {
		bc.gone = true
	}
}

func (c *conn) markDirty() {
	if !c.dirty && !c.busy && !c.cut && (!c.over || c.closing) {
		c.dirty = true
		c.sh.dirty = append(c.sh.dirty, c)
	}
}

// enqueue puts a stream among those that have something to send on this leg.
func (c *conn) enqueue(s *stream, l *lane) {
	if !l.queued {
		l.queued = true
		c.ready = append(c.ready, s)
	}
	c.markDirty()
}

// sayGoAway ends the connection for a reason.
func (c *conn) sayGoAway(e *connError) {
	if c.closing || c.over {
		return
	}
	c.write(appendGoAway(c.begin(short+len(e.text)), c.leg.lastID(), e.code, e.text))
	c.shut(linger)
	c.end(e)
}

// linger is how long a connection is read after it has been ended by us, so that
// its peer sees the GOAWAY before a reset takes it away.
const linger = time.Second

// shut has the socket closed for writing as soon as out is written, and closed in
// any case when the limit has passed.
func (c *conn) shut(limit time.Duration) {
	c.closing = true
	c.markDirty()
	time.AfterFunc(limit, func() { c.sock.Close() })
}

// end takes the connection out of use, once.
func (c *conn) end(err error) {
	if c.over {
		return
	}
	if !c.closing {
		c.doom()
	}
	c.over = true
	c.ready = nil
	c.leg.ended(err)
}

// flushOut encrypts and writes what has been taken from out. It reports whether the
// peer has taken all of it; otherwise Sock.finish is owed.
func (c *conn) flushOut(out []byte) error {
	if len(out) > 0 {
		if _, err := c.tls.Write(out); err != nil {
			return err
		}
	}
	return c.sock.flush()
}

// silence returns how long nothing has come.
func (c *conn) silence(now time.Time) time.Duration {
	return now.Sub(time.Unix(0, c.lastRead.Load()))
}

// pingLost reports whether a PING has been under way for longer than the limit
// while nothing at all has come.
func (c *conn) pingLost(now time.Time, limit time.Duration) bool {
	return !c.pingSent.IsZero() && now.Sub(c.pingSent) > limit && c.silence(now) > limit
}

// ping asks whether the peer is there.
func (c *conn) ping(now time.Time) {
	c.pingSent = now
	c.write(appendPing(c.begin(short), 0, []byte("alive?!?")))
}

// expected reports whether the end of a connection needs no word in the log.
func expected(err error) bool {
	return err == nil || errors.Is(err, io.EOF)
}
