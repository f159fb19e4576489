package forward

import (
	"errors"
	"net/http"
	"runtime/debug"
	"strconv"

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

// clientGone ends a request for which there is nobody to answer, or nobody who may
// have the answer.
func (x *exchange) clientGone() {
	if x.peer.Err() != nil {
		x.f.Metrics.Refused(balancer.ReasonClientGone)
	}
	x.record.Refused(x.goneReason())
	panic(http.ErrAbortHandler)
}

// refuse answers with the refusal's Status.
func (x *exchange) refuse(w http.ResponseWriter, r *balancer.Refusal) {
	x.code = r.Code
	x.f.Metrics.Refused(r.Reason)
	x.record.Refused(r.Reason)
	x.f.Refusals.Log(r, x.decision, x.in.Method, x.head.Path, x.client)
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
	x.leaveBody()
	if x.head.Upgrade != "" || x.unreadBody() {
		h.Set("Connection", "close") // what follows need not be a request
	}
	w.WriteHeader(r.Code)
	_, _ = w.Write(body) // #nosec G705 -- JSON, which says so, with &, < and > escaped; a client that is gone needs no error
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
		x.f.Log.Error("panic while forwarding a request", "panic", p, "method", balancer.Shorten(x.in.Method), "path", balancer.Shorten(x.head.Path), "stack", string(debug.Stack()))
	}
	panic(http.ErrAbortHandler)
}
