package tlsconf

import (
	"bytes"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// What a chain that its sender has made up would cost: each of its certificates may have
// signed each other, as far as names tell, and x509.Verify finds out by their keys.
func TestUnvouchedKeysAreNotUsed(t *testing.T) {
	ca := authority(t, nil, "ca")
	own := &issued{key: authority(t, nil, "S").key}
	var above []*x509.Certificate
	for i := range 9 {
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i)), Subject: pkix.Name{CommonName: "S"}, NotBefore: yearStart, NotAfter: yearEnd,
			IsCA: true, BasicConstraintsValid: true, DNSNames: []string{fmt.Sprint(i)}} // x509 knows equals by name, key and these
		above = append(above, sign(t, template, nil, own))
	}
	own.Certificate = above[0]
	leaf := issue(t, own, pkix.Name{CommonName: "jane"})
	v := verify(append(chainOf(leaf), above...), bundleOf(ca), nil, nil, noon)
	if v.Kind != Invalid || v.Reason != `x509: certificate signed by unknown authority` {
		t.Errorf("%s: %s", v.Kind, v.Reason)
	}
}

// A certificate that the client CA has issued to somebody vouches for nobody, in any
// version: the oldest do not say what they are for.
func TestLeafVouchesForNobody(t *testing.T) {
	ca := authority(t, nil, "ca")
	jane := issue(t, ca, pkix.Name{CommonName: "jane"})
	old := *jane.Certificate
	old.Version, old.BasicConstraintsValid, old.KeyUsage = 1, false, 0
	above := issue(t, jane, pkix.Name{CommonName: "above"}, func(c *x509.Certificate) { c.IsCA = true }).Certificate
	if got := vouched([]*x509.Certificate{&old, above}, bundleOf(ca)); len(got) > 0 {
		t.Errorf("vouched for: %v", got[0].Subject)
	}
}

// seeded are keys that are the same each time, as are the signatures of ed25519.
func seeded(i byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{i}, ed25519.SeedSize))
}

// plan is a certificate to be made.
type plan struct {
	name, issuer string
	key, signer  byte
	ca, v        bool // a CA; not valid at noon
	san          string
}

func (p plan) make(t interface{ Fatal(...any) }) *x509.Certificate {
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: p.name}, NotBefore: yearStart, NotAfter: yearEnd,
		IsCA: p.ca, BasicConstraintsValid: true}
	if p.v {
		c.NotBefore = noon.Add(time.Hour)
	}
	if p.san != "" {
		c.DNSNames = []string{p.san}
	}
	der, err := x509.CreateCertificate(nil, c, &x509.Certificate{Subject: pkix.Name{CommonName: p.issuer}}, seeded(p.key).Public(), seeded(p.signer))
	if err != nil {
		t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// rootPlan is the client CA of the tests below.
var rootPlan = plan{name: "root", issuer: "root", key: 0, signer: 0, ca: true}

// checkVerdict wants of a chain what x509.Verify says of it with all that was sent,
// which is what kube-apiserver asks, and the identity only then.
func checkVerdict(t interface {
	Errorf(string, ...any)
	Fatal(...any)
}, chain []*x509.Certificate) {
	root := rootPlan.make(t)
	roots := &bundle{certs: []*x509.Certificate{root}, pool: poolOf([]*x509.Certificate{root})}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots.pool, Intermediates: poolOf(chain[1:]), CurrentTime: noon, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	v := verify(chain, roots, nil, nil, noon)
	id, idErr := identityOf(chain[0])
	want := Valid
	switch {
	case err != nil || idErr != nil:
		want = Invalid
	case id == nil:
		want = NoOpinion
	}
	if want != Valid {
		id = nil
	}
	if diff := cmp.Diff(id, v.Identity); v.Kind != want || diff != "" {
		t.Errorf("%s (%s), want %s (x509: %v; identity: %v)\n%s", v.Kind, v.Reason, want, err, idErr, diff)
	}
}

// Chains in which names, keys and signatures are mixed up at random.
func TestVerdictIsThatOfX509(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names, keys := rapid.SampledFrom([]string{"root", "a", "b"}), rapid.ByteRange(0, 2)
		chain := []*x509.Certificate{plan{name: "jane", issuer: names.Draw(t, "issuer"), key: 9, signer: keys.Draw(t, "signer")}.make(t)}
		for range rapid.IntRange(0, maxChain-1).Draw(t, "above") {
			chain = append(chain, plan{name: names.Draw(t, "name"), issuer: names.Draw(t, "issuer"), key: keys.Draw(t, "key"), signer: keys.Draw(t, "signer"),
				ca: rapid.Float64().Draw(t, "ca") < 0.9, v: rapid.Float64().Draw(t, "early") > 0.9, san: rapid.SampledFrom([]string{"", "x"}).Draw(t, "san")}.make(t))
		}
		checkVerdict(t, chain)
	})
}

// Certificates as they come, one behind the other.
func FuzzVerify(f *testing.F) {
	inter := plan{name: "a", issuer: "root", key: 1, signer: 0, ca: true}
	early, poser := inter, inter
	early.v, poser.ca = true, false
	loop := plan{name: "a", issuer: "a", key: 1, signer: 1, ca: true}
	leaf := plan{name: "jane", issuer: "a", key: 9, signer: 1}
	for _, plans := range [][]plan{
		{{name: "jane", issuer: "root", key: 9, signer: 0}},
		{{name: "", issuer: "root", key: 9, signer: 0}},
		{{name: " x\n", issuer: "root", key: 9, signer: 0}},
		{{name: "jane", issuer: "root", key: 9, signer: 1}},
		{rootPlan},
		{leaf, inter}, {leaf, early}, {leaf, poser}, {leaf, loop, inter},
		{leaf, loop, {name: "a", issuer: "b", key: 1, signer: 2, ca: true}, {name: "b", issuer: "a", key: 2, signer: 1, ca: true}, inter},
	} {
		var der []byte
		for _, p := range plans {
			der = append(der, p.make(f).Raw...)
		}
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		chain, err := x509.ParseCertificates(der)
		if err != nil || len(chain) == 0 || len(chain) > maxChain {
			return
		}
		checkVerdict(t, chain)
	})
}

// A chain larger than any in use ends the handshake; all others come through, whatever
// they are worth.
func TestListenerBoundsChains(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	inter := authority(t, w.clientCA, "intermediate")
	many := []*issued{inter}
	for len(many) < maxChain {
		many = append(many, authority(t, nil, "noise"))
	}
	large := func(n int) *issued {
		return issue(t, w.clientCA, pkix.Name{CommonName: "jane", Organization: []string{strings.Repeat("x", n)}})
	}
	for _, tc := range []struct {
		what string
		leaf *issued
		more []*issued
		want string // of the client's error
	}{
		{"40 kB", large(40_000), nil, ""},
		{"five", issue(t, inter, pkix.Name{CommonName: "jane"}), many[:maxChain-1], ""},
		{"six", issue(t, inter, pkix.Name{CommonName: "jane"}), many, "bad certificate"},
		{"64 KiB", large(maxChainBytes), nil, "bad certificate"},
		{"64 KiB together", large(maxChainBytes / 2), []*issued{large(maxChainBytes / 2)}, "bad certificate"},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			server, _, err := handshake(t, s.ListenerConfig(), w.client("api.example", func(c *tls.Config) {
				c.MaxVersion, c.Certificates = version, []tls.Certificate{tc.leaf.tls(tc.more...)}
			}))
			if tc.want != "" {
				wantError(t, err, tc.want)
				continue
			}
			if v := s.Verify(server.PeerCertificates); err != nil || v.Kind != Valid {
				t.Errorf("%s, %s: %s (%s), error %v", tc.what, tls.VersionName(version), v.Kind, v.Reason, err)
			}
		}
	}
}

// Whatever makes verification panic is one client's matter.
func TestVerifyPanics(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	for range 3 {
		v := s.Verify([]*x509.Certificate{nil}) // stands for what nobody knows of yet
		if v.Kind != Invalid || !v.Panicked || v.Identity != nil || !s.Current(v) {
			t.Errorf("%+v", v)
		}
	}
	if line := w.logs.await(t, "panic while verifying"); !strings.Contains(line, "tlsconf.judge") || !strings.Contains(line, slog.LevelError.String()) {
		t.Errorf("log: %s", line)
	}
	if len(w.logs) > 0 {
		t.Errorf("told again at once: %s", <-w.logs)
	}
}
