package forward

import (
	"io"

	"apiserver-lb/balancer"
)

// readAhead is a response body whose beginning, or all of which, is read before the
// client gets any of the answer.
type readAhead struct {
	// Static after construction.
	src  io.ReadCloser
	room *balancer.Room

	// Owned by the handler's goroutine.
	held  []byte // read and not yet passed on
	err   error  // of src, after what is held; nil: there may be more
	taken int64  // of room, for the buffer that held is in
}

// peek returns the beginning of the body, n bytes or all that there are, without
// taking it away.
func (r *readAhead) peek(n int) []byte {
	r.held = make([]byte, 0, n) // so little that it needs no room
	r.fill(n)
	return r.held
}

// hold reads until the answer is whole; its error is that of one that breaks off
// before. What turns out to be large, or finds no room, goes on without being whole.
// length is as declared, -1 if it is not.
func (r *readAhead) hold(length int64) error {
	bound := int64(balancer.AnswerHoldBytes)
	if length >= 0 {
		bound = min(bound, length)
	}
	r.fill(int(bound) + 1) // only the end in place of one more byte makes it whole
	if r.err != nil && r.err != io.EOF {
		return &brokenAnswer{r.err}
	}
	return nil
}

// fill reads until n bytes are held, or the body has ended, or there is no room.
func (r *readAhead) fill(n int) {
	for r.err == nil && len(r.held) < n {
		if len(r.held) == cap(r.held) && !r.grow(n) {
			return
		}
		var k int
		k, r.err = r.src.Read(r.held[len(r.held):cap(r.held)])
		r.held = r.held[:len(r.held)+k]
	}
}

// firstHold is the least, in bytes, that is made room for; most answers are smaller.
const firstHold = 4 << 10

// grow makes the buffer larger, up to n bytes, and reports whether there was room.
func (r *readAhead) grow(n int) bool {
	size := min(max(2*cap(r.held), firstHold), n)
	more := int64(size - cap(r.held))
	if !r.room.Take(more) {
		return false
	}
	r.taken += more
	r.held = append(make([]byte, 0, size), r.held...)
	return true
}

// Read passes on what is held, and then the rest as it comes.
func (r *readAhead) Read(p []byte) (int, error) {
	if len(r.held) > 0 {
		n := copy(p, r.held)
		if r.held = r.held[n:]; len(r.held) == 0 {
			r.giveBack()
		}
		return n, nil
	}
	if r.err != nil {
		return 0, r.err
	}
	return r.src.Read(p)
}

// Close ends the body.
func (r *readAhead) Close() error {
	r.giveBack()
	return r.src.Close()
}

// giveBack lets go of the buffer.
func (r *readAhead) giveBack() {
	r.held = nil
	r.room.Give(r.taken)
	r.taken = 0
}

// brokenAnswer is the loss of an answer that had begun, but not at the client. It
// does not unwrap: whatever the error says, the backend has processed the request.
type brokenAnswer struct{ err error }

func (e *brokenAnswer) Error() string { return "the answer broke off: " + e.err.Error() }
