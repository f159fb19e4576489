package tlsconf

import (
	"crypto/tls"
	"slices"
	"strings"
	"time"
)

// cipherSuites are those of TLS 1.2 with forward secrecy and an AEAD. TLS 1.3
// has no others. In FIPS 140-3 mode crypto/tls leaves ChaCha20 out by itself;
// curves are left to it for the same reason.
var cipherSuites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// ListenerConfig is for the client port. Each handshake uses the certificates
// and the client CA of its moment. Client certificates are asked for, with the
// client CA as the hint, and not verified: see [Store.Verify]. More of them than
// anybody has is refused: see boundChain. A resumed
// session brings the certificates of its first handshake with it, so that
// Verify judges them by today's CA.
func (s *Store) ListenerConfig() *tls.Config {
	// The ticket keys are this outer config's, and so outlive a reload.
	c := listenerConfig(s.snap.Load(), s.loader.files.MinVersion, s.loader.now)
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return s.snap.Load().listener, nil
	}
	return c
}

func listenerConfig(snap *snapshot, minVersion uint16, now func() time.Time) *tls.Config {
	c := &tls.Config{
		Time:         now,
		MinVersion:   minVersion,
		CipherSuites: slices.Clone(cipherSuites),
		NextProtos:   []string{"h2", "http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return pick(snap.serving, hello), nil
		},
	}
	if snap.clientCA != nil {
		c.ClientAuth = tls.RequestClientCert
		c.ClientCAs = snap.clientCA.pool
		c.VerifyConnection = boundChain
	}
	return c
}

// pick chooses by server name: an exact name goes before a wildcard, in the
// order of configuration, and of several for one name (RSA and ECDSA) the
// first that the client can use. The first of all is for clients with no
// server name, which is every client that dials an address, and for unknown
// names: refusing those would only hide the reason from the client.
func pick(serving []*pair, hello *tls.ClientHelloInfo) *tls.Certificate {
	name := strings.ToLower(hello.ServerName)
	if name != "" {
		_, parent, _ := strings.Cut(name, ".")
		for _, wanted := range []string{name, "*." + parent} {
			for _, p := range serving {
				named := slices.ContainsFunc(p.cert.Leaf.DNSNames, func(san string) bool { return strings.EqualFold(san, wanted) })
				if named && hello.SupportsCertificate(&p.cert) == nil {
					return &p.cert
				}
			}
		}
	}
	return &serving[0].cert
}
