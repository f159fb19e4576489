package verify

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// signed is a certificate and its key.
type signed struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

func sign(t *testing.T, name string, by *signed) *signed {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: by == nil, DNSNames: []string{"a.example"}}
	parent, parentKey := template, key
	if by != nil {
		parent, parentKey = by.Certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &signed{c, key}
}

func pemOf(c *signed) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// good is what a kube-apiserver answers where nothing is wrong.
func good(name string) Observation {
	return Observation{Name: name, Version: "v1.36.3", WhoCode: http.StatusCreated, Who: &User{Username: "jane", UID: "7", Groups: []string{"dev"}}, Watch: 200, Upgrade: 404, AnonymousCode: 200,
		AssertedCode: http.StatusCreated, takesFrontProxy: true,
		Asserted: &User{Username: Probe, UID: Mark, Groups: []string{Mark, "system:authenticated"}, Extra: map[string][]string{Mark: {Mark}}}}
}

// TestDiagnose: each fault has its cause named, with where and a cure, and nothing else is.
func TestDiagnose(t *testing.T) {
	t.Parallel()
	clientCA, proxyCA, otherCA := sign(t, "client-ca", nil), sign(t, "front-proxy-ca", nil), sign(t, "other-ca", nil)
	proxy, jane := sign(t, "front-proxy-client", proxyCA), sign(t, "jane", clientCA)
	type state struct {
		s       Settings
		a, b, l Observation
		p       *Published
	}
	tests := []struct {
		name string
		edit func(*state)
		want []string // level, where, words of what
	}{
		{"nothing", func(*state) {}, nil},
		{"nothing is published", func(x *state) { x.p = nil }, nil},
		{"allowed names", func(x *state) { x.a.AssertedCode, x.a.Asserted = 401, nil; x.p.AllowedNames = []string{"aggregator"} }, []string{Problem, "a", "--requestheader-allowed-names", "aggregator"}},
		{"front-proxy CA", func(x *state) { x.a.AssertedCode, x.a.Asserted = 401, nil; x.p.FrontProxyCA = pemOf(otherCA) }, []string{Problem, "a", "--requestheader-client-ca-file"}},
		{"front-proxy CA, nothing published", func(x *state) { x.a.AssertedCode, x.a.Asserted, x.a.takesFrontProxy, x.p = 401, nil, false, nil }, []string{Problem, "a", "--requestheader-client-ca-file"}},
		{"user header", func(x *state) { x.a.AssertedCode, x.a.Asserted = 401, nil; x.p.UserHeaders = []string{"X-User"} }, []string{Problem, "a", "X-User", "--requestheader-username-headers"}},
		{"flags of one alone", func(x *state) { x.b.AssertedCode, x.b.Asserted = 401, nil }, []string{Problem, "b", "either --requestheader-allowed-names"}},
		{"another user", func(x *state) { x.a.Asserted.Username = "front-proxy-client" }, []string{Problem, "a", "arrived as front-proxy-client"}},
		{"UID header", func(x *state) { x.a.Asserted.UID = "" }, []string{Note, "a", "no UIDs"}},
		{"UID lost", func(x *state) { x.l.Who.UID = "" }, []string{Problem, Balancer, "another uid"}},
		{"group header", func(x *state) { x.a.Asserted.Groups = nil; x.p.GroupHeaders = []string{"X-G"} }, []string{Problem, "a", "groups", "X-G"}},
		{"extra prefix", func(x *state) { x.a.Asserted.Extra = nil }, []string{Problem, "a", "extras"}},
		{"anonymous off", func(x *state) { x.a.AnonymousCode = 401 }, []string{Note, "a", "--anonymous-auth=false"}},
		{"anonymous off, probes have nothing", func(x *state) { x.a.AnonymousCode, x.s.FrontProxy = 401, nil }, []string{Problem, "a", "health checks fail"}},
		{"anonymous refused by a guard", func(x *state) { x.l.AnonymousCode, x.s.RefusesAnonymous = 401, true }, nil},
		{"anonymous refused here alone", func(x *state) { x.l.AnonymousCode = 401 }, []string{Problem, Balancer, "anonymous", "401"}},
		{"clock", func(x *state) { x.b.Skew = -90 }, []string{Problem, "b", "clock", "-90"}},
		{"clock, a little", func(x *state) { x.b.Skew = 2 }, nil},
		{"versions", func(x *state) { x.b.Version = "v1.35.9" }, []string{Note, "backends", "v1.35.9, v1.36.3"}},
		{"versions far apart", func(x *state) { x.b.Version = "v1.34.1" }, []string{Problem, "backends", "more than one minor"}},
		{"name of the balancer", func(x *state) {
			x.l.err = x509.HostnameError{Certificate: jane.Certificate, Host: "lb.example"}
		}, []string{Problem, Balancer, "a.example", "lb.example", "subject alternative names"}},
		{"name of a backend", func(x *state) { x.b.err = x509.HostnameError{Certificate: jane.Certificate, Host: "10.0.0.1"} }, []string{Problem, "b", "10.0.0.1"}},
		{"authority of the balancer", func(x *state) { x.l.err = x509.UnknownAuthorityError{} }, []string{Problem, Balancer, "does not trust"}},
		{"authority of a backend", func(x *state) { x.b.err = x509.UnknownAuthorityError{} }, []string{Problem, "b", "backends.caFile"}},
		{"no balancer", func(x *state) { x.l.err, x.l.Error = errors.New("refused"), "refused" }, []string{Problem, Balancer, "no answer: refused"}},
		{"client CA missing here", func(x *state) { x.p.ClientCA = append(pemOf(clientCA), pemOf(otherCA)...) }, []string{Problem, Balancer, "lacks", "CN=other-ca"}},
		{"client CA missing there", func(x *state) {
			x.p.ClientCA = pemOf(otherCA)
			x.s.ClientCAs = append(x.s.ClientCAs, otherCA.Certificate)
		}, []string{Problem, Balancer, "has authorities", "CN=client-ca"}},
		{"one CA for both", func(x *state) { x.s.ClientCAs, x.p.ClientCA = nil, pemOf(proxyCA) }, []string{Problem, "backends", "one authority"}},
		{"issuer of the client unknown", func(x *state) {
			x.l.Who, x.l.WhoCode, x.p, x.s.ClientCAs = nil, 401, nil, []*x509.Certificate{otherCA.Certificate}
		}, []string{Problem, Balancer, "CN=client-ca", "tls.clientCAFile"}},
		{"no front proxy", func(x *state) { x.l.Who, x.l.WhoCode, x.s.FrontProxy = nil, 401, nil }, []string{Problem, Balancer, "no front-proxy certificate"}},
		{"credential refused", func(x *state) {
			x.a.Who, x.b.Who, x.l.Who, x.a.WhoCode, x.b.WhoCode, x.l.WhoCode = nil, nil, nil, 401, 401, 401
		}, []string{Problem, "a", "answered 401 directly"}},
		{"backends disagree", func(x *state) { x.b.Who.Groups = nil }, []string{Problem, "b", "another groups than a"}},
		{"watch", func(x *state) { x.l.Watch = 504 }, []string{Problem, Balancer, "watch", "504"}},
		{"upgrade", func(x *state) { x.l.Upgrade = 400 }, []string{Problem, Balancer, "upgrade", "400"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			x := &state{
				s: Settings{FrontProxy: []*x509.Certificate{proxy.Certificate}, UserHeader: "X-Remote-User", ClientCAs: []*x509.Certificate{clientCA.Certificate}, Client: []*x509.Certificate{jane.Certificate}},
				a: good("a"), b: good("b"), l: good(Balancer),
				p: &Published{ClientCA: pemOf(clientCA), FrontProxyCA: pemOf(proxyCA), AllowedNames: []string{"front-proxy-client"}, UserHeaders: []string{"x-remote-user"}},
			}
			tt.edit(x)
			got := Diagnose(x.s, []Observation{x.a, x.b}, x.l, x.p)
			if tt.want == nil {
				if len(got) > 0 {
					t.Errorf("%+v, want nothing", got)
				}
				return
			}
			if len(got) != 1 || got[0].Level != tt.want[0] || got[0].Where != tt.want[1] || got[0].Cure == "" || !containsAll(got[0].What, tt.want[2:]) {
				t.Errorf("%+v, want %q alone, with a cure", got, tt.want)
			}
		})
	}
}

func containsAll(s string, words []string) bool {
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(s, w) })
}

func FuzzParsePublished(f *testing.F) {
	f.Add([]byte(`{"data":{"client-ca-file":"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n","requestheader-allowed-names":"[\"front-proxy-client\"]","requestheader-uid-headers":"x"}}`))
	f.Fuzz(func(_ *testing.T, body []byte) {
		if p := parsePublished(body); p != nil {
			certificates(p.ClientCA)
		}
	})
}
