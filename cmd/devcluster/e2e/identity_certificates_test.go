package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// bmpString is a string in the encoding of old directories, UTF-16.
func bmpString(s string) asn1.RawValue {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = append(b, byte(u>>8), byte(u))
	}
	return asn1.RawValue{Tag: asn1.TagBMPString, Bytes: b}
}

// tagged is a string under an ASN.1 tag of choice.
func tagged(tag int, s string) asn1.RawValue { return asn1.RawValue{Tag: tag, Bytes: []byte(s)} }

// numbered returns n names.
func numbered(prefix string, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%03d", prefix, i)
	}
	return names
}

// TestCertificateSubjects: whatever a certificate's subject holds, kube-apiserver
// sees through the balancer what it sees directly.
func TestCertificateSubjects(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	first := newCA(t, shared.PKI.CA, "first")
	second := newCA(t, first, "second")
	shuffled := issue(t, cluster.CertificateOptions{CommonName: "jane", CA: second})
	shuffled.CertPEM = shuffle(t, shuffled.CertPEM)
	for _, test := range []struct {
		name    string
		options cluster.CertificateOptions
		made    *cluster.Certificate // used in place of options
		user    string
		groups  []string
	}{
		{"one group", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev"}}, nil, "jane", []string{"dev"}},
		{"groups in their order", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"z", "a", "m", "a"}}, nil, "jane", []string{"z", "a", "m", "a"}},
		{"12 groups", cluster.CertificateOptions{CommonName: "jane", Organizations: numbered("group", 12)}, nil, "jane", numbered("group", 12)},
		{"500 groups", cluster.CertificateOptions{CommonName: "jane", Organizations: numbered("group", 500)}, nil, "jane", numbered("group", 500)},
		{"system names", cluster.CertificateOptions{CommonName: "system:node:node-1", Organizations: []string{"system:nodes"}}, nil, "system:node:node-1", []string{"system:nodes"}},
		{"comma", cluster.CertificateOptions{CommonName: "doe, jane", Organizations: []string{"a,b", ",", "c, d"}}, nil, "doe, jane", []string{"a,b", ",", "c, d"}},
		{"punctuation", cluster.CertificateOptions{CommonName: `"jane"\;:<>%41+=?#&'`, Organizations: []string{"%2f", "a/b", "(c)"}}, nil, `"jane"\;:<>%41+=?#&'`, []string{"%2f", "a/b", "(c)"}},
		{"UTF-8", cluster.CertificateOptions{CommonName: "Žofie Ångström 王", Organizations: []string{"🦀", "группа"}}, nil, "Žofie Ångström 王", []string{"🦀", "группа"}},
		{"spaces inside", cluster.CertificateOptions{CommonName: "jane  m.  doe", Organizations: []string{"two  spaces", "tab\tinside"}}, nil, "jane  m.  doe", []string{"two  spaces", "tab\tinside"}},
		{"space of Unicode at the ends", cluster.CertificateOptions{CommonName: "\u00a0jane\u2003", Organizations: []string{"\u0085next", "line\u2028"}}, nil, "\u00a0jane\u2003", []string{"\u0085next", "line\u2028"}},
		{"two CNs", cluster.CertificateOptions{Subject: subject(oidCN, "admin", oidO, "dev", oidCN, "jane")}, nil, "jane", []string{"dev"}},
		{"CN and O in one set", cluster.CertificateOptions{Subject: pkix.RDNSequence{{{Type: oidCN, Value: "jane"}, {Type: oidO, Value: "dev"}, {Type: oidO, Value: "ops"}}}}, nil, "jane", []string{"dev", "ops"}},
		{"O before CN, others between", cluster.CertificateOptions{Subject: subject(oidO, "dev", asn1.ObjectIdentifier{2, 5, 4, 6}, "CZ", asn1.ObjectIdentifier{2, 5, 4, 11}, "unit", oidCN, "jane", oidO, "ops")}, nil, "jane", []string{"dev", "ops"}},
		{"BMPString", cluster.CertificateOptions{Subject: subject(oidCN, bmpString("Žofie"), oidO, bmpString("группа"))}, nil, "Žofie", []string{"группа"}},
		{"IA5String and PrintableString", cluster.CertificateOptions{Subject: subject(oidCN, tagged(asn1.TagIA5String, "jane@example.org"), oidO, tagged(asn1.TagPrintableString, "dev"))}, nil, "jane@example.org", []string{"dev"}},
		{"NumericString", cluster.CertificateOptions{Subject: subject(oidCN, tagged(asn1.TagNumericString, "12 34"))}, nil, "12 34", nil},
		{"T61String", cluster.CertificateOptions{Subject: subject(oidCN, tagged(asn1.TagT61String, "jane"))}, nil, "jane", nil},
		{"UID", cluster.CertificateOptions{CommonName: "jane", UID: "3f2a, 1"}, nil, "jane", nil},
		{"UID as BMPString", cluster.CertificateOptions{Subject: subject(oidUID, bmpString("ž-1"), oidCN, "jane")}, nil, "jane", nil},
		{"no usage", cluster.CertificateOptions{CommonName: "jane", ExtKeyUsage: []x509.ExtKeyUsage{}}, nil, "jane", nil},
		{"two intermediates", cluster.CertificateOptions{CommonName: "jane", CA: second}, nil, "jane", nil},
		{"intermediates in the wrong order", cluster.CertificateOptions{}, shuffled, "jane", nil},
		{"40 kB extension", cluster.CertificateOptions{CommonName: "jane", ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 99}, Value: make([]byte, 40_000)}}}, nil, "jane", nil},
		{"40 kB common name", cluster.CertificateOptions{CommonName: strings.Repeat("jane", 10_000)}, nil, strings.Repeat("jane", 10_000), nil},
		{"40 kB of groups", cluster.CertificateOptions{CommonName: "jane", Organizations: numbered(strings.Repeat("g", 76), 500)}, nil, "jane", numbered(strings.Repeat("g", 76), 500)},
	} {
		t.Run(test.name, func(t *testing.T) {
			who := caller{certificate: test.made}
			if who.certificate == nil {
				who.certificate = issue(t, test.options)
			}
			for _, protocol := range protocols {
				directly := who.see(t, protocol, direct, nil)
				if directly.User.Username != test.user {
					t.Errorf("%s: directly the user is %.100q (%d), want %.100q", protocol, directly.User.Username, directly.Code, test.user)
				}
				if got, want := directly.User.Groups, append(slices.Clone(test.groups), "system:authenticated"); !slices.Equal(got, want) {
					t.Errorf("%s: directly the groups are %q, want %q", protocol, got, want)
				}
				through := who.see(t, protocol, lb.URL, nil)
				if diff := cmp.Diff(directly, through); diff != "" {
					t.Errorf("%s: through the balancer (+) it is not as directly (-):\n%s", protocol, diff)
				}
			}
		})
	}
}

// shuffle puts the intermediates of a chain in the opposite order.
func shuffle(t *testing.T, chain []byte) []byte {
	t.Helper()
	const end = "-----END CERTIFICATE-----\n"
	parts := strings.SplitAfter(string(chain), end)
	parts = slices.DeleteFunc(parts, func(p string) bool { return p == "" })
	if len(parts) < 3 {
		t.Fatalf("a chain of %d certificates has no order to change", len(parts))
	}
	slices.Reverse(parts[1:])
	return []byte(strings.Join(parts, ""))
}

// TestUncarriableIdentities: an identity that an HTTP header cannot carry as it is
// would become another one. kube-apiserver takes it directly; the balancer refuses
// it, and says why. A token beside it still counts, as with any refused certificate.
func TestUncarriableIdentities(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	for _, test := range []struct {
		name    string
		options cluster.CertificateOptions
		why     string
	}{
		{"CR LF in CN", cluster.CertificateOptions{CommonName: "jane\r\nX-Remote-Group: system:masters"}, "0x0d"},
		{"LF in CN", cluster.CertificateOptions{CommonName: "jane\nadmin"}, "0x0a"},
		{"NUL in CN", cluster.CertificateOptions{CommonName: "admin\x00jane"}, "0x00"},
		{"DEL in CN", cluster.CertificateOptions{CommonName: "jane\x7f"}, "0x7f"},
		{"control character in CN", cluster.CertificateOptions{CommonName: "ja\x01ne"}, "0x01"},
		{"leading space in CN", cluster.CertificateOptions{CommonName: " jane"}, "begins with white space"},
		{"trailing space in CN", cluster.CertificateOptions{CommonName: "jane "}, "ends with white space"},
		{"trailing tab in CN", cluster.CertificateOptions{CommonName: "jane\t"}, "ends with white space"},
		{"space alone in CN", cluster.CertificateOptions{CommonName: " "}, "white space"},
		{"CR LF in O", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev", "ops\r\nX-Remote-User: admin"}}, "organization 2 of 2"},
		{"NUL in O", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"\x00"}}, "organization 1 of 1"},
		{"leading space in O", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{" system:masters"}}, "begins with white space"},
		{"trailing space in O", cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev "}}, "ends with white space"},
		{"empty O", cluster.CertificateOptions{Subject: subject(oidCN, "jane", oidO, "dev", oidO, "")}, "organization 2 of 2 is empty"},
		{"LF in UID", cluster.CertificateOptions{CommonName: "jane", UID: "a\nb"}, "UID contains"},
		{"trailing space in UID", cluster.CertificateOptions{CommonName: "jane", UID: "a "}, "UID ends with"},
	} {
		t.Run(test.name, func(t *testing.T) {
			who := caller{certificate: issue(t, test.options)}
			withToken := caller{who.certificate, bearer("alice")}
			for _, protocol := range protocols {
				directly := who.see(t, protocol, direct, nil)
				if directly.Code != http.StatusCreated || directly.User.Username != who.certificate.Leaf.Subject.CommonName {
					t.Errorf("%s: directly the user is %q (%d), want the common name %q", protocol, directly.User.Username, directly.Code, who.certificate.Leaf.Subject.CommonName)
				}
				for _, path := range []string{"/version", "/api/v1/namespaces/default/pods"} {
					wantRefusal(t, do(t, who.client(t, protocol), "GET", lb.URL+path, "", nil), test.why)
				}
				if got := withToken.see(t, protocol, lb.URL, nil).who(); got != "alice" {
					t.Errorf("%s: beside the token of alice the user is %s", protocol, got)
				}
			}
		})
	}
}

// TestUnreadableCertificates: certificates that crypto/x509 cannot read end the
// handshake, at a kube-apiserver and at the balancer.
func TestUnreadableCertificates(t *testing.T) {
	pair, err := tls.LoadX509KeyPair(shared.PKI.File("ca.crt"), shared.PKI.File("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		uid  any
	}{
		{"UID is a number", 4711},
		{"UID is a bit string", asn1.BitString{Bytes: []byte("u"), BitLength: 8}},
		{"UID is not UTF-8", tagged(asn1.TagUTF8String, "\xff\xfe")},
		{"UID breaks PrintableString", tagged(asn1.TagPrintableString, "a\nb")},
	} {
		t.Run(test.name, func(t *testing.T) {
			name, err := asn1.Marshal(subject(oidCN, "jane", oidUID, test.uid))
			if err != nil {
				t.Fatal(err)
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
				SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: name,
				NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			}, shared.PKI.CA.Cert, key.Public(), pair.PrivateKey)
			if err != nil {
				t.Fatal(err)
			}
			for _, base := range []string{shared.Apiserver(1).URL(), lb.URL} {
				config := caller{}.tls(t)
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
				}
				transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
				defer transport.CloseIdleConnections()
				res, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Get(base + "/version")
				if err == nil {
					body, _ := io.ReadAll(res.Body)
					res.Body.Close()
					t.Errorf("%s answered %d, want the handshake to fail: %.200q", base, res.StatusCode, body)
				}
				// The alert may be lost to the reset that follows it, so the error has many words.
			}
		})
	}
}
