package balancer

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"apiserver-lb/tlsconf"
)

// Records makes the records of requests. Its rules hold for both protocols, which only
// say what happens: see Record.
type Records struct {
	// Static after construction.
	Log    *AccessLog // nil: there is none
	Traces *Traces    // nil: there are none
}

// AccessLog says which requests are logged, and takes them.
type AccessLog struct {
	// Static after construction.
	Verbs        map[string]bool // nil: of all verbs
	HealthChecks bool            // /healthz, /livez, /readyz and what is beneath as well
	Ratio        float64         // the share of these that is logged, 0 to 1

	// Whatever Ratio says, these are: answers of a class of codes (Codes[5] is 5xx), and
	// short requests that took so long (0: none).
	Codes      [6]bool
	SlowerThan time.Duration

	// Write takes a line, which is its own from then on. It must not block.
	Write func(*Line)
}

// Stage is how far a request has come. Values are named as in kube-apiserver's audit log
// (k8s.io/apiserver/pkg/apis/audit/types.go, Stage).
type Stage uint8

const (
	// ResponseComplete: it is over. Every request that is logged has this line.
	ResponseComplete Stage = iota
	// ResponseStarted: a long-running one runs.
	ResponseStarted
)

var stageNames = [...]string{"ResponseComplete", "ResponseStarted"}

func (s Stage) String() string { return stageNames[s] }

// Line is one line of the access log. It holds nothing of a request that may be a
// secret: no header but those named here, no query, no name of an object, and of paths
// only what kube-apiserver is known to serve.
type Line struct {
	Stage      Stage
	At         time.Time // when the request came
	AuditID    string    // that the backend has seen
	Credential Credential
	User       string         // of a certificate; whose a token is only kube-apiserver knows
	Groups     int            // likewise: how many the certificate names
	As         string         // Impersonate-User, as the client says
	Peer       netip.AddrPort // without a zone

	Verb, APIGroup, APIVersion, Namespace, Resource, Subresource string

	Path string // where Resource is empty: see knownPath

	Code      int    // 0: the client went away before an answer
	Reason    string // why the balancer answered or ended it itself: a Reason constant
	In, Out   int64  // bytes of the bodies, or of the tunnel, as the client sent and got them
	Took      time.Duration
	Backend   string // of the last attempt; empty: none was made
	Retries   int
	UserAgent string
}

// Record is what is noted of one request while it runs. All methods may be called on
// nil, which notes nothing. Received may be called at any time, the others by who
// carries the request.
type Record struct {
	line    Line
	records *Records
	class   Class
	watched bool // by the access log
	sampled bool // for the access log; what Codes and SlowerThan say is known later
	started bool // the line of the start has been written
	in      atomic.Int64
	span    trace.Span // nil: the request is not sampled for a trace
}

// Begin makes the record of a request that came at the time given and has been decided
// on, or refused. It returns nil where nothing is to be noted.
func (r *Records) Begin(d *Decision, h *Head, cl *Client, now time.Time) *Record {
	if r == nil {
		return nil
	}
	watched, sampled := r.Log.wants(d, h)
	parent, traced := r.Traces.samples(h, cl)
	if !watched && !traced {
		return nil
	}
	x := &Record{records: r, class: d.Class, watched: watched, sampled: sampled}
	x.line = Line{
		At:         now,
		AuditID:    Shorten(d.AuditID),
		Credential: d.Credential,
		User:       Shorten(d.User),
		Groups:     len(d.groups),
		Peer:       netip.AddrPortFrom(bareAddr(cl.Peer.Addr()), cl.Peer.Port()),
		Verb:       knownVerb(d.Verb),
		UserAgent:  Shorten(h.UserAgent),
	}
	if d.AuditID == "" { // refused before anything was decided
		x.line.AuditID = Shorten(h.AuditID)
		if v := cl.verdict.Load(); v != nil && v.Kind == tlsconf.Valid && len(h.Chain) > 0 {
			x.line.Credential, x.line.User, x.line.Groups = Asserted, Shorten(v.Identity.User), len(v.Identity.Groups)
		}
	}
	if len(h.ImpersonateUser) > 0 {
		x.line.As = Shorten(fieldValue(h.ImpersonateUser[0]))
	}
	if d.Resource == "" {
		x.line.Path = knownPath(h.Path)
	}
	x.line.APIGroup, x.line.APIVersion = plainName(d.APIGroup), plainName(d.APIVersion)
	x.line.Namespace, x.line.Resource, x.line.Subresource = plainName(d.Namespace), plainName(d.Resource), plainName(d.Subresource)
	if traced {
		x.span = r.Traces.begin(d, parent, &x.line)
	}
	return x
}

// wants reports whether a request may be logged, and whether it surely is.
func (l *AccessLog) wants(d *Decision, h *Head) (watched, sampled bool) {
	if l == nil || l.Verbs != nil && !l.Verbs[d.Verb] || !l.HealthChecks && d.Resource == "" && healthCheck(h.Path) {
		return false, false
	}
	sampled = l.Ratio >= 1 || l.Ratio > 0 && rand.Float64() < l.Ratio
	return sampled || l.SlowerThan > 0 || l.Codes != [6]bool{}, sampled
}

// always reports whether a request with such an end is logged whatever Ratio says.
func (l *AccessLog) always(class Class, code int, took time.Duration) bool {
	if hundreds := code / 100; hundreds < len(l.Codes) && l.Codes[hundreds] {
		return true
	}
	return l.SlowerThan > 0 && class == Short && took >= l.SlowerThan
}

// Received notes bytes of the request body.
func (x *Record) Received(n int) {
	if x != nil {
		x.in.Add(int64(n))
	}
}

// Sent notes bytes of the answer's body that have gone to the client.
func (x *Record) Sent(n int) {
	if x != nil {
		x.line.Out += int64(n)
	}
}

// Retried notes that the request is sent to another backend after what happened at one.
func (x *Record) Retried(backend string, e Event) {
	if x == nil {
		return
	}
	x.line.Retries++
	if x.span != nil {
		retry(x.span, backend, e)
	}
}

// Refused notes why the balancer answers or ends the request itself. The first reason
// counts.
func (x *Record) Refused(reason string) {
	if x != nil && x.line.Reason == "" {
		x.line.Reason = reason
	}
}

// Started notes that the answer begins at the client, with such a code, from that
// backend. Of a long-running request that runs, a line says so.
func (x *Record) Started(code int, backend string) {
	if x == nil || x.class == Short || code >= 300 || !x.watched || x.started {
		return
	}
	log := x.records.Log
	if !x.sampled && !log.always(x.class, code, 0) {
		return
	}
	x.started = true
	l := x.line
	l.Stage, l.Code, l.Backend, l.In = ResponseStarted, code, backend, x.in.Load()
	l.Took = time.Since(l.At)
	log.Write(&l)
}

// Span returns the request's span for the exemplars of metrics; not valid: there is none.
func (x *Record) Span() (sc trace.SpanContext) {
	if x != nil && x.span != nil {
		sc = x.span.SpanContext()
	}
	return sc
}

// End notes that the request is over. Nothing may be noted after it.
func (x *Record) End(o *Observation) {
	if x == nil {
		return
	}
	l := &x.line
	l.Code, l.Backend, l.Took, l.In = o.Code, o.Backend, o.Took, x.in.Load()
	if x.span != nil {
		endSpan(x.span, l)
	}
	if log := x.records.Log; x.watched && (x.sampled || x.started || log.always(x.class, o.Code, o.Took)) {
		log.Write(l)
	}
}

// knownVerb returns a verb that kube-apiserver would log as it stands, and "other" for a
// method of a client's own making.
func knownVerb(verb string) string {
	if verb == "" || verbs[verb] {
		return verb
	}
	return "other"
}

// plainName returns a part of a path that stands for something that kube-apiserver may
// know: a group, a version, a resource, a namespace. All are names of DNS, or lower-case
// words; anything else could be whatever a client has put there by mistake, and is "?".
func plainName(s string) string {
	const most = 253
	if len(s) > most {
		return "?"
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return "?"
		}
	}
	return s
}

// knownPaths are the first segments of what kube-apiserver serves beside resources.
var knownPaths = map[string]bool{"api": true, "apis": true, "healthz": true, "livez": true, "readyz": true, "version": true,
	"metrics": true, "openapi": true, "openid": true, ".well-known": true, "logs": true, "debug": true, "flagz": true, "statusz": true}

// knownPath returns what of a path that is not for a resource can be told: the first
// segment, where it is known. Dots stand for the rest, which may hold anything.
func knownPath(path string) string {
	trimmed := strings.TrimLeft(path, "/")
	first, rest, _ := strings.Cut(trimmed, "/")
	switch {
	case path == "": // it was not understood
		return ""
	case trimmed == "":
		return "/"
	case !knownPaths[first]:
		return "/..."
	case rest == "":
		return "/" + first
	}
	return "/" + first + "/..."
}

// healthCheck reports whether a path asks for kube-apiserver's health.
func healthCheck(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return first == "healthz" || first == "livez" || first == "readyz"
}
