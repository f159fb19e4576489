package tlsconf

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// connected returns both ends of a socket pair. Unlike net.Pipe it has a
// buffer: an alert may cross a session ticket.
func connected(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "pair")
		ends[i], err = net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

// handshake runs both ends, and has the client read a byte, so that it sees
// the session tickets and the last alert. The error is the client's, or else
// the server's.
func handshake(t testing.TB, serverConfig, clientConfig *tls.Config) (server, client tls.ConnectionState, err error) {
	t.Helper()
	a, b := connected(t)
	deadline := time.Now().Add(20 * time.Second)
	_, _ = a.SetDeadline(deadline), b.SetDeadline(deadline)
	s, c := tls.Server(a, serverConfig), tls.Client(b, clientConfig)
	done := make(chan error, 1) // written once by the server, read once below
	go func() {
		_, err := s.Write([]byte{1})
		a.Close()
		done <- err
	}()
	_, err = c.Read(make([]byte, 1))
	b.Close()
	if serverErr := <-done; err == nil {
		err = serverErr
	}
	return s.ConnectionState(), c.ConnectionState(), err
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want %q", err, text)
	}
}

// client is a config that accepts the serving certificates of a world.
func (w *world) client(serverName string, edit ...func(*tls.Config)) *tls.Config {
	c := &tls.Config{Time: clock, RootCAs: bundleOf(w.backendCA).pool, ServerName: serverName}
	for _, e := range edit {
		e(c)
	}
	return c
}

func TestListenerVersionsAndSuites(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	only := func(version uint16, suites ...uint16) func(*tls.Config) {
		return func(c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.CipherSuites = tls.VersionTLS10, version, suites
		}
	}
	for _, tc := range []struct {
		what string
		edit func(*tls.Config)
		want string // of the error
	}{
		{"TLS 1.3", only(tls.VersionTLS13), ""},
		{"TLS 1.2 GCM", only(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256), ""},
		{"TLS 1.2 CBC", only(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA), "handshake failure"},
		{"TLS 1.2 CBC-SHA256", only(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256), "handshake failure"},
		{"TLS 1.1", only(tls.VersionTLS11), "protocol version"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			server, _, err := handshake(t, s.ListenerConfig(), w.client("api.example", tc.edit))
			if tc.want != "" {
				if fips140.Enabled() {
					tc.want = "" // some of these the client refuses to offer
				}
				wantError(t, err, tc.want)
			} else if err != nil || !server.HandshakeComplete {
				t.Error(err)
			}
		})
	}
	for _, id := range s.ListenerConfig().CipherSuites {
		if name := tls.CipherSuiteName(id); !strings.HasPrefix(name, "TLS_ECDHE_") || !(strings.Contains(name, "_GCM_") || strings.Contains(name, "CHACHA20_POLY1305")) {
			t.Errorf("suite %s has no forward secrecy or no AEAD", name)
		}
	}

	w.files.MinVersion = tls.VersionTLS13
	_, _, err := handshake(t, w.open(t).ListenerConfig(), w.client("api.example", only(tls.VersionTLS12)))
	wantError(t, err, "protocol version")
}

func TestListenerALPN(t *testing.T) {
	w := newWorld(t)
	for _, tc := range []struct {
		offer []string
		want  string
	}{
		{[]string{"http/1.1", "h2"}, "h2"},
		{[]string{"http/1.1"}, "http/1.1"},
		{nil, ""},
	} {
		server, _, err := handshake(t, w.open(t).ListenerConfig(), w.client("api.example", func(c *tls.Config) { c.NextProtos = tc.offer }))
		if err != nil || server.NegotiatedProtocol != tc.want {
			t.Errorf("offered %v: %q (%v), want %q", tc.offer, server.NegotiatedProtocol, err, tc.want)
		}
	}
}

func TestListenerSNI(t *testing.T) {
	w := newWorld(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := *w.other.Certificate
	template.RawSubject, template.Subject, template.DNSNames = nil, pkix.Name{CommonName: "rsa"}, []string{"api.example", "other.example"}
	der, err := x509.CreateCertificate(rand.Reader, &template, w.backendCA.Certificate, rsaKey.Public(), w.backendCA.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	w.files.Serving = append(w.files.Serving, KeyPairFiles{w.path("rsa.crt"), w.path("rsa.key")})
	write(t, w.path("rsa.crt"), pemOf("CERTIFICATE", der))
	write(t, w.path("rsa.key"), pemOf("PRIVATE KEY", keyDER))
	s := w.open(t)
	rsaOnly := func(c *tls.Config) {
		c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	}
	for _, tc := range []struct {
		name, want string
		edit       func(*tls.Config)
	}{
		{"api.example", "serving", nil},
		{"other.example", "other", nil},
		{"other.EXAMPLE", "other", nil},
		{"x.wild.example", "serving", nil},
		{"exact.wild.example", "other", nil}, // exact goes before the wildcard, though it is configured later
		{"y.x.wild.example", "serving", nil}, // one label only: the default
		{"unknown.example", "serving", nil},
		{"10.0.0.1", "serving", nil}, // no SNI is sent for an address
		{"other.example", "rsa", rsaOnly},
	} {
		_, client, err := handshake(t, s.ListenerConfig(), w.client(tc.name, func(c *tls.Config) {
			c.InsecureSkipVerify = true // which one is sent is the question here
			if tc.edit != nil {
				tc.edit(c)
			}
		}))
		if len(client.PeerCertificates) == 0 {
			t.Errorf("%s: %v", tc.name, err)
		} else if got := client.PeerCertificates[0].Subject.CommonName; got != tc.want {
			t.Errorf("%s: sent %q, want %q", tc.name, got, tc.want)
		}
	}
}

// The handshake asks for a certificate and hints at the CA, and judges nothing.
func TestListenerTakesAnyClientCertificate(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	expired := issue(t, w.clientCA, pkix.Name{CommonName: "old"}, validity(yearStart, noon.Add(-1*time.Second)))
	for _, tc := range []struct {
		what string
		cert *issued
		want VerdictKind
	}{
		{"good", issue(t, w.clientCA, pkix.Name{CommonName: "jane"}), Valid},
		{"expired", expired, Invalid},
		{"foreign", issue(t, w.proxyCA, pkix.Name{CommonName: "admin"}), Invalid},
		{"none", nil, NoCertificate},
	} {
		var hints [][]byte
		server, _, err := handshake(t, s.ListenerConfig(), w.client("api.example", func(c *tls.Config) {
			c.GetClientCertificate = func(request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
				hints = request.AcceptableCAs
				if tc.cert == nil {
					return &tls.Certificate{}, nil
				}
				shown := tc.cert.tls()
				return &shown, nil
			}
		}))
		if err != nil {
			t.Fatalf("%s: %v", tc.what, err)
		}
		if len(hints) != 1 || string(hints[0]) != string(w.clientCA.RawSubject) {
			t.Errorf("%s: hints %q", tc.what, hints)
		}
		if v := s.Verify(server.PeerCertificates); v.Kind != tc.want {
			t.Errorf("%s: %s (%s), want %s", tc.what, v.Kind, v.Reason, tc.want)
		}
	}

	w.files.ClientCA, w.files.ClientCRL = "", ""
	s = w.open(t)
	asked := false
	server, _, err := handshake(t, s.ListenerConfig(), w.client("api.example", func(c *tls.Config) {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			asked = true
			return &tls.Certificate{}, nil
		}
	}))
	if err != nil || asked || s.Verify(server.PeerCertificates).Kind != NoCertificate {
		t.Errorf("without a client CA: asked %v, error %v", asked, err)
	}
}

// A session ticket of before a CA rotation brings the old certificate along,
// without a new proof and without any callback of the handshake.
func TestResumedSessionAfterRotation(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			w := newWorld(t)
			s := w.open(t)
			listener := s.ListenerConfig()
			cache := tls.NewLRUClientSessionCache(1)
			jane := issue(t, w.clientCA, pkix.Name{CommonName: "jane"})
			client := w.client("api.example", func(c *tls.Config) {
				c.MaxVersion, c.ClientSessionCache, c.Certificates = version, cache, []tls.Certificate{jane.tls()}
			})
			first, _, err := handshake(t, listener, client)
			if err != nil {
				t.Fatal(err)
			}
			verdict := s.Verify(first.PeerCertificates)
			if verdict.Kind != Valid || first.DidResume || !s.Current(verdict) {
				t.Fatalf("first: %s, resumed %v", verdict.Kind, first.DidResume)
			}

			next := authority(t, nil, "client-ca-2")
			write(t, w.files.ClientCA, certPEM(next))
			write(t, w.files.ClientCRL, next.crl(t, yearEnd, nil))
			if err := s.Reload(); err != nil {
				t.Fatal(err)
			}
			if s.Current(verdict) {
				t.Error("the old verdict still stands")
			}
			second, _, err := handshake(t, listener, client)
			if err != nil || !second.DidResume {
				t.Fatalf("second: resumed %v, error %v; the test is about resumption", second.DidResume, err)
			}
			if v := s.Verify(second.PeerCertificates); v.Kind != Invalid || v.Identity != nil {
				t.Errorf("resumed: %s, want invalid", v.Kind)
			}
		})
	}
}

func TestBackend(t *testing.T) {
	w := newWorld(t)
	probe := w.pair(t, "probe", issue(t, w.clientCA, pkix.Name{CommonName: "probe"}))
	w.files.Probe = &probe
	s := w.open(t)
	byIP := issue(t, w.backendCA, pkix.Name{}, server(), func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP("fd00::1")} })
	mid := authority(t, w.backendCA, "mid")
	viaMid := issue(t, mid, pkix.Name{}, server("kubernetes"))
	backend := func(cert *issued, sent ...*issued) *tls.Config {
		return &tls.Config{
			Time: clock, Certificates: []tls.Certificate{cert.tls(sent...)}, NextProtos: []string{"h2", "http/1.1"},
			ClientAuth: tls.RequestClientCert, ClientCAs: bundleOf(w.clientCA).pool, // hints at the client CA alone
		}
	}
	for _, tc := range []struct {
		what   string
		server *tls.Config
		client *tls.Config
		want   string // error
		shown  string // CN of the client certificate
	}{
		{"token pool shows nothing", backend(w.backend), s.BackendConfig("kubernetes", false, "h2"), "", ""},
		{"asserted pool shows the front proxy, whatever the hint", backend(w.backend), s.BackendConfig("kubernetes", true, "h2"), "", "front-proxy-client"},
		{"probe", backend(w.backend), s.ProbeConfig("kubernetes"), "", "probe"},
		{"address", backend(byIP), s.BackendConfig("fd00::1", false), "", ""},
		{"intermediate", backend(viaMid, mid), s.BackendConfig("kubernetes", false), "", ""},
		{"wrong name", backend(w.other), s.BackendConfig("kubernetes", true), "valid for other.example", ""},
		{"wrong address", backend(byIP), s.BackendConfig("fd00::2", false), "not fd00::2", ""},
		{"no name", backend(w.backend), s.BackendConfig("", false), "no server name is configured", ""},
		{"self-signed", backend(issue(t, nil, pkix.Name{}, server("kubernetes"))), s.BackendConfig("kubernetes", false), "unknown authority", ""},
		{"another CA", backend(issue(t, w.clientCA, pkix.Name{}, server("kubernetes"))), s.ProbeConfig("kubernetes"), "unknown authority", ""},
		{"expired", backend(issue(t, w.backendCA, pkix.Name{}, server("kubernetes"), validity(yearStart, noon.Add(-1*time.Second)))), s.BackendConfig("kubernetes", false), "expired", ""},
		{"a client certificate", backend(issue(t, w.backendCA, pkix.Name{}, server("kubernetes"), usage(x509.ExtKeyUsageClientAuth))), s.BackendConfig("kubernetes", false), "incompatible key usage", ""},
	} {
		t.Run(tc.what, func(t *testing.T) {
			server, client, err := handshake(t, tc.server, tc.client)
			if tc.want != "" {
				wantError(t, err, tc.want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			shown := ""
			if len(server.PeerCertificates) > 0 {
				shown = server.PeerCertificates[0].Subject.CommonName
			}
			if shown != tc.shown {
				t.Errorf("shown %q, want %q", shown, tc.shown)
			}
			if len(tc.client.NextProtos) > 0 && client.NegotiatedProtocol != "h2" {
				t.Errorf("protocol %q", client.NegotiatedProtocol)
			}
		})
	}

	t.Run("kept config, new files", func(t *testing.T) {
		kept := s.BackendConfig("kubernetes", true)
		next := authority(t, nil, "backend-ca-2")
		generation := s.BackendGeneration()
		write(t, w.files.BackendCA, certPEM(next))
		w.pair(t, "proxy", issue(t, w.proxyCA, pkix.Name{CommonName: "front-proxy-2"}))
		if err := s.Reload(); err != nil {
			t.Fatal(err)
		}
		_, _, err := handshake(t, backend(w.backend), kept)
		wantError(t, err, "unknown authority")
		server, _, err := handshake(t, backend(issue(t, next, pkix.Name{}, server("kubernetes"))), kept)
		if err != nil || server.PeerCertificates[0].Subject.CommonName != "front-proxy-2" {
			t.Errorf("after the reload: %v", err)
		}
		if s.BackendGeneration() == generation {
			t.Error("the backend generation stands still")
		}
	})
	t.Run("front proxy not configured", func(t *testing.T) {
		w := newWorld(t)
		w.files.FrontProxy = nil
		trusted := issue(t, w.backendCA, pkix.Name{}, server("kubernetes"))
		_, _, err := handshake(t, backend(trusted), w.open(t).BackendConfig("kubernetes", true))
		wantError(t, err, "no front-proxy certificate is configured")
	})
}

func TestFIPSApprovedKeys(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := authority(t, nil, "good").Certificate
	for _, tc := range []struct {
		chain []*x509.Certificate
		want  bool
	}{
		{[]*x509.Certificate{good, {PublicKey: small.Public()}}, true},
		{[]*x509.Certificate{good, {PublicKey: p224.Public()}}, false},
		{[]*x509.Certificate{{PublicKey: nil}, good}, false},
	} {
		if got := fipsApproved(tc.chain); got != tc.want {
			t.Errorf("fipsApproved(%T, %T) = %v", tc.chain[0].PublicKey, tc.chain[1].PublicKey, got)
		}
	}
}

// FIPS 140-3 mode is set for a process at its start, so the handshakes run in
// another one.
func TestFIPSMode(t *testing.T) {
	if os.Getenv("TLSCONF_FIPS") != "" {
		if !fips140.Enabled() {
			t.Error("this process should be in FIPS mode, and is not")
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^Test(FIPSMode|Listener|Resumed|Backend|Verify)", "-test.v")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=only", "TLSCONF_FIPS=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestBackend") {
		t.Errorf("%v\n%s", err, out)
	}
}
