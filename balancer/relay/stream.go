package relay

import (
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/relay/hpack"
	"apiserver-lb/health"
)

// lane is one direction of a stream: what waits to be sent, and the windows on both
// of its legs.
type lane struct {
	buf        buffer
	end        bool // nothing follows what is in buf
	ended      bool // END_STREAM has been sent
	queued     bool // in the ready list of the leg that it is sent on
	trailers   []hpack.Field
	window     int64 // bytes that may be sent
	receivable int   // bytes that the sender may still send us
	owed       int   // bytes that have moved on and are not credited to the sender yet
}

// waits reports whether there is something to send.
func (l *lane) waits() bool { return l.buf.unsent > 0 || l.end && !l.ended }

// holding is why an answer waits here although it has begun at the backend.
type holding uint8

const (
	holdNot   holding = iota
	holdPeek          // its body tells whether the backend shuts down
	holdWhole         // until it is whole, so that it can still come from elsewhere
)

// stream is one request and its answer, from a stream of a client connection to one
// of a backend connection.
type stream struct {
	// Static after construction.
	cc      *clientConn
	id      uint32
	started time.Time
	method  string

	// Static after begin.
	verb       string
	class      balancer.Class
	credential balancer.Credential
	watch      bool

	// Guarded by sh.mu.
	path     string             // without the query, which may hold a secret; until the answer begins
	decision *balancer.Decision // likewise: a watch need not carry what only its beginning needs

	head    []hpack.Field // for a backend; nil once it cannot be sent again
	length  int64         // of the request body, as declared, less what has come; -1: not declared
	credits int64         // offset in the request body up to which the client has its window back

	bodyRoom int // bytes taken from Relay.bodies

	slot     *backend.Slot      // nil: no backend at the moment
	at       *backend.Backend   // of the last attempt; nil: none was made
	tried    []*backend.Backend // ruled out for this request
	losses   int
	refusals int
	pool     *pool        // where it waits for a connection; nil: nowhere
	bc       *backendConn // nil: on none
	bid      uint32       // its id there

	code     int // of the answer; 0: none
	hold     holding
	pending  []hpack.Field // the head of an answer that is held
	maybe    answerHead    // of it, without its fields
	room     int           // bytes taken from Core.Answers
	left     int64         // bytes of its body that are still to come; -1: not declared
	early    int           // bytes in down.buf for which the backend has its window back
	target   int           // of the window at the backend
	answered bool          // the answer has begun at the client
	done     bool
	endAt    time.Time // of a watch while the balancer drains

	up, down lane
}

func newStream(cc *clientConn, id uint32, h requestHead, end bool) *stream {
	s := &stream{cc: cc, id: id, started: cc.sh.now, method: h.method, length: h.length, target: backendWindow}
	s.down.window = cc.initial
	s.up.receivable = clientWindow
	s.up.end = end
	s.up.buf.keep = true
	return s
}

// begin decides what is to happen with the request, and does it.
func (s *stream) begin(h *requestHead) {
	sh := s.cc.sh
	core := sh.r.Core
	d := h.decisive()
	s.path = d.Path
	var refusal *balancer.Refusal
	switch {
	case sh.tooLarge():
		refusal = &balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest, Message: "the request header is too large (http.maxHeaderBytes in the balancer's configuration)"}
	default:
		if refusal = h.unusable(); refusal == nil {
			d.Chain = s.cc.chain
			s.decision, refusal = core.Decide(&d, s.cc.client, sh.now)
		}
	}
	if refusal != nil {
		s.decision = &balancer.Decision{Attributes: balancer.Attribute(d.Method, d.Path, d.RawQuery)}
	}
	s.verb, s.class, s.credential, s.watch = s.decision.Verb, s.decision.Class, s.decision.Credential, s.decision.Watch()
	sh.r.Metrics.InFlight(s.class, 1)
	if refusal != nil {
		s.refuse(refusal)
		return
	}
	core.RetryBudget(s.credential).Deposit()
	s.head = h.outgoing(&s.decision.Edits, sh.borrow())
	s.decision.Edits = balancer.Edits{}
	s.attempt()
}

// attempt chooses a backend and sends the request there, or waits for a connection.
func (s *stream) attempt() {
	sh := s.cc.sh
	s.slot = sh.r.Core.Pick(s.cc.client, s.decision, s.tried, sh.now)
	if s.slot == nil {
		s.refuse(balancer.NoBackend())
		return
	}
	s.at = s.slot.Backend
	p := sh.pool(s.slot.Backend, s.credential)
	if bc := p.reserve(); bc != nil {
		bc.open(s)
		return
	}
	p.wait(s)
}

// failed decides what follows from an attempt that got no answer that can be used.
func (s *stream) failed(e balancer.Event, err error) {
	sh, b := s.cc.sh, s.slot.Backend
	if e.Spares(s.refusals) {
		s.refusals++
	} else {
		s.tried = append(s.tried, b)
	}
	core := sh.r.Core
	a := balancer.Attempt{
		Event:    e,
		Method:   s.method,
		BodyHeld: s.up.buf.whole(),
		DialOnly: s.decision.DialRetryOnly(),
		Losses:   s.losses,
		Left:     core.Left(s.tried, sh.now),
		Err:      err,
	}
	switch e {
	case balancer.DialFailed:
		sh.r.Passive(b, health.DialFailed)
	case balancer.Lost:
		sh.r.Passive(b, health.ConnLost)
	case balancer.ShuttingDown:
		sh.r.Passive(b, health.ShutdownAnnounced)
	}
	again, refusal := a.Again(core.RetryBudget(s.credential))
	sh.r.Log.Debug("attempt failed", "backend", b.Name, "event", e.String(), "again", again, "method", s.method, "path", balancer.Shorten(s.path), "auditID", balancer.Shorten(s.decision.AuditID), "err", err)
	if !again && e == balancer.ShuttingDown {
		s.release() // its own words, with its own Retry-After
		return
	}
	s.detach(codeCancel)
	s.slot.Release()
	s.slot = nil
	s.dropAnswer()
	if !again {
		s.refuse(refusal)
		return
	}
	sh.r.Metrics.Retried(b.Name, e)
	if e == balancer.Lost || e == balancer.Died {
		s.losses++
	}
	s.up.buf.rewind()
	s.up.ended, s.up.queued = false, false
	s.attempt()
}

// dropAnswer forgets an answer that was held.
func (s *stream) dropAnswer() {
	s.cc.sh.giveBack(s.pending)
	s.pending, s.hold = nil, holdNot
	s.down.buf.discard()
	s.down.end, s.down.trailers, s.down.owed = false, nil, 0
	s.shrink()
	s.early = 0
	s.code = 0
	s.giveRoom()
}

// maxHeldAnswers bounds what one client connection takes of Core.Answers, in bytes:
// one that does not read its answers must not leave others without.
const maxHeldAnswers = 512 << 10

func (s *stream) giveRoom() {
	if s.room > 0 {
		s.cc.sh.r.Core.Answers.Give(int64(s.room))
		s.cc.held -= s.room
		s.room = 0
	}
}

// bodyCame takes a piece of the request body, and its end.
func (s *stream) bodyCame(p []byte) {
	b := &s.up.buf
	if s.down.ended || s.slot == nil {
		s.uploaded(len(p)) // the answer is there already: nobody wants it
		return
	}
	if b.keep && (b.size()+len(p) > s.cc.sh.r.MaxHeldBody || !s.cc.sh.r.bodies.Take(int64(len(p)))) {
		s.dropBody()
	} else if b.keep {
		s.bodyRoom += len(p)
	}
	b.add(p)
	if s.bc != nil {
		s.bc.enqueue(s, &s.up)
	}
}

// dropBody lets go of what is kept of the request body to be sent again.
func (s *stream) dropBody() {
	s.up.buf.drop()
	s.cc.sh.r.bodies.Give(int64(s.bodyRoom))
	s.bodyRoom = 0
}

// sentUp notes that the request body has been sent on up to an offset that may be
// new.
func (s *stream) sentUp() {
	if n := s.up.buf.sent - s.credits; n > 0 {
		s.credits = s.up.buf.sent
		s.uploaded(int(n))
	}
}

// uploaded gives n bytes of window back to the client.
func (s *stream) uploaded(n int) {
	if n == 0 {
		return
	}
	s.cc.credit(n)
	if s.up.end {
		return
	}
	if s.up.owed += n; s.up.owed >= clientWindow/2 && !s.cc.over && !s.cc.closing {
		s.up.receivable += s.up.owed
		s.cc.write(appendWindowUpdate(s.cc.begin(short), s.id, uint32(s.up.owed)))
		s.up.owed = 0
	}
}

// afterDown ends a stream whose answer has been sent. A body that is still on its
// way is not wanted any more.
func (s *stream) afterDown() {
	if s.done {
		return
	}
	if !s.up.end {
		s.cc.undo(s.id, codeNone)
	}
	c := codeCancel
	if s.bc != nil && s.up.ended {
		c = codeNone
	}
	s.detach(c)
	s.finish()
}

// detach takes the stream off its backend connection. Where the backend has not
// ended it, or waits for more, it is reset with the code; codeNone: both are done.
func (s *stream) detach(c code) {
	if p := s.pool; p != nil {
		p.forget(s)
	}
	bc := s.bc
	if bc == nil {
		return
	}
	s.bc = nil
	s.up.queued = false
	if c != codeNone && !bc.over {
		bc.write(appendReset(bc.begin(short), s.bid, c))
		if s.code == 0 {
			bc.cooling[0]++
		}
	}
	bc.forget(s)
}

// finish gives back whatever the stream has, once.
func (s *stream) finish() {
	if s.done {
		return
	}
	s.done = true
	sh := s.cc.sh
	s.detach(codeCancel)
	if s.slot != nil {
		s.slot.Release()
		s.slot = nil
	}
	// What of the body nobody took is credited all the same.
	s.cc.credit(int(s.up.buf.sent + int64(s.up.buf.unsent) - s.credits))
	s.forgetHead()
	s.cc.sh.giveBack(s.pending)
	s.pending = nil
	s.dropBody()
	s.up.buf.discard()
	s.down.buf.discard()
	s.giveRoom()
	s.shrink()
	s.cc.forget(s)
	name := ""
	if s.at != nil {
		name = s.at.Name
	}
	sh.r.Metrics.InFlight(s.class, -1)
	sh.r.Metrics.Request(balancer.Observation{
		Verb:       s.verb,
		Class:      s.class,
		Credential: s.credential,
		Backend:    name,
		Code:       s.code,
		Took:       sh.now.Sub(s.started),
	})
}

// clientGone ends a request for which there is nobody to answer.
func (s *stream) clientGone() {
	if s.done {
		return
	}
	if !s.answered {
		s.cc.sh.r.Metrics.Refused(balancer.ReasonClientGone)
	}
	s.finish()
}

// lost ends what a backend owed: the backend has died, or has given the stream up.
// A watch ends as if it had run its time: a clean end makes an informer resume at
// the last resourceVersion, where a reset costs it a new LIST and the events in
// between. Any other answer that has begun breaks off, so that nobody takes a part
// for the whole.
func (s *stream) lost(e balancer.Event, err error) {
	s.detach(codeNone)
	switch {
	case s.down.end:
		// All of it is here.
		if !s.up.ended {
			s.up.buf.discard()
		}
	case !s.answered:
		s.failed(e, err)
	case s.resumable():
		s.endWatch()
	default:
		s.cc.undo(s.id, codeInternal)
		s.finish()
	}
}

// resumable reports whether the answer is a watch, which may end at any point.
func (s *stream) resumable() bool { return s.watch && s.code == http.StatusOK }

// endWatch ends a watch cleanly.
func (s *stream) endWatch() {
	s.detach(codeCancel)
	if !s.down.end {
		s.down.end = true
		s.cc.enqueue(s, &s.down)
	}
}

// endBy returns when a watch ends while the balancer drains: at a random time, so
// that their clients do not all come to the next balancer at once.
func (s *stream) endBy() time.Time {
	if s.endAt.IsZero() {
		now := s.cc.sh.now
		s.endAt = now
		if left := s.cc.sh.until.Sub(now); left > 0 {
			s.endAt = now.Add(rand.N(left))
		}
	}
	return s.endAt
}

// refuse answers with the refusal's Status.
func (s *stream) refuse(r *balancer.Refusal) {
	sh := s.cc.sh
	s.detach(codeCancel)
	s.code = r.Code
	sh.r.Metrics.Refused(r.Reason)
	sh.r.Refusals.Log(r, s.decision, s.method, s.path, s.cc.client)
	body := r.Status(sh.r.Name)
	s.maybe.status = strconv.Itoa(r.Code)
	fields := []hpack.Field{
		{Name: "content-type", Value: "application/json"},
		{Name: "content-length", Value: strconv.Itoa(len(body))},
	}
	if s.decision.AuditID != "" {
		fields = append(fields, hpack.Field{Name: "audit-id", Value: s.decision.AuditID})
	}
	if r.RetryAfter > 0 {
		fields = append(fields, hpack.Field{Name: "retry-after", Value: strconv.Itoa(r.RetryAfter)})
	}
	s.forgetHead()
	s.dropBody()
	s.down.end = true
	if s.method == "HEAD" {
		s.sendHead(fields, true)
		return
	}
	s.down.buf.add(body)
	s.early = len(body)
	s.sendHead(fields, false)
	s.cc.enqueue(s, &s.down)
}
