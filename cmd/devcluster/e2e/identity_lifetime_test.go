package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// revocationLimit is within what time a change of CA or CRL must reach open
// connections.
const revocationLimit = 10 * time.Second

// roundTrip makes a function a RoundTripper.
type roundTrip func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// connection opens one connection; the client makes all its requests on that one,
// and fails once it is gone. resumed tells whether it continues a TLS session.
func (c caller) connection(t *testing.T, config *tls.Config, protocol, base string) (hc *http.Client, resumed bool) {
	t.Helper()
	speaks := new(http.Protocols)
	speaks.SetHTTP1(protocol == "HTTP/1.1")
	speaks.SetHTTP2(protocol == "HTTP/2.0")
	transport := &http.Transport{TLSClientConfig: config, Protocols: speaks, DisableCompression: true}
	cc, err := transport.NewClientConn(t.Context(), "https", strings.TrimPrefix(base, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	hc = &http.Client{Transport: roundTrip(cc.RoundTrip), Timeout: 30 * time.Second}
	// The first answer also brings the session ticket of TLS 1.3.
	res, err := hc.Get(base + "/version")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil { // a body that is not read ends an HTTP/1.1 connection
		t.Fatal(err)
	}
	return hc, res.TLS.DidResume
}

// seeOn asks who the caller is on the client's connection.
func (c caller) seeOn(t *testing.T, hc *http.Client, base string) seen {
	t.Helper()
	return readSeen(t, do(t, hc, "POST", base+selfReviewPath, selfReview, c.header(nil)))
}

// replace puts content in the place of a file in one step.
func replace(t *testing.T, file string, content []byte) {
	t.Helper()
	if err := os.WriteFile(file+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// logSize is how much the balancer has logged by now.
func logSize(t *testing.T, b *balancer) int64 {
	t.Helper()
	info, err := os.Stat(b.Process.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// logTells waits until the balancer's log, from an offset on, has a line with all
// the words.
func logTells(t *testing.T, b *balancer, from int64, words ...string) {
	t.Helper()
	eventually(t, revocationLimit, fmt.Sprintf("a line of the log with %q", words), func() error {
		data, err := os.ReadFile(b.Process.LogFile())
		if err != nil {
			return err
		}
	lines:
		for line := range strings.Lines(string(data[from:])) {
			for _, w := range words {
				if !strings.Contains(line, w) {
					continue lines
				}
			}
			return nil
		}
		return fmt.Errorf("there is none in:\n%s", data[from:])
	})
}

// line is one open connection of a caller's to the balancer, replaced by another when
// it has ended.
type line struct {
	who            caller
	protocol, base string
	hc             *http.Client
	ended          bool // the first one has; another stands in its place
}

func newLine(t *testing.T, who caller, protocol, base string) *line {
	t.Helper()
	hc, _ := who.connection(t, who.tls(t), protocol, base)
	return &line{who: who, protocol: protocol, base: base, hc: hc}
}

// see asks who the caller is; on another connection where this one has ended.
func (l *line) see(t *testing.T) seen {
	t.Helper()
	if a, err := attempt(t, l.hc, "POST", l.base+selfReviewPath, selfReview, l.who.header(nil)); err == nil {
		return readSeen(t, a)
	}
	*l = *newLine(t, l.who, l.protocol, l.base)
	l.ended = true
	return l.who.seeOn(t, l.hc, l.base)
}

// wantEnd waits until the connection has ended. Until then each answer is a refusal. Its
// successor may stand: it has let nobody in.
func (l *line) wantEnd(t *testing.T) {
	t.Helper()
	if l.ended {
		return
	}
	eventually(t, revocationLimit, l.protocol+": the end of an open connection", func() error {
		a, err := attempt(t, l.hc, "GET", l.base+"/version", "", l.who.header(nil))
		if err != nil {
			return nil
		}
		if a.Code != http.StatusUnauthorized {
			t.Errorf("%s: %d on an open connection, want 401", l.protocol, a.Code)
		}
		time.Sleep(250 * time.Millisecond)
		return fmt.Errorf("it is open")
	})
}

// TestExpiryOnOpenConnection: a certificate that expires while its connection is
// open is refused from the next request on, at a kube-apiserver and at the
// balancer, which soon ends the connection; so is a resumed TLS session.
func TestExpiryOnOpenConnection(t *testing.T) {
	short := issue(t, cluster.CertificateOptions{CommonName: "jane", NotAfter: time.Now().Add(8 * time.Second)})
	who := caller{certificate: short}
	type open struct {
		name string
		*line
	}
	var conns []open
	for _, base := range []string{shared.Apiserver(1).URL(), lb.URL} {
		for _, protocol := range protocols {
			conns = append(conns, open{protocol + " to " + base, newLine(t, who, protocol, base)})
		}
	}
	sessions := who.sessions(t, lb.URL, "jane")
	for _, c := range conns {
		if got := who.seeOn(t, c.hc, c.base).who(); got != "jane" {
			t.Fatalf("%s: the user is %s before the certificate expires", c.name, got)
		}
	}

	// NotAfter itself belongs to the validity (RFC 5280, section 4.1.2.5).
	time.Sleep(time.Until(short.Leaf.NotAfter.Add(100 * time.Millisecond)))

	for _, c := range conns {
		if got := c.see(t).Code; got != http.StatusUnauthorized {
			t.Errorf("%s: %d after the certificate has expired, want 401", c.name, got)
		}
	}
	for _, s := range sessions {
		s.wantRefused(t, lb.URL, "expired")
	}
	for _, c := range conns {
		if c.base == lb.URL {
			c.wantEnd(t)
			again := newLine(t, who, c.protocol, c.base)
			wantRefusal(t, do(t, again.hc, "GET", c.base+"/version", "", nil), "expired")
			// This one has never let anybody in, and stands.
			time.Sleep(3 * time.Second)
			if got := (caller{authorization: bearer("alice")}).seeOn(t, again.hc, c.base).who(); got != "alice" {
				t.Errorf("%s: with the token of alice the user is %s", c.name, got)
			}
		}
	}
}

// session is a TLS session of a caller's that can be resumed.
type session struct {
	who      caller
	protocol string
	config   *tls.Config
}

// sessions begins one for each protocol and version of TLS, and checks that it can be
// resumed, as the user given.
func (c caller) sessions(t *testing.T, base, user string) (all []session) {
	t.Helper()
	for _, protocol := range protocols {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			config := c.tls(t)
			config.MinVersion, config.MaxVersion = version, version
			config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
			all = append(all, session{c, protocol, config})
			for i := range 2 {
				hc, resumed := c.connection(t, config, protocol, base)
				if got := c.seeOn(t, hc, base).who(); got != user || resumed != (i == 1) {
					t.Fatalf("connection %d of %s, %s: user %s, session resumed: %v", i+1, protocol, tls.VersionName(version), got, resumed)
				}
			}
		}
	}
	return all
}

// wantRefused resumes the session, which lets nobody in any more.
func (s session) wantRefused(t *testing.T, base, why string) {
	t.Helper()
	hc, resumed := s.who.connection(t, s.config, s.protocol, base)
	// crypto/tls itself resumes none whose certificate has expired.
	if expired := time.Now().After(s.who.certificate.Leaf.NotAfter); resumed == expired {
		t.Errorf("%s, %s: session of before resumed: %v; certificate expired: %v", s.protocol, tls.VersionName(s.config.MinVersion), resumed, expired)
	}
	wantRefusal(t, do(t, hc, "GET", base+"/version", "", nil), why)
}

// TestClientCASwap: when the client CA is replaced, those of the old one lose
// access on open connections and in resumed sessions, and those of the new one get
// it, also on a connection that was refused before. A broken file changes nothing.
func TestClientCASwap(t *testing.T) {
	for _, layout := range []struct {
		name string
		// prepare makes a directory with the content under ca.crt, and swap replaces that.
		prepare, swap func(t *testing.T, dir string, content []byte)
		broken        []func(good []byte) []byte
	}{
		{"rename", func(t *testing.T, dir string, content []byte) { replace(t, filepath.Join(dir, "ca.crt"), content) },
			func(t *testing.T, dir string, content []byte) { replace(t, filepath.Join(dir, "ca.crt"), content) },
			[]func([]byte) []byte{
				func([]byte) []byte { return nil },
				func(good []byte) []byte { return good[:len(good)-40] },
			}},
		{"symbolic links of a Kubernetes volume", prepareVolume, swapVolume,
			[]func([]byte) []byte{
				func([]byte) []byte { return []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n") },
			}},
	} {
		t.Run(layout.name, func(t *testing.T) {
			dir := t.TempDir()
			layout.prepare(t, dir, shared.PKI.CA.PEM)
			b := ownBalancer(t, func(config map[string]any) { section(config, "tls")["clientCAFile"] = filepath.Join(dir, "ca.crt") })

			newCA := newCA(t, nil, "kubernetes-2")
			before := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}
			after := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "june", CA: newCA})}
			sessions := before.sessions(t, b.URL, "jane")
			olds, news := map[string]*line{}, map[string]*line{}
			for _, protocol := range protocols {
				olds[protocol] = newLine(t, before, protocol, b.URL)
				news[protocol] = newLine(t, after, protocol, b.URL)
			}
			check := func(what string, oldIn, newIn bool) error {
				for _, protocol := range protocols {
					for _, c := range []struct {
						*line
						in   bool
						name string
					}{{olds[protocol], oldIn, "jane"}, {news[protocol], newIn, "june"}} {
						want := unauthorized
						if c.in {
							want = c.name
						}
						if got := c.see(t).who(); got != want {
							return fmt.Errorf("%s, %s: %s is seen as %s, want %s", what, protocol, c.name, got, want)
						}
					}
				}
				return nil
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			must(check("old CA", true, false))

			both := append(append([]byte{}, shared.PKI.CA.PEM...), newCA.PEM...)
			layout.swap(t, dir, both)
			eventually(t, revocationLimit, "both CAs are in force", func() error { return check("both CAs", true, true) })

			standing := newLine(t, before, "HTTP/2.0", b.URL)
			must(check("both CAs", true, true))
			if got := standing.see(t).who(); got != "jane" {
				t.Fatalf("jane is seen as %s", got)
			}
			layout.swap(t, dir, newCA.PEM)
			eventually(t, revocationLimit, "only the new CA is in force", func() error { return check("new CA", false, true) })
			standing.wantEnd(t)
			for _, s := range sessions {
				s.wantRefused(t, b.URL, "unknown authority")
			}

			for _, broken := range layout.broken {
				from := logSize(t, b)
				layout.swap(t, dir, broken(both))
				logTells(t, b, from, "cannot reload", "clientCA")
				must(check("a broken file", false, true))
				layout.swap(t, dir, newCA.PEM)
				logTells(t, b, from, "sound again", "clientCA")
				must(check("the file repaired", false, true))
			}

			layout.swap(t, dir, shared.PKI.CA.PEM)
			eventually(t, revocationLimit, "the old CA is in force again", func() error { return check("old CA again", true, false) })
		})
	}
}

// prepareVolume lays out a directory as the kubelet does a ConfigMap volume:
// ca.crt -> ..data/ca.crt, ..data -> ..1.
func prepareVolume(t *testing.T, dir string, content []byte) {
	t.Helper()
	swapVolume(t, dir, content)
	if err := os.Symlink(filepath.Join("..data", "ca.crt"), filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
}

// swapVolume updates such a directory: a new one beside the old, and a new ..data
// renamed over the old.
func swapVolume(t *testing.T, dir string, content []byte) {
	t.Helper()
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	version, err := os.MkdirTemp(dir, "..v")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(version, "ca.crt"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Base(version), filepath.Join(dir, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRevocation: a certificate in the CRL is refused whatever else the request
// carries; a new CRL reaches open connections; a broken one changes nothing.
// kube-apiserver has no revocation to compare with.
func TestRevocation(t *testing.T) {
	file := filepath.Join(t.TempDir(), "clients.crl")
	lost := issue(t, cluster.CertificateOptions{CommonName: "lost", Organizations: []string{"system:masters"}})
	jane := issue(t, cluster.CertificateOptions{CommonName: "jane"})
	nameless := issue(t, cluster.CertificateOptions{Organizations: []string{"dev"}})
	crl := func(number int64, revoked ...*cluster.Certificate) []byte {
		list, err := shared.PKI.CA.CRL(number, revoked...)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	replace(t, file, crl(1, lost, nameless))
	b := ownBalancer(t, func(config map[string]any) { section(config, "tls")["clientCRLFile"] = file })

	for _, certificate := range []*cluster.Certificate{lost, nameless} {
		for name, authorization := range map[string]string{"no token": "", "good token": bearer("alice"), "bad token": "Bearer nobody-knows-this"} {
			for _, protocol := range protocols {
				t.Run(certificate.Leaf.Subject.String()+"/"+name+"/"+protocol, func(t *testing.T) {
					who := caller{certificate, authorization}
					wantRefusal(t, do(t, who.client(t, protocol), "GET", b.URL+"/version", "", who.header(nil)), "revoked")
					wantRefusal(t, do(t, who.client(t, protocol), "POST", b.URL+selfReviewPath, selfReview, who.header(nil)), "revoked")
				})
			}
		}
	}
	if h := openWebSocket(t, caller{lost, ""}, b.URL, "/api/v1/namespaces/default/configmaps?watch=1",
		[]string{tokenProtocol(shared.Token("alice").Token), "binary.k8s.io"}); h.Code != http.StatusUnauthorized {
		t.Errorf("a WebSocket with a revoked certificate and a good token: %+v, want 401", h)
	}

	who := caller{certificate: jane}
	sessions := who.sessions(t, b.URL, "jane")
	open := newLine(t, who, "HTTP/2.0", b.URL)
	if got := open.see(t).who(); got != "jane" {
		t.Fatalf("jane, who is not revoked, is seen as %s", got)
	}
	replace(t, file, crl(2, lost, nameless, jane))
	eventually(t, revocationLimit, "the new CRL is in force", func() error {
		if got := open.see(t).who(); got != unauthorized {
			return fmt.Errorf("jane is seen as %s", got)
		}
		return nil
	})
	wantRefusal(t, do(t, who.client(t, "HTTP/2.0"), "GET", b.URL+"/version", "", http.Header{"Authorization": {bearer("alice")}}), "revoked")
	for _, s := range sessions {
		s.wantRefused(t, b.URL, "revoked")
	}

	foreign, err := shared.PKI.UntrustedCA.CRL(3)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string][]byte{"garbage": []byte("no CRL"), "a CRL of another CA": foreign} {
		from := logSize(t, b)
		replace(t, file, content)
		logTells(t, b, from, "cannot reload", "clientCRL")
		if got := open.see(t).who(); got != unauthorized {
			t.Errorf("after %s in the place of the CRL jane is seen as %s", what, got)
		}
	}
	replace(t, file, crl(4, lost))
	eventually(t, revocationLimit, "jane is on the list no more", func() error {
		if got := open.see(t).who(); got != "jane" {
			return fmt.Errorf("jane is seen as %s", got)
		}
		return nil
	})
}
