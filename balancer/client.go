package balancer

import (
	"crypto/x509"
	"net/netip"
	"sync/atomic"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/tlsconf"
)

// Verifier tells what a certificate chain says of its holder, and whether an
// earlier verdict still stands. *tlsconf.Store is one.
type Verifier interface {
	Verify(chain []*x509.Certificate) tlsconf.Verdict
	Current(v tlsconf.Verdict) bool
}

// Client is one client connection.
type Client struct {
	// Peer is where the connection comes from: its other end, or what a proxy in front
	// says of that by the PROXY protocol.
	Peer netip.AddrPort
	// Unannounced: a proxy in front has not said for whom it connects, and Peer is the
	// proxy. That may be a check of its health, or anybody whose address it does not know.
	Unannounced bool
	// Source is what the connection counts at; nil: at none. It is closed with it.
	Source *SourceConn
	Home   backend.Home // the backend that its requests go to while they may

	bodies  atomic.Int64 // bytes of its requests that are kept to be sent again
	verdict atomic.Pointer[tlsconf.Verdict]
	address atomic.Pointer[string]

	// Of the last request, since the next one is likely to be the same.
	token    atomic.Pointer[tokenMemo]
	identity atomic.Pointer[identityMemo]

	meter atomic.Pointer[meter] // nil: no request came while clients were moved
}

// tokenMemo is a token and the key that stands for it.
type tokenMemo struct {
	token string
	key   TokenKey
}

// tokenKey returns the key that stands for the token.
func (c *Client) tokenKey(t *Tokens, token string) TokenKey {
	if m := c.token.Load(); m != nil && m.token == token {
		return m.key
	}
	m := &tokenMemo{token, t.Key(token)}
	c.token.Store(m)
	return m.key
}

// identityMemo is an identity and the fields that assert it.
type identityMemo struct {
	identity *tlsconf.Identity
	fields   []Field
}

// asserted returns the fields that assert the identity, which must not be changed.
func (c *Client) asserted(h *IdentityHeaders, id *tlsconf.Identity) []Field {
	if m := c.identity.Load(); m != nil && m.identity == id {
		return m.fields
	}
	m := &identityMemo{id, h.Assert(id)}
	c.identity.Store(m)
	return m.fields
}

// isFrom reports whether the client comes from one of the networks, to be let in or
// believed for it.
func (c *Client) isFrom(n Networks) bool { return !c.Unannounced && n.Contains(c.Peer.Addr()) }

// addressText returns the peer's address as it stands in X-Forwarded-For, empty
// where a transport without addresses, such as a pipe, has none.
func (c *Client) addressText() string {
	if s := c.address.Load(); s != nil {
		return *s
	}
	s := ""
	if a := c.Peer.Addr(); a.IsValid() {
		s = bareAddr(a).String()
	}
	c.address.Store(&s)
	return s
}

// noCertificate is the verdict on those who show none.
var noCertificate = tlsconf.Verdict{Kind: tlsconf.NoCertificate}

// Judge renews the verdict on the connection's certificates where it may have
// changed. It is for those who are about to decide under a lock that others wait for:
// to verify a chain takes signature checks.
func (c *Client) Judge(v Verifier, chain []*x509.Certificate) { c.judge(v, chain) }

// judge returns the verdict on the connection's certificates as of now. A request
// is judged, not a connection: one that stays open, or resumes a TLS session,
// loses its rights with its certificate, as at kube-apiserver. The verdict is kept
// until the CA, the CRL, the deny list or the clock may change it. What runs already
// is judged from time to time: see Lapsed.
func (c *Client) judge(v Verifier, chain []*x509.Certificate) *tlsconf.Verdict {
	if len(chain) == 0 {
		return &noCertificate
	}
	if old := c.verdict.Load(); old != nil && v.Current(*old) {
		return old
	}
	fresh := v.Verify(chain)
	c.verdict.Store(&fresh)
	return &fresh
}
