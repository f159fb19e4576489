package relay

import "apiserver-lb/balancer/relay/hpack"

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
	for l.buf.waiting() > 0 {
		n := c.sendable(l.buf.waiting(), l.window)
		p := l.buf.next(n)
		if len(p) == 0 {
			return sent, true
		}
		end := l.end && len(p) == l.buf.waiting() && l.trailers == nil
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
	if l.buf.waiting() > 0 {
		return sent, true
	}
	if l.end && !l.ended {
		l.ended = true
		if l.trailers != nil {
			c.out = c.appendFields(id, *l.trailers, true)
		} else {
			c.out = appendData(c.begin(short), id, nil, true)
		}
	}
	return sent, false
}

// appendFields encodes fields and appends them to out: both under one lock, since
// the table follows the order on the wire.
func (c *conn) appendFields(id uint32, fields []hpack.Field, end bool) []byte {
	c.beginBlock()
	for i := range fields {
		c.encode(&fields[i])
	}
	return c.appendBlock(id, end)
}

// appendBlock appends the header block that has been encoded last.
func (c *conn) appendBlock(id uint32, end bool) []byte {
	block := c.sh.encoded
	frames := 1 + len(block)/c.frameSize
	return appendHeaders(c.begin(len(block)+frames*frameHeaderLen), id, block, end, c.frameSize)
}

// beginBlock begins a header block in the shard's scratch.
func (c *conn) beginBlock() {
	sh := c.sh
	if cap(sh.encoded) > 64<<10 {
		sh.encoded = nil
	}
	sh.encoded = c.enc.Begin(sh.encoded[:0])
}

func (c *conn) encode(f *hpack.Field) { c.sh.encoded = c.enc.Append(c.sh.encoded, f) }
