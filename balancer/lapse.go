package balancer

import (
	"crypto/x509"

	"apiserver-lb/tlsconf"
)

// Lapse is what a client connection has lost because its certificate has expired, has
// been revoked or denied, or has lost its CA.
type Lapse struct{ verdict *tlsconf.Verdict }

// Lapsed judges the certificates of the connection anew, as for a request that comes
// now. It returns nil where nothing that runs on the connection rests on them, or they
// still stand. A certificate that never was good for anything is no lapse: who shows
// one beside a token goes on doing so.
func (c *Client) Lapsed(v Verifier, chain []*x509.Certificate) *Lapse {
	verdict := c.judge(v, chain)
	switch verdict.Kind {
	case tlsconf.NoCertificate, tlsconf.Valid:
		return nil
	case tlsconf.Revoked:
		return &Lapse{verdict}
	}
	if c.identity.Load() == nil {
		return nil // it never asserted anybody
	}
	return &Lapse{verdict}
}

// Spares reports whether a request that was let in by the credential goes on: whether
// one like it would be let in now. Whether the balancer's own front-proxy certificate
// still counts is another matter, and none of the client's.
func (l *Lapse) Spares(c Credential) bool {
	_, refusal := authenticate(l.verdict, c == Token || c == Unproven, FrontProxyValid)
	return refusal == nil
}
