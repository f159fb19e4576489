package forward

import (
	"errors"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"

	"golang.org/x/time/rate"

	"apiserver-lb/balancer"
)

// fail is the end of a request that got no answer from a backend.
func (x *exchange) fail(w http.ResponseWriter, _ *http.Request, err error) {
	var refusal *balancer.Refusal
	switch {
	case errors.As(err, &refusal):
	case x.in.Context().Err() != nil:
		x.clientGone()
	default:
		refusal = &balancer.Refusal{Code: 500, Reason: balancer.ReasonInternal, Message: "the request could not be forwarded", Err: err}
	}
	x.refuse(w, refusal)
}

// unreadableBody is the refusal of a request whose body broke off or was malformed.
func unreadableBody(err error) *balancer.Refusal {
	return &balancer.Refusal{Code: 400, Reason: balancer.ReasonBodyRead, Message: "the request body could not be read to its end", Err: err}
}

// clientGone ends a request for which there is nobody to answer.
func (x *exchange) clientGone() {
	x.f.Metrics.Refused(balancer.ReasonClientGone)
	panic(http.ErrAbortHandler)
}

// refuse answers with the refusal's Status.
func (x *exchange) refuse(w http.ResponseWriter, r *balancer.Refusal) {
	x.code = r.Code
	x.f.Metrics.Refused(r.Reason)
	x.logRefusal(r)
	body := r.Status(x.f.Name)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if x.decision.AuditID != "" {
		h.Set("Audit-Id", x.decision.AuditID)
	}
	if r.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(r.RetryAfter))
	}
	if x.head.Upgrade != "" || x.unreadBody() {
		h.Set("Connection", "close") // what follows need not be a request
	}
	w.WriteHeader(r.Code)
	_, _ = w.Write(body) // a client that is gone needs no error
}

// Refusals are logged at this rate and no faster, so that an outage, or a client
// that means ill, does not fill the disk; the metrics count all of them.
const (
	refusalsLogged = rate.Limit(10) // per second
	refusalsBurst  = 100
)

// maxLogged bounds, in bytes, what of a client's own words goes into a log line.
const maxLogged = 256

// logRefusal writes one line; the query is not in it, since it may hold a token.
func (x *exchange) logRefusal(r *balancer.Refusal) {
	if !x.f.refusalLog.Allow() {
		return
	}
	level := slog.LevelInfo
	if r.Code >= 500 {
		level = slog.LevelWarn
	}
	attrs := []any{"code", r.Code, "reason", r.Reason, "message", r.Message,
		"method", shorten(x.in.Method), "path", shorten(x.head.Path), "peer", x.client.Peer.String()}
	if x.decision.AuditID != "" {
		attrs = append(attrs, "auditID", shorten(x.decision.AuditID))
	}
	if r.Err != nil {
		attrs = append(attrs, "err", r.Err)
	}
	x.f.Log.Log(x.in.Context(), level, "request refused", attrs...)
}

func shorten(s string) string {
	if len(s) > maxLogged {
		return s[:maxLogged] + "..."
	}
	return s
}

// reportPanic makes a panic of ours known, which net/http would only tell its own
// log, and ends the request. http.ErrAbortHandler is how a request is ended on
// purpose. It is to be deferred.
func (x *exchange) reportPanic() {
	p := recover()
	if p == nil {
		return
	}
	if p != http.ErrAbortHandler {
		x.f.Metrics.Refused(balancer.ReasonInternal)
		x.f.Log.Error("panic while forwarding a request", "panic", p, "method", shorten(x.in.Method), "path", shorten(x.head.Path), "stack", string(debug.Stack()))
	}
	panic(http.ErrAbortHandler)
}
