// Package forward carries requests over net/http: it reads a request, asks package
// balancer what is to happen with it, and does that.
//
// A request's way, top to bottom:
//
//	Forwarder.ServeHTTP   head -> Decide, Admit -> one exchange, or a Status
//	exchange.serve        ReverseProxy: hop-by-hop fields, 1xx, trailers, flushing
//	exchange.rewrite      the header edits that were decided
//	exchange.RoundTrip    attempts: pick, send, and after a failure ask Again
//	readAhead             holds a short answer until it is whole, so that it may still fail
//	responseBody          streams; gives the slot back at its end; ends watches cleanly
//	Forwarder.upgrade     the way of requests that leave HTTP instead
package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"sync"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// Options are what a Forwarder needs; all are required.
type Options struct {
	Core        *balancer.Core
	Pools       *Pools
	Metrics     *balancer.Metrics
	Refusals    *balancer.RefusalLog
	Name        string // of this balancer, for the Status errors that it writes itself
	MaxHeldBody int    // bytes of a request body that are kept to be sent again
	// StallTimeout is how long a short request may stand still because of its client,
	// which sends nothing of its body, or takes nothing of its answer.
	StallTimeout time.Duration
	// Passive tells the health checks what traffic showed of a backend; it must not block.
	Passive func(*backend.Backend, health.Verdict)
	Log     *slog.Logger
}

// Forwarder forwards requests to backends.
type Forwarder struct {
	Options
	places   admit.Places
	drain    drain
	waiters  waiters
	lapses   lapses
	buffers  sync.Pool
	proxyLog *log.Logger
}

// New returns a Forwarder; it starts nothing.
func New(o Options) *Forwarder {
	f := &Forwarder{Options: o}
	f.buffers.New = func() any { b := make([]byte, 32<<10); return &b }
	f.proxyLog = slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug)
	return f
}

// Get and Put make a Forwarder the BufferPool of its ReverseProxy.
func (f *Forwarder) Get() []byte { return *f.buffers.Get().(*[]byte) }

// Put takes a buffer back.
func (f *Forwarder) Put(b []byte) { f.buffers.Put(&b) }

type clientKey struct{}

// clientOf returns the client connection that the request came on.
func clientOf(r *http.Request) *balancer.Client {
	return r.Context().Value(clientKey{}).(*balancer.Client)
}

// ServeHTTP answers one request.
func (f *Forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{f: f, in: r, peer: r.Context(), client: clientOf(r), started: time.Now(), head: headOf(r), conn: http.NewResponseController(w)}
	defer x.reportPanic()
	x.answer(w)
	x.timeRest()
}

// answer answers the request.
func (x *exchange) answer(w http.ResponseWriter) {
	f, r := x.f, x.in
	refusal := malformed(r)
	if refusal == nil {
		x.decision, refusal = f.Core.Decide(&x.head, x.client, x.started)
	}
	if refusal == nil && f.Core.Memory.Short() {
		refusal = f.Core.Memory.Afford(r.ContentLength, 0)
	}
	if refusal != nil {
		x.decision = &balancer.Decision{Attributes: balancer.Attribute(r.Method, x.head.Path, x.head.RawQuery)}
	} else {
		x.admission, refusal = f.Core.Admit(x.decision, x.client, x.started)
	}
	w = x.recorded(w)
	if refusal != nil {
		x.refuse(w, refusal)
		x.observe()
		return
	}
	defer f.lapses.enter(x)()
	f.Core.RetryBudget(x.decision.Credential).Deposit()
	f.Metrics.InFlight(x.decision.Class, 1)
	defer func() {
		// Deferred, because an answer that breaks off ends in a panic with
		// http.ErrAbortHandler, which net/http turns into a reset.
		if x.sent != nil {
			_ = x.sent.Close() // a panic may have come before
		}
		x.admission.Release()
		f.Metrics.InFlight(x.decision.Class, -1)
		x.observe()
		if x.body != nil {
			x.body.end()
		}
		if x.timedBody != nil && x.in.ProtoMajor != 1 {
			x.timedBody.abandon() // what reads it may go on for a moment
		}
	}()
	if x.decision.Class == balancer.Upgrade {
		x.upgrade(w)
		return
	}
	x.serve(x.timed(w))
}

// exchange is one request and its answer.
type exchange struct {
	f        *Forwarder
	in       *http.Request   // its context ends with peer, or when it is no longer allowed
	peer     context.Context // ends when the client goes away
	client   *balancer.Client
	started  time.Time
	head     balancer.Head
	decision *balancer.Decision

	admission balancer.Admission

	// Owned by the handler's goroutine.
	record    *balancer.Record // nil: nothing is recorded
	conn      *http.ResponseController
	timedBody *timedBody       // nil: no body whose client may not stand still
	body      *heldBody        // nil: no request body
	backend   *backend.Backend // of the last attempt; nil: none was made
	sent      *responseBody    // of the answer that the client gets; nil: none yet
	code      int              // of the answer; 0: none was given
}

// serve forwards a request that stays within HTTP.
func (x *exchange) serve(w http.ResponseWriter) {
	proxy := httputil.ReverseProxy{
		Rewrite:        x.rewrite,
		Transport:      x,
		ModifyResponse: x.frameAnswer,
		ErrorHandler:   x.fail,
		ErrorLog:       x.f.proxyLog,
		BufferPool:     x.f,
	}
	if x.decision.Class == balancer.Long {
		proxy.FlushInterval = -1 // each event as it comes, the header at once
	}
	proxy.ServeHTTP(unswitched{w}, x.in)
}

// rewrite makes the request that backends get. ReverseProxy has removed the
// hop-by-hop fields by now, so that nothing that Connection names can take away
// what is set here.
func (x *exchange) rewrite(pr *httputil.ProxyRequest) {
	out, edits := pr.Out, &x.decision.Edits
	for _, name := range []string{"Forwarded", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := pr.In.Header[name]; ok {
			out.Header[name] = v // ReverseProxy took them; the edits decide
		}
	}
	edit(out.Header, edits)
	// A proxy may discard trailers (RFC 9110, section 6.5.1). kube-apiserver reads
	// none, and what speaks of identity must not arrive by that way either.
	out.Trailer = nil
	if out.Body != nil {
		x.hold(out.Body)
	}
}

// hold begins the holding of the request's body.
func (x *exchange) hold(src io.ReadCloser) {
	if x.record != nil {
		src = &recordedBody{src, x.record}
	}
	if x.decision.Class != balancer.Long {
		x.timedBody = &timedBody{ReadCloser: src, conn: x.conn, timeout: x.f.StallTimeout}
		src = x.timedBody
	}
	x.body = newHeldBody(src, x.f.MaxHeldBody, x.f.Core.BodyRoom(x.client))
}

// frameAnswer makes the answer one that HTTP/1.1 can carry.
func (x *exchange) frameAnswer(res *http.Response) error {
	x.record.Started(x.code, x.backend.Name)
	if x.in.ProtoMajor != 1 {
		return nil
	}
	if len(res.Trailer) > 0 {
		res.Header.Del("Content-Length") // there are trailers in chunks only
	}
	if x.unreadBody() {
		res.Header.Set("Connection", "close")
	}
	return nil
}

// unreadBody reports whether the connection must end with the answer because that
// comes before the end of the request body: what of it is still on the wire, or
// was unreadable, must not be taken for the next request of HTTP/1.1. On a
// connection that goes on, net/http would also read the body to its end before it
// sends the answer, and wait for ever on a client that waits for that.
func (x *exchange) unreadBody() bool {
	return x.in.ProtoMajor == 1 && x.body != nil && !x.body.ended()
}

// edit applies the decided edits to a header.
func edit(h http.Header, edits *balancer.Edits) {
	for name := range h {
		if edits.Drop(name) {
			delete(h, name)
		}
	}
	for _, f := range edits.Add {
		h[f.Name] = append(h[f.Name], f.Value)
	}
}

// RoundTrip sends the request to one backend after the other until one answers or
// it may not be sent again. Its errors are *balancer.Refusal, or that of the
// client's context.
func (x *exchange) RoundTrip(out *http.Request) (*http.Response, error) {
	core, ctx := x.f.Core, out.Context()
	var tried []*backend.Backend // ruled out for this request
	losses, refusals := 0, 0
	for {
		slot := core.Pick(x.client, x.decision, tried, time.Now())
		if slot == nil {
			return nil, balancer.NoBackend()
		}
		x.backend = slot.Backend
		failed := func(e balancer.Event, err error) balancer.Attempt {
			without := tried
			if !e.Spares(refusals) {
				without = append(slices.Clip(tried), slot.Backend)
			}
			return balancer.Attempt{
				Event:    e,
				Method:   x.in.Method,
				BodyHeld: x.body == nil || x.body.replayable(),
				DialOnly: x.decision.DialRetryOnly(),
				Losses:   losses,
				Left:     core.Left(e, without, time.Now()),
				Err:      err,
			}
		}
		res, moved, err := x.movable(ctx, out, slot, failed)
		if err == nil {
			x.code = res.StatusCode
			return res, nil
		}
		slot.Release()
		if x.timedBody != nil && x.timedBody.stalled() {
			return nil, balancer.BodyStalled(x.f.StallTimeout)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if final := (*balancer.Refusal)(nil); errors.As(err, &final) {
			return nil, final
		}
		if x.body != nil && x.body.sourceErr() != nil {
			return nil, unreadableBody(x.body.sourceErr())
		}

		event := eventOf(err, slot.Backend)
		again, refusal := moved, (*balancer.Refusal)(nil)
		if moved {
			event = balancer.Stalled
		} else {
			again, refusal = x.again(failed(event, err))
		}
		x.signal(slot.Backend, event)
		x.f.Log.Debug("attempt failed", "backend", slot.Backend.Name, "event", event.String(), "again", again, "method", balancer.Shorten(x.in.Method), "path", balancer.Shorten(x.head.Path), "auditID", balancer.Shorten(x.decision.AuditID), "err", err)
		var sd *shutdownAnswer
		if !again {
			if errors.As(err, &sd) {
				x.code = sd.res.StatusCode
				return sd.res, nil // its own words, with its own Retry-After
			}
			return nil, refusal
		}
		if errors.As(err, &sd) {
			sd.res.Body.Close()
		}
		x.f.Metrics.Retried(slot.Backend.Name, event)
		x.record.Retried(slot.Backend.Name, event)
		if event.Sent() {
			losses++
		}
		if event.Spares(refusals) {
			refusals++
		} else {
			tried = append(tried, slot.Backend)
		}
	}
}

// again decides on a failed attempt.
func (x *exchange) again(a balancer.Attempt) (bool, *balancer.Refusal) {
	return a.Again(x.f.Core.RetryBudget(x.decision.Credential))
}

// movable is an attempt that Server.Unstall may end while it waits for the answer, in
// favour of another backend; moved reports that it has.
func (x *exchange) movable(ctx context.Context, out *http.Request, slot *backend.Slot, failed func(balancer.Event, error) balancer.Attempt) (res *http.Response, moved bool, err error) {
	if x.body != nil { // which the transport reads at the same time
		res, err = x.attempt(ctx, out, slot)
		return res, false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	w := &waiter{backend: slot.Backend, cancel: cancel, again: func() bool {
		again, _ := x.again(failed(balancer.Stalled, errStalled))
		return again
	}}
	x.f.waiters.add(w)
	res, err = x.attempt(ctx, out, slot)
	moved = x.f.waiters.done(w)
	if moved && err == nil { // it was answered at the same time
		res.Body.Close()
		err = errStalled
	}
	if err != nil {
		cancel(err)
	}
	return res, moved, err
}

// attempt sends the request to one backend. It succeeds with an answer that is to
// begin at the client now; one that is held breaks off as an error. On success the
// slot is released at the end of the response body, else by the caller. An error
// that is a *balancer.Refusal is for the client: it would come from any backend.
func (x *exchange) attempt(ctx context.Context, out *http.Request, slot *backend.Slot) (*http.Response, error) {
	b := slot.Backend
	cc, err := x.f.Pools.get(ctx, b, x.decision.Credential, x.decision.Credential.Stranger() && x.whole())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	req := out.WithContext(ctx)
	setTarget(req, targetOf(x.in), b.Address)
	endBody := func() {}
	if x.body != nil {
		sent := x.body.attempt()
		req.Body = sent
		stop := context.AfterFunc(cc.gone, sent.end)
		endBody = func() {
			stop()
			sent.end()
		}
		cancelContext := cancel
		cancel = func() {
			cancelContext()
			endBody()
		}
	}
	res, err := cc.RoundTrip(req)
	switch {
	case err == nil && res.StatusCode == http.StatusSwitchingProtocols:
		// ReverseProxy would leave it open.
		res.Body.Close()
		err = &balancer.Refusal{Code: 502, Reason: balancer.ReasonUpgradeProtocol, Message: "the kube-apiserver switched to another protocol, which was not asked for"}
	case err == nil && (res.StatusCode < 200 || res.StatusCode > 999):
		// net/http's client takes any number, and its server panics.
		res.Body.Close()
		err = fmt.Errorf("the kube-apiserver answered with the status code %d", res.StatusCode)
	case err != nil && err.Error() == textHeaderTooLarge:
		err = &balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest, Err: err,
			Message: "the request header, with what the balancer adds to it, is larger than the kube-apiserver takes"}
	}
	if err != nil {
		cancel()
		return nil, err
	}
	ahead := &readAhead{src: res.Body, room: x.f.Core.Answers}
	// What exec and proxy reach is not kube-apiserver's own word, and would not be
	// sent again anyway.
	if !x.decision.DialRetryOnly() && balancer.MaybeShutdown(res.StatusCode, res.Header.Get) {
		if balancer.ShutdownBody(ahead.peek(balancer.ShutdownBodyBytes)) {
			res.Body = &cancelBody{ahead, cancel}
			endBody() // before anybody asks whether it can be sent again
			return nil, &shutdownAnswer{res}
		}
	}
	if x.decision.HoldsAnswer(x.in.Method, res.StatusCode, res.Header.Get("Content-Type"), res.ContentLength) {
		if err := ahead.hold(res.ContentLength); err != nil {
			cancel()
			_ = ahead.Close() // the attempt has failed in any case
			return nil, err
		}
	}
	if x.body != nil {
		x.body.release()
	}
	x.f.Core.Concluded(x.decision, res.StatusCode, time.Now())
	body := &responseBody{src: ahead, slot: slot, cancel: cancel, client: x.peer, record: x.record, resumable: x.decision.Watch() && res.StatusCode == http.StatusOK}
	if x.decision.Class == balancer.Long {
		k := stream
		if x.decision.Watch() {
			k = watch
		}
		body.forget = x.f.drain.add(b, k, cancel)
	}
	res.Body, x.sent = body, body
	return res, nil
}

// signal tells the health checks what a failed attempt says of the backend.
func (x *exchange) signal(b *backend.Backend, e balancer.Event) {
	switch e {
	case balancer.DialFailed:
		x.f.Passive(b, health.DialFailed)
	case balancer.Lost:
		x.f.Passive(b, health.ConnLost)
	case balancer.ShuttingDown:
		x.f.Passive(b, health.ShutdownAnnounced)
	}
}

// observe counts the request when it is over.
func (x *exchange) observe() {
	name := ""
	if x.backend != nil {
		name = x.backend.Name
	}
	o := balancer.Observation{
		Verb:       x.decision.Verb,
		Class:      x.decision.Class,
		Credential: x.decision.Credential,
		Backend:    name,
		Code:       x.code,
		Took:       time.Since(x.started),
		Span:       x.record.Span(),
	}
	x.f.Metrics.Request(o)
	x.record.End(&o)
}

// shutdownAnswer is the answer of a kube-apiserver that shuts down, as an error.
type shutdownAnswer struct{ res *http.Response }

func (s *shutdownAnswer) Error() string { return "the kube-apiserver is shutting down" }

// addrPortOf parses what net/http says of the peer.
func addrPortOf(s string) netip.AddrPort {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{} // a transport without addresses, such as a pipe
	}
	return ap
}
