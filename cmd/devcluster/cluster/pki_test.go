package cluster

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func testPKI(t *testing.T) *PKI {
	t.Helper()
	p, err := newPKI(filepath.Join(t.TempDir(), "pki"), []string{"127.0.0.11", "127.0.0.12"}, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// attributes lists a subject as OID=value in the order of the DER.
func attributes(t *testing.T, raw []byte) []string {
	t.Helper()
	var seq pkix.RDNSequence
	if rest, err := asn1.Unmarshal(raw, &seq); err != nil || len(rest) > 0 {
		t.Fatalf("subject: %v, %d bytes left over", err, len(rest))
	}
	var out []string
	for _, set := range seq {
		for _, a := range set {
			out = append(out, a.Type.String()+"="+a.Value.(string))
		}
	}
	return out
}

func TestIssueClientSubject(t *testing.T) {
	p := testPKI(t)
	rdn := func(oid asn1.ObjectIdentifier, value string) pkix.RelativeDistinguishedNameSET {
		return pkix.RelativeDistinguishedNameSET{{Type: oid, Value: value}}
	}
	raw, err := asn1.Marshal(pkix.RDNSequence{rdn(oidOrganization, "raw")})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		options CertificateOptions
		want    []string
	}{
		{"empty", CertificateOptions{}, nil},
		{"user", CertificateOptions{CommonName: "jane"}, []string{"2.5.4.3=jane"}},
		{"groups in order", CertificateOptions{CommonName: "jane", Organizations: []string{"b", "a", "b"}},
			[]string{"2.5.4.3=jane", "2.5.4.10=b", "2.5.4.10=a", "2.5.4.10=b"}},
		{"uid", CertificateOptions{CommonName: "jane", UID: "1-2"}, []string{"2.5.4.3=jane", "1.3.6.1.4.1.57683.2=1-2"}},
		{"UTF-8 and commas", CertificateOptions{CommonName: "Jürgen, Ж", Organizations: []string{"a,b=c+d"}},
			[]string{"2.5.4.3=Jürgen, Ж", "2.5.4.10=a,b=c+d"}},
		{"two names", CertificateOptions{CommonName: "ignored", Subject: pkix.RDNSequence{rdn(oidCommonName, "first"), rdn(oidCommonName, "last")}},
			[]string{"2.5.4.3=first", "2.5.4.3=last"}},
		{"raw wins", CertificateOptions{CommonName: "ignored", Subject: pkix.RDNSequence{rdn(oidCommonName, "ignored")}, RawSubject: raw},
			[]string{"2.5.4.10=raw"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := p.IssueClient(tc.options)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, attributes(t, c.Leaf.RawSubject)); diff != "" {
				t.Error(diff)
			}
			if _, err := c.TLS(); err != nil {
				t.Errorf("the key does not fit: %v", err)
			}
		})
	}
}

func TestIssueClientVerifies(t *testing.T) {
	p := testPKI(t)
	intermediate, err := p.CA.Intermediate("intermediate")
	if err != nil {
		t.Fatal(err)
	}
	second, err := intermediate.Intermediate("second")
	if err != nil {
		t.Fatal(err)
	}
	hour := time.Hour
	for _, tc := range []struct {
		name    string
		options CertificateOptions
		want    bool // verifies as a client certificate of the cluster CA, now
	}{
		{"default", CertificateOptions{}, true},
		{"expired", CertificateOptions{NotBefore: time.Now().Add(-2 * hour), NotAfter: time.Now().Add(-hour)}, false},
		{"not yet valid", CertificateOptions{NotBefore: time.Now().Add(hour)}, false},
		{"untrusted CA", CertificateOptions{CA: p.UntrustedCA}, false},
		{"front-proxy CA", CertificateOptions{CA: p.FrontProxyCA}, false},
		{"intermediate", CertificateOptions{CA: intermediate}, true},
		{"two intermediates", CertificateOptions{CA: second}, true},
		{"serving only", CertificateOptions{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, false},
		{"no key usage", CertificateOptions{ExtKeyUsage: []x509.ExtKeyUsage{}}, true}, // RFC 5280, 4.2.1.12: unrestricted
		{"critical extension", CertificateOptions{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := p.IssueClient(tc.options)
			if err != nil {
				t.Fatal(err)
			}
			roots, between := x509.NewCertPool(), x509.NewCertPool()
			roots.AddCert(p.CA.Cert)
			_, rest := pem.Decode(c.CertPEM)
			between.AppendCertsFromPEM(rest)
			_, err = c.Leaf.Verify(x509.VerifyOptions{
				Roots:         roots,
				Intermediates: between,
				KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			})
			if (err == nil) != tc.want {
				t.Errorf("verified: %v, want success %t", err, tc.want)
			}
		})
	}
}

func TestIssueServing(t *testing.T) {
	p := testPKI(t)
	c, err := p.IssueServing("lb", "127.0.0.1", "::1", "localhost")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.CA.Cert)
	for host, want := range map[string]bool{"127.0.0.1": true, "::1": true, "localhost": true, "127.0.0.2": false, "lb": false} {
		_, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host})
		if (err == nil) != want {
			t.Errorf("%s: %v, want success %t", host, err, want)
		}
	}
}

func TestCRL(t *testing.T) {
	p := testPKI(t)
	revoked, err := p.IssueClient(CertificateOptions{CommonName: "mallory"})
	if err != nil {
		t.Fatal(err)
	}
	text, err := p.CA.CRL(7, revoked)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "X509 CRL" {
		t.Fatalf("no PEM of a CRL: %s", text)
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := list.CheckSignatureFrom(p.CA.Cert); err != nil {
		t.Error(err)
	}
	if list.Number.Int64() != 7 || len(list.RevokedCertificateEntries) != 1 ||
		list.RevokedCertificateEntries[0].SerialNumber.Cmp(revoked.Leaf.SerialNumber) != 0 {
		t.Errorf("number %v, entries %v", list.Number, list.RevokedCertificateEntries)
	}
}

// The balancer refuses key files that others can read, and so do careful people.
func TestKeyFilesArePrivate(t *testing.T) {
	p := testPKI(t)
	keys, err := filepath.Glob(p.File("*.key"))
	if err != nil || len(keys) < 10 {
		t.Fatalf("%d key files, %v", len(keys), err)
	}
	for _, file := range keys {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("%s: %v", filepath.Base(file), mode)
		}
	}
}
