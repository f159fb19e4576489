package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/relay/hpack"
	"apiserver-lb/health"
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

// pool is the connections of a shard to one backend for one credential.
type pool struct {
	// Static after construction.
	sh         *shard
	backend    *backend.Backend
	credential balancer.Credential

	// Guarded by sh.mu.
	conns   []*backendConn
	waiting []*stream
	dialing *dialing // the dial under way; nil: none
}

type dialing struct {
	cancel context.CancelFunc
	stale  bool  // what is dialled is out of use already
	dead   error // it is of no use, and those who wait are to go elsewhere
}

// pool returns the pool for a backend and a credential.
func (sh *shard) pool(b *backend.Backend, c balancer.Credential) *pool {
	key := poolKey{b, c}
	p := sh.pools[key]
	if p == nil {
		p = &pool{sh: sh, backend: b, credential: c}
		sh.pools[key] = p
	}
	return p
}

// reserve returns a connection that takes one more stream, or nil.
func (p *pool) reserve() *backendConn {
	if len(p.waiting) > 0 {
		return nil // those who came before are first
	}
	return p.free()
}

func (p *pool) free() *backendConn {
	for _, bc := range p.conns {
		if bc.hasPlace() && len(bc.out) < maxUnsent {
			return bc
		}
	}
	return nil
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

// wait puts a stream in line for a connection, and dials one unless that is being
// done: one at a time, and all who wait share its fate.
func (p *pool) wait(s *stream) {
	s.ask.pool = p
	p.waiting = append(p.waiting, s)
	p.dial()
}

func (p *pool) dial() {
	if p.dialing != nil || p.sh.closed {
		return
	}
	for _, bc := range p.conns {
		if bc.hasPlace() {
			return // it takes them as soon as it has written what waits
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.dialing = &dialing{cancel: cancel}
	go p.connect(ctx, p.dialing)
}

// forget takes a stream out of the line.
func (p *pool) forget(s *stream) {
	s.ask.pool = nil
	for i, w := range p.waiting {
		if w == s {
			p.waiting = append(p.waiting[:i], p.waiting[i+1:]...)
			return
		}
	}
}

// serveWaiting sends on those who wait, as far as there is room.
func (p *pool) serveWaiting() {
	for len(p.waiting) > 0 {
		bc := p.free()
		if bc == nil {
			p.dial()
			return
		}
		s := p.waiting[0]
		p.forget(s)
		bc.open(s)
	}
}

// connect dials for all who wait, and then reads what comes on the connection.
func (p *pool) connect(ctx context.Context, d *dialing) {
	defer d.cancel()
	sh := p.sh
	t, err := sh.r.dialTLS(ctx, p.backend, p.credential)
	sh.lock()
	p.dialing = nil
	dialled := err == nil
	if d.dead != nil {
		err = d.dead
	}
	if err != nil || d.stale {
		waiting := p.waiting
		p.waiting = nil
		for _, s := range waiting {
			s.ask.pool = nil
		}
		for _, s := range waiting {
			switch {
			case err == nil:
				p.wait(s)
			case !s.done:
				s.failed(balancer.DialFailed, err)
			}
		}
		sh.unlockAndFlush()
		if dialled {
			sh.r.hangUp(p, t)
		}
		return
	}
	bc := &backendConn{pool: p, nextID: 1, maxStreams: assumedStreams}
	bc.init(sh, bc, t, t.NetConn().(*Sock), maxAnswerHead)
	bc.receivable, bc.creditAt = backendConnWindow, backendConnWindow/4
	p.conns = append(p.conns, bc)
	out := appendSettings(append(bc.begin(4*short), preface...),
		setting{settingEnablePush, 0},
		setting{settingInitialWindow, backendWindow},
		setting{settingMaxHeaderListSize, maxAnswerHead})
	bc.write(appendWindowUpdate(out, 0, backendConnWindow-defaultWindow))
	p.serveWaiting()
	sh.unlockAndFlush()

	err = bc.read("")
	sh.lock()
	bc.end(err)
	sh.unlockAndFlush()
	sh.r.hangUp(p, t)
	if !expected(err) {
		sh.r.Log.Debug("backend connection ended", "backend", p.backend.Name, "credential", p.credential.String(), "err", err)
	}
}

// dialTLS connects to the backend and proves that it is the one, within the dial
// timeout. Only connections of the asserted credential bear the front-proxy
// certificate.
func (r *Relay) dialTLS(ctx context.Context, b *backend.Backend, c balancer.Credential) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, r.DialTimeout)
	defer cancel()
	nc, err := r.Dial(ctx, "tcp", b.Address)
	if err != nil {
		return nil, err
	}
	t := tls.Client(NewSock(nc), r.TLS.BackendConfig(b.ServerName, c == balancer.Asserted, "h2", "http/1.1"))
	if err := t.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS to %s: %w", b.Address, err)
	}
	speaks := t.ConnectionState().NegotiatedProtocol == "h2"
	if b.SpeaksHTTP2(speaks) && !speaks {
		r.Log.Warn("the backend speaks HTTP/1.1 only: HTTP/2 clients are served over HTTP/1.1 as well, at a higher cost", "backend", b.Name)
		go r.Resettle()
	}
	if !speaks {
		nc.Close()
		return nil, fmt.Errorf("%s does not speak HTTP/2", b.Address)
	}
	r.Opened(b, c, 1)
	return t, nil
}

func (r *Relay) hangUp(p *pool, t *tls.Conn) {
	t.NetConn().Close()
	r.Opened(p.backend, p.credential, -1)
}

// Learn finds out whether the backend speaks HTTP/2 (Suits), where it can be reached
// at all: before the first clients come, and whenever it has come back.
func (r *Relay) Learn(ctx context.Context, b *backend.Backend) {
	if t, err := r.dialTLS(ctx, b, balancer.Anonymous); err == nil {
		t.Close()
		r.Opened(b, balancer.Anonymous, -1)
	}
}

// open sends the head of a request as a new stream.
func (bc *backendConn) open(s *stream) {
	if bc.maxList > 0 && listSize(s.ask.head) > bc.maxList {
		s.slot.Release()
		s.slot = nil
		s.refuse(&balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest,
			Message: "the request header, with what the balancer adds to it, is larger than the kube-apiserver takes"})
		return
	}
	s.bc, s.bid = bc, bc.nextID
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

func (bc *backendConn) prepare() {}

func (bc *backendConn) lastID() uint32 { return 0 } // no backend opens streams

func (bc *backendConn) spend(frame) error { return nil } // a backend hurts nobody but itself

func (bc *backendConn) idle(id uint32) bool { return id >= bc.nextID || id%2 == 0 }

func (bc *backendConn) pump() {
	bc.pumpReady(
		func(s *stream) (*lane, uint32) {
			if s.bc != bc {
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
	for i := range bc.sh.fields {
		if problem := badField(&bc.sh.fields[i]); problem != "" {
			bc.broken(s, "the trailers have "+problem)
			return
		}
	}
	if s.left > 0 {
		bc.broken(s, "a body of another length than declared")
		return
	}
	if len(bc.sh.fields) > 0 {
		trailers := append([]hpack.Field(nil), bc.sh.fields...)
		s.down.trailers = &trailers
	}
	s.down.end = true
	if s.hold != holdNot {
		s.judgeHeld()
		return
	}
	s.cc.enqueue(s, &s.down)
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
	s.down.receivable -= size
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
	bc.gone = true
	for _, s := range bc.streams.all() {
		if s.bc != bc || s.bid <= last {
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

// forget is called when a stream has left.
func (bc *backendConn) forget(s *stream) {
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
	e := balancer.Lost
	if errors.Is(err, errSilent) || p.backend.State() == health.Dead {
		e = balancer.Died
	}
	if err == nil {
		err = errors.New("the connection ended")
	}
	for _, s := range bc.streams.all() {
		if s.bc == bc {
			s.lost(e, err)
		}
	}
	p.serveWaiting()
}

// tick asks a backend that is silent whether it is there. It is asked while
// requests wait, and from time to time when none does.
func (p *pool) tick() {
	now := p.sh.now
	for _, bc := range append([]*backendConn(nil), p.conns...) {
		bc.cooling = [2]int{0, bc.cooling[0]}
		if p.surplus(bc) {
			bc.retire()
			continue
		}
		after := p.sh.r.PingAfter
		if bc.streams.n == 0 {
			after = idlePingAfter
		}
		switch {
		case bc.pingLost(now, p.sh.r.PingTimeout):
			p.sh.r.Passive(p.backend, health.NoAnswer)
			bc.end(errSilent)
		case bc.pingSent.IsZero() && bc.silence(now) > after:
			bc.ping(now)
		}
	}
	p.serveWaiting()
}

// surplusAfter is how long a connection that a burst has left may be idle.
const surplusAfter = 10 * time.Second

// surplus reports whether a connection has been idle for long beside another one that
// has a place.
func (p *pool) surplus(bc *backendConn) bool {
	if bc.streams.n > 0 || bc.cooling != [2]int{} || bc.silence(p.sh.now) < surplusAfter {
		return false
	}
	return slices.ContainsFunc(p.conns, func(other *backendConn) bool { return other != bc && other.hasPlace() })
}

// idlePingAfter is how long a connection without a stream may be silent.
const idlePingAfter = 30 * time.Second

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
