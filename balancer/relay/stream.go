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
	buf        *buffer // nil: nothing waits
	trailers   *[]hpack.Field
	end        bool  // nothing follows what is in buf
	ended      bool  // END_STREAM has been sent
	queued     bool  // in the ready list of the leg that it is sent on
	keep       bool  // what is sent is kept, to be sent again
	refusal    bool  // it is one of ours, for which nothing runs
	receivable int32 // bytes that the sender may still send us
	owed       int32 // bytes that have moved on and are not credited to the sender yet
	window     int64 // bytes that may be sent
}

// waits reports whether there is something to send.
func (l *lane) waits() bool { return l.buf.waiting() > 0 || l.end && !l.ended }

// add lets a piece wait to be sent.
func (l *lane) add(p []byte) {
	if l.buf == nil {
		l.buf = &buffer{keep: l.keep}
	}
	l.buf.add(p)
}

// holding is why an answer waits here although it has begun at the backend.
type holding uint8

const (
	holdNot   holding = iota
	holdPeek          // its body tells whether the backend shuts down
	holdWhole         // until it is whole, so that it can still come from elsewhere
)

// carrier is a connection to a backend, for the streams that are on it.
type carrier interface {
	// resume is called when more of the request body, or its end, waits to be sent.
	resume(s *stream)
	// grant lets the backend send n bytes more of the answer.
	grant(s *stream, n int)
	// leave takes the stream off. Where the backend has not ended it, or waits for more,
	// it is told so with the code; codeNone: both are done.
	leave(s *stream, c code)
}

// stream is one request and its answer, from a stream of a client connection to one
// of a backend connection. It is small, since watches are many and live for long: what
// only matters until the answer begins is in asking.
type stream struct {
	// Static after construction.
	cc     *clientConn
	id     uint32
	isHead bool // the method is HEAD

	// Static after begin; started is static after construction.
	class      balancer.Class
	credential balancer.Credential
	watch      bool
	started    time.Duration // since Relay.epoch
	verb       string
	record     *balancer.Record // nil: nothing is recorded of it

	// Guarded by sh.mu.
	ask       *asking // nil once the answer has begun at the client
	admission balancer.Admission

	length   int64 // of the request body, as declared, less what has come; -1: not declared
	credits  int64 // offset in the request body up to which the client has its window back
	bodyRoom int32 // bytes taken from Core.Bodies
	room     int32 // bytes taken from Core.Answers

	slot *backend.Slot    // nil: no backend at the moment
	at   *backend.Backend // of the last attempt; nil: none was made
	via  carrier          // the connection to it; nil: none
	bid  uint32           // its id there, where that is one of HTTP/2

	idle     uint8 // looks since the client last sent or took something: see stalled
	hold     holding
	answered bool // the answer has begun at the client
	done     bool
	code     int           // of the answer; 0: none
	left     int64         // bytes of its body that are still to come; -1: not declared
	early    int32         // bytes in down.buf for which the backend has its window back
	target   int32         // of the window at the backend
	endAt    time.Duration // of a watch while the balancer drains, since Relay.epoch; 0: not chosen yet

	up, down lane
}

// asking is what of a request matters until its answer begins at the client.
type asking struct {
	method   string
	path     string // without the query, which may hold a secret
	decision balancer.Decision
	head     []hpack.Field      // for a backend
	tried    []*backend.Backend // ruled out for this request
	losses   int
	refusals int
	pool     *pool // where it waits for a connection; nil: nowhere

	maybe   answerHead    // of an answer that is held, without its fields
	pending []hpack.Field // those
}

func newStream(cc *clientConn, id uint32, h requestHead, end bool) *stream {
	s := &stream{cc: cc, id: id, isHead: h.method == "HEAD", started: cc.sh.now.Sub(cc.sh.r.epoch), length: h.length, target: backendWindow}
	s.ask = cc.sh.borrowAsking()
	s.ask.method = h.method
	s.down.window = cc.initial
	s.up.receivable = clientWindow
	s.up.end = end
	s.up.keep = true
	return s
}

// begin decides what is to happen with the request, and does it.
func (s *stream) begin(h *requestHead) {
	sh := s.cc.sh
	core := sh.r.Core
	d := h.decisive()
	s.ask.path = d.Path
	decision := &s.ask.decision
	var refusal *balancer.Refusal
	switch {
	case sh.tooLarge():
		refusal = &balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest, Message: "the request header is too large (http.maxHeaderBytes in the balancer's configuration)"}
	case sh.blownUp():
		refusal = &balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest, Message: "the request header repeats fields far too often"}
	default:
		if refusal = h.unusable(); refusal == nil {
			d.Chain = s.cc.chain
			refusal = core.DecideInto(decision, &d, s.cc.client, sh.now)
			if refusal == nil && core.Memory.Short() {
				refusal = core.Memory.Afford(s.bodyLength(), s.cc.waiting())
			}
			if refusal == nil {
				s.admission, refusal = core.Admit(decision, s.cc.client, sh.now)
			}
		}
	}
	if decision.Verb == "" { // refused before anything was decided
		decision.Attributes = balancer.Attribute(d.Method, d.Path, d.RawQuery)
	}
	s.verb, s.class, s.credential, s.watch = decision.Verb, decision.Class, decision.Credential, decision.Watch()
	if core.Records != nil {
		if core.Records.Traces != nil {
			d.Traceparent = h.values("traceparent")
		}
		s.record = core.Records.Begin(decision, &d, s.cc.client, sh.now)
	}
	sh.r.Metrics.InFlight(s.class, 1)
	if refusal != nil {
		s.refuse(refusal)
		return
	}
	core.RetryBudget(s.credential).Deposit()
	s.ask.head = h.outgoing(&decision.Edits, sh.borrow())
	decision.Edits = balancer.Edits{}
	s.attempt()
}

// bodyLength is that of the request body as announced, -1 if it is not.
func (s *stream) bodyLength() int64 {
	if s.up.end {
		return 0
	}
	return s.length
}

// attempt chooses a backend and sends the request there, or waits for a connection.
func (s *stream) attempt() {
	sh := s.cc.sh
	s.slot = sh.r.Core.Pick(s.cc.client, &s.ask.decision, s.ask.tried, sh.now)
	if s.slot == nil {
		s.refuse(balancer.NoBackend())
		return
	}
	s.at = s.slot.Backend
	sh.pool(s.slot.Backend, s.credential).carry(s)
}

// failed decides what follows from an attempt that got no answer that can be used.
func (s *stream) failed(e balancer.Event, err error) {
	sh, b := s.cc.sh, s.slot.Backend
	tried, refusals := s.ask.tried, s.ask.refusals
	if e.Spares(refusals) {
		refusals++
	} else {
		tried = append(tried, b)
	}
	core := sh.r.Core
	a := balancer.Attempt{
		Event:    e,
		Method:   s.ask.method,
		BodyHeld: s.up.buf.whole(),
		DialOnly: s.ask.decision.DialRetryOnly(),
		Losses:   s.ask.losses,
		Left:     core.Left(e, tried, sh.now),
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
	if !again && e == balancer.Stalled {
		return
	}
	s.ask.tried, s.ask.refusals = tried, refusals
	sh.r.Log.Debug("attempt failed", "backend", b.Name, "event", e.String(), "again", again, "method", s.ask.method, "path", balancer.Shorten(s.ask.path), "auditID", balancer.Shorten(s.ask.decision.AuditID), "err", err)
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
	s.record.Retried(b.Name, e)
	if e.Sent() {
		s.ask.losses++
	}
	s.up.buf.rewind()
	s.up.ended, s.up.queued = false, false
	s.attempt()
}

// dropAnswer forgets an answer that was held.
func (s *stream) dropAnswer() {
	s.cc.sh.giveBack(s.ask.pending)
	s.ask.pending, s.hold = nil, holdNot
	s.down.buf = nil
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
		s.cc.held -= int(s.room)
		s.room = 0
	}
}

// bodyCame takes a piece of the request body, and its end.
func (s *stream) bodyCame(p []byte) {
	if s.down.ended || s.slot == nil {
		s.uploaded(len(p)) // the answer is there already: nobody wants it
		return
	}
	if len(p) > 0 {
		s.idle = 0
	}
	if s.up.keep && (s.up.buf.size()+len(p) > s.cc.sh.r.MaxHeldBody || !s.bodyShare().Take(int64(len(p)))) {
		s.dropBody()
	} else if s.up.keep {
		s.bodyRoom += int32(len(p))
	}
	s.up.add(p)
	if s.via != nil {
		s.via.resume(s)
	}
}

// dropBody lets go of what is kept of the request body to be sent again.
func (s *stream) dropBody() {
	s.up.keep = false
	s.up.buf.drop()
	s.bodyShare().Give(int64(s.bodyRoom))
	s.bodyRoom = 0
}

func (s *stream) bodyShare() balancer.Share { return s.cc.sh.r.Core.BodyRoom(s.cc.client) }

// sentUp notes that the request body has been sent on up to an offset that may be
// new.
func (s *stream) sentUp() {
	if sent := s.up.buf.gone(); sent > s.credits {
		n := sent - s.credits
		s.credits = sent
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
	if s.up.owed += int32(n); s.up.owed >= clientWindow/2 && !s.cc.over && !s.cc.closing {
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
	if s.via != nil && s.up.ended {
		c = codeNone
	}
	s.detach(c)
	s.finish()
}

// detach takes the stream off its backend connection. Where the backend has not
// ended it, or waits for more, it is reset with the code; codeNone: both are done.
func (s *stream) detach(c code) {
	if s.ask != nil && s.ask.pool != nil {
		s.ask.pool.forget(s)
	}
	via := s.via
	if via == nil {
		return
	}
	s.via = nil
	s.up.queued = false
	via.leave(s, c)
}

// leaveIfWhole takes the stream off a connection once both sides have ended it, while the
// rest of its answer waits for the client: the backend does not count it any more.
func (s *stream) leaveIfWhole(c carrier) {
	if s.via == c && s.down.end && s.up.ended && s.hold == holdNot {
		s.detach(codeNone)
	}
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
	s.admission.Release()
	// What of the body nobody took is credited all the same.
	s.cc.credit(int(s.up.buf.gone() + int64(s.up.buf.waiting()) - s.credits))
	s.forgetAsking()
	s.dropBody()
	s.up.buf, s.down.buf = nil, nil
	s.giveRoom()
	s.shrink()
	s.cc.forget(s)
	name := ""
	if s.at != nil {
		name = s.at.Name
	}
	sh.r.Metrics.InFlight(s.class, -1)
	o := balancer.Observation{
		Verb:       s.verb,
		Class:      s.class,
		Credential: s.credential,
		Backend:    name,
		Code:       s.code,
		Took:       sh.now.Sub(sh.r.epoch) - s.started,
		Span:       s.record.Span(),
	}
	sh.r.Metrics.Request(o)
	s.record.End(&o)
}

// clientGone ends a request for which there is nobody to answer.
func (s *stream) clientGone() {
	if s.done {
		return
	}
	if !s.answered {
		s.cc.sh.r.Metrics.Refused(balancer.ReasonClientGone)
		s.record.Refused(balancer.ReasonClientGone)
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
		s.record.Refused(balancer.ReasonBackendLost)
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

// endBy returns when a watch ends that is to end until by: at a random time, so that
// their clients do not all come to the next balancer or backend at once.
func (s *stream) endBy(by time.Time) time.Time {
	sh := s.cc.sh
	if s.endAt == 0 {
		s.endAt = sh.now.Sub(sh.r.epoch)
		if left := by.Sub(sh.now); left > 0 {
			s.endAt += rand.N(left)
		}
	}
	return sh.r.epoch.Add(s.endAt)
}

// refuse answers with the refusal's Status.
func (s *stream) refuse(r *balancer.Refusal) {
	sh := s.cc.sh
	s.detach(codeCancel)
	s.code = r.Code
	sh.r.Metrics.Refused(r.Reason)
	s.record.Refused(r.Reason)
	sh.r.Refusals.Log(r, &s.ask.decision, s.ask.method, s.ask.path, s.cc.client)
	body := r.Status(sh.r.Name)
	s.ask.maybe.status = strconv.Itoa(r.Code)
	fields := []hpack.Field{
		{Name: "content-type", Value: "application/json"},
		{Name: "content-length", Value: strconv.Itoa(len(body))},
	}
	if s.ask.decision.AuditID != "" {
		fields = append(fields, hpack.Field{Name: "audit-id", Value: s.ask.decision.AuditID})
	}
	if r.RetryAfter > 0 {
		fields = append(fields, hpack.Field{Name: "retry-after", Value: strconv.Itoa(r.RetryAfter)})
	}
	s.dropBody()
	s.down.end = true
	if s.isHead {
		s.sendHead(fields, true)
		return
	}
	s.down.add(body)
	s.down.refusal = true
	s.early = int32(len(body))
	s.sendHead(fields, false)
	s.cc.enqueue(s, &s.down)
}
