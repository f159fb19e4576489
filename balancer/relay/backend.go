package relay

import (
	"errors"
	"fmt"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

const (
	// backendWindow is how much of an answer may come before any of it has moved on
	// to the client: with a thousand streams that are not read, it is what they cost.
	// A stream that flows gets up to maxStreamWindow. All streams of one client
	// connection together get maxExtraWindow beyond the usual, and those of all
	// clients extraWindows.
	backendWindow   = 6 << 10
	maxStreamWindow = 512 << 10
	maxExtraWindow  = 512 << 10
	extraWindows    = 2 << 20
	// backendConnWindow is that of a connection, which many clients share: what
	// limits them is the windows of their streams.
	backendConnWindow = 1 << 30
	// assumedStreams is how many streams a backend takes before it has said so.
	assumedStreams = 100
	// assumedList is how large a header list a backend takes before it has said so: as
	// large as kube-apiserver does, whose server ends the connection, and with it others'
	// requests, where more frames of one follow (net/http, http2Framer.readMetaFrame).
	assumedList = 1<<20 + headerSlack
	// lastStreamID is where a connection is given up, long before ids run out.
	lastStreamID = 1 << 30
	// maxAnswerHead bounds the decoded head of a backend's answer, in bytes.
	maxAnswerHead = 1 << 20
)

var (
	errShuttingDown = errors.New("the kube-apiserver is shutting down")
	errSilent       = errors.New("no answer to an HTTP/2 PING")
	errGoAway       = errors.New("GOAWAY before the request was processed")
	errDead         = errors.New("the backend is dead")
	errStalled      = errors.New("the backend fails its checks and has not answered")
	errRemoved      = errors.New("the backend has been taken out of the configuration")
)

// backendConn is a connection to a backend, for requests of one credential.
type backendConn struct {
	conn

	pool *pool // static

	// Guarded by sh.mu.
	streams    streams
	nextID     uint32
	maxStreams int
	maxList    int64  // SETTINGS_MAX_HEADER_LIST_SIZE; 0: none
	gone       bool   // no new streams: GOAWAY, or retired
	cooling    [2]int // streams that were reset unanswered, since the last tick and before it
}

// maxUnsent is how many bytes may wait for a backend that is slow to read before no
// more requests are added to them.
const maxUnsent = 256 << 10

// hasPlace reports whether the connection takes one more stream. One that was reset
// before it was answered keeps its place for a moment: the backend's handler may
// still run, and Go's server ends connections on which too many do.
func (bc *backendConn) hasPlace() bool {
	return !bc.gone && bc.streams.n+bc.cooling[0]+bc.cooling[1] < bc.maxStreams
}

// listTaken is the size of the largest header list that the backend takes; 0: of any.
func (bc *backendConn) listTaken() int64 {
	if !bc.settled {
		return assumedList
	}
	return bc.maxList
}

// open sends the head of a request as a new stream.
func (bc *backendConn) open(s *stream) {
	if limit := bc.listTaken(); limit > 0 && listSize(s.ask.head) > limit {
		s.slot.Release()
		s.slot = nil
		s.refuse(&balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest,
			Message: "the request header, with what the balancer adds to it, is larger than the kube-apiserver takes"})
		return
	}
	s.via, s.bid = bc, bc.nextID
	bc.nextID += 2
	bc.streams.put(s.bid, s)
	s.up.window, s.down.receivable = bc.initial, backendWindow
	bc.beginBlock()
	for i := range s.ask.head {
		f := &s.ask.head[i]
		if f.Value == "" && f.Which() == hpack.Authority {
			named := hpack.Make(hpack.Authority, bc.pool.backend.Address) // HTTP/2 must name one
			f = &named
		}
		bc.encode(f)
	}
	end := s.up.end && s.up.buf.waiting() == 0
	bc.write(bc.appendBlock(s.bid, end))
	s.up.ended = end
	if !end {
		bc.enqueue(s, &s.up)
	}
	if bc.nextID > lastStreamID {
		bc.retire()
	}
}

func (bc *backendConn) resume(s *stream) { bc.enqueue(s, &s.up) }

func (bc *backendConn) grant(s *stream, n int) {
	bc.write(appendWindowUpdate(bc.begin(short), s.bid, uint32(n)))
}

func (bc *backendConn) prepare() {}

func (bc *backendConn) lastID() uint32 { return 0 } // no backend opens streams

func (bc *backendConn) spend(frame) error { return nil } // a backend hurts nobody but itself

func (bc *backendConn) idle(id uint32) bool { return id >= bc.nextID || id%2 == 0 }

func (bc *backendConn) pump() {
	bc.pumpReady(
		func(s *stream) (*lane, uint32) {
			if s.via != bc {
				return nil, 0
			}
			return &s.up, s.bid
		},
		func(s *stream, _ int) { s.sentUp() })
}

func (bc *backendConn) headers(id uint32, end bool) error {
	s := bc.streams.get(id)
	if s == nil {
		return nil // its client has gone
	}
	bc.pool.backend.Answered(bc.sh.now)
	if s.down.end {
		bc.broken(s, "HEADERS after the end of the answer")
		return nil
	}
	if bc.sh.tooLarge() {
		bc.broken(s, "the head of the answer is too large")
		return nil
	}
	if s.code != 0 {
		bc.trailers(s, end)
		return nil
	}
	h, problem := parseAnswer(bc.sh.fields)
	if problem == "" && h.code < 200 && end {
		problem = "an interim answer that ends the stream"
	}
	if problem == "" && end && h.length > 0 && !s.bodyless(h.code) {
		problem = "an end before the body that was announced"
	}
	if problem != "" {
		bc.broken(s, "the head of the answer has "+problem)
		return nil
	}
	if h.code < 200 {
		s.interim(&h)
		return nil
	}
	s.answerCame(&h, end)
	return nil
}

// trailers ends an answer.
func (bc *backendConn) trailers(s *stream, end bool) {
	if !end {
		bc.broken(s, "trailers that do not end the answer")
		return
	}
	if problem := badTrailers(bc.sh.fields); problem != "" {
		bc.broken(s, problem)
		return
	}
	if s.left > 0 {
		bc.broken(s, "a body of another length than declared")
		return
	}
	s.trailersCame(bc.sh.fields)
	s.leaveIfWhole(bc)
}

// broken gives up a stream on which the backend broke the rules.
func (bc *backendConn) broken(s *stream, what string) {
	s.detach(codeProtocol)
	s.lost(balancer.Lost, errors.New(what))
}

func (bc *backendConn) data(id uint32, p []byte, size int, end bool) error {
	bc.credit(size)
	s := bc.streams.get(id)
	if s == nil {
		return nil
	}
	bc.pool.backend.Answered(bc.sh.now)
	s.down.receivable -= int32(size)
	switch {
	case s.code == 0 || s.down.end:
		bc.broken(s, "DATA before the head of the answer or after its end")
	case s.down.receivable < 0:
		s.detach(codeFlowControl)
		s.lost(balancer.Lost, errors.New("more DATA than the window allows"))
	case s.isHead && len(p) > 0:
		bc.broken(s, "DATA in answer to HEAD")
	case s.left >= 0 && (int64(len(p)) > s.left || end && int64(len(p)) < s.left):
		bc.broken(s, "a body of another length than declared")
	default:
		if s.left >= 0 {
			s.left -= int64(len(p))
		}
		if pad := size - len(p); pad > 0 && !end {
			s.creditBackend(pad)
		}
		s.dataCame(p, end)
		s.leaveIfWhole(bc)
	}
	return nil
}

func (bc *backendConn) reset(id uint32, c code) error {
	s := bc.streams.get(id)
	if s == nil {
		return nil
	}
	s.detach(codeNone)
	e := balancer.Lost
	if c == codeRefusedStream && s.code == 0 {
		e = balancer.Refused
	}
	s.lost(e, fmt.Errorf("the kube-apiserver reset the stream with error code %d", c))
	return nil
}

func (bc *backendConn) streamWindow(id, increment uint32) error {
	s := bc.streams.get(id)
	if s == nil {
		return nil
	}
	if s.up.window += int64(increment); increment == 0 || s.up.window > maxWindow {
		bc.broken(s, "a wrong WINDOW_UPDATE")
		return nil
	}
	if s.up.waits() {
		bc.enqueue(s, &s.up)
	}
	return nil
}

func (bc *backendConn) windowChanged(delta int64) error {
	for _, s := range bc.streams.all() {
		if s.up.window += delta; s.up.window > maxWindow {
			return &connError{codeFlowControl, "stream window too large"}
		}
		if s.up.waits() {
			bc.enqueue(s, &s.up)
		}
	}
	return nil
}

// goAway takes the connection out of use. What the backend has not processed goes
// elsewhere, or to another connection; the rest finishes.
func (bc *backendConn) goAway(last uint32, _ code) {
	bc.gone, bc.pool.wentAway = true, bc.sh.now
	for _, s := range bc.streams.all() {
		if s.via != bc || s.bid <= last {
			continue
		}
		e := balancer.Refused
		if s.code != 0 {
			e = balancer.Lost // it has begun to answer, whatever it says
		}
		s.detach(codeNone)
		s.lost(e, errGoAway)
	}
	bc.closeIfDone()
}

// retire takes the connection out of use and closes it when its last stream ends.
func (bc *backendConn) retire() {
	bc.gone = true
	bc.closeIfDone()
}

func (bc *backendConn) closeIfDone() {
	if bc.gone && bc.streams.n == 0 && !bc.closing && !bc.over {
		bc.end(nil)
	}
}

func (bc *backendConn) leave(s *stream, c code) {
	if c != codeNone && !bc.over {
		bc.write(appendReset(bc.begin(short), s.bid, c))
		if s.code == 0 {
			bc.cooling[0]++
		}
	}
	bc.streams.remove(s.bid)
	if bc.over {
		return
	}
	bc.closeIfDone()
	if len(bc.pool.waiting) > 0 {
		bc.pool.serveWaiting()
	}
}

// ended tells all streams that their backend is lost.
func (bc *backendConn) ended(err error) {
	p := bc.pool
	for i, other := range p.conns {
		if other == bc {
			p.conns = append(p.conns[:i], p.conns[i+1:]...)
			break
		}
	}
	e := p.loss()
	if errors.Is(err, errSilent) {
		e = balancer.Died
	}
	if err == nil {
		err = errors.New("the connection ended")
	}
	for _, s := range bc.streams.all() {
		if s.via == bc {
			s.lost(e, err)
		}
	}
	p.serveWaiting()
}

// interim passes on an answer that is not final, such as 103.
func (s *stream) interim(h *answerHead) {
	cc := s.cc
	if cc.over || cc.closing || len(cc.out) > outLimit {
		return // nobody has to see it
	}
	cc.beginBlock()
	status := hpack.Make(hpack.Status, h.status)
	cc.encode(&status)
	for i := range h.fields {
		cc.encode(&h.fields[i])
	}
	cc.write(cc.appendBlock(s.id, false))
}
