package tlsconf

import (
	"crypto/x509"
	"strings"
	"time"
)

// VerdictKind says what a client certificate is worth.
type VerdictKind uint8

const (
	// NoCertificate: the client showed none.
	NoCertificate VerdictKind = iota
	// Valid: Verdict.Identity is the user.
	Valid
	// NoOpinion: it names nobody, and kube-apiserver's x509 authenticator would
	// leave the request to the next one: the CN is empty, or no client CA is
	// configured.
	NoOpinion
	// Invalid: kube-apiserver would record an error, so that the request is a
	// 401 unless another credential is accepted.
	Invalid
	// Revoked: listed in a CRL or on the deny list. Refused whatever else the request carries.
	Revoked
)

// String returns the kind in camelCase, as metrics and logs have it.
func (k VerdictKind) String() string {
	switch k {
	case NoCertificate:
		return "noCertificate"
	case Valid:
		return "valid"
	case NoOpinion:
		return "noOpinion"
	case Invalid:
		return "invalid"
	case Revoked:
		return "revoked"
	}
	return "unknown"
}

// Verdict is the judgement over one client chain. It stands while
// [Store.Current] says so.
type Verdict struct {
	Kind     VerdictKind
	Identity *Identity // set if and only if Kind is Valid
	Reason   string    // Invalid and Revoked: why, for the log

	// Until is when the clock alone may change the verdict: it stands for
	// every instant before. Zero: never. For a certificate that verifies this
	// is one nanosecond past the NotAfter at which its best chain ends, since
	// NotAfter itself belongs to the validity (RFC 5280, section 4.1.2.5).
	Until time.Time
	// Panicked: Invalid, because to verify it made this process panic. That is a bug,
	// and in the log.
	Panicked bool
	// Generation is that of the client CA, CRL and deny list that were asked; see
	// [Store.Generation].
	Generation uint64

	// Serial (hexadecimal) and Subject (RFC 2253) of the leaf, for logs, cut at 256
	// bytes as Reason is. They are the client's own word, and may hold any character.
	Serial, Subject string
}

// maxSubject bounds what a client can put into each log line, and into each answer: a
// subject may be as large as the handshake allows, 256 KiB, and what is wrong with a
// certificate is told with the subject of its issuer.
const maxSubject = 256

// cut returns what of a client's word is told.
func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxSubject)], "") }

// verify is judge, with what it tells of the client's words cut.
func verify(chain []*x509.Certificate, roots *bundle, crls *crlSet, deny *denyList, now time.Time) Verdict {
	v := judge(chain, roots, crls, deny, now)
	v.Reason, v.Serial, v.Subject = cut(v.Reason), cut(v.Serial), cut(v.Subject)
	return v
}

// judge judges a chain, leaf first, as kube-apiserver's x509 authenticator
// would at the given time: with the intermediates that the client sent and EKU
// ClientAuth. No roots: no opinion. kube-apiserver knows no revocation; that
// is added between verification and identity.
func judge(chain []*x509.Certificate, roots *bundle, crls *crlSet, deny *denyList, now time.Time) Verdict {
	if len(chain) == 0 {
		return Verdict{Kind: NoCertificate}
	}
	leaf := chain[0]
	v := Verdict{Subject: leaf.Subject.String()}
	if leaf.SerialNumber != nil {
		v.Serial = leaf.SerialNumber.Text(16)
	}
	if roots == nil {
		v.Kind = NoOpinion
		return v
	}
	above := vouched(chain[1:], roots)
	verified, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots.pool,
		Intermediates: poolOf(above),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		v.Kind, v.Reason, v.Until = Invalid, err.Error(), nextNotBefore(leaf, above, roots, now)
		return v
	}
	unrevoked, why := crls.sift(verified)
	if len(unrevoked) > 0 {
		unrevoked, why = deny.sift(unrevoked)
	}
	if len(unrevoked) == 0 {
		v.Kind, v.Reason, v.Until = Revoked, why, endOf(verified)
		return v
	}
	id, err := identityOf(leaf)
	switch {
	case err != nil:
		// No time at which this certificate becomes better.
		v.Kind, v.Reason = Invalid, err.Error()
	case id == nil:
		v.Kind, v.Until = NoOpinion, endOf(unrevoked)
	default:
		v.Kind, v.Identity, v.Until = Valid, id, endOf(unrevoked)
	}
	return v
}

// poolOf is the pool of the certificates.
func poolOf(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

// endOf is the first instant at which none of the chains is valid any more: a
// chain ends with its first certificate, and the last chain to end counts.
func endOf(chains [][]*x509.Certificate) time.Time {
	var best time.Time
	for _, chain := range chains {
		end := chain[0].NotAfter
		for _, c := range chain[1:] {
			if c.NotAfter.Before(end) {
				end = c.NotAfter
			}
		}
		if end.After(best) {
			best = end
		}
	}
	return best.Add(time.Nanosecond)
}

// nextNotBefore is the first instant at which a chain that does not verify
// could: where the leaf is not yet valid its NotBefore; otherwise when the
// next of its possible issuers becomes valid. Zero: time does not help. It may
// come too early (an issuer that does not matter), never too late; to verify at
// each candidate would hand a client that sends many certificates our CPU.
func nextNotBefore(leaf *x509.Certificate, above []*x509.Certificate, roots *bundle, now time.Time) time.Time {
	if now.After(leaf.NotAfter) {
		return time.Time{}
	}
	if now.Before(leaf.NotBefore) {
		return leaf.NotBefore
	}
	var next time.Time
	for _, issuers := range [][]*x509.Certificate{above, roots.certs} {
		for _, c := range issuers {
			if c.NotBefore.After(now) && (next.IsZero() || c.NotBefore.Before(next)) {
				next = c.NotBefore
			}
		}
	}
	return next
}
