package relay

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

// outLimit is how many bytes of frames wait for a connection before DATA is left
// in its stream, so that a slow reader stops its own streams and nobody else's.
// They fit into a buffer that is lent (largeBuffer), with what TLS adds.
const outLimit = 4 * 16384

// leg is what is different between the two sides: a connection of a client, or one
// to a backend. All but run under the shard's lock.
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
	enc      *hpack.Encoder
	dec      *hpack.Decoder
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
	c.enc = hpack.NewEncoder(&sh.encoded)
	c.dec = hpack.NewDecoder(4096, c.emit)
	c.dec.SetMaxStringLength(2 * listLimit)
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
	if c.closing {
		p = nil // nobody listens any more
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

// handle acts on one frame.
func (c *conn) handle(f *frame) error {
	if c.blockID != 0 && (f.typ != frameContinuation || f.id != c.blockID) {
		return &connError{codeProtocol, "a header block was interrupted"}
	}
	if !c.settled && f.typ != frameSettings {
		return &connError{codeProtocol, "the first frame is not SETTINGS"}
	}
	if err := c.leg.spend(*f); err != nil {
		return err
	}
	switch f.typ {
	case frameData:
		return c.handleData(f)
	case frameHeaders:
		return c.handleHeaders(f)
	case frameContinuation:
		return c.handleContinuation(f)
	case framePriority:
		return c.handlePriority(f)
	case frameReset:
		return c.handleReset(f)
	case frameSettings:
		return c.handleSettings(f)
	case framePushPromise:
		return &connError{codeProtocol, "PUSH_PROMISE"}
	case framePing:
		return c.handlePing(f)
	case frameGoAway:
		if f.id != 0 {
			return &connError{codeProtocol, "GOAWAY on a stream"}
		}
		if len(f.payload) < 8 {
			return &connError{codeFrameSize, "GOAWAY too short"}
		}
		c.leg.goAway(binary.BigEndian.Uint32(f.payload)&maxStreamID, code(binary.BigEndian.Uint32(f.payload[4:])))
		return nil
	case frameWindowUpdate:
		return c.handleWindowUpdate(f)
	}
	return nil // unknown types are ignored (RFC 9113, section 4.1)
}

func (c *conn) handleData(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "DATA on no stream"}
	}
	if c.leg.idle(f.id) {
		return &connError{codeProtocol, "DATA on an idle stream"}
	}
	p, err := f.unpad()
	if err != nil {
		return err
	}
	if c.receivable -= len(f.payload); c.receivable < 0 {
		return &connError{codeFlowControl, "more DATA than the connection window allows"}
	}
	return c.leg.data(f.id, p, len(f.payload), f.has(flagEndStream))
}

func (c *conn) handleHeaders(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "HEADERS on no stream"}
	}
	p, err := f.unpad()
	if err != nil {
		return err
	}
	if f.has(flagPriority) {
		if len(p) < 5 {
			return &connError{codeFrameSize, "HEADERS too short for its priority"}
		}
		if binary.BigEndian.Uint32(p)&maxStreamID == f.id {
			return &connError{codeProtocol, "a stream that depends on itself"}
		}
		p = p[5:]
	}
	c.blockEnd = f.has(flagEndStream)
	if f.has(flagEndHeaders) {
		return c.decode(f.id, p)
	}
	c.blockID, c.parts, c.since = f.id, 0, c.sh.now
	c.block = append([]byte(nil), p...)
	return nil
}

// maxParts is how many CONTINUATION frames a block of a length may come in. Those
// who fill their frames never come near it; a flood of small or empty ones ends
// soon (CVE-2024-27316 and its kin).
func maxParts(length int) int { return 10 + length/8192 }

func (c *conn) handleContinuation(f *frame) error {
	if c.blockID == 0 {
		return &connError{codeProtocol, "CONTINUATION without HEADERS"}
	}
	c.parts++
	c.block = append(c.block, f.payload...)
	if c.parts > maxParts(len(c.block)) || len(c.block) > 2*c.listLimit {
		return &connError{codeEnhanceYourCalm, "header block too large or in too many frames"}
	}
	if !f.has(flagEndHeaders) {
		return nil
	}
	block, id := c.block, c.blockID
	c.block, c.blockID = nil, 0
	return c.decode(id, block)
}

// decode decodes a whole header block, whatever its stream: the table of the
// connection depends on each of them.
func (c *conn) decode(id uint32, block []byte) error {
	sh := c.sh
	sh.fields, sh.listBytes, sh.listLimit = sh.fields[:0], 0, c.listLimit
	if _, err := c.dec.Write(block); err != nil {
		return c.undecodable(err)
	}
	if err := c.dec.Close(); err != nil {
		return c.undecodable(err)
	}
	if sh.listBytes > 2*c.listLimit {
		return &connError{codeEnhanceYourCalm, "header list far too large"}
	}
	sh.blockBytes = len(block)
	return c.leg.headers(id, c.blockEnd)
}

func (c *conn) undecodable(err error) error {
	if errors.Is(err, hpack.ErrStringLength) {
		return &connError{codeEnhanceYourCalm, "header field too large"}
	}
	return &connError{codeCompression, "header block: " + err.Error()}
}

// emit gets each decoded field. What is beyond the limit is counted and not kept.
func (c *conn) emit(f hpack.HeaderField) {
	sh := c.sh
	sh.listBytes += int(f.Size())
	if sh.listBytes <= sh.listLimit && len(sh.fields) <= maxFields {
		sh.fields = append(sh.fields, f)
	}
}

// maxFields is how many fields a header list may have.
const maxFields = 2000

// A list of over inflatedBytes that is inflated times as long as it came repeats one
// field over and over: a byte each here, and all of it to a backend.
const (
	inflatedBytes = 256 << 10
	inflated      = 8
)

// tooLarge reports whether the list in sh.fields is not to be used: it is not
// complete, or blown up.
func (sh *shard) tooLarge() bool {
	return sh.listBytes > sh.listLimit || len(sh.fields) > maxFields ||
		sh.listBytes > inflatedBytes && sh.listBytes > inflated*sh.blockBytes
}

func (c *conn) handlePriority(f *frame) error {
	if f.id == 0 {
		return &connError{codeProtocol, "PRIORITY on no stream"}
	}
	if len(f.payload) != 5 {
		return &connError{codeFrameSize, "PRIORITY of a wrong length"}
	}
	if binary.BigEndian.Uint32(f.payload)&maxStreamID == f.id {
		return &connError{codeProtocol, "a stream that depends on itself"}
	}
	return nil
}

func (c *conn) handleReset(f *frame) error {
	if f.id == 0 || c.leg.idle(f.id) {
		return &connError{codeProtocol, "RST_STREAM on no stream"}
	}
	if len(f.payload) != 4 {
		return &connError{codeFrameSize, "RST_STREAM of a wrong length"}
	}
	return c.leg.reset(f.id, code(binary.BigEndian.Uint32(f.payload)))
}

func (c *conn) handleSettings(f *frame) error {
	if f.id != 0 {
		return &connError{codeProtocol, "SETTINGS on a stream"}
	}
	if f.has(flagAck) {
		if len(f.payload) != 0 {
			return &connError{codeFrameSize, "SETTINGS acknowledged with a payload"}
		}
		return nil
	}
	list, err := parseSettings(f.payload)
	if err != nil {
		return err
	}
	for _, s := range lastOfEach(list) {
		switch s.id {
		case settingHeaderTableSize:
			c.enc.SetMaxDynamicTableSizeLimit(min(s.value, 4096))
			c.enc.SetMaxDynamicTableSize(min(s.value, 4096))
		case settingInitialWindow:
			delta := int64(s.value) - c.initial
			c.initial = int64(s.value)
			if err := c.leg.windowChanged(delta); err != nil {
				return err
			}
		case settingMaxFrameSize:
			c.frameSize = min(int(s.value), maxFrameSize)
		case settingMaxStreams, settingMaxHeaderListSize:
			c.sh.announced(c.leg, s)
		}
	}
	c.settled = true
	if err := c.answer(); err != nil {
		return err
	}
	c.write(appendSettingsAck(c.begin(short)))
	return nil
}

// maxUnanswered bounds the answers to SETTINGS and PING that wait for a peer who
// does not read them.
const maxUnanswered = 1000

func (c *conn) answer() error {
	if c.unanswered++; c.unanswered > maxUnanswered {
		return &connError{codeEnhanceYourCalm, "answers are asked for and not read"}
	}
	return nil
}

func (c *conn) handlePing(f *frame) error {
	if f.id != 0 {
		return &connError{codeProtocol, "PING on a stream"}
	}
	if len(f.payload) != 8 {
		return &connError{codeFrameSize, "PING of a wrong length"}
	}
	if f.has(flagAck) {
		c.pingSent = time.Time{}
		return nil
	}
	if err := c.answer(); err != nil {
		return err
	}
	c.write(appendPing(c.begin(short), flagAck, f.payload))
	return nil
}

func (c *conn) handleWindowUpdate(f *frame) error {
	if len(f.payload) != 4 {
		return &connError{codeFrameSize, "WINDOW_UPDATE of a wrong length"}
	}
	increment := binary.BigEndian.Uint32(f.payload) & maxStreamID
	if f.id != 0 {
		if c.leg.idle(f.id) {
			return &connError{codeProtocol, "WINDOW_UPDATE on an idle stream"}
		}
		return c.leg.streamWindow(f.id, increment)
	}
	if increment == 0 {
		return &connError{codeProtocol, "WINDOW_UPDATE of 0"}
	}
	if c.window += int64(increment); c.window > maxWindow {
		return &connError{codeFlowControl, "connection window too large"}
	}
	if len(c.ready) > 0 {
		c.markDirty()
	}
	return nil
}

// credit lets the peer send n bytes more on the connection.
func (c *conn) credit(n int) {
	if c.owed += n; c.owed >= c.creditAt && !c.over && !c.closing {
		c.receivable += c.owed
		c.write(appendWindowUpdate(c.begin(short), 0, uint32(c.owed)))
		c.owed = 0
	}
}

// sendable returns how much of n bytes may be sent on a stream with the window given.
func (c *conn) sendable(n int, window int64) int {
	room := outLimit - len(c.out) - frameHeaderLen
	return int(max(0, min(int64(n), window, c.window, int64(c.frameSize), int64(room))))
}

// pumpReady gives each stream that has something to send its turn, as long as there
// is room. side tells a stream's lane on this leg, and its id; sent gets what has
// gone.
func (c *conn) pumpReady(side func(*stream) (*lane, uint32), sent func(s *stream, n int)) {
	for idle := 0; idle < len(c.ready); {
		s := c.ready[0]
		c.ready[0] = nil
		c.ready = c.ready[1:]
		l, id := side(s)
		if l == nil {
			continue // it has left this leg
		}
		l.queued = false
		n, left := c.pumpLane(id, l)
		if left && l.window > 0 { // else a WINDOW_UPDATE brings it back
			l.queued = true
			c.ready = append(c.ready, s)
		}
		if n == 0 && left {
			idle++
		} else {
			idle = 0
		}
		sent(s, n)
	}
	if len(c.ready) == 0 {
		c.ready = nil
	}
}

// pumpLane sends what it may of a lane on a stream of this leg and returns how much
// that was, and whether something is left.
func (c *conn) pumpLane(id uint32, l *lane) (sent int, left bool) {
	for l.buf.unsent > 0 {
		n := c.sendable(l.buf.unsent, l.window)
		p := l.buf.next(n)
		if len(p) == 0 {
			return sent, true
		}
		end := l.end && len(p) == l.buf.unsent && len(l.trailers) == 0
		c.out = appendData(c.begin(frameHeaderLen+len(p)), id, p, end)
		l.buf.advance(len(p))
		l.window -= int64(len(p))
		c.window -= int64(len(p))
		sent += len(p)
		if end {
			l.ended = true
		}
		if sent >= c.frameSize {
			break // the next stream's turn
		}
	}
	if l.buf.unsent > 0 {
		return sent, true
	}
	if l.end && !l.ended {
		l.ended = true
		if len(l.trailers) > 0 {
			c.out = c.appendFields(id, l.trailers, true)
		} else {
			c.out = appendData(c.begin(short), id, nil, true)
		}
	}
	return sent, false
}

// appendFields encodes fields and appends them to out: both under one lock, since
// the table follows the order on the wire.
func (c *conn) appendFields(id uint32, fields []hpack.HeaderField, end bool) []byte {
	c.sh.encoded.reset()
	// A change of the table's size must stand first in a block, and package hpack
	// writes it: so the first field is its own.
	_ = c.enc.WriteField(fields[0])
	for _, f := range fields[1:] {
		c.encode(f)
	}
	return c.appendBlock(id, end)
}

// appendBlock appends the header block that has been encoded last.
func (c *conn) appendBlock(id uint32, end bool) []byte {
	block := c.sh.encoded.b
	frames := 1 + len(block)/c.frameSize
	return appendHeaders(c.begin(len(block)+frames*frameHeaderLen), id, block, end, c.frameSize)
}

func (c *conn) encode(f hpack.HeaderField) {
	if f.Sensitive {
		c.sh.encoded.b = appendLiteral(c.sh.encoded.b, f.Name, f.Value)
		return
	}
	_ = c.enc.WriteField(f) // to memory
}

// sayGoAway ends the connection for a reason.
func (c *conn) sayGoAway(e *connError) {
	if c.closing || c.over {
		return
	}
	c.write(appendGoAway(c.begin(short+len(e.text)), c.leg.(interface{ lastID() uint32 }).lastID(), e.code, e.text))
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
		c.sh.doomed = append(c.sh.doomed, c.sock)
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
