package balancer

import (
	"crypto/x509"
	"fmt"
	"strings"
	"time"

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
	UserAgent     string   // User-Agent
	Traceparent   []string // only where there are traces

	// Impersonate-User and Impersonate-Group, every value. kube-apiserver heeds the
	// first user only (k8s.io/apiserver/pkg/endpoints/filters/impersonation).
	ImpersonateUser, ImpersonateGroup []string

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

	groups    []string // where Credential is Asserted
	unlimited bool     // no limit of requests applies
	renew     bool     // where Credential is Token: if it is proven again, that is to be noted

	added [3]Field // room for Edits.Add, as long as that is enough
}

// maxNameQuoted bounds what of a client's header name goes into a message and a log.
const maxNameQuoted = 64

// Decide works out what is to happen with a request of the client.
func (c *Core) Decide(h *Head, cl *Client, now time.Time) (*Decision, *Refusal) {
	d := new(Decision)
	if refusal := c.DecideInto(d, h, cl, now); refusal != nil {
		return nil, refusal
	}
	return d, nil
}

// DecideInto is Decide into memory of the caller's, of which nothing stays as it was.
// After a refusal only the Attributes are set.
func (c *Core) DecideInto(d *Decision, h *Head, cl *Client, now time.Time) *Refusal {
	*d = Decision{}
	d.attribute(h.Method, h.Path, h.RawQuery)
	if refusal := c.decide(d, h, cl, now); refusal != nil {
		*d = Decision{Attributes: d.Attributes}
		return refusal
	}
	return nil
}

func (c *Core) decide(d *Decision, h *Head, cl *Client, now time.Time) *Refusal {
	if refusal := BadMethod(h.Method); refusal != nil {
		return refusal
	}
	if name := c.Headers.connectionForbids(h.Connection); name != "" {
		return &Refusal{Code: 400, Reason: ReasonBadRequest,
			Message: fmt.Sprintf("the header Connection must not name %q: it would remove what authentication or audit depends on", name[:min(len(name), maxNameQuoted)])}
	}

	d.Edits.Add = d.added[:0]
	d.AuditID = h.AuditID
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
		return refusal
	}
	if c.Guards != nil {
		var id *tlsconf.Identity
		if d.Credential == Asserted {
			id = verdict.Identity
		}
		if refusal := c.Guards.check(d.Credential, id, h, cl); refusal != nil {
			return refusal
		}
	}
	switch d.Credential {
	case Asserted:
		d.User, d.groups = verdict.Identity.User, verdict.Identity.Groups
	case Unproven:
		d.Token = cl.tokenKey(c.Tokens, token)
		var accepted bool
		if accepted, d.renew = c.Tokens.Accepted(d.Token, now); accepted {
			d.Credential = Token
		}
	}

	d.unlimited = c.Limits != nil && d.isUnlimited(h.Method, h.Path)

	setAuditID := ""
	if d.AuditID == "" {
		d.AuditID = c.NewAuditID()
		setAuditID = d.AuditID
	}
	var asserted []Field
	if d.Credential == Asserted {
		asserted = cl.asserted(c.Headers, verdict.Identity)
	}
	c.Headers.edit(&d.Edits, d.Credential, asserted, cl.addressText(), cl.isFrom(c.Trusted), h.ForwardedFor, setAuditID)
	if d.Credential == Asserted {
		d.Edits.withholdToken(h.Subprotocols)
	}
	return nil
}

// Concluded notes what a backend's answer says of the request's token. The answer
// to an upgrade proves nothing: it may be owed to a second token among the
// WebSocket subprotocols, and an upgrade has a connection to itself in any case. A
// token that is in use stays proven, at the cost of a lock in each generation of Tokens.
func (c *Core) Concluded(d *Decision, code int, now time.Time) {
	switch {
	case d.Credential == Token && code == 401:
		c.Tokens.Forget(d.Token)
	case (d.Credential == Unproven || d.renew) && d.Class != Upgrade && provesToken(code):
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
