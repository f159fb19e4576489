package forward

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"apiserver-lb/balancer"
)

// plenty is room for all that is held here.
var plenty = balancer.NewRoom(1<<40, nil).Share(new(atomic.Int64))

// source is a request body whose bytes come when the test says so.
type source struct {
	chunks chan []byte // closed at the end
	rest   []byte
	err    error
	asked  int // bytes that were asked for at most
}

func (s *source) Read(p []byte) (int, error) {
	s.asked += len(p)
	if len(s.rest) == 0 {
		chunk, ok := <-s.chunks
		if !ok {
			return 0, s.err
		}
		s.rest = chunk
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// bodyStep is a step of a body's life: what happens, and with how many bytes.
type bodyStep struct {
	what string
	n    int
}

// bodyPlay is a body's life.
type bodyPlay struct {
	body   []byte
	limit  int
	broken bool // the client goes away instead of ending the body
	steps  []bodyStep
}

// TestHeldBody drives a held body at random, as forwarding does: attempts that read
// and fail at any moment, one after the other, a read of the client under way while
// the new one begins, and a release. An attempt that reads to the end has read the
// whole body; what is held stays within its bound.
func TestHeldBody(t *testing.T) {
	steps := rapid.Custom(func(rt *rapid.T) bodyStep {
		return bodyStep{rapid.SampledFrom([]string{"fail", "attempt", "read", "read", "read", "read", "send", "send", "send", "end", "release"}).Draw(rt, "what"), rapid.IntRange(1, 70).Draw(rt, "n")}
	})
	rapid.Check(t, func(rt *rapid.T) {
		play := bodyPlay{
			body:   make([]byte, rapid.IntRange(0, 500).Draw(rt, "size")),
			limit:  rapid.IntRange(0, 150).Draw(rt, "limit"),
			broken: rapid.Bool().Draw(rt, "broken"),
			steps:  rapid.SliceOfN(steps, 30, 120).Draw(rt, "steps"),
		}
		for i := range play.body {
			play.body[i] = byte(i) // not a multiple of the sizes that are read
		}
		var problem error
		synctest.Test(t, func(*testing.T) { problem = play.run() })
		if problem != nil {
			rt.Fatal(problem)
		}
	})
}

// errBroken ends a body whose client goes away.
var errBroken = errors.New("connection reset")

// run plays, within a bubble, and returns what went wrong.
func (p *bodyPlay) run() error {
	src := &source{chunks: make(chan []byte), err: io.EOF}
	if p.broken {
		src.err = errBroken
	}
	h := newHeldBody(src, p.limit, plenty)
	unsent, ended, released := p.body, false, false
	var (
		a       *bodyAttempt // nil: none stands
		got     []byte       // that a has read
		reading chan error   // of a's reader; nil: it does not read
	)
	send := func(n int) {
		if n = min(n, len(unsent)); n > 0 && h.wantsMore() {
			src.chunks <- unsent[:n]
			unsent = unsent[n:]
		}
	}
	end := func() {
		if len(unsent) == 0 && !ended {
			ended = true
			close(src.chunks)
		}
	}
	defer func() {
		unsent = nil
		end() // lets a read go that nobody waits for
	}()
	read := func(n int) {
		if a == nil || reading != nil {
			return
		}
		done, attempt := make(chan error, 1), a
		reading = done
		go func() {
			buf := make([]byte, n)
			n, err := attempt.Read(buf)
			got = append(got, buf[:n]...)
			done <- err
		}()
	}
	settle := func() error {
		synctest.Wait()
		if reading == nil {
			return nil
		}
		var err error
		select {
		case err = <-reading:
			reading = nil
		default:
			return nil
		}
		switch {
		case err == nil:
			return nil
		case err == io.EOF && !p.broken && bytes.Equal(got, p.body):
		case err == errBroken && p.broken && h.sourceErr() == errBroken:
		default:
			return fmt.Errorf("after %d bytes of %d: %w", len(got), len(p.body), err)
		}
		a = nil
		return nil
	}
	a = h.attempt()
	for i, s := range p.steps {
		switch s.what {
		case "fail":
			if a != nil {
				a.Close()
				synctest.Wait()
				if reading != nil {
					if err := <-reading; err != io.ErrClosedPipe && err != nil && err != src.err {
						return fmt.Errorf("step %d: read of a closed attempt: %w", i, err)
					}
				}
				a, reading = nil, nil
			}
		case "attempt":
			if a == nil && !released && h.replayable() {
				a, got = h.attempt(), nil
			}
		case "read":
			read(s.n)
		case "send":
			send(s.n)
		case "end":
			end()
		case "release":
			if a != nil {
				released = true
				h.release()
			}
		}
		if err := settle(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		if n := h.holds(); n > p.limit+70 || n > 70 && released && a != nil && len(got) == len(p.body)-len(unsent) {
			return fmt.Errorf("step %d: %d bytes are held", i, n)
		}
	}
	// In the end an attempt that stands gets everything.
	for i := 0; a != nil; i++ {
		if i > 1000 {
			return fmt.Errorf("the attempt never ends, after %d bytes of %d", len(got), len(p.body))
		}
		read(64)
		send(64)
		end()
		if err := settle(); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	return nil
}

// wantsMore reports whether the client is being read.
func (h *heldBody) wantsMore() bool {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.filling
}

func (h *heldBody) holds() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.held)
}

// TestHeldBodyReadsOnDemand: nothing is taken from the client that nobody asked for.
func TestHeldBodyReadsOnDemand(t *testing.T) {
	src := &source{chunks: make(chan []byte, 1), err: io.EOF}
	src.chunks <- bytes.Repeat([]byte("x"), 100)
	h := newHeldBody(src, 1000, plenty)
	a := h.attempt()
	for range 3 {
		if n, err := a.Read(make([]byte, 10)); n != 10 || err != nil {
			t.Fatalf("read = %d, %v", n, err)
		}
	}
	a.Close()
	if src.asked != 30 {
		t.Errorf("asked for %d bytes", src.asked)
	}
	// The new attempt begins with what is held, without asking.
	b := h.attempt()
	if n, err := b.Read(make([]byte, 100)); n != 30 || err != nil || src.asked != 30 {
		t.Errorf("read = %d, %v; asked for %d bytes", n, err, src.asked)
	}
	close(src.chunks)
}

// TestHeldBodyGivesUp: what the answer has made needless is not held, and an
// attempt that would need it is told so.
func TestHeldBodyGivesUp(t *testing.T) {
	h := newHeldBody(bytes.NewReader(make([]byte, 100)), 1000, plenty)
	a := h.attempt()
	io.ReadFull(a, make([]byte, 10))
	h.release()
	if n := h.holds(); n != 0 || h.replayable() {
		t.Errorf("%d bytes are held after the release, replayable %v", n, h.replayable())
	}
	io.ReadFull(a, make([]byte, 10))
	if n := h.holds(); n != 0 {
		t.Errorf("%d bytes are held after the release", n)
	}
	if n, err := h.attempt().Read(make([]byte, 10)); n != 0 || err != errGone {
		t.Errorf("read = %d, %v", n, err)
	}
}

// TestHeldBodyEnd: the end comes with the last bytes, so that it can travel with
// them.
func TestHeldBodyEnd(t *testing.T) {
	h := newHeldBody(bytes.NewReader([]byte("abc")), 10, plenty)
	a := h.attempt()
	if b, err := io.ReadAll(a); string(b) != "abc" || err != nil {
		t.Fatalf("read = %q, %v", b, err)
	}
	a.Close()
	b := h.attempt()
	if n, err := b.Read(make([]byte, 10)); n != 3 || err != io.EOF {
		t.Errorf("read again = %d, %v", n, err)
	}
	if !h.ended() || h.sourceErr() != nil {
		t.Errorf("ended %v, error %v", h.ended(), h.sourceErr())
	}
	b.Close()
	h.release()
	if n := h.holds(); n != 0 {
		t.Errorf("%d bytes are held after the release", n)
	}
}

// TestHeldBodyRoom: what is held takes room, without which nothing more is held, and it
// gives all of it back.
func TestHeldBodyRoom(t *testing.T) {
	room := balancer.NewRoom(25, nil)
	share := room.Share(new(atomic.Int64))
	left := func(n int64) {
		t.Helper()
		if !room.Take(n) || room.Take(1) {
			t.Errorf("not %d bytes of room are left", n)
		}
		room.Give(n)
	}
	h := newHeldBody(bytes.NewReader(make([]byte, 100)), 1000, share)
	a := h.attempt()
	io.ReadFull(a, make([]byte, 10))
	left(15)
	if !h.replayable() {
		t.Error("it cannot be sent again, although there was room")
	}
	io.ReadFull(a, make([]byte, 10))
	if n := h.holds(); n != 0 || h.replayable() {
		t.Errorf("%d bytes are held beyond the room, replayable %v", n, h.replayable())
	}
	left(25)
	if b, err := io.ReadAll(a); len(b) != 80 || err != nil {
		t.Errorf("the rest: %d bytes, %v", len(b), err)
	}

	h = newHeldBody(bytes.NewReader(make([]byte, 100)), 1000, share)
	io.ReadFull(h.attempt(), make([]byte, 10))
	left(15)
	h.end() // whatever became of the attempt
	left(25)
}
