package forward

import (
	"io"
	"net/http"
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
}

func (b *timedBody) Read(p []byte) (int, error) {
	begun := time.Now()
	b.begun.Store(begun.UnixNano())
	_ = b.conn.SetReadDeadline(begun.Add(b.timeout)) // a connection that is gone says so below
	n, err := b.ReadCloser.Read(p)
	if err == nil || err == io.EOF {
		// Before anybody learns of the end, since net/http reads on then, to see whether
		// the client goes away. After a failure it would wait for the rest of the body.
		_ = b.conn.SetReadDeadline(time.Time{})
		b.begun.Store(0)
	}
	return n, err
}

// stalled reports whether a read has taken too long. net/http ends the request's context
// then, as if the client had gone, before it says why.
func (b *timedBody) stalled() bool {
	begun := b.begun.Load()
	return begun != 0 && time.Since(time.Unix(0, begun)) >= b.timeout
}

// timedWriter writes the answer to a short request: each piece of it must be taken in
// so long. The pieces are those of httputil.ReverseProxy, 32 KiB at most.
type timedWriter struct {
	http.ResponseWriter
	conn    *http.ResponseController
	timeout time.Duration
	x       *exchange
}

// Unwrap is for http.ResponseController.
func (w *timedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *timedWriter) Write(p []byte) (int, error) {
	begun := time.Now()
	_ = w.conn.SetWriteDeadline(begun.Add(w.timeout))
	defer func() { _ = w.conn.SetWriteDeadline(time.Time{}) }() // the connection may serve others later
	n, err := w.ResponseWriter.Write(p)
	if err != nil && time.Since(begun) >= w.timeout {
		w.x.f.Metrics.Refused(balancer.ReasonAnswerStalled)
	}
	return n, err
}

// timed makes the client of a short request one that may not stand still for longer than
// StallTimeout.
func (x *exchange) timed(w http.ResponseWriter) http.ResponseWriter {
	if x.decision.Class != balancer.Short {
		return w
	}
	x.conn = http.NewResponseController(w)
	return &timedWriter{w, x.conn, x.f.StallTimeout, x}
}
