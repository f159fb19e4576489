package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"apiserver-lb/cmd/devcluster/cluster"
)

// TestTLSVersionsAndSuites: TLS 1.2 and 1.3 with an AEAD are spoken, and nothing
// else.
func TestTLSVersionsAndSuites(t *testing.T) {
	strict := ownBalancer(t, func(config map[string]any) { section(config, "tls")["minVersion"] = "1.3" })
	// ChaCha20 is none of the ciphers that FIPS 140-3 approves.
	fips := strings.Contains(os.Getenv(godebugEnv), "fips140=")
	for _, test := range []struct {
		name    string
		base    string
		version uint16
		suites  []uint16 // TLS 1.2; nil: whatever crypto/tls offers
		spoken  bool
	}{
		{"TLS 1.0", lb.URL, tls.VersionTLS10, nil, false},
		{"TLS 1.1", lb.URL, tls.VersionTLS11, nil, false},
		{"TLS 1.2", lb.URL, tls.VersionTLS12, nil, true},
		{"TLS 1.2, AES 128 GCM", lb.URL, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}, true},
		{"TLS 1.2, AES 256 GCM", lb.URL, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}, true},
		{"TLS 1.2, ChaCha20", lb.URL, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}, !fips},
		{"TLS 1.2, CBC", lb.URL, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256}, false},
		{"TLS 1.2, CBC at a kube-apiserver", shared.Apiserver(1).URL(), tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}, true}, // so the row above can tell
		{"TLS 1.2, without forward secrecy", lb.URL, tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}, false},
		{"TLS 1.3", lb.URL, tls.VersionTLS13, nil, true},
		{"TLS 1.2 where 1.3 is the least", strict.URL, tls.VersionTLS12, nil, false},
		{"TLS 1.3 where 1.3 is the least", strict.URL, tls.VersionTLS13, nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := caller{}.tls(t)
			config.MinVersion, config.MaxVersion, config.CipherSuites = test.version, test.version, test.suites
			conn, err := tls.Dial("tcp", strings.TrimPrefix(test.base, "https://"), config)
			if err == nil {
				defer conn.Close()
			}
			var alert tls.AlertError
			switch {
			case test.spoken && err != nil:
				t.Errorf("the handshake failed: %v", err)
			case !test.spoken && err == nil:
				t.Errorf("the handshake succeeded with %s", tls.CipherSuiteName(conn.ConnectionState().CipherSuite))
			case !test.spoken && !errors.As(err, &alert) && !isAlert(err):
				t.Errorf("the handshake failed without an alert of the balancer's: %v", err)
			}
		})
	}
}

// isAlert reports whether the error is an alert that the peer sent.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// serialServed returns the serial number of the certificate that the balancer
// shows to a client that asks for the server name.
func serialServed(t *testing.T, b *balancer, serverName string) string {
	t.Helper()
	// Which certificate it is, is the question; whether to trust it is not.
	conn, err := tls.Dial("tcp", strings.TrimPrefix(b.URL, "https://"), &tls.Config{ServerName: serverName, InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// TestServingCertificates: the server name chooses the certificate; a new one
// comes into force without a connection lost; a broken one does not.
func TestServingCertificates(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	serving := func(hosts ...string) *cluster.Certificate {
		c, err := shared.PKI.IssueServing("apiserver-lb", hosts...)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	write := func(c *cluster.Certificate) {
		replace(t, key, c.KeyPEM)
		replace(t, cert, c.CertPEM)
	}
	first, wild := serving("api.example.org", "alias.example.org"), serving("*.example.org")
	write(first)
	if err := wild.Write(filepath.Join(dir, "wild.crt"), filepath.Join(dir, "wild.key")); err != nil {
		t.Fatal(err)
	}
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "tls")["certificates"] = []any{
			map[string]any{"certFile": filepath.Join(dir, "wild.crt"), "keyFile": filepath.Join(dir, "wild.key")},
			map[string]any{"certFile": cert, "keyFile": key},
		}
	})
	byDefault := serialServed(t, b, "")
	for name, want := range map[string]string{
		"api.example.org":      first.Leaf.SerialNumber.String(),
		"ALIAS.example.org":    first.Leaf.SerialNumber.String(),
		"other.example.org":    wild.Leaf.SerialNumber.String(),
		"a.b.example.org":      byDefault,
		"example.org":          byDefault,
		"unknown.example.com":  byDefault,
		"localhost":            byDefault,
		"kubernetes.default":   byDefault,
		"api.example.org.evil": byDefault,
	} {
		if got := serialServed(t, b, name); got != want {
			t.Errorf("%s: the certificate with the serial number %s, want %s", name, got, want)
		}
	}
	if byDefault == first.Leaf.SerialNumber.String() || byDefault == wild.Leaf.SerialNumber.String() {
		t.Errorf("without a server name: the certificate of a server name")
	}

	alice := caller{authorization: bearer("alice")}
	open, _ := alice.connection(t, alice.tls(t), "HTTP/2.0", b.URL)
	served := func(want *cluster.Certificate) func() error {
		return func() error {
			if got := serialServed(t, b, "api.example.org"); got != want.Leaf.SerialNumber.String() {
				return fmt.Errorf("the certificate with the serial number %s, want %s", got, want.Leaf.SerialNumber)
			}
			return nil
		}
	}
	second := serving("api.example.org")
	write(second)
	eventually(t, revocationLimit, "the new certificate is served", served(second))

	// A key that does not fit, and a certificate that has expired.
	from := logSize(t, b)
	replace(t, key, first.KeyPEM)
	logTells(t, b, from, "cannot reload", "serving")
	if err := served(second)(); err != nil {
		t.Errorf("after a key that does not fit: %v", err)
	}
	replace(t, key, second.KeyPEM)
	logTells(t, b, from, "sound again", "serving")
	from = logSize(t, b)
	replace(t, cert, []byte("no certificate"))
	logTells(t, b, from, "cannot reload", "serving")
	if err := served(second)(); err != nil {
		t.Errorf("after a file that is no certificate: %v", err)
	}
	third := serving("api.example.org")
	write(third)
	eventually(t, revocationLimit, "the third certificate is served", served(third))
	if got := alice.seeOn(t, open, b.URL).who(); got != "alice" {
		t.Errorf("on the connection of before all that the user is %s", got)
	}
}

// TestWithoutFrontProxy: a balancer without a front-proxy certificate cannot pass
// client certificates on, and says so; tokens work.
func TestWithoutFrontProxy(t *testing.T) {
	b := ownBalancer(t, func(config map[string]any) { delete(config, "frontProxy") })
	logTells(t, b, 0, "client certificates cannot be passed on", "WARN")
	jane := issue(t, cluster.CertificateOptions{CommonName: "jane"})
	for _, protocol := range protocols {
		wantRefusal(t, do(t, caller{certificate: jane}.client(t, protocol), "GET", b.URL+"/version", "", nil), `"jane" cannot be passed on`)
		both := caller{jane, bearer("alice")}
		wantRefusal(t, do(t, both.client(t, protocol), "GET", b.URL+"/version", "", both.header(nil)), "frontProxy.certFile")
		for want, who := range map[string]caller{"alice": {authorization: bearer("alice")}, anonymousUser: {}, unauthorized: {authorization: "Bearer nobody-knows-this"}} {
			if got := who.see(t, protocol, b.URL, nil).who(); got != want {
				t.Errorf("%s: the user is %s, want %s", protocol, got, want)
			}
		}
	}
	out, err := command(t, commandLimit, kubectlPath(t), "--kubeconfig", kubeconfig(t, b.URL, cluster.User{Certificate: jane}), "auth", "whoami")
	if err == nil || !strings.Contains(err.Error(), "no front-proxy certificate") {
		t.Errorf("kubectl does not pass the explanation on: %v %s", err, out)
	}
}

// TestWithoutClientCA: a balancer without a client CA does not ask for certificates.
func TestWithoutClientCA(t *testing.T) {
	b := ownBalancer(t, func(config map[string]any) { delete(section(config, "tls"), "clientCAFile") })
	logTells(t, b, 0, "client certificates are not asked for", "WARN")
	jane := issue(t, cluster.CertificateOptions{CommonName: "jane"})
	for _, protocol := range protocols {
		if got := (caller{certificate: jane}).see(t, protocol, b.URL, nil).who(); got != anonymousUser {
			t.Errorf("%s: jane, whose certificate nobody asks for, is %s, want %s", protocol, got, anonymousUser)
		}
		if got := (caller{jane, bearer("alice")}).see(t, protocol, b.URL, nil).who(); got != "alice" {
			t.Errorf("%s: with the token of alice the user is %s", protocol, got)
		}
	}
}

// TestFrontProxyKeyReload: a new front-proxy certificate comes into force for
// connections to the backends, and one whose name kube-apiserver does not allow
// is told by the health checks.
func TestFrontProxyKeyReload(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "fp.crt"), filepath.Join(dir, "fp.key")
	write := func(commonName string) {
		c := issue(t, cluster.CertificateOptions{CommonName: commonName, CA: shared.PKI.FrontProxyCA})
		replace(t, key, c.KeyPEM)
		replace(t, cert, c.CertPEM)
	}
	write("front-proxy-client")
	b := ownBalancer(t, func(config map[string]any) {
		config["frontProxy"] = map[string]any{"certFile": cert, "keyFile": key}
	})
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}
	hc := jane.client(t, "HTTP/2.0")
	if got := jane.seeOn(t, hc, b.URL).who(); got != "jane" {
		t.Fatalf("the user is %s, want jane", got)
	}
	from := logSize(t, b)
	write("front-proxy-client")
	logTells(t, b, from, "certificates reloaded", "frontProxy")
	for range 20 {
		if got := jane.seeOn(t, hc, b.URL).who(); got != "jane" {
			t.Fatalf("after the reload the user is %s, want jane", got)
		}
	}
	write("somebody-else")
	eventually(t, revocationLimit, "a front proxy that is not allowed asserts nobody", func() error {
		if got := jane.seeOn(t, hc, b.URL); got.Code == http.StatusCreated {
			return fmt.Errorf("the user is %s", got.who())
		}
		return nil
	})
	write("front-proxy-client")
	eventually(t, revocationLimit, "the allowed one does again", func() error {
		if got := jane.seeOn(t, hc, b.URL).who(); got != "jane" {
			return fmt.Errorf("the user is %s", got)
		}
		return nil
	})
}
