package forward

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"apiserver-lb/tlsconf"
)

// issued is a certificate with its key.
type issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

var lastSerial atomic.Int64

// issue signs a certificate; by == nil signs itself. It is valid through the time
// of bubbles, which begins in 2000, and that of today.
func issue(by *issued, subject pkix.Name, edit ...func(*x509.Certificate)) *issued {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1000 + lastSerial.Add(1)), Subject: subject,
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, e := range edit {
		e(template)
	}
	parent, parentKey := template, key
	if by != nil {
		parent, parentKey = by.Certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	must(err)
	c, err := x509.ParseCertificate(der)
	must(err)
	return &issued{c, key}
}

func authority(name string) *issued {
	return issue(nil, pkix.Name{CommonName: name}, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
	})
}

func serverOf(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames, c.ExtKeyUsage = names, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
}

func (i *issued) pair() tls.Certificate {
	return tls.Certificate{PrivateKey: i.key, Certificate: [][]byte{i.Raw}}
}

func (i *issued) certPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Raw})
}

func (i *issued) keyPEM() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	must(err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// pki is all certificates of the tests. It is made once and never changed.
type pki struct {
	clientCA, backendCA, proxyCA  *issued
	serving, backend, proxy       *issued
	alice, bob, expired, stranger *issued // clients
	pool                          *x509.CertPool
}

var certificates = sync.OnceValue(func() *pki {
	p := &pki{clientCA: authority("client-ca"), backendCA: authority("backend-ca"), proxyCA: authority("proxy-ca")}
	p.serving = issue(p.backendCA, pkix.Name{CommonName: "balancer"}, serverOf("balancer.example"))
	p.backend = issue(p.backendCA, pkix.Name{CommonName: "kube-apiserver"}, serverOf("kubernetes"))
	p.proxy = issue(p.proxyCA, pkix.Name{CommonName: "front-proxy-client"})
	p.alice = issue(p.clientCA, pkix.Name{CommonName: "alice", Organization: []string{"dev", "ops"}})
	p.bob = issue(p.clientCA, pkix.Name{CommonName: "bob"})
	p.expired = issue(p.clientCA, pkix.Name{CommonName: "alice"}, func(c *x509.Certificate) {
		c.NotAfter = c.NotBefore.Add(time.Hour)
	})
	p.stranger = issue(authority("other-ca"), pkix.Name{CommonName: "root", Organization: []string{"system:masters"}})
	p.pool = x509.NewCertPool()
	p.pool.AddCert(p.backendCA.Certificate)
	return p
})

// openStore puts the certificates into files and opens a store on them.
func openStore(t testing.TB, dir string, p *pki) *tlsconf.Store {
	t.Helper()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keyPair := func(name string, i *issued) tlsconf.KeyPairFiles {
		return tlsconf.KeyPairFiles{Cert: file(name+".crt", i.certPEM()), Key: file(name+".key", i.keyPEM())}
	}
	proxy := keyPair("proxy", p.proxy)
	s, err := tlsconf.Open(tlsconf.Files{
		Serving:    []tlsconf.KeyPairFiles{keyPair("serving", p.serving)},
		ClientCA:   file("client-ca.crt", p.clientCA.certPEM()),
		BackendCA:  file("backend-ca.crt", p.backendCA.certPEM()),
		FrontProxy: &proxy,
	}, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// rotateProxy replaces the front-proxy certificate of a store and reloads it.
func rotateProxy(t testing.TB, dir string, s *tlsconf.Store, p *pki, name string) {
	t.Helper()
	next := issue(p.proxyCA, pkix.Name{CommonName: name})
	for file, data := range map[string][]byte{"proxy.crt": next.certPEM(), "proxy.key": next.keyPEM()} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "proxy.crt")); !bytes.Equal(got, next.certPEM()) {
		t.Fatal("the certificate was not replaced")
	}
}
