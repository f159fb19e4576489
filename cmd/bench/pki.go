package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// serverName is the name in all certificates, which proxies verify.
const serverName = "localhost"

// pki names the PEM files of a run.
type pki struct {
	ca                      string
	proxyCert, proxyKey     string
	proxyBundle             string // certificate and key in one file, for HAProxy
	backendCert, backendKey string
}

// newPKI writes a CA and two serving certificates, P-256, into dir.
func newPKI(dir string) (pki, error) {
	p := pki{
		ca:        filepath.Join(dir, "ca.crt"),
		proxyCert: filepath.Join(dir, "proxy.crt"), proxyKey: filepath.Join(dir, "proxy.key"),
		proxyBundle: filepath.Join(dir, "proxy.pem"),
		backendCert: filepath.Join(dir, "backend.crt"), backendKey: filepath.Join(dir, "backend.key"),
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p, err
	}
	ca := certTemplate(1, "bench CA")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	if _, err := issue(p.ca, ca, ca, caKey.Public(), caKey); err != nil {
		return p, err
	}
	for i, leaf := range []struct{ cert, key, bundle string }{
		{p.proxyCert, p.proxyKey, p.proxyBundle},
		{p.backendCert, p.backendKey, ""},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return p, err
		}
		template := certTemplate(int64(i)+2, serverName)
		template.DNSNames = []string{serverName}
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		template.KeyUsage = x509.KeyUsageDigitalSignature
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		certPEM, err := issue(leaf.cert, template, ca, key.Public(), caKey)
		if err != nil {
			return p, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return p, err
		}
		keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err := os.WriteFile(leaf.key, keyPEM, 0o600); err != nil {
			return p, err
		}
		if leaf.bundle != "" {
			if err := os.WriteFile(leaf.bundle, append(certPEM, keyPEM...), 0o600); err != nil {
				return p, err
			}
		}
	}
	return p, nil
}

// roots is the pool of the CA alone.
func (p pki) roots() (*x509.CertPool, error) {
	ca, err := os.ReadFile(p.ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return roots, nil
}

func certTemplate(serial int64, commonName string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
	}
}

// issue signs a certificate, writes it to file and returns it as PEM.
func issue(file string, template, parent *x509.Certificate, public any, signer crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", template.Subject.CommonName, err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certPEM, os.WriteFile(file, certPEM, 0o600)
}
