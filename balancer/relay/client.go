package relay

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"apiserver-lb/balancer"
)

// clientConn is the connection of a client.
type clientConn struct {
	conn

	// Static after construction.
	client *balancer.Client
	chain  []*x509.Certificate

	// Guarded by sh.mu.
	streams streams
	last    uint32 // the highest id that the client has opened
	late    uint32 // the same after the last GOAWAY: what comes on such streams is ignored
	leaving leaving
	leaveAt time.Time // when the second GOAWAY is due
	lapsed  time.Time // since when the certificate has not counted any more; zero: it does, or there is none
	idleAt  time.Time // when the last stream ended
	lookAt  time.Time // when streams that stand still are looked for
	held    int       // bytes of answers that are held
	extra   int       // bytes of window at backends beyond the usual, of all streams

	undone  []uint32 // ids of streams that we reset of late, in a ring once it is full
	undoneN int      // how many there were
	resets  balancer.Bucket
	control balancer.Bucket
	updates int // WINDOW_UPDATEs that DATA has drawn
}

// leaving is how far a connection is on its way out (RFC 9113, section 6.8).
type leaving uint8

const (
	staying  leaving = iota
	warned           // GOAWAY with the highest id there is: no new streams, please
	finished         // GOAWAY with the last id that we have seen: later ones are ignored
)

const (
	// clientWindow is how much of a request body may wait here for its backend, and
	// clientConnWindow the same for all bodies of a connection: a client that fills
	// it waits for itself alone.
	clientWindow     = 128 << 10
	clientConnWindow = 1 << 20
	// headerSlack is how much larger than its limit a header list may be, as with
	// Go's server in kube-apiserver (net/http, http2Server.maxHeaderListSize).
	headerSlack = 320
	// leaveAfter is the time between the two GOAWAYs, for requests under way.
	leaveAfter = time.Second
	// cutAfter is how long a client that is slow to read may take for what is left
	// when its connection ends well.
	cutAfter = 30 * time.Second
	// A client that was silent for pingAfter is asked whether it is there; one that
	// does not answer within pingTimeout is gone.
	clientPingAfter   = 30 * time.Second
	clientPingTimeout = 15 * time.Second
)

// Serve carries the requests of a client connection whose TLS handshake is over and
// has agreed on h2. It returns when the connection has ended; the caller closes it.
//
// Its frame is small, as are those of read and readAll: a goroutine that is parked
// beneath them keeps the smallest stack that the runtime shrinks to.
func (r *Relay) Serve(t *tls.Conn, client *balancer.Client) {
	defer failStop()
	if cc := r.admit(t, client); cc != nil {
		cc.dismiss(cc.read(preface))
	}
}

// admit begins a connection; nil: the relay has been closed.
//
//go:noinline
func (r *Relay) admit(t *tls.Conn, client *balancer.Client) *clientConn {
	sock, ok := t.NetConn().(*Sock)
	if !ok {
		panic("relay: a connection that did not come from Wrap")
	}
	sh := r.shards[r.turn.Add(1)%uint64(len(r.shards))]
	cc := &clientConn{client: client, chain: t.ConnectionState().PeerCertificates}
	cc.init(sh, cc, t, sock, r.MaxHeaderBytes+headerSlack)
	sock.lazy = true // not so at backends: what they leave unfinished must go elsewhere at once
	cc.receivable, cc.creditAt = clientConnWindow, clientConnWindow/2
	sh.lock()
	cc.idleAt, cc.since = sh.now, sh.now
	if sh.closed {
		sh.mu.Unlock()
		return nil
	}
	sh.clients[cc] = struct{}{}
	out := appendSettings(cc.begin(4*short),
		setting{settingMaxStreams, uint32(r.Limits.Streams)},
		setting{settingInitialWindow, clientWindow},
		setting{settingMaxHeaderListSize, uint32(r.MaxHeaderBytes + headerSlack)})
	cc.write(appendWindowUpdate(out, 0, clientConnWindow-defaultWindow))
	if sh.draining || !r.Suits() { // the set of backends was another when this was asked before
		cc.leave()
	}
	sh.unlockAndFlush()
	return cc
}

// dismiss is the end of a connection, whose reading has ended so.
//
//go:noinline
func (cc *clientConn) dismiss(err error) {
	sh := cc.sh
	sh.lock()
	cc.end(err)
	delete(sh.clients, cc)
	sh.unlockAndFlush()
	if !expected(err) {
		sh.r.Log.Debug("client connection ended", "peer", cc.client.Peer.String(), "err", err)
	}
}

// failStop ends the process after a panic, where net/http would go on. What happens
// under a shard's lock concerns many clients, and who is who: in a state that nobody
// foresaw, nothing may be sent any more.
func failStop() {
	if p := recover(); p != nil {
		stack := debug.Stack()
		go func() { panic(fmt.Sprintf("%v\n\n%s", p, stack)) }()
		select {}
	}
}

// ended takes back all requests.
func (cc *clientConn) ended(error) {
	for _, s := range cc.streams.all() {
		s.clientGone()
	}
}

// prepare judges the certificates before the lock is taken: see balancer.Client.
func (cc *clientConn) prepare() {
	if len(cc.chain) > 0 {
		cc.client.Judge(cc.sh.r.Core.Verifier, cc.chain)
	}
}

func (cc *clientConn) lastID() uint32 { return cc.last }

func (cc *clientConn) idle(id uint32) bool { return id > max(cc.last, cc.late) || id%2 == 0 }

func (cc *clientConn) goAway(uint32, code) {} // we open no streams; it may finish those that it has

func (cc *clientConn) pump() {
	cc.pumpReady(
		func(s *stream) (*lane, uint32) {
			if s.done {
				return nil, 0
			}
			return &s.down, s.id
		},
		func(s *stream, n int) {
			cc.drew(n, s.down.buf.waiting() > 0)
			s.delivered(n)
		})
}

// headers begins a request, or ends its body with trailers.
func (cc *clientConn) headers(id uint32, end bool) error {
	if s := cc.streams.get(id); s != nil {
		return cc.trailers(s, end)
	}
	switch {
	case id%2 == 0:
		return &connError{codeProtocol, "a stream with an even id"}
	case id <= cc.last && cc.wasUndone(id):
		return cc.charge(costAnswered) // it crossed our reset
	case id <= cc.last:
		return &connError{codeStreamClosed, "HEADERS on a closed stream"}
	case cc.leaving == finished:
		cc.late = max(cc.late, id)
		return cc.charge(costAnswered) // after the last GOAWAY; the client sends it elsewhere
	}
	if cc.last == 0 {
		cc.client.Source.Begun()
	}
	cc.last = id
	if cc.streams.n >= cc.sh.r.Limits.Streams {
		cc.undo(id, codeRefusedStream)
		return cc.charge(1)
	}
	h, problem := parseRequest(cc.sh.fields)
	if problem == "" && end && h.length > 0 {
		problem = "an end before the body that was announced"
	}
	excess := cc.sh.tooLarge() || cc.sh.blownUp()
	if problem != "" && !excess {
		cc.undo(id, codeProtocol)
		return cc.charge(costFault)
	}
	s := newStream(cc, id, h, end)
	cc.streams.put(id, s)
	s.begin(&h)
	if excess {
		return cc.charge(costFault)
	}
	return nil
}

// trailers ends a request body. The trailers themselves stay behind: a proxy may
// discard them (RFC 9110, section 6.5.1), kube-apiserver reads none, and what
// speaks of identity must not arrive by that way either.
func (cc *clientConn) trailers(s *stream, end bool) error {
	if s.up.end {
		return cc.fault(s, codeStreamClosed)
	}
	if !end || cc.sh.tooLarge() || cc.sh.blownUp() {
		return cc.fault(s, codeProtocol)
	}
	for i := range cc.sh.fields {
		if badField(&cc.sh.fields[i]) != "" {
			return cc.fault(s, codeProtocol)
		}
	}
	return cc.body(s, nil, true)
}

func (cc *clientConn) data(id uint32, p []byte, size int, end bool) error {
	s := cc.streams.get(id)
	if s == nil {
		cc.credit(size)
		if id > cc.last || cc.wasUndone(id) {
			return nil
		}
		cc.undo(id, codeStreamClosed)
		return cc.charge(costFault)
	}
	if s.up.end {
		cc.credit(size)
		return cc.fault(s, codeStreamClosed)
	}
	if s.up.receivable -= int32(size); s.up.receivable < 0 {
		cc.credit(size)
		return cc.fault(s, codeFlowControl)
	}
	s.uploaded(size - len(p)) // padding has arrived where it goes
	return cc.body(s, p, end)
}

// body takes a piece of a request body.
func (cc *clientConn) body(s *stream, p []byte, end bool) error {
	if s.length >= 0 {
		if s.length -= int64(len(p)); s.length < 0 || end && s.length > 0 {
			cc.credit(len(p))
			return cc.fault(s, codeProtocol)
		}
	}
	s.up.end = end
	s.record.Received(len(p))
	s.bodyCame(p)
	return nil
}

// reset takes a request back.
func (cc *clientConn) reset(id uint32, _ code) error {
	s := cc.streams.get(id)
	if s == nil {
		return cc.charge(costAnswered) // it may have crossed the end of the answer
	}
	cost := 1.0
	if s.answered {
		cost = costAnswered
	}
	s.clientGone()
	return cc.charge(cost)
}

func (cc *clientConn) streamWindow(id, increment uint32) error {
	s := cc.streams.get(id)
	switch {
	case s == nil && increment == 0 && id <= cc.last && !cc.wasUndone(id):
		return cc.charge(costFault)
	case s == nil:
		return nil
	case increment == 0:
		return cc.fault(s, codeProtocol)
	}
	if s.down.window += int64(increment); s.down.window > maxWindow {
		return cc.fault(s, codeFlowControl)
	}
	if s.answered && s.down.waits() {
		cc.enqueue(s, &s.down)
	}
	return nil
}

func (cc *clientConn) windowChanged(delta int64) error {
	for _, s := range cc.streams.all() {
		if s.down.window += delta; s.down.window > maxWindow {
			return &connError{codeFlowControl, "stream window too large"}
		}
		if s.answered && s.down.waits() {
			cc.enqueue(s, &s.down)
		}
	}
	return nil
}

// fault ends a stream of which the client broke the rules.
func (cc *clientConn) fault(s *stream, c code) error {
	cc.undo(s.id, c)
	s.clientGone()
	return cc.charge(costFault)
}

// undo resets a stream at the client. What the client sent before it knew is ignored.
func (cc *clientConn) undo(id uint32, c code) {
	if len(cc.undone) < maxUndone {
		cc.undone = append(cc.undone, id)
	} else {
		cc.undone[cc.undoneN%maxUndone] = id
	}
	cc.undoneN++
	if !cc.over && !cc.closing {
		cc.write(appendReset(cc.begin(short), id, c))
	}
}

// maxUndone is how many of the streams that we reset are remembered: as many as a
// busy client may have uploads under way that are all answered early.
const maxUndone = 1024

func (cc *clientConn) wasUndone(id uint32) bool { return slices.Contains(cc.undone, id) }

// forget is called when a stream has ended.
func (cc *clientConn) forget(s *stream) {
	cc.streams.remove(s.id)
	if cc.streams.n == 0 {
		cc.idleAt = cc.sh.now
		cc.leaveIfDone()
	}
}

// leave begins to end the connection without an error for anybody.
func (cc *clientConn) leave() {
	if cc.leaving != staying || cc.closing || cc.over {
		return
	}
	cc.leaving, cc.leaveAt = warned, cc.sh.now.Add(leaveAfter)
	cc.write(appendGoAway(cc.begin(short), maxStreamID, codeNone, ""))
}

func (cc *clientConn) leaveIfDone() {
	if cc.leaving == finished && cc.streams.n == 0 && !cc.closing && !cc.over {
		limit := cutAfter
		if !cc.lapsed.IsZero() {
			limit = lapseGrace
		}
		cc.shut(limit)
	}
}

// idleTimeout is how long the connection may be without a request. Until the first one
// comes it holds one of the few places that its source has for unfinished ones.
func (cc *clientConn) idleTimeout() time.Duration {
	if cc.last == 0 {
		return cc.sh.r.ReadHeaderTimeout
	}
	return cc.sh.r.IdleTimeout
}

// tick sees to what is due.
func (cc *clientConn) tick() {
	now := cc.sh.now
	if cc.over || cc.closing {
		return
	}
	if cc.leaving == warned && now.After(cc.leaveAt) {
		cc.leaving = finished
		cc.write(appendGoAway(cc.begin(short), cc.last, codeNone, ""))
		cc.leaveIfDone()
		return
	}
	limit := cc.sh.r.ReadHeaderTimeout
	switch {
	case (!cc.settled || cc.blockID != 0) && now.Sub(cc.since) > limit:
		cc.sayGoAway(&connError{codeProtocol, "the preface or a header block took too long"})
	case !cc.partSince.IsZero() && now.Sub(cc.partSince) > limit:
		cc.sayGoAway(&connError{codeProtocol, "a frame took too long"})
	case cc.streams.n == 0 && cc.leaving == staying && now.Sub(cc.idleAt) > cc.idleTimeout():
		cc.leave()
	case cc.pingLost(now, clientPingTimeout):
		cc.end(context.DeadlineExceeded)
	case cc.pingSent.IsZero() && cc.silence(now) > clientPingAfter:
		cc.ping(now)
	}
	cc.lookForStalls()
	if cc.sh.draining {
		for _, s := range cc.streams.all() {
			if s.resumable() && s.answered && now.After(s.endBy(cc.sh.until)) {
				s.endWatch()
			}
		}
	}
}
