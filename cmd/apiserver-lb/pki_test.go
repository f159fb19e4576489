package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// issued is a certificate with its key.
type issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

var lastSerial atomic.Int64

// issue signs a client certificate of a year; by == nil signs itself.
func issue(t *testing.T, by *issued, name string, edit ...func(*x509.Certificate)) *issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(lastSerial.Add(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
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
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issued{c, key}
}

func authority(t *testing.T, name string, edit ...func(*x509.Certificate)) *issued {
	t.Helper()
	return issue(t, nil, name, append(edit, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
	})...)
}

// server makes a serving certificate, of loopback and a name.
func server(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{name}, []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
}

func until(at time.Time) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotAfter = at }
}

func (i *issued) pair() tls.Certificate {
	return tls.Certificate{PrivateKey: i.key, Certificate: [][]byte{i.Raw}}
}

// id tells certificates apart.
func (i *issued) id() string { return i.SerialNumber.String() }

func certPEM(all ...*issued) (b []byte) {
	for _, i := range all {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Raw})...)
	}
	return b
}

func (i *issued) keyPEM(t *testing.T) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// pki is the certificates of one cluster.
type pki struct {
	clientCA, clusterCA, proxyCA *issued
	serving, backend, proxy      *issued
	alice                        *issued
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{clientCA: authority(t, "client-ca"), clusterCA: authority(t, "cluster-ca"), proxyCA: authority(t, "front-proxy-ca")}
	p.serving = issue(t, p.clusterCA, "apiserver-lb", server("lb.example"))
	p.backend = issue(t, p.clusterCA, "kube-apiserver", server("kubernetes"))
	p.proxy = issue(t, p.proxyCA, "front-proxy-client")
	p.alice = issue(t, p.clientCA, "alice")
	return p
}

// replace puts a file in place whole, as renewals do.
func replace(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// replacePair puts name.crt and name.key in place.
func replacePair(t *testing.T, dir, name string, i *issued) (certFile, keyFile string) {
	t.Helper()
	return replace(t, dir, name+".crt", certPEM(i)), replace(t, dir, name+".key", i.keyPEM(t))
}
