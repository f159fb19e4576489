package balancer

import (
	"crypto/x509"
	"time"
)

const (
	// certificateCost is how many bytes of memory a byte of a certificate takes for as long
	// as its connection lasts: as it is, as names that have been read, and in the buffer
	// that crypto/tls has needed for the handshake.
	certificateCost = 4
	// usualChain is what is not counted, in bytes: a leaf and an intermediate with RSA keys
	// have 3 KB, and what is usual is part of what a connection costs.
	usualChain = 4 << 10
)

// Shown counts the certificates that the connection's client has shown, or returns why it
// is to be closed: its source has more memory with them than is left for all others.
// Anybody may show certificates, and they stay in memory until the connection ends.
func (c *SourceConn) Shown(chain []*x509.Certificate, now time.Time) *TurnedAway {
	if c == nil || c.all.limits.Certificates == nil {
		return nil
	}
	size := 0
	for _, cert := range chain {
		size += len(cert.Raw)
	}
	if size <= usualChain {
		return nil
	}
	n := int64(certificateCost * (size - usualChain))
	s := c.all
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.closed {
		return nil
	}
	if !s.limits.Certificates.Share(&c.source.shown).Take(n) {
		return c.source.turnedAway(ReasonSourceCertificates, c.addr, c.source.open, now)
	}
	c.shown += n
	return nil
}

// forgetShown gives back what Shown has counted. all.mu is held.
func (c *SourceConn) forgetShown() {
	if c.shown > 0 {
		c.all.limits.Certificates.Share(&c.source.shown).Give(c.shown)
		c.shown = 0
	}
}
