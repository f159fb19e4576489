package e2e

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"apiserver-lb/cmd/devcluster/cluster"
)

// protocols are the versions of HTTP that every test of identity is run over.
var protocols = []string{"HTTP/1.1", "HTTP/2.0"}

// caller is somebody who makes requests, by what he shows of himself.
type caller struct {
	certificate   *cluster.Certificate // nil: none
	authorization string               // empty: none
}

// tls returns a configuration that trusts the cluster CA and presents the
// caller's certificate, whatever CAs the server names as its hint.
func (c caller) tls(t *testing.T) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(shared.PKI.CA.Cert)
	config := &tls.Config{RootCAs: roots}
	if c.certificate != nil {
		pair, err := c.certificate.TLS()
		if err != nil {
			t.Fatal(err)
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config
}

// client returns a client of the caller's that speaks the one protocol.
func (c caller) client(t *testing.T, protocol string) *http.Client {
	t.Helper()
	speaks := new(http.Protocols)
	speaks.SetHTTP1(protocol == "HTTP/1.1")
	speaks.SetHTTP2(protocol == "HTTP/2.0")
	transport := &http.Transport{TLSClientConfig: c.tls(t), Protocols: speaks, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 60 * time.Second}
}

// header is the caller's part of a request header, with fields added.
func (c caller) header(add http.Header) http.Header {
	h := http.Header{}
	if c.authorization != "" {
		h.Set("Authorization", c.authorization)
	}
	for name, values := range add {
		h[name] = values
	}
	return h
}

// seen is what a server makes of a caller: the answer to a SelfSubjectReview.
type seen struct {
	Code      int
	User      authenticationv1.UserInfo // where Code is 201
	Forbidden string                    // where Code is 403: the message, which names the user
}

// who names the user that a server saw, or else the status code.
func (s seen) who() string {
	if s.Code == http.StatusCreated {
		return s.User.Username
	}
	if m := userInMessage.FindStringSubmatch(s.Forbidden); m != nil {
		return m[1]
	}
	return strconv.Itoa(s.Code)
}

// userInMessage finds the user in kube-apiserver's word for 403.
var userInMessage = regexp.MustCompile(`User "([^"]*)" cannot`)

const (
	selfReviewPath = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
	selfReview     = `{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`
)

// see asks the server at base who the caller is.
func (c caller) see(t *testing.T, protocol, base string, add http.Header) seen {
	t.Helper()
	return readSeen(t, do(t, c.client(t, protocol), "POST", base+selfReviewPath, selfReview, c.header(add)))
}

// readSeen reads the answer to a SelfSubjectReview.
func readSeen(t *testing.T, a answer) seen {
	t.Helper()
	s := seen{Code: a.Code}
	switch a.Code {
	case http.StatusCreated:
		var review authenticationv1.SelfSubjectReview
		if err := json.Unmarshal([]byte(a.Body), &review); err != nil {
			t.Fatalf("SelfSubjectReview: %v: %s", err, a.Body)
		}
		s.User = review.Status.UserInfo
	case http.StatusForbidden:
		s.Forbidden = readStatus(t, a).Message
	}
	return s
}

// readStatus reads an answer that must be a Status with the answer's code.
func readStatus(t *testing.T, a answer) metav1.Status {
	t.Helper()
	var s metav1.Status
	if err := json.Unmarshal([]byte(a.Body), &s); err != nil {
		t.Fatalf("answer %d is no Status: %v: %.200q", a.Code, err, a.Body)
	}
	if s.Kind != "Status" || s.APIVersion != "v1" || s.Status != metav1.StatusFailure || int(s.Code) != a.Code {
		t.Fatalf("answer %d is no Status of a failure: %.300q", a.Code, a.Body)
	}
	return s
}

// wantRefusal fails the test unless the answer is a 401 Status of the balancer's
// own that says why.
func wantRefusal(t *testing.T, a answer, why string) {
	t.Helper()
	if a.Code != http.StatusUnauthorized {
		t.Errorf("answer %d, want 401: %.300q", a.Code, a.Body)
		return
	}
	s := readStatus(t, a)
	if s.Reason != metav1.StatusReasonUnauthorized || !strings.HasPrefix(s.Message, "apiserver-lb on ") || !strings.Contains(s.Message, why) {
		t.Errorf("Status of the refusal: reason %q, message %q, want Unauthorized by apiserver-lb because of %q", s.Reason, s.Message, why)
	}
	if got := a.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type of the refusal %q, want application/json", got)
	}
}

// issue makes a client certificate of the cluster CA, unless the options say another.
func issue(t *testing.T, o cluster.CertificateOptions) *cluster.Certificate {
	t.Helper()
	c, err := shared.PKI.IssueClient(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Attribute types of subjects.
var (
	oidCN  = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidO   = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidUID = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 2}
)

// subject makes a distinguished name of attributes given as pairs of type and
// value, each a name part of its own. A string becomes a PrintableString or a
// UTF8String; anything else is encoded as it is.
func subject(pairs ...any) pkix.RDNSequence {
	var seq pkix.RDNSequence
	for i := 0; i < len(pairs); i += 2 {
		seq = append(seq, pkix.RelativeDistinguishedNameSET{{Type: pairs[i].(asn1.ObjectIdentifier), Value: pairs[i+1]}})
	}
	return seq
}

// issueBy makes a certificate signed by a certificate that is no authority.
func issueBy(t *testing.T, issuer *cluster.Certificate, commonName string, groups ...string) *cluster.Certificate {
	t.Helper()
	pair, err := issuer.TLS()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: commonName, Organization: groups},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	// The new certificate has the issuer's key, to be short.
	der, err := x509.CreateCertificate(rand.Reader, template, issuer.Leaf, issuer.Leaf.PublicKey, pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), issuer.CertPEM...)
	return &cluster.Certificate{Leaf: leaf, CertPEM: chain, KeyPEM: issuer.KeyPEM}
}

// newCA makes an authority, below parent where that is given.
func newCA(t *testing.T, parent *cluster.CA, name string) *cluster.CA {
	t.Helper()
	var ca *cluster.CA
	var err error
	if parent == nil {
		ca, err = cluster.NewCA(name)
	} else {
		ca, err = parent.Intermediate(name)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// leafOnly returns the certificate without the intermediates beside it.
func leafOnly(c *cluster.Certificate) *cluster.Certificate {
	return &cluster.Certificate{Leaf: c.Leaf, CertPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw}), KeyPEM: c.KeyPEM}
}

// bearer returns the value of Authorization for a user of the cluster's token file.
func bearer(user string) string { return "Bearer " + shared.Token(user).Token }
