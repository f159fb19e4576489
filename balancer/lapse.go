package balancer

import (
	"crypto/x509"
	"time"

	"apiserver-lb/tlsconf"
)

// Lapse is what a client connection has lost because its certificate has expired, has
// been revoked or denied, or has lost its CA.
type Lapse struct{ verdict *tlsconf.Verdict }

// Lapsed judges the certificates of the connection anew, as for a request that comes
// now. It returns nil where nothing that runs on the connection rests on them, or they
// still stand. A certificate that never was good for anything is no lapse: who shows
// one beside a token goes on doing so. It is not even looked at, since anybody may show as
// many as he likes: should the client CA vouch for it by now, that is for the next request.
func (c *Client) Lapsed(v Verifier, chain []*x509.Certificate) *Lapse {
	last := c.verdict.Load()
	if last == nil || last.Kind == tlsconf.Invalid && !c.hasAsserted() {
		return nil
	}
	verdict := c.judge(v, chain)
	switch verdict.Kind {
	case tlsconf.NoCertificate, tlsconf.Valid:
		return nil
	case tlsconf.Revoked:
		return &Lapse{verdict}
	}
	if !c.hasAsserted() {
		return nil
	}
	return &Lapse{verdict}
}

// hasAsserted reports whether a request has gone on as the user of the certificate.
func (c *Client) hasAsserted() bool { return c.identity.Load() != nil }

// AssertedFirst orders connections for Lapsed: after a change of the client CA all are to
// be judged, and those on which somebody may have lost something must not wait for others.
func AssertedFirst[C any](conns []C, client func(C) *Client) []C {
	first, others := make([]C, 0, len(conns)), []C(nil)
	for _, c := range conns {
		if client(c).hasAsserted() {
			first = append(first, c)
		} else {
			others = append(others, c)
		}
	}
	return append(first, others...)
}

// Spares reports whether a request that was let in by the credential goes on: whether
// one like it would be let in now. Whether the balancer's own front-proxy certificate
// still counts is another matter, and none of the client's.
func (l *Lapse) Spares(c Credential) bool {
	_, refusal := authenticate(l.verdict, c == Token || c == Unproven, FrontProxyValid)
	return refusal == nil
}

// CertificateUse is a client certificate as whose user requests have come.
type CertificateUse struct {
	User     string    `json:"user"`   // as kube-apiserver is told, cut short
	Serial   string    `json:"serial"` // in hexadecimal
	NotAfter time.Time `json:"notAfter"`
}

// CertificateUse returns the certificate of the connection; false: no request has gone on
// as its user.
func (c *Client) CertificateUse(chain []*x509.Certificate) (CertificateUse, bool) {
	memo := c.identity.Load()
	if memo == nil || len(chain) == 0 {
		return CertificateUse{}, false
	}
	return CertificateUse{Shorten(memo.identity.User), chain[0].SerialNumber.Text(16), chain[0].NotAfter}, true
}
