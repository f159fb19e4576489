package tlsconf

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The clock of all tests stands at noon; certificates are valid that year.
var (
	noon      = time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)
	yearStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	yearEnd   = time.Date(2026, 12, 31, 0, 0, 0, 0, time.UTC)
)

func clock() time.Time { return noon }

// issued is a certificate with its key; a CA if its template says so.
type issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

var lastSerial atomic.Int64

// issue signs a certificate; by == nil signs itself.
func issue(t testing.TB, by *issued, subject pkix.Name, edit ...func(*x509.Certificate)) *issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1000 + lastSerial.Add(1)), Subject: subject,
		NotBefore: yearStart, NotAfter: yearEnd, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, e := range edit {
		e(template)
	}
	return &issued{sign(t, template, by, &issued{key: key}), key}
}

// sign makes the certificate of a template for the key of holder.
func sign(t testing.TB, template *x509.Certificate, by, holder *issued) *x509.Certificate {
	t.Helper()
	parent, parentKey := template, holder.key
	if by != nil {
		parent, parentKey = by.Certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, holder.key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func authority(t testing.TB, by *issued, name string, edit ...func(*x509.Certificate)) *issued {
	return issue(t, by, pkix.Name{CommonName: name}, append([]func(*x509.Certificate){func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
	}}, edit...)...)
}

func validity(from, to time.Time) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }
}

func usage(u ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = u }
}

func server(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames, c.ExtKeyUsage = names, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
}

var (
	oidCN = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidO  = asn1.ObjectIdentifier{2, 5, 4, 10}
)

// attribute is one subject attribute with the string type of choice.
func attribute(oid asn1.ObjectIdentifier, tag int, value string) pkix.AttributeTypeAndValue {
	return pkix.AttributeTypeAndValue{Type: oid, Value: asn1.RawValue{Tag: tag, Bytes: []byte(value)}}
}

// subject sets the DER of the subject, attribute by attribute.
func subject(t testing.TB, attributes ...pkix.AttributeTypeAndValue) func(*x509.Certificate) {
	var sequence pkix.RDNSequence
	for _, a := range attributes {
		sequence = append(sequence, pkix.RelativeDistinguishedNameSET{a})
	}
	der, err := asn1.Marshal(sequence)
	if err != nil {
		t.Fatal(err)
	}
	return func(c *x509.Certificate) { c.RawSubject = der }
}

func chainOf(certs ...*issued) []*x509.Certificate {
	var chain []*x509.Certificate
	for _, c := range certs {
		chain = append(chain, c.Certificate)
	}
	return chain
}

func bundleOf(certs ...*issued) *bundle {
	return &bundle{certs: chainOf(certs...), pool: poolOf(chainOf(certs...))}
}

// crl signs a CRL that lists the given certificates.
func (i *issued) crl(t testing.TB, nextUpdate time.Time, extensions []pkix.Extension, revoked ...*issued) []byte {
	t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: yearStart, NextUpdate: nextUpdate, ExtraExtensions: extensions}
	for _, r := range revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: r.SerialNumber, RevocationTime: yearStart})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, i.Certificate, i.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func crlPEM(der []byte) []byte { return pemOf("X509 CRL", der) }

func certPEM(certs ...*issued) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

func (i *issued) keyPEM(t testing.TB) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	if err != nil {
		t.Fatal(err)
	}
	return pemOf("PRIVATE KEY", der)
}

func (i *issued) tls(more ...*issued) tls.Certificate {
	c := tls.Certificate{PrivateKey: i.key, Certificate: [][]byte{i.Raw}}
	for _, m := range more {
		c.Certificate = append(c.Certificate, m.Raw)
	}
	return c
}

func write(t testing.TB, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func symlink(t testing.TB, target, link string) {
	t.Helper()
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
}

// world is a store over real files, with the authorities that filled them.
type world struct {
	dir                            string
	clientCA, backendCA, proxyCA   *issued
	serving, other, proxy, backend *issued
	files                          Files
	logs                           logs
}

func newWorld(t *testing.T) *world {
	w := &world{dir: t.TempDir(), logs: make(logs, 1000)}
	w.clientCA, w.backendCA, w.proxyCA = authority(t, nil, "client-ca"), authority(t, nil, "backend-ca"), authority(t, nil, "proxy-ca")
	w.serving = issue(t, w.backendCA, pkix.Name{CommonName: "serving"}, server("api.example", "*.wild.example"))
	w.other = issue(t, w.backendCA, pkix.Name{CommonName: "other"}, server("other.example", "exact.wild.example"))
	w.proxy = issue(t, w.proxyCA, pkix.Name{CommonName: "front-proxy-client"})
	w.backend = issue(t, w.backendCA, pkix.Name{CommonName: "kube-apiserver"}, server("kubernetes"))
	w.files = Files{
		Serving:  []KeyPairFiles{w.pair(t, "serving", w.serving), w.pair(t, "other", w.other)},
		ClientCA: w.path("client-ca.crt"), ClientCRL: w.path("client.crl"), BackendCA: w.path("backend-ca.crt"),
	}
	proxy := w.pair(t, "proxy", w.proxy)
	w.files.FrontProxy = &proxy
	write(t, w.files.ClientCA, certPEM(w.clientCA))
	write(t, w.files.ClientCRL, w.clientCA.crl(t, yearEnd, nil))
	write(t, w.files.BackendCA, certPEM(w.backendCA))
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) pair(t testing.TB, name string, c *issued) KeyPairFiles {
	f := KeyPairFiles{w.path(name + ".crt"), w.path(name + ".key")}
	write(t, f.Cert, certPEM(c))
	write(t, f.Key, c.keyPEM(t))
	return f
}

func (w *world) open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(w.files, clock, slog.New(slog.NewTextHandler(w.logs, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// logs is a stream of log lines. Written by the store, read by the test, never
// closed.
type logs chan string

func (l logs) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// await returns the next line that holds text; lines before it must not hold
// any of the unwanted ones.
func (l logs) await(t testing.TB, text string, unwanted ...string) string {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line := <-l:
			if strings.Contains(line, text) {
				return line
			}
			for _, u := range unwanted {
				if strings.Contains(line, u) {
					t.Fatalf("waiting for %q, got %s", text, line)
				}
			}
		case <-timeout:
			t.Fatalf("no log line with %q", text)
		}
	}
}
