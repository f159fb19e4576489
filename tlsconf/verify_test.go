package tlsconf

import (
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestVerify is the reading of client certificates by kube-apiserver, row by
// row, as k8s.io/apiserver v0.36 pkg/authentication/request/x509 has it.
func TestVerify(t *testing.T) {
	ca := authority(t, nil, "ca")
	foreign := authority(t, nil, "foreign")
	intermediate := authority(t, ca, "intermediate", validity(yearStart, noon.Add(time.Hour)))
	later := authority(t, ca, "later", validity(noon.Add(2*time.Hour), yearEnd))
	roots := bundleOf(ca)

	name := func(cn string, o ...string) pkix.Name { return pkix.Name{CommonName: cn, Organization: o} }
	uid := func(values ...any) pkix.Name {
		n := pkix.Name{CommonName: "jane"}
		for _, v := range values {
			n.ExtraNames = append(n.ExtraNames, pkix.AttributeTypeAndValue{Type: uidOID, Value: v})
		}
		return n
	}
	leaf := func(n pkix.Name, edit ...func(*x509.Certificate)) []*x509.Certificate {
		return chainOf(issue(t, ca, n, edit...))
	}
	raw := func(attributes ...pkix.AttributeTypeAndValue) []*x509.Certificate {
		return leaf(pkix.Name{}, subject(t, attributes...))
	}
	crowd := make([]string, 500)
	for i := range crowd {
		crowd[i] = fmt.Sprintf("team:%03d", i)
	}
	end := yearEnd.Add(1)
	poser := issue(t, ca, name("poser"))

	for _, tc := range []struct {
		what   string
		chain  []*x509.Certificate
		kind   VerdictKind
		want   Identity // Valid
		reason string   // Invalid
		until  time.Time
	}{
		{what: "none", kind: NoCertificate},
		{what: "no groups", chain: leaf(name("jane")), kind: Valid, want: Identity{User: "jane"}, until: end},
		{what: "several O in order, twice the same", chain: raw(attribute(oidCN, asn1.TagUTF8String, "jane"), attribute(oidO, asn1.TagUTF8String, "dev"), attribute(oidO, asn1.TagUTF8String, "ops"), attribute(oidO, asn1.TagUTF8String, "dev")), kind: Valid, want: Identity{User: "jane", Groups: []string{"dev", "ops", "dev"}}, until: end},
		{what: "several O in one RDN, which DER sorts by length", chain: leaf(name("jane", "zzz", "b", "a")), kind: Valid, want: Identity{User: "jane", Groups: []string{"a", "b", "zzz"}}, until: end},
		{what: "500 O", chain: leaf(name("jane", crowd...)), kind: Valid, want: Identity{User: "jane", Groups: crowd}, until: end},
		{what: "masters", chain: leaf(name("admin", "system:masters")), kind: Valid, want: Identity{User: "admin", Groups: []string{"system:masters"}}, until: end},
		{what: "last of two CNs", chain: raw(attribute(oidCN, asn1.TagUTF8String, "first"), attribute(oidCN, asn1.TagUTF8String, "last")), kind: Valid, want: Identity{User: "last"}, until: end},
		{what: "CN with inner spaces", chain: leaf(name("Jane  Q Doe")), kind: Valid, want: Identity{User: "Jane  Q Doe"}, until: end},
		{what: "inner tab, which HTTP carries", chain: leaf(name("Jane\tDoe")), kind: Valid, want: Identity{User: "Jane\tDoe"}, until: end},
		{what: "comma", chain: leaf(name("Doe, Jane", "a,b")), kind: Valid, want: Identity{User: "Doe, Jane", Groups: []string{"a,b"}}, until: end},
		{what: "UTF-8", chain: leaf(name("zoë", "部門", "équipe")), kind: Valid, want: Identity{User: "zoë", Groups: []string{"部門", "équipe"}}, until: end},
		{what: "40 kB", chain: leaf(name(strings.Repeat("x", 40_000))), kind: Valid, want: Identity{User: strings.Repeat("x", 40_000)}, until: end},
		{what: "BMPString", chain: raw(attribute(oidCN, asn1.TagBMPString, "\x00z\x00o\x00\xeb")), kind: Valid, want: Identity{User: "zoë"}, until: end},
		{what: "BMPString with terminator", chain: raw(attribute(oidCN, asn1.TagBMPString, "\x00z\x00\x00")), kind: Valid, want: Identity{User: "z"}, until: end},
		{what: "T61String, read as Latin-1", chain: raw(attribute(oidCN, asn1.TagT61String, "zo\xeb")), kind: Valid, want: Identity{User: "zoë"}, until: end},
		{what: "IA5String and NumericString", chain: raw(attribute(oidCN, asn1.TagIA5String, "a@b"), attribute(oidO, asn1.TagNumericString, "1 2")), kind: Valid, want: Identity{User: "a@b", Groups: []string{"1 2"}}, until: end},
		{what: "UID", chain: leaf(uid("6c1b")), kind: Valid, want: Identity{User: "jane", UID: "6c1b"}, until: end},
		{what: "EKU any", chain: leaf(name("jane"), usage(x509.ExtKeyUsageAny)), kind: Valid, want: Identity{User: "jane"}, until: end},
		{what: "no EKU extension: any use", chain: leaf(name("jane"), usage()), kind: Valid, want: Identity{User: "jane"}, until: end},
		{what: "intermediate sent", chain: chainOf(issue(t, intermediate, name("jane")), intermediate), kind: Valid, want: Identity{User: "jane"}, until: noon.Add(time.Hour + 1)},
		{what: "intermediate sent after noise", chain: chainOf(issue(t, intermediate, name("jane")), foreign, intermediate), kind: Valid, want: Identity{User: "jane"}, until: noon.Add(time.Hour + 1)},

		{what: "empty CN", chain: leaf(name("", "system:masters")), kind: NoOpinion, until: end},
		{what: "empty CN is asked before the UID", chain: leaf(pkix.Name{ExtraNames: uid("", "").ExtraNames}), kind: NoOpinion, until: end},
		{what: "empty CN is asked before what HTTP carries", chain: leaf(name("", "a\nb")), kind: NoOpinion, until: end},
		{what: "last of two CNs is empty", chain: raw(attribute(oidCN, asn1.TagUTF8String, "first"), attribute(oidCN, asn1.TagUTF8String, "")), kind: NoOpinion, until: end},

		{what: "two UIDs", chain: leaf(uid("a", "b")), kind: Invalid, reason: "the subject has 2 UIDs, and may have one"},
		{what: "empty UID", chain: leaf(uid("")), kind: Invalid, reason: "the UID in the subject is empty"},
		{what: "UID with LF", chain: leaf(uid("a\nb")), kind: Invalid, reason: "the UID contains the control character 0x0a, which an HTTP header cannot carry"},
		{what: "CN with CR LF", chain: leaf(name("a\r\nX-Remote-Group: system:masters")), kind: Invalid, reason: "the common name contains the control character 0x0d, which an HTTP header cannot carry"},
		{what: "CN with NUL", chain: leaf(name("admin\x00.evil")), kind: Invalid, reason: "the common name contains the control character 0x00, which an HTTP header cannot carry"},
		{what: "CN with DEL", chain: leaf(name("a\x7f")), kind: Invalid, reason: "the common name contains the control character 0x7f, which an HTTP header cannot carry"},
		{what: "CN with NUL by BMPString", chain: raw(attribute(oidCN, asn1.TagBMPString, "\x00a\x00\x00\x00b")), kind: Invalid, reason: "the common name contains the control character 0x00, which an HTTP header cannot carry"},
		{what: "leading space", chain: leaf(name(" admin")), kind: Invalid, reason: "the common name begins with white space, which an HTTP header cannot carry"},
		{what: "trailing tab", chain: leaf(name("admin\t")), kind: Invalid, reason: "the common name ends with white space, which an HTTP header cannot carry"},
		{what: "only a space", chain: leaf(name(" ")), kind: Invalid, reason: "the common name begins with white space, which an HTTP header cannot carry"},
		{what: "O with trailing space", chain: leaf(name("jane", "dev", "ops ")), kind: Invalid, reason: "organization 2 of 2 ends with white space, which an HTTP header cannot carry"},
		{what: "O with escape", chain: leaf(name("jane", "a\x1bb")), kind: Invalid, reason: "organization 1 of 1 contains the control character 0x1b, which an HTTP header cannot carry"},
		{what: "empty O", chain: raw(attribute(oidCN, asn1.TagUTF8String, "jane"), attribute(oidO, asn1.TagUTF8String, "")), kind: Invalid, reason: "organization 1 of 1 is empty, which an HTTP header cannot carry"},
		{what: "wrong EKU", chain: leaf(name("jane"), usage(x509.ExtKeyUsageServerAuth)), kind: Invalid, reason: "x509: certificate specifies an incompatible key usage"},
		{what: "intermediate not sent", chain: chainOf(issue(t, intermediate, name("jane"))), kind: Invalid, reason: "x509: certificate signed by unknown authority"},
		{what: "wrong CA with system:masters", chain: chainOf(issue(t, foreign, name("admin", "system:masters"))), kind: Invalid, reason: "x509: certificate signed by unknown authority"},
		{what: "wrong CA of the same name", chain: chainOf(issue(t, authority(t, nil, "ca"), name("admin", "system:masters"))), kind: Invalid, reason: "x509: certificate signed by unknown authority"},
		{what: "self-signed", chain: chainOf(issue(t, nil, name("admin", "system:masters"))), kind: Invalid, reason: "x509: certificate signed by unknown authority"},
		{what: "leaf posing as CA", chain: chainOf(issue(t, poser, name("admin", "system:masters")), poser), kind: Invalid, reason: "x509: certificate signed by unknown authority"},
		{what: "expired", chain: leaf(name("jane"), validity(yearStart, noon.Add(-1*time.Second))), kind: Invalid, reason: "x509: certificate has expired or is not yet valid: "},
		{what: "its last second", chain: leaf(name("jane"), validity(yearStart, noon)), kind: Valid, want: Identity{User: "jane"}, until: noon.Add(1)},
		{what: "not yet valid", chain: leaf(name("jane"), validity(noon.Add(time.Hour), yearEnd)), kind: Invalid, reason: "x509: certificate has expired or is not yet valid: ", until: noon.Add(time.Hour)},
		{what: "its issuer not yet valid", chain: chainOf(issue(t, later, name("jane")), later), kind: Invalid, reason: "x509: certificate has expired or is not yet valid: ", until: noon.Add(2 * time.Hour)},
	} {
		t.Run(tc.what, func(t *testing.T) {
			v := verify(tc.chain, roots, nil, nil, noon)
			if v.Kind != tc.kind || !strings.HasPrefix(v.Reason, tc.reason) || (v.Reason == "") != (tc.reason == "") {
				t.Fatalf("verdict %s %q, want %s %q", v.Kind, v.Reason, tc.kind, tc.reason)
			}
			if !v.Until.Equal(tc.until) {
				t.Errorf("until %s, want %s", v.Until, tc.until)
			}
			var want *Identity
			if tc.kind == Valid {
				want = &tc.want
				want.Extra = map[string][]string{"authentication.kubernetes.io/credential-id": {fmt.Sprintf("X509SHA256=%x", sha256.Sum256(tc.chain[0].Raw))}}
			}
			if diff := cmp.Diff(want, v.Identity); diff != "" {
				t.Error(diff)
			}
			if len(v.Subject) > maxSubject {
				t.Errorf("a subject of %d bytes for the log", len(v.Subject))
			}
		})
	}
	if v := verify(leaf(name("jane")), nil, nil, nil, noon); v.Kind != NoOpinion {
		t.Errorf("without a client CA: %s, want noOpinion", v.Kind)
	}
}

// The verdict holds until Until, and is another from then on.
func TestVerifyUntil(t *testing.T) {
	ca := authority(t, nil, "ca")
	// One key, two certificates of the CA above it: two chains.
	short := authority(t, ca, "mid", validity(yearStart, noon.Add(time.Hour)))
	long := *short
	long.Certificate = reissue(t, ca, short, validity(yearStart, noon.Add(2*time.Hour)))
	leaf := issue(t, short, pkix.Name{CommonName: "jane"})
	chain := chainOf(leaf, short, &long)

	v := verify(chain, bundleOf(ca), nil, nil, noon)
	if want := noon.Add(2*time.Hour + 1); !v.Until.Equal(want) {
		t.Fatalf("until %s, want %s: the better chain counts", v.Until, want)
	}
	if before := verify(chain, bundleOf(ca), nil, nil, v.Until.Add(-1)); before.Kind != Valid {
		t.Errorf("just before: %s", before.Kind)
	}
	if after := verify(chain, bundleOf(ca), nil, nil, v.Until); after.Kind != Invalid {
		t.Errorf("at Until: %s", after.Kind)
	}
}

func TestVerifyRevoked(t *testing.T) {
	ca := authority(t, nil, "ca")
	twin := authority(t, nil, "ca") // same name, another key
	mid := authority(t, ca, "mid")
	mid2 := *mid // the same key under a second serial
	mid2.Certificate = reissue(t, ca, mid, validity(yearStart, noon.Add(time.Hour)))
	leaf := issue(t, ca, pkix.Name{CommonName: "jane"})
	below := issue(t, mid, pkix.Name{CommonName: "joe"})
	nobody := issue(t, ca, pkix.Name{})
	sameSerial := issue(t, twin, pkix.Name{CommonName: "jane"}, func(c *x509.Certificate) { c.SerialNumber = leaf.SerialNumber })
	expired := issue(t, ca, pkix.Name{CommonName: "old"}, validity(yearStart, yearStart.Add(1)))
	point := func(der string, critical bool) []pkix.Extension {
		return []pkix.Extension{{Id: oidIssuingDistributionPoint, Critical: critical, Value: []byte(der)}}
	}

	for _, tc := range []struct {
		what  string
		crl   []byte
		chain []*x509.Certificate
		want  VerdictKind
		until time.Time
	}{
		{"listed", ca.crl(t, yearEnd, nil, leaf), chainOf(leaf), Revoked, yearEnd.Add(1)},
		{"listed, PEM, second of two", slices.Concat([]byte("# new\n"), crlPEM(twin.crl(t, yearEnd, nil)), crlPEM(ca.crl(t, yearEnd, nil, leaf))), chainOf(leaf), Revoked, yearEnd.Add(1)},
		{"not listed", ca.crl(t, yearEnd, nil, below), chainOf(leaf), Valid, yearEnd.Add(1)},
		{"past its next update", ca.crl(t, noon.Add(-1), nil, leaf), chainOf(leaf), Revoked, yearEnd.Add(1)},
		{"users only", ca.crl(t, yearEnd, point("\x30\x03\x81\x01\xff", true), leaf), chainOf(leaf), Revoked, yearEnd.Add(1)},
		{"serial of another issuer with the same name", ca.crl(t, yearEnd, nil, leaf), chainOf(sameSerial), Valid, yearEnd.Add(1)},
		{"intermediate", ca.crl(t, yearEnd, nil, mid), chainOf(below, mid), Revoked, yearEnd.Add(1)},
		{"intermediate in one of two chains", ca.crl(t, yearEnd, nil, mid), chainOf(below, mid, &mid2), Valid, noon.Add(time.Hour + 1)},
		{"intermediates in both chains", ca.crl(t, yearEnd, nil, mid, &mid2), chainOf(below, mid, &mid2), Revoked, yearEnd.Add(1)},
		{"a CN that is empty is no way out", ca.crl(t, yearEnd, nil, nobody), chainOf(nobody), Revoked, yearEnd.Add(1)},
		{"expired as well: as kube-apiserver says", ca.crl(t, yearEnd, nil, expired), chainOf(expired), Invalid, time.Time{}},
		{"root named by itself", ca.crl(t, yearEnd, nil, ca), chainOf(leaf), Valid, yearEnd.Add(1)},
	} {
		t.Run(tc.what, func(t *testing.T) {
			roots := bundleOf(ca, twin)
			crls, err := parseCRLs(tc.crl, roots)
			if err != nil {
				t.Fatal(err)
			}
			v := verify(tc.chain, roots, crls, nil, noon)
			if v.Kind != tc.want || !v.Until.Equal(tc.until) {
				t.Errorf("%s (%s) until %s, want %s until %s", v.Kind, v.Reason, v.Until, tc.want, tc.until)
			}
			if revoked := v.Kind == Revoked; revoked != strings.Contains(v.Reason, "is revoked by the CRL") || (revoked && v.Identity != nil) {
				t.Errorf("reason %q, identity %v", v.Reason, v.Identity)
			}
		})
	}

	allowed := authority(t, nil, "no-crl-sign")
	noSign := &issued{reissue(t, nil, allowed, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }), allowed.key}
	foreign := authority(t, nil, "foreign")
	forged := authority(t, nil, "ca")
	good := ca.crl(t, yearEnd, nil, leaf)
	for _, tc := range []struct {
		what, want string
		crl        []byte
	}{
		{"unknown issuer", `its issuer "CN=foreign" is not in the client CA file`, foreign.crl(t, yearEnd, nil, leaf)},
		{"forged", `its issuer "CN=ca" is in the client CA file, yet did not sign it`, forged.crl(t, yearEnd, nil)},
		{"issuer may not sign CRLs", "yet did not sign it", allowed.crl(t, yearEnd, nil)},
		{"second of two is foreign", "CRL 2 of 2: its issuer", append(crlPEM(good), crlPEM(foreign.crl(t, yearEnd, nil))...)},
		{"indirect", "an indirect CRL", ca.crl(t, yearEnd, point("\x30\x03\x84\x01\xff", true))},
		{"malformed distribution point", "malformed", ca.crl(t, yearEnd, point("\x30\x03\x84\x01", true))},
		{"delta", "critical extension 2.5.29.27", ca.crl(t, yearEnd, []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte("\x02\x01\x01")}})},
		{"cut off, DER", "malformed", good[:len(good)-9]},
		{"cut off, PEM", "cut off", append(crlPEM(good), crlPEM(good)[:60]...)},
		{"certificates instead", `no PEM block "X509 CRL"`, certPEM(ca)},
		{"empty", "malformed", nil},
	} {
		t.Run(tc.what, func(t *testing.T) {
			_, err := parseCRLs(tc.crl, bundleOf(ca, noSign))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

// reissue gives the key of c another certificate.
func reissue(t testing.TB, by, c *issued, edit ...func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := *c.Certificate
	template.SerialNumber = issue(t, nil, pkix.Name{}).SerialNumber
	for _, e := range edit {
		e(&template)
	}
	return sign(t, &template, by, c)
}

func FuzzCRL(f *testing.F) {
	ca := authority(f, nil, "ca")
	f.Add(ca.crl(f, yearEnd, nil, ca))
	f.Add(crlPEM(ca.crl(f, yearEnd, []pkix.Extension{{Id: oidIssuingDistributionPoint, Critical: true, Value: []byte("\x30\x03\x81\x01\xff")}})))
	f.Fuzz(func(t *testing.T, data []byte) {
		if set, err := parseCRLs(data, bundleOf(ca)); err == nil && len(set.lists) == 0 {
			t.Error("accepted, and without a CRL")
		}
	})
}

func FuzzCertificates(f *testing.F) {
	ca := authority(f, nil, "ca")
	f.Add(certPEM(ca, ca))
	f.Add(certPEM(ca, ca)[:900])
	f.Fuzz(func(t *testing.T, data []byte) {
		if certs, err := parseCertificates(data); err == nil && len(certs) == 0 {
			t.Error("accepted, and without a certificate")
		}
	})
}

// What a client has written into certificates is told in part only: x509 names an issuer
// that it cannot use, whose name may take all that a handshake may, and would stand in
// every answer.
func TestVerdictIsShort(t *testing.T) {
	loud := authority(t, nil, strings.Repeat("\x01", 100_000))
	ca := authority(t, nil, strings.Repeat("\x01", 100_000)) // with another key
	leaf := issue(t, loud, pkix.Name{CommonName: strings.Repeat("x", 100_000)}, func(c *x509.Certificate) {
		c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 8*10_000)
	})
	v := verify(chainOf(leaf), bundleOf(ca), nil, nil, noon)
	if v.Kind != Invalid || !strings.HasPrefix(v.Reason, "x509: certificate signed by unknown authority") {
		t.Fatalf("verdict %s %.100q", v.Kind, v.Reason)
	}
	for what, text := range map[string]string{"reason": v.Reason, "subject": v.Subject, "serial number": v.Serial} {
		if len(text) > maxSubject || text == "" {
			t.Errorf("a %s of %d bytes", what, len(text))
		}
	}
}
