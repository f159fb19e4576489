package forward

import (
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer"
)

// timedBody is the body of a short request: a read of it may take so long. Nothing is
// read unless the backend asks for more.
type timedBody struct {
	io.ReadCloser
	conn    *http.ResponseController
	timeout time.Duration
	begun   atomic.Int64 // when the read under way, or the one that failed, began; 0: none. Nanoseconds since the epoch

	mu   sync.Mutex
	left bool // guarded by mu: nobody wants more of it
}

func (b *timedBody) Read(p []byte) (int, error) {
	begun := time.Now()
	b.begun.Store(begun.UnixNano())
	b.deadline(begun.Add(b.timeout))
	n, err := b.ReadCloser.Read(p)
	if err == nil || err == io.EOF {
		// Before anybody learns of the end, since net/http reads on then, to see whether
		// the client goes away. After a failure it would wait for the rest of the body.
		b.deadline(time.Time{})
		b.begun.Store(0)
	}
	return n, err
}

// deadline is for reads while the body is wanted.
func (b *timedBody) deadline(t time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.left {
		_ = b.conn.SetReadDeadline(t) // a connection that is gone says so to who reads
	}
}

// leave ends a read that is still under way at the time given.
func (b *timedBody) leave(at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left = true
	_ = b.conn.SetReadDeadline(at)
}

// abandon sets no deadline any more: over HTTP/2 there is nothing to set it on once the
// handler has returned, and net/http panics.
func (b *timedBody) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left = true
}

// stalled reports whether a read has taken too long. net/http ends the request's context
// then, as if the client had gone, before it says why.
func (b *timedBody) stalled() bool {
	begun := b.begun.Load()
	return begun != 0 && time.Since(time.Unix(0, begun)) >= b.timeout
}

// timedWriter writes the answer to a short request, or the one that refuses an upgrade:
// each piece of it must be taken in so long. The pieces are 32 KiB at most; small ones, of an
// answer whose length is not known, are sent by a flush alone.
type timedWriter struct {
	http.ResponseWriter
	conn    *http.ResponseController
	timeout time.Duration
	x       *exchange
}

// Unwrap is for http.ResponseController.
func (w *timedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *timedWriter) Write(p []byte) (int, error) {
	begun := w.begin()
	n, err := w.ResponseWriter.Write(p)
	w.end(begun, err)
	return n, err
}

// FlushError is for http.ResponseController.
func (w *timedWriter) FlushError() error {
	begun := w.begin()
	err := w.conn.Flush()
	w.end(begun, err)
	return err
}

func (w *timedWriter) begin() time.Time {
	now := time.Now()
	_ = w.conn.SetWriteDeadline(now.Add(w.timeout))
	return now
}

func (w *timedWriter) end(begun time.Time, err error) {
	_ = w.conn.SetWriteDeadline(time.Time{}) // the connection may serve others later
	if err != nil && time.Since(begun) >= w.timeout {
		w.x.f.Metrics.Refused(balancer.ReasonAnswerStalled)
		w.x.record.Refused(balancer.ReasonAnswerStalled)
	}
}

// timed makes the client of a short request one that may not stand still for longer than
// StallTimeout.
func (x *exchange) timed(w http.ResponseWriter) http.ResponseWriter {
	if x.decision.Class != balancer.Short {
		return w
	}
	return &timedWriter{w, x.conn, x.f.StallTimeout, x}
}

// leaveBody gives what is still to come of the request's body a moment. On HTTP/1.1
// net/http reads on when a request is over, up to 256 KiB, in some cases before it sends
// the answer, and waits for ever on a client that is in no hurry.
func (x *exchange) leaveBody() {
	if x.in.ProtoMajor != 1 || x.in.ContentLength == 0 || x.body != nil && x.body.ended() {
		return
	}
	if by := time.Now().Add(goodbyeTimeout); x.timedBody != nil {
		x.timedBody.leave(by)
	} else {
		_ = x.conn.SetReadDeadline(by) // a connection that is gone says so to net/http
	}
}

// timeRest times what net/http does once the handler has returned: it writes the last
// piece of the answer, until its StateIdle, and reads the rest of the request. Where a read
// of that is under way it forgets the deadline, so that it is done here.
func (x *exchange) timeRest() {
	if x.in.ProtoMajor != 1 {
		return
	}
	_ = x.conn.SetWriteDeadline(time.Now().Add(x.f.StallTimeout))
	if x.unreadBody() {
		_ = x.conn.Flush()
		x.leaveBody()
		x.body.settle()
		_ = x.in.Body.Close() // of all three errors net/http hears as well
	}
}
