package tlsconf

import "time"

// Expiry says when one certificate, or CRL, in force runs out.
type Expiry struct {
	Use      string // one of the Use constants
	File     string
	Subject  string    // of the certificate; of a CRL, its issuer
	NotAfter time.Time // of a CRL, its NextUpdate
}

// Expiries lists the leaf of each pair, each CA certificate and each CRL that
// names its next update, in a stable order.
func (s *Store) Expiries() []Expiry {
	snap, files := s.snap.Load(), s.loader.files
	var all []Expiry
	leaf := func(use string, f *KeyPairFiles, p *pair) {
		if p != nil {
			all = append(all, Expiry{use, f.Cert, p.cert.Leaf.Subject.String(), p.cert.Leaf.NotAfter})
		}
	}
	authorities := func(use, file string, b *bundle) {
		if b != nil {
			for _, c := range b.certs {
				all = append(all, Expiry{use, file, c.Subject.String(), c.NotAfter})
			}
		}
	}
	for i, p := range snap.serving {
		leaf(UseServing, &files.Serving[i], p)
	}
	leaf(UseFrontProxy, files.FrontProxy, snap.frontProxy)
	leaf(UseProbe, files.Probe, snap.probe)
	authorities(UseClientCA, files.ClientCA, snap.clientCA)
	authorities(UseBackendCA, files.BackendCA, snap.backendCA)
	if snap.crl != nil {
		for _, list := range snap.crl.lists {
			if !list.nextUpdate.IsZero() {
				all = append(all, Expiry{UseClientCRL, files.ClientCRL, list.issuer.Subject.String(), list.nextUpdate})
			}
		}
	}
	return all
}

// FrontProxyNotAfter is when the front-proxy certificate in force expires;
// zero where none is configured. Connections that carry it are to be retired
// before.
func (s *Store) FrontProxyNotAfter() time.Time {
	if p := s.snap.Load().frontProxy; p != nil {
		return p.cert.Leaf.NotAfter
	}
	return time.Time{}
}
