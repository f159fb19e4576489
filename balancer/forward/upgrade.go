package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
)

// answerTimeout bounds how long a backend may take to answer the head of an
// upgrade request: kube-apiserver itself dials a kubelet, or an aggregated server,
// before it answers, and gives up after 30 s.
const answerTimeout = time.Minute

// upgrade forwards a request that asks to leave HTTP (exec, attach, port-forward).
// It gets a backend connection of its own, which is used for nothing else
// afterwards: a refused upgrade must leave no tunnel behind (CVE-2018-1002105).
func (x *exchange) upgrade(w http.ResponseWriter) {
	ctx := x.in.Context()
	if !x.f.places.Take() {
		x.refuse(w, balancer.NoPlace())
		return
	}
	defer x.f.places.Give()
	if refusal := x.readBody(); refusal != nil {
		x.refuse(w, refusal)
		return
	}
	conn, slot, refusal := x.dialUpgrade(ctx)
	if refusal != nil {
		x.refuse(w, refusal)
		return
	}
	defer slot.Release()
	defer conn.Close()
	// The connection beneath TLS, for Cut must not wait for a backend that hangs to
	// take an alert, nor let one that does not answer it.
	defer x.f.Pools.hold(slot.Backend, conn.NetConn())()

	// What waits on the backend ends when the client goes away. A tunnel sees
	// that for itself, and net/http no more.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	limited := &io.LimitedReader{R: conn}
	from := bufio.NewReader(limited)
	res, err := x.askUpgrade(ctx, slot.Backend, conn, limited, from)
	if ctx.Err() != nil { // also where the backend answers because of the end
		x.clientGone()
	}
	if err != nil {
		a := balancer.Attempt{Event: eventOf(err, slot.Backend), Method: x.in.Method, DialOnly: true, Err: err}
		x.signal(slot.Backend, a.Event)
		_, refusal := a.Again(x.f.Core.RetryBudget(x.decision.Credential))
		x.refuse(w, refusal)
		return
	}
	x.f.Core.Concluded(x.decision, res.StatusCode, time.Now())
	x.code = res.StatusCode
	if res.StatusCode != http.StatusSwitchingProtocols {
		x.relayRefusedUpgrade(&timedWriter{w, x.conn, x.f.StallTimeout, x}, res)
		return
	}
	if !sameProtocol(x.in.Header, res.Header) {
		x.refuse(w, &balancer.Refusal{Code: 502, Reason: balancer.ReasonUpgradeProtocol,
			Message: fmt.Sprintf("the kube-apiserver switched to the protocol %q, which was not asked for", res.Header.Get("Upgrade"))})
		return
	}
	stop()
	x.tunnel(w, res, conn, from)
}

// readBody reads the body of the request, which has none as a rule, to its end. The
// connection to a backend, which serves nobody else, must not wait for a client that is in
// no hurry.
func (x *exchange) readBody() *balancer.Refusal {
	if x.in.ContentLength == 0 {
		return nil
	}
	x.hold(x.in.Body)
	n, err := io.Copy(io.Discard, io.LimitReader(x.body.attempt(), int64(x.f.MaxHeldBody)+1))
	switch {
	case x.timedBody.stalled():
		return balancer.BodyStalled(x.f.StallTimeout)
	case err != nil:
		if x.in.Context().Err() != nil {
			x.clientGone()
		}
		return unreadableBody(err)
	case n > int64(x.f.MaxHeldBody):
		return balancer.UpgradeBodyTooLarge(x.f.MaxHeldBody)
	case !x.body.replayable():
		return balancer.NoRoom()
	}
	return nil
}

// dialUpgrade connects to a backend that will have the request. Failed dials are
// the only thing after which another backend is tried.
func (x *exchange) dialUpgrade(ctx context.Context) (*tls.Conn, *backend.Slot, *balancer.Refusal) {
	core := x.f.Core
	var tried []*backend.Backend
	for {
		slot := core.Pick(x.client, x.decision, tried, time.Now())
		if slot == nil {
			return nil, nil, balancer.NoBackend()
		}
		x.backend = slot.Backend
		conn, err := x.f.Pools.dialTLS(ctx, slot.Backend, x.decision.Credential, func() {}, "http/1.1")
		if err == nil {
			return conn, slot, nil
		}
		slot.Release()
		if ctx.Err() != nil {
			x.clientGone()
		}
		tried = append(tried, slot.Backend)
		x.signal(slot.Backend, balancer.DialFailed)
		a := balancer.Attempt{Event: balancer.DialFailed, Method: x.in.Method, BodyHeld: true, DialOnly: true,
			Left: core.Left(balancer.DialFailed, tried, time.Now()), Err: err}
		again, refusal := a.Again(core.RetryBudget(x.decision.Credential))
		if !again {
			return nil, nil, refusal
		}
		x.f.Metrics.Retried(slot.Backend.Name, a.Event)
		x.record.Retried(slot.Backend.Name, a.Event)
	}
}

// askUpgrade sends the request and reads the head of the answer from the reader
// given, which reads limited, which reads conn.
func (x *exchange) askUpgrade(ctx context.Context, b *backend.Backend, conn *tls.Conn, limited *io.LimitedReader, from *bufio.Reader) (*http.Response, error) {
	out := x.in.Clone(ctx)
	stripHopByHop(out.Header)
	edit(out.Header, &x.decision.Edits)
	out.Header.Set("Connection", "Upgrade")
	out.Header["Upgrade"] = x.in.Header["Upgrade"]
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header.Set("User-Agent", "") // or Request.Write sends its own
	}
	out.Trailer, out.Close = nil, false
	out.Body = nil
	if x.body != nil {
		out.Body = x.body.attempt()
	}
	setTarget(out, targetOf(x.in), b.Address)

	if err := conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return nil, err
	}
	if err := out.Write(conn); err != nil {
		return nil, err
	}
	for {
		limited.N = maxResponseHeader
		res, err := http.ReadResponse(from, out)
		if err != nil {
			return nil, err
		}
		limited.N = math.MaxInt64
		if res.StatusCode < 200 && res.StatusCode != http.StatusSwitchingProtocols {
			continue // 100 Continue and its like end with the head
		}
		return res, conn.SetDeadline(time.Time{})
	}
}

// stripHopByHop removes what concerns one connection only (RFC 9110, section
// 7.6.1), among it everything that Connection names.
func stripHopByHop(h http.Header) {
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
		"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		h.Del(name)
	}
}

// relayRefusedUpgrade passes on an answer other than 101 and ends both connections.
func (x *exchange) relayRefusedUpgrade(w http.ResponseWriter, res *http.Response) {
	stripHopByHop(res.Header)
	maps.Copy(w.Header(), res.Header)
	w.Header().Set("Connection", "close")
	w.WriteHeader(res.StatusCode)
	buf := x.f.Get()
	defer x.f.Put(buf)
	flush := http.NewResponseController(w).Flush
	for {
		n, err := res.Body.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				panic(http.ErrAbortHandler)
			}
			if flush() != nil {
				panic(http.ErrAbortHandler)
			}
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

// sameProtocol reports whether the answer switches to a protocol that was asked for.
func sameProtocol(asked, answered http.Header) bool {
	return answered.Get("Upgrade") != "" && httpguts.HeaderValuesContainsToken(asked["Upgrade"], answered.Get("Upgrade"))
}
