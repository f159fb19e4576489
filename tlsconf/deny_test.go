package tlsconf

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

// colons writes bytes as openssl writes a fingerprint.
func colons(b [sha256.Size]byte) string {
	return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":")
}

// TestDenyList: each kind of entry denies those it names, and nobody else.
func TestDenyList(t *testing.T) {
	ca := authority(t, nil, "ca", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) })
	other := authority(t, nil, "other ca")
	mid := authority(t, ca, "mid")
	mid2 := *mid // the same key under a second certificate
	mid2.Certificate = reissue(t, ca, mid, validity(yearStart, noon.Add(time.Hour)))
	roots := bundleOf(ca, other)
	jane := issue(t, ca, pkix.Name{CommonName: "jane"})
	renewed := issue(t, ca, pkix.Name{CommonName: "jane"})
	namesake := issue(t, other, pkix.Name{CommonName: "june"}, func(c *x509.Certificate) { c.SerialNumber = jane.SerialNumber })
	below := issue(t, mid, pkix.Name{CommonName: "joe"})
	nobody := issue(t, ca, pkix.Name{})
	odd := issue(t, ca, pkix.Name{CommonName: "# Jane  Q, \"user\" Doe\u00a0"})
	uncarriable := issue(t, ca, pkix.Name{CommonName: "jane", Organization: []string{" x"}})
	expired := issue(t, ca, pkix.Name{CommonName: "jane"}, validity(yearStart, yearStart.Add(1)))
	forged := issue(t, authority(t, nil, "ca"), pkix.Name{CommonName: "jane"})
	sum := func(c *issued) [sha256.Size]byte { return sha256.Sum256(c.Raw) }

	for _, tc := range []struct {
		what, list string
		chain      []*x509.Certificate
		want       VerdictKind
		reason     string // Revoked
	}{
		{"empty file", "", chainOf(jane), Valid, ""},
		{"comments and empty lines", "# user jane\n\n  \t\n #fingerprint\n", chainOf(jane), Valid, ""},

		{"user", "user jane", chainOf(jane), Revoked, `its user "jane" is on the deny list (line 1)`},
		{"user, with a certificate that was renewed", "user jane", chainOf(renewed), Revoked, "its user"},
		{"user among others, CRLF, byte order mark", "\ufeff# list\r\nuser bob\r\n\tuser \t jane \r\n", chainOf(jane), Revoked, "(line 3)"},
		{"user of another name", "user jan\nuser janet\nuser Jane\nuser ja ne", chainOf(jane), Valid, ""},
		{"user with all that a name may have", "user # Jane  Q, \"user\" Doe\u00a0", chainOf(odd), Revoked, "its user"},
		{"user below an intermediate", "user joe", chainOf(below, mid), Revoked, "its user"},
		{"the name of a CA is no user", "user ca\nuser mid", chainOf(below, mid), Valid, ""},

		{"fingerprint as openssl prints it", "fingerprint " + colons(sum(jane)), chainOf(jane), Revoked, "the fingerprint of certificate"},
		{"fingerprint as sha256sum prints it", fmt.Sprintf("fingerprint %x\n", sum(jane)), chainOf(jane), Revoked, "the fingerprint"},
		{"fingerprint as an audit log has it", fmt.Sprintf("fingerprint X509SHA256=%x\n", sum(jane)), chainOf(jane), Revoked, "the fingerprint"},
		{"fingerprint of another certificate of the user", fmt.Sprintf("fingerprint %x\n", sum(jane)), chainOf(renewed), Valid, ""},
		{"fingerprint of the intermediate", fmt.Sprintf("fingerprint %x\n", sum(mid)), chainOf(below, mid), Revoked, `certificate "CN=mid"`},
		{"fingerprint of one of two intermediates", fmt.Sprintf("fingerprint %x\n", sum(mid)), chainOf(below, mid, &mid2), Valid, ""},
		{"fingerprint of the CA", fmt.Sprintf("fingerprint %x\n", sum(ca)), chainOf(jane), Revoked, `certificate "CN=ca"`},

		{"serial", fmt.Sprintf("serial %X", jane.SerialNumber), chainOf(jane), Revoked, "serial number"},
		{"serial with leading zeroes and colons", fmt.Sprintf("serial 00:00:%02x:%02x", jane.SerialNumber.Int64()>>8, jane.SerialNumber.Int64()&0xff), chainOf(jane), Revoked, "serial number"},
		{"serial of any issuer", fmt.Sprintf("serial %x", jane.SerialNumber), chainOf(namesake), Revoked, "serial number"},
		{"serial and issuer", fmt.Sprintf("serial %x ca", jane.SerialNumber), chainOf(jane), Revoked, "serial number"},
		{"serial and issuer with a space", fmt.Sprintf("serial %x \t other ca", jane.SerialNumber), chainOf(namesake), Revoked, "serial number"},
		{"serial of another issuer", fmt.Sprintf("serial %x other ca", jane.SerialNumber), chainOf(jane), Valid, ""},
		{"serial of the intermediate", fmt.Sprintf("serial %x ca", mid.SerialNumber), chainOf(below, mid), Revoked, "serial number"},
		{"serial of the root, which says nothing", "serial 1", chainOf(jane), Valid, ""},
		{"another serial", fmt.Sprintf("serial %x", renewed.SerialNumber), chainOf(jane), Valid, ""},

		{"a CN that is empty is no way out", fmt.Sprintf("fingerprint %x", sum(nobody)), chainOf(nobody), Revoked, "the fingerprint"},
		{"nor is a group that HTTP cannot carry", "user jane", chainOf(uncarriable), Revoked, "its user"},
		{"expired as well: as kube-apiserver says", "user jane", chainOf(expired), Invalid, ""},
		{"by a foreign CA: as kube-apiserver says", "user jane", chainOf(forged), Invalid, ""},
		{"no certificate", "user jane", nil, NoCertificate, ""},
	} {
		t.Run(tc.what, func(t *testing.T) {
			deny, err := parseDenyList([]byte(tc.list))
			if err != nil {
				t.Fatal(err)
			}
			v := verify(tc.chain, roots, nil, deny, noon)
			if v.Kind != tc.want || (v.Identity != nil) != (tc.want == Valid) {
				t.Errorf("%s (%s), want %s", v.Kind, v.Reason, tc.want)
			}
			if tc.want == Revoked && !strings.Contains(v.Reason, tc.reason) {
				t.Errorf("reason %q, want %q", v.Reason, tc.reason)
			}
		})
	}
}

// Both the CRL and the deny list count, and neither makes up for the other.
func TestDenyListBesideCRL(t *testing.T) {
	ca := authority(t, nil, "ca")
	roots := bundleOf(ca)
	jane, joe, ann := issue(t, ca, pkix.Name{CommonName: "jane"}), issue(t, ca, pkix.Name{CommonName: "joe"}), issue(t, ca, pkix.Name{CommonName: "ann"})
	crls, err := parseCRLs(ca.crl(t, yearEnd, nil, jane), roots)
	if err != nil {
		t.Fatal(err)
	}
	deny, err := parseDenyList([]byte("user joe"))
	if err != nil {
		t.Fatal(err)
	}
	for who, want := range map[*issued]VerdictKind{jane: Revoked, joe: Revoked, ann: Valid} {
		if v := verify(chainOf(who), roots, crls, deny, noon); v.Kind != want {
			t.Errorf("%s: %s (%s), want %s", who.Subject, v.Kind, v.Reason, want)
		}
	}
}

// TestDenyListErrors: what is not understood is refused with the line, the value and
// the cure.
func TestDenyListErrors(t *testing.T) {
	for _, tc := range []struct{ list, want string }{
		{"user a\nbob", `line 2: "bob" has no value; write fingerprint, serial or user and then the value`},
		{"user", `line 1: "user" has no value`},
		{"user \t\r\n", `line 1: "user" has no value`},
		{"# x\n\nusers bob", `line 3: "users" is no kind of entry; write fingerprint, serial or user`},
		{"User bob", `line 1: "User" is no kind of entry`},
		{"user: bob", `line 1: "user:" is no kind of entry`},
		{"- user bob", `line 1: "-" is no kind of entry`},
		{"user b\x00b", `line 1: "b\x00b" holds the control character 0x00; take it out`},
		{"user bob\ruser joe", `line 1: "bob\ruser joe" holds the control character 0x0d`},
		{"user zo\xeb", `line 1: "zo\xeb" is not UTF-8; save the file in that encoding`},
		{"fingerprint abcd", `line 1: fingerprint "abcd" is not one by SHA-256; write the 64 hexadecimal digits that openssl x509 -noout -fingerprint -sha256 prints`},
		{"fingerprint " + strings.Repeat("g", 64), `is not one by SHA-256`},
		{"fingerprint " + strings.Repeat("a", 64) + " # jane", `is not one by SHA-256`},
		{"fingerprint " + strings.Repeat("a", 1<<20), `fingerprint "` + strings.Repeat("a", maxDenyQuoted) + `..." is not`},
		{"serial 0x12", `line 1: serial number "0x12" is not hexadecimal; write the hexadecimal digits that openssl x509 -noout -serial prints`},
		{"serial -12", `"-12" is not hexadecimal`},
		{"serial 1_2", `"1_2" is not hexadecimal`},
		{"serial :", `":" is not hexadecimal`},
		{"serial " + strings.Repeat("1", 129), `has more than 128 digits`},
	} {
		if _, err := parseDenyList([]byte(tc.list)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.60q: error %v, want %q", tc.list, err, tc.want)
		}
	}
}

// TestDenyListReload: a new list is in force for verdicts of before, and a broken one
// changes nothing.
func TestDenyListReload(t *testing.T) {
	w := newWorld(t)
	w.files.ClientDeny = w.path("deny")
	write(t, w.files.ClientDeny, nil)
	s := w.open(t)
	swaps := running(t, s, 0)
	jane := chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "jane"}))
	before := s.Verify(jane)
	if before.Kind != Valid {
		t.Fatalf("an empty list: %s", before.Kind)
	}

	write(t, w.files.ClientDeny, []byte("user jane\n"))
	await(t, swaps, "the list with jane", func() bool { return !s.Current(before) })
	denied := s.Verify(jane)
	if denied.Kind != Revoked {
		t.Errorf("%s, want revoked", denied.Kind)
	}

	write(t, w.files.ClientDeny, []byte("user joe\nuzer jane\n"))
	w.logs.await(t, "cannot reload")
	var file *FileError
	if err := s.Reload(); !errors.As(err, &file) || file.Use != UseClientDeny || !strings.Contains(err.Error(), `line 2: "uzer"`) {
		t.Errorf("error %v", err)
	}
	if !s.Current(denied) || s.Verify(chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "joe"}))).Kind != Valid {
		t.Error("a broken list has changed something")
	}

	// As a disk that is full leaves it, or somebody who is about to write it.
	write(t, w.files.ClientDeny, []byte("\n"))
	if err := s.Reload(); !errors.As(err, &file) || !strings.Contains(err.Error(), "the file is empty") {
		t.Errorf("error %v", err)
	}
	if !s.Current(denied) {
		t.Error("an empty list lets in who was denied")
	}
	write(t, w.files.ClientDeny, []byte("# nobody\n"))
	await(t, swaps, "the list of nobody", func() bool { return !s.Current(denied) })
	write(t, w.files.ClientDeny, []byte("user jane\n"))
	await(t, swaps, "the list with jane again", func() bool { return s.Verify(jane).Kind == Revoked })
	denied = s.Verify(jane)

	write(t, w.files.ClientDeny, []byte("user joe\n"))
	await(t, swaps, "the list without jane", func() bool { return !s.Current(denied) })
	if v := s.Verify(jane); v.Kind != Valid {
		t.Errorf("%s, want valid", v.Kind)
	}
}

// A TLS session of before its certificate was denied brings that certificate along.
func TestResumedSessionAfterDenial(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			w := newWorld(t)
			w.files.ClientDeny = w.path("deny")
			write(t, w.files.ClientDeny, nil)
			s := w.open(t)
			listener := s.ListenerConfig()
			jane := issue(t, w.clientCA, pkix.Name{CommonName: "jane"})
			client := w.client("api.example", func(c *tls.Config) {
				c.MaxVersion, c.ClientSessionCache, c.Certificates = version, tls.NewLRUClientSessionCache(1), []tls.Certificate{jane.tls()}
			})
			if first, _, err := handshake(t, listener, client); err != nil || s.Verify(first.PeerCertificates).Kind != Valid {
				t.Fatalf("first: error %v", err)
			}
			write(t, w.files.ClientDeny, fmt.Appendf(nil, "fingerprint %x", sha256.Sum256(jane.Raw)))
			if err := s.Reload(); err != nil {
				t.Fatal(err)
			}
			second, _, err := handshake(t, listener, client)
			if err != nil || !second.DidResume {
				t.Fatalf("second: resumed %v, error %v; the test is about resumption", second.DidResume, err)
			}
			if v := s.Verify(second.PeerCertificates); v.Kind != Revoked {
				t.Errorf("resumed: %s, want revoked", v.Kind)
			}
		})
	}
}

func FuzzDenyList(f *testing.F) {
	f.Add([]byte("# list\nuser jane\nserial 4d:2 ca\nfingerprint " + strings.Repeat("aB", 32) + "\n"))
	f.Add([]byte("\xef\xbb\xbfuser Jane  Q Doe\r\n\tserial 00\r\n"))
	f.Add([]byte("user\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseDenyList(data)
		if err != nil {
			return
		}
		entries := 0
		for line := range strings.Lines(strings.TrimPrefix(string(data), "\ufeff")) {
			if line = strings.Trim(line, " \t\r\n"); line != "" && line[0] != '#' {
				entries++
			}
		}
		if n := len(list.users) + len(list.serials) + len(list.fingerprints); n > entries || entries > 0 && n == 0 {
			t.Errorf("%d lines gave %d entries", entries, n)
		}
		for user := range list.users {
			if user == "" || unfitForHeader(user) != "" {
				t.Errorf("the user %q, whom no certificate can be", user)
			}
		}
	})
}
