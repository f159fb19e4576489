package forward

import (
	"io"
	"sync"
	"sync/atomic"
)

// heldBody keeps what has been read of a request body, up to a bound, so that it
// can be sent to a second backend when the first one did not act on it. Nothing is
// read ahead: a byte is taken from the client when an attempt asks for it.
//
// Attempts may overlap for a moment, because a transport can still be reading for
// an attempt that has already failed. They take turns at the source, and what the
// old one reads is held for the new one.
type heldBody struct {
	src   io.Reader
	limit int

	lost     atomic.Bool // some of what was sent is not held any more
	released atomic.Bool // the answer has begun: nothing needs to be held

	mu     sync.Mutex
	held   []byte
	srcErr error // from src, io.EOF included; final
}

func newHeldBody(src io.Reader, limit int) *heldBody { return &heldBody{src: src, limit: limit} }

// replayable reports whether an attempt may begin anew.
func (h *heldBody) replayable() bool { return !h.lost.Load() }

// release ends the holding; what is held and has not been sent yet still will be.
func (h *heldBody) release() { h.released.Store(true) }

// sourceErr returns the error with which reading from the client ended, nil where
// it has not ended or ended well. It does not wait for a read that is under way.
func (h *heldBody) sourceErr() error {
	if !h.mu.TryLock() {
		return nil
	}
	defer h.mu.Unlock()
	if h.srcErr == io.EOF {
		return nil
	}
	return h.srcErr
}

// attempt returns a reader of the whole body from its beginning. Only the latest
// attempt may be used once the body has outgrown its bound.
func (h *heldBody) attempt() io.ReadCloser { return &bodyAttempt{body: h} }

// bodyAttempt reads a heldBody for one attempt.
type bodyAttempt struct {
	body   *heldBody
	closed atomic.Bool
	at     int // guarded by body.mu
}

func (a *bodyAttempt) Read(p []byte) (int, error) {
	h := a.body
	h.mu.Lock()
	defer h.mu.Unlock()
	if a.closed.Load() {
		return 0, io.ErrClosedPipe
	}
	if a.at < len(h.held) {
		n := copy(p, h.held[a.at:])
		a.at += n
		if h.released.Load() && a.at == len(h.held) {
			h.drop()
			a.at = 0
		}
		return n, nil
	}
	if h.srcErr != nil {
		return 0, h.srcErr
	}
	n, err := h.src.Read(p)
	h.srcErr = err
	switch {
	case n == 0 || h.lost.Load():
	case h.released.Load() || len(h.held)+n > h.limit:
		h.drop()
		a.at = 0
	default:
		h.held = append(h.held, p[:n]...)
		a.at += n
	}
	return n, err
}

// drop gives up what is held; it cannot be sent again after that.
func (h *heldBody) drop() {
	h.lost.Store(true)
	h.held = nil
}

// Close ends the attempt. A read that is under way goes on, and what it yields is
// held for the next attempt.
func (a *bodyAttempt) Close() error {
	a.closed.Store(true)
	return nil
}
