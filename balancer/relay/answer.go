package relay

import (
	"net/http"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

// answerCame takes the final head of an answer.
func (s *stream) answerCame(h *answerHead, end bool) {
	s.code, s.left = h.code, h.length
	if s.bodyless(h.code) || end {
		s.left = -1
	}
	s.ask.maybe = answerHead{status: h.status, code: h.code}
	s.down.end = end
	// What exec and proxy reach is not kube-apiserver's own word, and would not be
	// sent again anyway.
	switch {
	case !s.ask.decision.DialRetryOnly() && balancer.MaybeShutdown(h.code, h.get):
		s.hold = holdPeek
	case !end && s.ask.decision.HoldsAnswer(s.ask.method, h.code, h.contentType, h.length):
		s.hold = holdWhole
	default:
		s.conclude()
		s.sendHead(h.fields, end && s.down.trailers == nil)
		return
	}
	s.ask.maybe.length, s.ask.maybe.contentType = h.length, h.contentType
	s.ask.pending = append(s.cc.sh.borrow(), h.fields...)
	if end {
		s.judgeHeld()
	}
}

// bodyless reports whether an answer with the code has no body whatever its length says,
// which is that of an answer to GET, or of what the client has (RFC 9110, section 8.6).
func (s *stream) bodyless(code int) bool { return s.isHead || code == http.StatusNotModified }

// conclude notes that the answer is the one that the client gets: nothing of the
// request needs to be held any more.
func (s *stream) conclude() {
	s.cc.sh.r.Core.Concluded(&s.ask.decision, s.code, s.cc.sh.now)
	s.dropBody()
}

// forgetAsking lets go of what would be needed to send the request again.
func (s *stream) forgetAsking() {
	if s.ask == nil {
		return
	}
	s.cc.sh.giveBackAsking(s.ask)
	s.ask = nil
}

// sendHead begins the answer at the client.
func (s *stream) sendHead(fields []hpack.Field, end bool) {
	cc := s.cc
	status := hpack.Make(hpack.Status, s.ask.maybe.status)
	s.answered = true
	s.forgetAsking()
	if cc.over || cc.closing {
		return
	}
	cc.beginBlock()
	cc.encode(&status)
	for i := range fields {
		cc.encode(&fields[i])
	}
	cc.write(cc.appendBlock(s.id, end))
	if s.record != nil && s.at != nil {
		s.record.Started(s.code, s.at.Name)
	}
	if end {
		s.down.ended = true
		s.afterDown()
	}
}

// dataCame takes a piece of the answer's body, and its end.
func (s *stream) dataCame(p []byte, end bool) {
	cc := s.cc
	s.down.end = end
	if s.hold == holdWhole && end && len(p) > 0 && s.down.buf.waiting() == 0 {
		s.beginHeld(false) // whole at once: most small answers are
	}
	if s.hold != holdNot {
		s.down.add(p)
		s.holdOn(len(p))
		return
	}
	if len(p) == 0 && !end {
		return
	}
	if s.down.buf.waiting() == 0 && !s.down.queued && len(p) <= cc.sendable(len(p), s.down.window) && len(cc.out) < outLimit {
		cc.write(appendData(cc.begin(frameHeaderLen+len(p)), s.id, p, end))
		s.down.window -= int64(len(p))
		cc.window -= int64(len(p))
		s.down.ended = end
		cc.drew(len(p), false)
		s.delivered(len(p))
		return
	}
	s.down.add(p)
	cc.enqueue(s, &s.down)
}

// badTrailers says what is wrong with the trailers of an answer, empty where nothing is.
func badTrailers(fields []hpack.Field) string {
	for i := range fields {
		if problem := badField(&fields[i]); problem != "" {
			return "the trailers have " + problem
		}
	}
	return ""
}

// trailersCame ends the answer with trailers. The fields are copied.
func (s *stream) trailersCame(fields []hpack.Field) {
	if len(fields) > 0 {
		trailers := append([]hpack.Field(nil), fields...)
		s.down.trailers = &trailers
	}
	s.down.end = true
	if s.hold != holdNot {
		s.judgeHeld()
	} else {
		s.cc.enqueue(s, &s.down)
	}
}

// holdOn keeps an answer waiting, as long as there is reason and room for it. The
// backend gets its window back meanwhile.
func (s *stream) holdOn(n int) {
	if s.cc.held+n > maxHeldAnswers || !s.cc.sh.r.Core.Answers.Take(int64(n)) {
		s.hold = holdWhole // there is no time for a closer look either
		s.release()
		return
	}
	s.room += int32(n)
	s.cc.held += n
	s.early += int32(n)
	if !s.down.end {
		s.creditBackend(n)
	}
	s.judgeHeld()
}

// judgeHeld decides whether an answer that is held has shown enough.
func (s *stream) judgeHeld() {
	if s.hold == holdPeek {
		if !s.down.end && s.down.buf.waiting() < balancer.ShutdownBodyBytes {
			return
		}
		if balancer.ShutdownBody(s.down.buf.prefix(balancer.ShutdownBodyBytes)) {
			s.failed(balancer.ShuttingDown, errShuttingDown)
			return
		}
		s.hold = holdNot
		if !s.down.end && s.ask.decision.HoldsAnswer(s.ask.method, s.code, s.ask.maybe.contentType, s.ask.maybe.length) {
			s.hold = holdWhole
			return
		}
	}
	if s.down.end || s.hold == holdNot || s.down.buf.waiting() > balancer.AnswerHoldBytes {
		s.release()
	}
}

// release lets an answer that was held go to the client.
func (s *stream) release() {
	s.beginHeld(s.down.end && s.down.buf.waiting() == 0 && s.down.trailers == nil)
	if s.done {
		return
	}
	if s.down.waits() {
		s.cc.enqueue(s, &s.down)
	}
}

// beginHeld sends the head of an answer that was held.
func (s *stream) beginHeld(end bool) {
	fields := s.ask.pending
	s.ask.pending, s.hold = nil, holdNot
	s.conclude()
	s.sendHead(fields, end)
	s.cc.sh.giveBack(fields)
}

// delivered notes that n bytes of the answer have moved on to the client.
func (s *stream) delivered(n int) {
	if n > 0 {
		s.idle = 0
		s.record.Sent(n)
	}
	early := min(n, int(s.early))
	s.early -= int32(early)
	if s.down.buf.waiting() == 0 {
		s.down.buf = nil
		s.giveRoom()
	}
	if n -= early; n > 0 && !s.down.end {
		s.creditBackend(n)
	}
	if s.down.ended {
		s.afterDown()
	}
}

// creditBackend gives n bytes of window back to the backend. A short answer that
// flows gets a larger window, as long as its client has not got many of those: what
// arrives for a client that then stops reading waits here. A watch would keep it for
// hours.
func (s *stream) creditBackend(n int) {
	if s.via == nil {
		return
	}
	if s.down.owed += int32(n); s.down.owed < s.target/2 {
		return
	}
	increment := int(s.down.owed)
	if s.class == balancer.Short && s.hold == holdNot && s.down.buf.waiting() == 0 && s.target < maxStreamWindow {
		grow := min(3*int(s.target), maxStreamWindow-int(s.target), maxExtraWindow-s.cc.extra)
		if grow > 0 && s.cc.sh.r.windows.Take(int64(grow)) {
			s.target += int32(grow)
			s.cc.extra += grow
			increment += grow
		}
	}
	s.down.receivable += int32(increment)
	s.down.owed = 0
	s.via.grant(s, increment)
}

// shrink gives back what the stream's window had beyond the usual.
func (s *stream) shrink() {
	extra := int(s.target) - backendWindow
	s.cc.extra -= extra
	s.cc.sh.r.windows.Give(int64(extra))
	s.target = backendWindow
}
