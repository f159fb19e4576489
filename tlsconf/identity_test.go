package tlsconf

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/textproto"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"
)

// The UID of a parsed certificate is always a string: crypto/x509 refuses
// other types. kube-apiserver checks all the same, and so do we.
func TestUIDThatIsNoString(t *testing.T) {
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: "jane", Names: []pkix.AttributeTypeAndValue{{Type: uidOID, Value: 7}}}}
	if id, err := identityOf(leaf); id != nil || err == nil || !strings.Contains(err.Error(), "not a string") {
		t.Errorf("identityOf = %v, %v; want an error", id, err)
	}
	leaf.Subject.CommonName = ""
	if id, err := identityOf(leaf); id != nil || err != nil {
		t.Errorf("identityOf with an empty CN = %v, %v; want no opinion: the CN is asked first", id, err)
	}
}

// checkIdentity holds an identity against what x/net lets into a header, and
// what textproto strips from one.
func checkIdentity(t *testing.T, leaf *x509.Certificate) {
	id, err := identityOf(leaf)
	if err != nil || id == nil {
		if id != nil {
			t.Fatal("an identity beside an error")
		}
		return
	}
	if id.User != leaf.Subject.CommonName || len(id.Groups) != len(leaf.Subject.Organization) {
		t.Fatalf("identity %+v is not that of %v", id, leaf.Subject)
	}
	for _, value := range append([]string{id.User, id.UID, id.Extra[CredentialIDKey][0]}, id.Groups...) {
		if !httpguts.ValidHeaderFieldValue(value) || textproto.TrimString(value) != value {
			t.Fatalf("%q cannot stand in a header", value)
		}
	}
	for _, value := range append([]string{id.User}, id.Groups...) {
		if value == "" {
			t.Fatal("an empty value would be dropped")
		}
	}
}

func FuzzIdentityOfCertificate(f *testing.F) {
	ca := authority(f, nil, "ca")
	for _, edit := range []func(*x509.Certificate){
		subject(f, attribute(oidCN, asn1.TagUTF8String, "jané"), attribute(oidO, asn1.TagPrintableString, "dev")),
		subject(f, attribute(oidCN, asn1.TagBMPString, "\x00a\x00\n"), attribute(uidOID, asn1.TagIA5String, "1")),
		subject(f, attribute(oidCN, asn1.TagT61String, "caf\xe9 \x00"), attribute(uidOID, asn1.TagNumericString, " 1")),
	} {
		f.Add(issue(f, ca, pkix.Name{}, edit).Raw)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		if leaf, err := x509.ParseCertificate(der); err == nil {
			checkIdentity(t, leaf)
		}
	})
}

func FuzzIdentityOfSubject(f *testing.F) {
	f.Add("jane", "system:masters", "dev", "1")
	f.Add("", "", "", "")
	f.Add("a\r\nX-Remote-Group: system:masters", "b\x00", " c", "d\t")
	f.Fuzz(func(t *testing.T, cn, o1, o2, uid string) {
		leaf := &x509.Certificate{Raw: []byte(cn), Subject: pkix.Name{CommonName: cn, Organization: []string{o1, o2}}}
		leaf.Subject.Names = []pkix.AttributeTypeAndValue{{Type: uidOID, Value: uid}}
		checkIdentity(t, leaf)
	})
}
