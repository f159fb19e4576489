package forward

import (
	"errors"
	"io"
	"sync"
	"time"

	"apiserver-lb/balancer"
)

// heldBody keeps what has been read of a request body, up to a bound, so that it
// can be sent to a second backend when the first one did not act on it. Nothing but
// what ready asks for is read ahead: bytes are taken from the client when an attempt
// asks for them.
//
// Reading from the client happens in a goroutine of its own, one read at a time,
// and what it yields belongs to the body, not to the attempt that asked. So an
// attempt that has failed can be closed while its client is silent, which net/http
// waits for, and the next attempt misses nothing of what the old one asked for.
type heldBody struct {
	// Static after construction.
	src   io.Reader
	limit int
	room  balancer.Share

	mu       sync.Mutex
	cond     sync.Cond    // broadcast when something below has changed
	held     []byte       // the body from offset on, as far as it has been read
	offset   int64        // of held in the body; above 0 the body cannot be sent again
	srcErr   error        // from src, io.EOF included; final
	filling  bool         // a read of src is under way
	released bool         // the answer is final: nothing needs to be held
	spent    bool         // there was no room for more: what is held goes when it has been sent
	taken    int64        // of room, for what is held
	latest   *bodyAttempt // the only one for which bytes are given up
}

// errGone is the error of an attempt that would need what is not held any more.
var errGone = errors.New("the request body is not held any more")

func newHeldBody(src io.Reader, limit int, room balancer.Share) *heldBody {
	h := &heldBody{src: src, limit: limit, room: room}
	h.cond.L = &h.mu
	return h
}

// replayable reports whether an attempt may begin anew.
func (h *heldBody) replayable() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.offset == 0
}

// release ends the holding; what is held and has not been sent yet still will be.
func (h *heldBody) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released = true
	h.trim()
}

// ended reports whether the client's body has been read to its end.
func (h *heldBody) ended() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.srcErr == io.EOF
}

// sourceErr returns the error with which reading from the client ended, nil where
// it has not ended or ended well.
func (h *heldBody) sourceErr() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.srcErr == io.EOF {
		return nil
	}
	return h.srcErr
}

// ready reads ahead, for balancer.StrangerBodyWait at most, and reports whether the body has
// come to its end and is smaller than balancer.StrangerBodyBytes.
func (h *heldBody) ready() bool {
	late := false
	timer := time.AfterFunc(balancer.StrangerBodyWait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late = true
		h.cond.Broadcast()
	})
	defer timer.Stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.srcErr == nil && !late && !h.spent && len(h.held) < min(balancer.StrangerBodyBytes, h.limit) {
		h.ask(fillBytes)
		h.cond.Wait()
	}
	return h.srcErr == io.EOF && len(h.held) < balancer.StrangerBodyBytes
}

// whole reports whether the request, with its body, has come to its end: over HTTP/1.1
// nothing else of a stranger goes to a backend.
func (x *exchange) whole() bool {
	return x.body == nil || x.in.Header.Get("Expect") == "" && x.body.ready()
}

// attempt returns a reader of the whole body from its beginning. The attempt
// before it must have been closed.
func (h *heldBody) attempt() *bodyAttempt {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.latest = &bodyAttempt{body: h}
	return h.latest
}

// fillBytes is how much is read from the client at once.
const fillBytes = 32 << 10

// ask has the client read once, unless it is being read. h.mu is held.
func (h *heldBody) ask(size int) {
	if !h.filling {
		h.filling = true
		go h.fill(size)
	}
}

// fill reads once from the client.
func (h *heldBody) fill(size int) {
	buf := make([]byte, size)
	n, err := h.src.Read(buf)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.held) == 0 {
		h.held = buf[:n]
	} else {
		h.held = append(h.held, buf[:n]...)
	}
	h.srcErr, h.filling = err, false
	if !h.released && !h.spent && h.offset == 0 {
		if h.room.Take(int64(n)) {
			h.taken += int64(n)
		} else {
			h.spent = true
		}
	}
	h.cond.Broadcast()
}

// trim gives up what nobody will read again. h.mu is held.
func (h *heldBody) trim() {
	a, end := h.latest, h.offset+int64(len(h.held))
	if a == nil {
		return
	}
	done := h.released && a.closed
	passed := !a.closed && a.at == end && (h.released || h.offset > 0 || h.spent || len(h.held) > h.limit)
	if done || passed {
		h.drop()
	}
}

// drop gives up what is held. h.mu is held.
func (h *heldBody) drop() {
	h.offset, h.held = h.offset+int64(len(h.held)), nil
	h.room.Give(h.taken)
	h.taken = 0
}

// end gives up what is held: the request is over.
func (h *heldBody) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released = true
	h.drop()
}

// bodyAttempt reads a heldBody for one attempt.
type bodyAttempt struct {
	body *heldBody // static

	// Guarded by body.mu.
	at     int64
	closed bool
}

// settle waits until the client is not being read.
func (h *heldBody) settle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.filling {
		h.cond.Wait()
	}
}

// Read returns what is held, or waits for more from the client.
func (a *bodyAttempt) Read(p []byte) (int, error) {
	h := a.body
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for {
		switch at := a.at - h.offset; {
		case a.closed:
			return 0, io.ErrClosedPipe
		case at < 0:
			return 0, errGone
		case at < int64(len(h.held)):
			n := copy(p, h.held[at:])
			a.at += int64(n)
			var err error
			if int(at)+n == len(h.held) {
				err = h.srcErr // the end comes with the last bytes, as END_STREAM does
			}
			h.trim()
			return n, err
		case h.srcErr != nil:
			return 0, h.srcErr
		}
		h.ask(min(len(p), fillBytes))
		h.cond.Wait()
	}
}

// Close is end.
func (a *bodyAttempt) Close() error {
	a.end()
	return nil
}

// end ends the attempt, and a Read that waits. What the client is being read for is
// held for the next attempt.
func (a *bodyAttempt) end() {
	h := a.body
	h.mu.Lock()
	defer h.mu.Unlock()
	a.closed = true
	h.trim()
	h.cond.Broadcast()
}
