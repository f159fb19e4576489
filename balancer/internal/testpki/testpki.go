// Package testpki is the certificates of the tests.
package testpki

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

// Issued is a certificate with its key.
type Issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

var lastSerial atomic.Int64

// Issue signs a certificate; by == nil signs itself. It is valid through the time
// of bubbles, which begins in 2000, and that of today.
func Issue(by *Issued, subject pkix.Name, edit ...func(*x509.Certificate)) *Issued {
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
	return &Issued{c, key}
}

// Authority returns a CA.
func Authority(name string) *Issued {
	return Issue(nil, pkix.Name{CommonName: name}, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
	})
}

// ServerOf makes a certificate that of a server with the names given.
func ServerOf(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames, c.ExtKeyUsage = names, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
}

// Pair returns it as crypto/tls wants it.
func (i *Issued) Pair() tls.Certificate {
	return tls.Certificate{PrivateKey: i.key, Certificate: [][]byte{i.Raw}}
}

// CertPEM returns the certificate in PEM.
func (i *Issued) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Raw})
}

// KeyPEM returns the key in PEM.
func (i *Issued) KeyPEM() []byte {
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	must(err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// PKI is all certificates of the tests. It is made once and never changed.
type PKI struct {
	ClientCA, BackendCA, ProxyCA  *Issued
	Serving, Backend, Proxy       *Issued
	Alice, Bob, Expired, Stranger *Issued // clients
	Pool                          *x509.CertPool
}

// Certificates returns the PKI.
var Certificates = sync.OnceValue(func() *PKI {
	p := &PKI{ClientCA: Authority("client-ca"), BackendCA: Authority("backend-ca"), ProxyCA: Authority("proxy-ca")}
	p.Serving = Issue(p.BackendCA, pkix.Name{CommonName: "balancer"}, ServerOf("balancer.example"))
	p.Backend = Issue(p.BackendCA, pkix.Name{CommonName: "kube-apiserver"}, ServerOf("kubernetes"))
	p.Proxy = Issue(p.ProxyCA, pkix.Name{CommonName: "front-proxy-client"})
	p.Alice = Issue(p.ClientCA, pkix.Name{CommonName: "alice", Organization: []string{"dev", "ops"}})
	p.Bob = Issue(p.ClientCA, pkix.Name{CommonName: "bob"})
	p.Expired = Issue(p.ClientCA, pkix.Name{CommonName: "alice"}, func(c *x509.Certificate) {
		c.NotAfter = c.NotBefore.Add(time.Hour)
	})
	p.Stranger = Issue(Authority("other-ca"), pkix.Name{CommonName: "root", Organization: []string{"system:masters"}})
	p.Pool = x509.NewCertPool()
	p.Pool.AddCert(p.BackendCA.Certificate)
	return p
})

// OpenStore puts the certificates into files and opens a store on them.
func OpenStore(t testing.TB, dir string, p *PKI) *tlsconf.Store {
	t.Helper()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keyPair := func(name string, i *Issued) tlsconf.KeyPairFiles {
		return tlsconf.KeyPairFiles{Cert: file(name+".crt", i.CertPEM()), Key: file(name+".key", i.KeyPEM())}
	}
	proxy := keyPair("proxy", p.Proxy)
	s, err := tlsconf.Open(tlsconf.Files{
		Serving:    []tlsconf.KeyPairFiles{keyPair("serving", p.Serving)},
		ClientCA:   file("client-ca.crt", p.ClientCA.CertPEM()),
		ClientDeny: file("denied", nil),
		BackendCA:  file("backend-ca.crt", p.BackendCA.CertPEM()),
		FrontProxy: &proxy,
	}, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Deny replaces the deny list of a store and reloads it.
func Deny(t testing.TB, dir string, s *tlsconf.Store, list string) {
	t.Helper()
	replace(t, dir, s, "denied", []byte(list))
}

// TrustClientsOf replaces the client CA of a store and reloads it.
func TrustClientsOf(t testing.TB, dir string, s *tlsconf.Store, ca *Issued) {
	t.Helper()
	replace(t, dir, s, "client-ca.crt", ca.CertPEM())
}

func replace(t testing.TB, dir string, s *tlsconf.Store, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
}

// RotateProxy replaces the front-proxy certificate of a store and reloads it.
func RotateProxy(t testing.TB, dir string, s *tlsconf.Store, p *PKI, name string) {
	t.Helper()
	next := Issue(p.ProxyCA, pkix.Name{CommonName: name})
	for file, data := range map[string][]byte{"proxy.crt": next.CertPEM(), "proxy.key": next.KeyPEM()} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "proxy.crt")); !bytes.Equal(got, next.CertPEM()) {
		t.Fatal("the certificate was not replaced")
	}
}
