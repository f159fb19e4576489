package tlsconf

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// BackendConfig is for connections to a backend whose certificate must be
// valid for serverName, a DNS name or an IP address. With frontProxy, the
// front-proxy certificate is shown; without, no certificate is. The config may
// be kept: each handshake uses the backend CA and the certificate of its
// moment.
func (s *Store) BackendConfig(serverName string, frontProxy bool, alpn ...string) *tls.Config {
	c := s.clientConfig(serverName, alpn)
	if frontProxy {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			// Whatever CAs the server hints at: kube-apiserver lists the
			// request-header CA, a proxy in between may not, and to show none
			// would turn each request on the connection into an anonymous one.
			if p := s.snap.Load().frontProxy; p != nil {
				return &p.cert, nil
			}
			return nil, errors.New("no front-proxy certificate is configured")
		}
	}
	return c
}

// ProbeConfig is BackendConfig for health probes: it shows the probe
// certificate where one is configured, and none otherwise.
func (s *Store) ProbeConfig(serverName string) *tls.Config {
	c := s.clientConfig(serverName, nil)
	if s.loader.files.Probe != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &s.snap.Load().probe.cert, nil
		}
	}
	return c
}

func (s *Store) clientConfig(serverName string, alpn []string) *tls.Config {
	return &tls.Config{
		Time:         s.loader.now,
		ServerName:   serverName,
		MinVersion:   tls.VersionTLS12,
		CipherSuites: slices.Clone(cipherSuites),
		NextProtos:   slices.Clone(alpn),
		// crypto/tls verifies against the CA pool that the config was built
		// with, and net/http keeps one config for the life of a transport. So
		// its check is replaced, not skipped, by the same one with the pool of
		// the moment; VerifyConnection runs in every handshake, resumed ones
		// too.
		InsecureSkipVerify: true, //nolint:gosec // G402: VerifyConnection below verifies chain and name
		VerifyConnection: func(state tls.ConnectionState) error {
			err := verifyBackend(state.PeerCertificates, s.snap.Load().backendCA, serverName, s.loader.now(), fips140.Enabled())
			if err != nil {
				return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
			}
			return nil
		},
	}
}

// verifyBackend is what crypto/tls does for a client: chain, server name, EKU
// ServerAuth, and in FIPS 140-3 mode approved keys only.
func verifyBackend(chain []*x509.Certificate, ca *bundle, serverName string, now time.Time, fips bool) error {
	if serverName == "" {
		// x509 takes an empty name for "any".
		return errors.New("no server name is configured to verify the backend by")
	}
	if len(chain) == 0 {
		return errors.New("the backend sent no certificate")
	}
	verified, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         ca.pool,
		Intermediates: poolOf(vouched(chain[1:], ca)),
		DNSName:       serverName,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("the backend is not %s by the backend CA: %w", serverName, err)
	}
	if fips && !slices.ContainsFunc(verified, fipsApproved) {
		return fmt.Errorf("the backend %s has no chain of keys that FIPS 140-3 approves", serverName)
	}
	return nil
}

// fipsApproved is fipsAllowChain of crypto/tls (common.go, defaults_fips140.go).
func fipsApproved(chain []*x509.Certificate) bool {
	return !slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
		switch key := c.PublicKey.(type) {
		case *rsa.PublicKey:
			return key.N.BitLen() < 2048
		case *ecdsa.PublicKey:
			return key.Curve != elliptic.P256() && key.Curve != elliptic.P384() && key.Curve != elliptic.P521()
		case ed25519.PublicKey:
			return false
		}
		return true
	})
}
