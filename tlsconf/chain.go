package tlsconf

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
)

// What a client may send as its chain. It takes four times as much memory for as long as
// the connection lasts, and anybody may send one: crypto/tls allows 256 KiB. A certificate
// with 500 groups has 20 KB.
const (
	maxChain      = 5        // certificates: a leaf and four above it
	maxChainBytes = 64 << 10 // all together
)

// boundChain refuses, in the handshake, a chain that is larger than any in use. It is a
// VerifyConnection callback, since a resumed session calls no VerifyPeerCertificate.
func boundChain(c tls.ConnectionState) error {
	chain := c.PeerCertificates
	if len(chain) > maxChain {
		return fmt.Errorf("the client sent %d certificates, and may send %d", len(chain), maxChain)
	}
	size := 0
	for _, cert := range chain {
		size += len(cert.Raw)
	}
	if size > maxChainBytes {
		return fmt.Errorf("the client sent %d bytes of certificates, and may send %d", size, maxChainBytes)
	}
	return nil
}

// vouched returns those of the certificates that a client sent with its leaf that can be
// part of a chain to the roots: CA certificates that a root has signed, or one that is
// vouched for itself. Whatever else was sent cannot change the verdict, only its cost:
// x509.Verify begins at the leaf, so that up to a hundred signatures are checked by keys
// that nobody but their sender has chosen, RSA keys of 8192 bits with a large exponent
// for instance. Here every signature is checked by a key of the CA's, at most once for
// each pair. Time does not matter: one that is valid later is vouched for already.
func vouched(sent []*x509.Certificate, roots *bundle) []*x509.Certificate {
	var good []*x509.Certificate
	waiting := make([]*x509.Certificate, 0, len(sent))
	for _, c := range sent {
		if c.BasicConstraintsValid && c.IsCA { // as x509.Verify wants of an intermediate
			waiting = append(waiting, c)
		}
	}
	signedBy := func(parent *x509.Certificate) {
		rest := waiting[:0]
		for _, c := range waiting {
			if bytes.Equal(c.RawIssuer, parent.RawSubject) && c.CheckSignatureFrom(parent) == nil {
				good = append(good, c)
			} else {
				rest = append(rest, c)
			}
		}
		waiting = rest
	}
	for _, root := range roots.certs {
		signedBy(root)
	}
	for i := 0; i < len(good); i++ { // which grows
		signedBy(good[i])
	}
	return good
}
