package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// uidOID is the attribute of a subject in which kube-apiserver looks for a UID
// (k8s.io/apiserver/pkg/authentication/request/x509, since 1.33 by default).
var uidOID = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 2}

var (
	oidCommonName   = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidOrganization = asn1.ObjectIdentifier{2, 5, 4, 10}
)

// certificateLife is how long certificates are valid when nothing else is asked for. A
// cluster lives for minutes or hours.
const certificateLife = 30 * 24 * time.Hour

// CA is a certificate authority whose key this process holds.
type CA struct {
	// Cert is the authority's own certificate.
	Cert *x509.Certificate
	// PEM is Cert in PEM.
	PEM []byte

	key   crypto.Signer
	chain []byte // PEM of the intermediates up to the root, the root left out
}

// Certificate is a certificate with its private key.
type Certificate struct {
	// Leaf is the certificate itself.
	Leaf *x509.Certificate
	// CertPEM is the certificate, followed by the intermediates where its CA is one.
	CertPEM []byte
	// KeyPEM is the private key in PKCS #8.
	KeyPEM []byte
}

// TLS returns the certificate as crypto/tls takes it.
func (c *Certificate) TLS() (tls.Certificate, error) {
	return tls.X509KeyPair(c.CertPEM, c.KeyPEM)
}

// Write writes the certificate and its key (mode 0600) to two files.
func (c *Certificate) Write(certFile, keyFile string) error {
	return errors.Join(
		os.WriteFile(certFile, c.CertPEM, 0o644),
		os.WriteFile(keyFile, c.KeyPEM, 0o600),
	)
}

// CertificateOptions says what a client certificate holds. The zero value is a valid
// certificate of the cluster CA with an empty subject.
type CertificateOptions struct {
	// CommonName is the user, Organizations are the groups, in that order in the subject.
	CommonName    string
	Organizations []string
	// UID is put into the subject under OID 1.3.6.1.4.1.57683.2 when not empty.
	UID string
	// Subject is used in place of the fields above when not nil: any attributes in any
	// order, repeated ones too.
	Subject pkix.RDNSequence
	// RawSubject is the DER of a subject; it is used in place of all of the above.
	RawSubject []byte
	// CA issues the certificate; nil means the cluster CA.
	CA *CA
	// NotBefore and NotAfter bound its validity; zero means an hour ago, and in a week.
	NotBefore, NotAfter time.Time
	// ExtKeyUsage is client authentication when nil; an empty slice that is not nil
	// leaves the extension out.
	ExtKeyUsage []x509.ExtKeyUsage
	// ExtraExtensions are added as they are.
	ExtraExtensions []pkix.Extension
	// DNSNames and IPs are the subject alternative names.
	DNSNames []string
	IPs      []net.IP
}

// subject returns the DER of the subject that the options describe.
func (o CertificateOptions) subject() ([]byte, error) {
	if o.RawSubject != nil {
		return o.RawSubject, nil
	}
	seq := o.Subject
	if seq == nil {
		seq = pkix.RDNSequence{}
		add := func(oid asn1.ObjectIdentifier, value string) {
			seq = append(seq, pkix.RelativeDistinguishedNameSET{{Type: oid, Value: value}})
		}
		if o.CommonName != "" {
			add(oidCommonName, o.CommonName)
		}
		for _, org := range o.Organizations {
			add(oidOrganization, org)
		}
		if o.UID != "" {
			add(uidOID, o.UID)
		}
	}
	der, err := asn1.Marshal(seq)
	if err != nil {
		return nil, fmt.Errorf("encoding the subject: %w", err)
	}
	return der, nil
}

// NewCA makes a self-signed authority. It is also the way to one that nobody trusts.
func NewCA(commonName string) (*CA, error) {
	return newCA(commonName, nil)
}

// Intermediate makes an authority below ca. Certificates that it issues carry its own
// certificate in their PEM.
func (ca *CA) Intermediate(commonName string) (*CA, error) {
	return newCA(commonName, ca)
}

func newCA(commonName string, parent *CA) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(2 * certificateLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	if template.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	issuer, signer := template, crypto.Signer(key)
	if parent != nil {
		issuer, signer = parent.Cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("CA %q: %w", commonName, err)
	}
	ca := &CA{key: key, PEM: pemBlock("CERTIFICATE", der)}
	if ca.Cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if parent != nil {
		ca.chain = append(append([]byte{}, ca.PEM...), parent.chain...)
	}
	return ca, nil
}

// Issue makes a certificate with a key of its own; o.CA is not looked at.
func (ca *CA) Issue(o CertificateOptions) (*Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		NotBefore:       o.NotBefore,
		NotAfter:        o.NotAfter,
		KeyUsage:        x509.KeyUsageDigitalSignature,
		ExtKeyUsage:     o.ExtKeyUsage,
		ExtraExtensions: o.ExtraExtensions,
		DNSNames:        o.DNSNames,
		IPAddresses:     o.IPs,
	}
	if template.RawSubject, err = o.subject(); err != nil {
		return nil, err
	}
	if template.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(certificateLife)
	}
	if o.ExtKeyUsage == nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Cert, key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("certificate for %q: %w", o.CommonName, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certificate for %q: %w", o.CommonName, err)
	}
	keyPEM, err := marshalKey(key)
	if err != nil {
		return nil, err
	}
	return &Certificate{
		Leaf:    leaf,
		CertPEM: append(pemBlock("CERTIFICATE", der), ca.chain...),
		KeyPEM:  keyPEM,
	}, nil
}

// CRL returns a certificate revocation list in PEM, signed by ca, valid for a day, that
// names the certificates given. number must grow from list to list.
func (ca *CA) CRL(number int64, revoked ...*Certificate) ([]byte, error) {
	now := time.Now()
	template := &x509.RevocationList{
		Number:     big.NewInt(number),
		ThisUpdate: now.Add(-time.Minute),
		NextUpdate: now.Add(24 * time.Hour),
	}
	for _, c := range revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber:   c.Leaf.SerialNumber,
			RevocationTime: now.Add(-time.Minute),
		})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, ca.Cert, ca.key)
	if err != nil {
		return nil, fmt.Errorf("CRL of %s: %w", ca.Cert.Subject, err)
	}
	return pemBlock("X509 CRL", der), nil
}

// PKI is everything a cluster needs to know one another. The files lie in Dir under the
// names that kubeadm gives them.
type PKI struct {
	// Dir holds the files: ca.crt, ca.key, front-proxy-ca.crt, front-proxy-client.crt and
	// .key, sa.key, sa.pub, apiserver-N.crt and .key, admin.crt and .key and more.
	Dir string
	// CA issues serving and client certificates: --client-ca-file.
	CA *CA
	// FrontProxyCA issues what may assert identities: --requestheader-client-ca-file.
	FrontProxyCA *CA
	// UntrustedCA is known to nobody.
	UntrustedCA *CA
	// Admin is in system:masters.
	Admin *Certificate
	// FrontProxyClient has CN=front-proxy-client, which the apiservers allow.
	FrontProxyClient *Certificate

	etcdCA *CA
}

// IssueClient makes a client certificate; see CertificateOptions for what can be chosen.
func (p *PKI) IssueClient(o CertificateOptions) (*Certificate, error) {
	if o.CA == nil {
		o.CA = p.CA
	}
	return o.CA.Issue(o)
}

// IssueServing makes a serving certificate of the cluster CA for names and addresses.
func (p *PKI) IssueServing(commonName string, hosts ...string) (*Certificate, error) {
	o := CertificateOptions{CommonName: commonName, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			o.IPs = append(o.IPs, ip)
		} else {
			o.DNSNames = append(o.DNSNames, h)
		}
	}
	return p.CA.Issue(o)
}

// File returns the path of a file of the PKI.
func (p *PKI) File(name string) string { return filepath.Join(p.Dir, name) }

// newPKI makes all keys and certificates and writes them to dir. apiservers and node are
// the addresses that they listen on.
func newPKI(dir string, apiservers []string, node string) (*PKI, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &PKI{Dir: dir}
	for _, ca := range []struct {
		to   **CA
		name string
		file string // without extension; empty: not written
	}{
		{&p.CA, "kubernetes", "ca"},
		{&p.FrontProxyCA, "front-proxy-ca", "front-proxy-ca"},
		{&p.etcdCA, "etcd-ca", "etcd-ca"},
		{&p.UntrustedCA, "untrusted-ca", ""},
	} {
		made, err := NewCA(ca.name)
		if err != nil {
			return nil, err
		}
		*ca.to = made
		if ca.file == "" {
			continue
		}
		key, err := marshalKey(made.key)
		if err != nil {
			return nil, err
		}
		if err := (&Certificate{CertPEM: made.PEM, KeyPEM: key}).Write(p.File(ca.file+".crt"), p.File(ca.file+".key")); err != nil {
			return nil, err
		}
	}
	if err := p.writeServiceAccountKey(); err != nil {
		return nil, err
	}

	server := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	loopback := []net.IP{net.IPv4(127, 0, 0, 1)}
	type entry struct {
		file string
		CertificateOptions
	}
	entries := []entry{
		{"etcd", CertificateOptions{CommonName: "etcd", CA: p.etcdCA, ExtKeyUsage: both, IPs: loopback, DNSNames: []string{"localhost"}}},
		{"apiserver-etcd-client", CertificateOptions{CommonName: "kube-apiserver-etcd-client", CA: p.etcdCA}},
		{"apiserver-kubelet-client", CertificateOptions{CommonName: "kube-apiserver-kubelet-client", Organizations: []string{"system:masters"}}},
		{"front-proxy-client", CertificateOptions{CommonName: frontProxyName, CA: p.FrontProxyCA}},
		{"admin", CertificateOptions{CommonName: "kubernetes-admin", Organizations: []string{"system:masters"}}},
		{"controller-manager", CertificateOptions{CommonName: "system:kube-controller-manager", ExtKeyUsage: both, IPs: loopback, DNSNames: []string{"localhost"}}},
		{"kwok", CertificateOptions{CommonName: "kwok", Organizations: []string{"system:masters"}}},
		{"kubelet", CertificateOptions{CommonName: "system:node:" + NodeName, Organizations: []string{"system:nodes"}, ExtKeyUsage: server, IPs: []net.IP{net.ParseIP(node)}, DNSNames: []string{NodeName}}},
	}
	for i := range apiservers {
		o := CertificateOptions{
			CommonName:  "kube-apiserver",
			ExtKeyUsage: server,
			DNSNames: []string{
				"localhost", apiserverName(i + 1), "kubernetes", "kubernetes.default",
				"kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
			},
			// 10.96.0.1 is the first address of serviceRange: what pods call.
			IPs: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)},
		}
		for _, a := range apiservers {
			o.IPs = append(o.IPs, net.ParseIP(a))
		}
		entries = append(entries, entry{apiserverName(i + 1), o})
	}
	for _, e := range entries {
		c, err := p.IssueClient(e.CertificateOptions)
		if err != nil {
			return nil, err
		}
		if err := c.Write(p.File(e.file+".crt"), p.File(e.file+".key")); err != nil {
			return nil, err
		}
		switch e.file {
		case "admin":
			p.Admin = c
		case "front-proxy-client":
			p.FrontProxyClient = c
		}
	}
	return p, nil
}

// writeServiceAccountKey makes the key that signs service account tokens. RSA, since
// it is what clusters have; an OIDC client library may know nothing else.
func (p *PKI) writeServiceAccountKey() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	private, err := marshalKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(p.File("sa.key"), private, 0o600),
		os.WriteFile(p.File("sa.pub"), pemBlock("PUBLIC KEY", public), 0o644),
	)
}

func marshalKey(key any) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pemBlock("PRIVATE KEY", der), nil
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// newSerial returns a random serial number of 127 bits (RFC 5280, 4.1.2.2: at most 20
// octets, positive).
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}
