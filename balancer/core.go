package balancer

import (
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/tlsconf"
)

// Head is what decisions need of a request head, the same for both protocols.
type Head struct {
	Method   string
	Path     string // as on the wire, without the query; "*" for OPTIONS *
	RawQuery string

	Authorization string   // first value
	Connection    []string // HTTP/1.1 only
	Upgrade       string   // HTTP/1.1 only: the protocol, where Connection names Upgrade
	Subprotocols  []string // Sec-WebSocket-Protocol
	ForwardedFor  []string // X-Forwarded-For
	AuditID       string   // Audit-ID

	Chain []*x509.Certificate // that the client presented, leaf first
}

// Decision is what is to happen with a request.
type Decision struct {
	Attributes
	Credential Credential
	Token      TokenKey // where Credential is Token or Unproven
	User       string   // where Credential is Asserted, for the log
	AuditID    string   // that the backend will see
	Edits      Edits
}

// maxNameQuoted bounds what of a client's header name goes into a message and a log.
const maxNameQuoted = 64

// Policy is a way of choosing a backend.
type Policy string

// The policies of the configuration key backends.policy.
const (
	PolicyAffinity      Policy = "affinity"
	PolicyLeastRequests Policy = "least-requests"
	PolicyRoundRobin    Policy = "round-robin"
)

// Core decides for all requests of a process.
type Core struct {
	// Static after construction.
	Backends   *backend.Set
	Verifier   Verifier
	FrontProxy func(now time.Time) FrontProxy
	Headers    *IdentityHeaders
	Trusted    []netip.Prefix // peers whose X-Forwarded-For is kept
	Policy     Policy
	Bound      pick.Bound
	Budget     *Budget // of retries, for those who are known
	Strangers  *Budget // the same for Anonymous and Unproven, who could empty that of all others
	Tokens     *Tokens
	Answers    *Room // for answers that are held until they are whole
	NewAuditID func() string

	turn atomic.Uint64 // of round-robin
}

// Decide works out what is to happen with a request of the client.
func (c *Core) Decide(h *Head, cl *Client, now time.Time) (*Decision, *Refusal) {
	switch h.Method {
	case "CONNECT", "TRACE":
		return nil, &Refusal{Code: 405, Reason: ReasonMethod, Message: "the method " + h.Method + " is not served"}
	}
	if name := c.Headers.connectionForbids(h.Connection); name != "" {
		return nil, &Refusal{Code: 400, Reason: ReasonBadRequest,
			Message: fmt.Sprintf("the header Connection must not name %q: it would remove what authentication or audit depends on", name[:min(len(name), maxNameQuoted)])}
	}

	d := &Decision{Attributes: Attribute(h.Method, h.Path, h.RawQuery), AuditID: h.AuditID}
	token := bearerToken(h.Authorization)
	if h.Upgrade != "" {
		d.Class = Upgrade
		if token == "" && strings.EqualFold(h.Upgrade, "websocket") {
			token = websocketToken(h.Subprotocols)
		}
	}

	verdict := cl.judge(c.Verifier, h.Chain)
	var refusal *Refusal
	if d.Credential, refusal = authenticate(verdict, token != "", c.FrontProxy(now)); refusal != nil {
		return nil, refusal
	}
	switch d.Credential {
	case Asserted:
		d.User = verdict.Identity.User
	case Unproven:
		d.Token = c.Tokens.Key(token)
		if c.Tokens.Accepted(d.Token, now) {
			d.Credential = Token
		}
	}

	setAuditID := ""
	if d.AuditID == "" {
		d.AuditID = c.NewAuditID()
		setAuditID = d.AuditID
	}
	d.Edits = c.Headers.edits(d.Credential, verdict.Identity, cl.addressText(), c.trusted(cl.Peer.Addr()), h.ForwardedFor, setAuditID)
	if d.Credential == Asserted {
		d.Edits.withholdToken(h.Subprotocols)
	}
	return d, nil
}

func (c *Core) trusted(peer netip.Addr) bool {
	peer = peer.Unmap().WithZone("")
	for _, p := range c.Trusted {
		if p.Contains(peer) {
			return true
		}
	}
	return false
}

// RetryBudget returns the budget that requests of a credential share. Whoever may
// send requests without a credential can make kube-apiserver end connections again
// and again, and the retries that this costs must not be those of others.
func (c *Core) RetryBudget(cred Credential) *Budget {
	if cred == Anonymous || cred == Unproven {
		return c.Strangers
	}
	return c.Budget
}

// Pick chooses a backend for a request of the client, apart from those that have
// been tried, and counts the request in. It returns nil where no backend is left.
func (c *Core) Pick(cl *Client, d *Decision, tried []*backend.Backend, now time.Time) *backend.Slot {
	var room [8]pick.Candidate
	view := c.Backends.View(room[:0], tried, now)
	long := d.Class != Short
	var chosen int
	switch c.Policy {
	case PolicyLeastRequests:
		chosen = pick.LeastRequests(view, long, rand.Uint64())
	case PolicyRoundRobin:
		chosen = pick.RoundRobin(view, c.turn.Add(1))
	default:
		home := cl.Home.At()
		var rehome bool
		chosen, rehome = pick.Affinity(view, c.Backends.Index(home), long, c.Bound, rand.Uint64())
		if rehome && home != nil && home.Ready() {
			rehome = false // it failed this one request; the client stays with it
		}
		if rehome {
			// A request beside this one may have moved the client meanwhile: then
			// both go where that one went, so that a client has one home.
			if now := cl.Home.Move(home, c.Backends.All()[chosen]); now != nil {
				if i := c.Backends.Index(now); i >= 0 && view[i].Usable {
					chosen = i
				}
			}
		}
	}
	if chosen < 0 {
		return nil
	}
	return c.Backends.All()[chosen].Acquire(long)
}

// Left returns the number of backends that a request that has tried some may
// still go to.
func (c *Core) Left(tried []*backend.Backend, now time.Time) int {
	var room [8]pick.Candidate
	n := 0
	for _, v := range c.Backends.View(room[:0], tried, now) {
		if v.Usable {
			n++
		}
	}
	return n
}

// NoBackend is the refusal of a request for which Pick found nothing.
func NoBackend() *Refusal {
	return &Refusal{Code: 503, Reason: ReasonNoBackend, RetryAfter: 1, Message: "no kube-apiserver is available; nothing has been done"}
}

// Concluded notes what a backend's answer says of the request's token. The answer
// to an upgrade proves nothing: it may be owed to a second token among the
// WebSocket subprotocols, and an upgrade has a connection to itself in any case.
func (c *Core) Concluded(d *Decision, code int, now time.Time) {
	switch {
	case d.Credential == Token && code == 401:
		c.Tokens.Forget(d.Token)
	case d.Credential == Unproven && d.Class != Upgrade && provesToken(code):
		c.Tokens.Accept(d.Token, now)
	}
}

// provesToken reports whether kube-apiserver gives this status code only to those
// whom it has authenticated. It gives others before it looks at the token, so that
// a bad one may draw them as well: 500 for /api/v1/watch, 400 for ?timeout=x, 204
// for a CORS preflight, 429 and 503 while it shuts down, 504 when authentication
// takes too long (k8s.io/apiserver/pkg/server/config.go, DefaultBuildHandlerChain).
func provesToken(code int) bool {
	switch code {
	case 200, 201, 202, 403, 404, 409, 422:
		return true
	}
	return false
}

var _ Verifier = (*tlsconf.Store)(nil)
