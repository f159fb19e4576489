package configs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// now is the time at which the certificates of the tests are valid.
var now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

func atNow() time.Time { return now }

// minimal is the smallest configuration that loads in the directory of inPKI.
const minimal = `tls:
  certFile: tls.crt
  keyFile: tls.key
backends:
  caFile: ca.crt
  servers:
    - address: 10.0.0.11
`

// issue makes a certificate and its key. A nil parent: self-signed.
func issue(t testing.TB, template, parent *x509.Certificate, parentKey crypto.Signer) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(1)
	if template.NotBefore.IsZero() {
		template.NotBefore, template.NotAfter = now.AddDate(0, -1, 0), now.AddDate(1, 0, 0)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func subject(cn string) pkix.Name { return pkix.Name{CommonName: cn} }

func certPEM(certs ...*x509.Certificate) string {
	var b strings.Builder
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

func keyPEM(t testing.TB, key crypto.Signer) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func write(t testing.TB, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // the umask has no say
		t.Fatal(err)
	}
}

// A pki is what the files of inPKI were made of.
type pki struct {
	ca    *x509.Certificate
	caKey crypto.Signer
	tls   *x509.Certificate
}

// inPKI enters a new directory with ca.crt, tls.crt, tls.key, other.key,
// proxy.crt, proxy.key, crl.pem, crl.der, token and denied.
func inPKI(t testing.TB) *pki {
	t.Helper()
	t.Chdir(t.TempDir())
	p := new(pki)
	p.ca, p.caKey = issue(t, &x509.Certificate{
		Subject: subject("test CA"), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil, nil)
	write(t, "ca.crt", certPEM(p.ca), 0o644)

	var key crypto.Signer
	p.tls, key = issue(t, &x509.Certificate{
		Subject: subject("balancer"), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, p.ca, p.caKey)
	write(t, "tls.crt", certPEM(p.tls, p.ca), 0o644)
	write(t, "tls.key", keyPEM(t, key), 0o600)

	proxy, key := issue(t, &x509.Certificate{
		Subject: subject("front-proxy"), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, p.ca, p.caKey)
	write(t, "proxy.crt", certPEM(proxy), 0o644)
	write(t, "proxy.key", keyPEM(t, key), 0o600)

	_, key = issue(t, &x509.Certificate{Subject: subject("other")}, p.ca, p.caKey)
	write(t, "other.key", keyPEM(t, key), 0o600)

	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now.AddDate(0, 0, 7),
	}, p.ca, p.caKey)
	if err != nil {
		t.Fatal(err)
	}
	write(t, "crl.der", string(crl), 0o644)
	write(t, "crl.pem", string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: crl})), 0o644)
	write(t, "token", "abc.def.ghi\n", 0o600)
	write(t, "denied", "", 0o644)
	return p
}

// load writes a configuration into the working directory and loads it.
func load(t testing.TB, text string, o Options) (*Config, error) {
	t.Helper()
	write(t, "lb.yaml", text, 0o644)
	if o.Now == nil {
		o.Now = atNow
	}
	return Load("lb.yaml", o)
}

// mustLoad is load for a configuration without mistakes.
func mustLoad(t testing.TB, text string, o Options) *Config {
	t.Helper()
	c, err := load(t, text, o)
	if err != nil {
		t.Fatalf("load:\n%v", err)
	}
	return c
}

// wantErrors compares an error of Load with the literal lines wanted.
func wantErrors(t testing.TB, err error, want string) {
	t.Helper()
	got := ""
	if err != nil {
		var problems *Errors
		if !errors.As(err, &problems) {
			t.Fatalf("the error is %T, want *Errors", err)
		}
		got = err.Error()
	}
	if diff := cmp.Diff(strings.Split(strings.TrimSpace(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("errors (-want +got):\n%s\ngot:\n%s", diff, got)
	}
}

// edit replaces parts of a configuration, each of which must be there.
func edit(t testing.TB, text string, oldNew ...string) string {
	t.Helper()
	for i := 0; i < len(oldNew); i += 2 {
		if strings.Count(text, oldNew[i]) != 1 {
			t.Fatalf("%q is in the text %d times, want once", oldNew[i], strings.Count(text, oldNew[i]))
		}
		text = strings.Replace(text, oldNew[i], oldNew[i+1], 1)
	}
	return text
}

// sameConfig are the options with which configurations are compared.
var sameConfig = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Prefix{})}

// repoFile returns the path of a file of this package, wherever the test has
// gone since.
func repoFile(t testing.TB, elem ...string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return path
}
