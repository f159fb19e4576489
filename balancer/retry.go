package balancer

import (
	"bytes"
	"fmt"
	"sync"
	"time"
)

// Event is how an attempt at a backend failed. What decides is how much of the
// request the backend may have acted on: nothing, maybe, or surely something.
type Event uint8

const (
	// DialFailed: no connection, so nothing was sent.
	DialFailed Event = iota
	// Refused: the backend says that it has not processed the request
	// (REFUSED_STREAM, or GOAWAY with a lower last-stream-id; RFC 9113, 8.7).
	Refused
	// ShuttingDown: a kube-apiserver that shuts down rejected the request before it
	// acted on it (MaybeShutdown).
	ShuttingDown
	// Lost: reset or end of file before the answer began at the client: before any
	// response header, or within an answer that was held (HoldsAnswer).
	Lost
	// Died: the same, and the backend has been declared dead meanwhile.
	Died
	// Stalled: the backend owes the answer still, and has failed its checks for
	// StalledAfter. Where this is no reason to go elsewhere (Again), the request waits on.
	Stalled
)

var eventNames = [...]string{"dial_failed", "refused", "shutting_down", "lost", "died", "stalled"}

// StalledAfter is how long a backend fails its checks before reads that wait for it go
// elsewhere, and watches end there. A kube-apiserver that shuts down has answered most
// of what it has by then. One that has lost its etcd answers nothing for 20 s and more,
// which is twice as long as a leader election may take, and its watches are silent.
const StalledAfter = 2 * time.Second

func (e Event) String() string { return eventNames[e] }

// Attempt is what Again needs to know of a request and what became of it.
type Attempt struct {
	Event    Event
	Method   string
	BodyHeld bool  // what has been sent of the body can be sent again
	DialOnly bool  // Attributes.DialRetryOnly
	Losses   int   // earlier attempts after which Sent holds
	Left     int   // usable backends that are not ruled out
	Err      error // for the log
}

// safe methods ask for nothing to be changed (RFC 9110, section 9.2.1).
func safe(method string) bool { return method == "GET" || method == "HEAD" || method == "OPTIONS" }

// mayAgain says whether the request may be sent to another backend, regardless of
// whether there is one. It is the table of what may be sent again; once an answer
// has begun at the client, nobody asks.
func (a *Attempt) mayAgain() bool {
	if a.Event == DialFailed {
		return a.BodyHeld
	}
	if a.DialOnly {
		return false
	}
	switch a.Event {
	case Refused, ShuttingDown:
		return a.BodyHeld
	default: // Lost, Died, Stalled
		return safe(a.Method) && a.BodyHeld && a.Losses == 0
	}
}

// maxRefusals is how often a request may be refused without a backend being ruled
// out for it; the HTTP/2 transport of Go, and so a client that connects directly,
// tries as often (golang.org/x/net/http2, Transport.RoundTripOpt).
const maxRefusals = 6

// Spares reports whether the backend of a failed attempt stays among those that the
// request may go to, refusals being how many attempts before ended in Refused. A
// GOAWAY speaks of a connection: kube-apiserver ends the one that an anonymous
// request or a bad token came on, and any at random with --goaway-chance, and takes
// the next one gladly. Were the backend ruled out, a few such requests would be
// enough to leave those beside them without any.
func (e Event) Spares(refusals int) bool { return e == Refused && refusals < maxRefusals }

// Sent reports whether the backend may have acted on the request.
func (e Event) Sent() bool { return e >= Lost }

// Again decides, after a failed attempt, whether the request goes to another
// backend (true) or what the client is told. A retry after anything but a failed
// dial costs the budget.
func (a *Attempt) Again(b *Budget) (bool, *Refusal) {
	if a.mayAgain() && a.Left > 0 {
		if a.Event == DialFailed || b.Withdraw() {
			return true, nil
		}
		r := a.refusal()
		r.Reason = ReasonRetryBudget
		return false, r
	}
	return false, a.refusal()
}

func (a *Attempt) refusal() *Refusal {
	r := &Refusal{Err: a.Err}
	switch {
	case !a.Event.Sent():
		// Not acted on by any backend: client-go may replay any verb.
		r.Code, r.Reason, r.RetryAfter = 503, ReasonNoBackend, 1
		r.Message = "no kube-apiserver could take the request; nothing has been done"
		if a.Event == ShuttingDown {
			r.Reason = ReasonBackendShutdown
		}
	case a.Event == Died:
		r.Code, r.Reason = 504, ReasonBackendTimeout
		r.Message = "the kube-apiserver stopped responding before it answered"
	default:
		r.Code, r.Reason = 502, ReasonBackendLost
		r.Message = "the connection to the kube-apiserver broke before it answered"
	}
	if a.Event.Sent() && (!safe(a.Method) || a.DialOnly) {
		r.Message += fmt.Sprintf("; whether the %s took effect is not known", a.Method)
	}
	return r
}

// Budget bounds retries to a share of requests, so that a failure does not grow
// into a storm. Every request deposits its share, every retry withdraws one.
type Budget struct {
	// Static after construction.
	share float64
	limit float64

	mu      sync.Mutex
	balance float64
}

// budgetLimit is how many retries may come at once: as many requests as one
// busy kube-apiserver has in flight when it dies
// (--max-requests-inflight 400 and --max-mutating-requests-inflight 200, and
// room for those that wait in its queues).
const budgetLimit = 1000

// NewBudget allows retries up to the share given of requests, 0 to 1, and at most
// 1,000 at once. It starts full; with share 0 there are none at all.
func NewBudget(share float64) *Budget {
	b := &Budget{share: share, limit: budgetLimit}
	if share > 0 {
		b.balance = b.limit
	}
	return b
}

// Deposit counts one request in.
func (b *Budget) Deposit() {
	b.mu.Lock()
	b.balance = min(b.limit, b.balance+b.share)
	b.mu.Unlock()
}

// Withdraw takes one retry out, and reports whether there was one.
func (b *Budget) Withdraw() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.balance < 1 {
		return false
	}
	b.balance--
	return true
}

// MaybeShutdown reports whether an answer may be that of a kube-apiserver that
// shuts down, so that its body is worth a look (ShutdownBody): 429 with
// --shutdown-send-retry-after, 503 from requests that come between the end of the
// shutdown delay and the closing of the listener
// (k8s.io/apiserver/pkg/server/filters/with_retry_after.go, waitgroup.go). Both
// reject before priority and fairness, whose answers always bear its headers.
func MaybeShutdown(code int, get func(name string) string) bool {
	return (code == 429 || code == 503) &&
		get("Retry-After") != "" &&
		get("X-Kubernetes-Pf-Flowschema-Uid") == "" &&
		get("X-Kubernetes-Pf-Prioritylevel-Uid") == ""
}

// ShutdownBodyBytes is how much of a body ShutdownBody needs.
const ShutdownBodyBytes = 1024

// ShutdownBody reports whether a body that begins so is of a kube-apiserver that
// shuts down.
func ShutdownBody(prefix []byte) bool {
	return bytes.Contains(prefix, []byte("apiserver is shutting down"))
}
