package forward

import (
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/tlsconf"
)

// forged are spellings of identity headers that some server might take for one.
var forged = []string{
	"X-Remote-User", "x-remote-user", "X-REMOTE-USER", "X_Remote_User", "x-remote_user", "X-Remote%2dUser", "X%2DRemote%2dUser",
	"X-Remote-Group", "x-remote-group", "X_REMOTE_GROUP", "X-Remote-Uid", "X-Remote-UID", "x_remote_uid",
	"X-Remote-Extra-Scopes", "x-remote-extra-", "X_Remote_Extra_acme%2ecom%2fscope", "X-Remote-Extra-%E4%BD%A0", "X-Remote%2DExtra-a",
}

// asserts returns the fields that assert alice, as kube-apiserver gets them.
func (w *world) asserts(cert *testpki.Issued) http.Header {
	v := w.store.Verify(nil)
	if cert != nil {
		v = w.store.Verify([]*x509.Certificate{cert.Certificate})
	}
	h := http.Header{}
	if v.Kind != tlsconf.Valid {
		return h
	}
	for _, f := range w.core.Headers.Assert(v.Identity) {
		h.Add(f.Name, f.Value)
	}
	return h
}

// TestForgedHeaders: what a client says of identity reaches no backend, whatever
// its credential and however it is spelled, and what is asserted stands alone.
func TestForgedHeaders(t *testing.T) {
	for _, b := range []struct {
		name, token string
		cert        func(p *testpki.PKI) *testpki.Issued
		conn        string
	}{
		{"certificate", "", func(p *testpki.PKI) *testpki.Issued { return p.Alice }, "front-proxy-client"},
		{"certificate and token", "t", func(p *testpki.PKI) *testpki.Issued { return p.Alice }, "front-proxy-client"},
		{"token", "t", func(*testpki.PKI) *testpki.Issued { return nil }, ""},
		{"expired certificate and token", "t", func(p *testpki.PKI) *testpki.Issued { return p.Expired }, ""},
		{"anonymous", "", func(*testpki.PKI) *testpki.Issued { return nil }, ""},
	} {
		for major := 1; major <= 2; major++ {
			for _, upgrade := range []bool{false, true} {
				if major == 2 && upgrade {
					continue // there are none
				}
				t.Run(fmt.Sprintf("%s h%d upgrade %v", b.name, major, upgrade), func(t *testing.T) {
					run(t, setup{backends: 1}, func(w *world) {
						cert := b.cert(w.pki)
						fields := []string{"X-Remote: kept", "X-Remote-Users: kept", "X-Remote-Extr: kept"}
						for _, name := range forged {
							fields = append(fields, name+": system:masters", name+": second")
						}
						if b.token != "" {
							fields = append(fields, "Authorization: Bearer "+b.token)
						}
						if major == 1 {
							r := w.raw(cert)
							head := append([]string{"POST /api HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "Trailer: X-Remote-User, x_remote_group"}, fields...)
							if upgrade {
								head = append(head, "Connection: Upgrade", "Upgrade: websocket")
							}
							r.say(append(head, "", "2", "{}", "0", "X-Remote-User: root", "X-Remote-Uid: 0", "x_remote_group: system:masters", "X-Other: 1", "")...)
							r.hear("POST").want(w, 200, "")
						} else {
							for i := range fields {
								name, value, _ := strings.Cut(fields[i], ": ")
								fields[i] = strings.ToLower(name) + ": " + value
							}
							p := w.h2(cert)
							id := p.ask(false, "POST", "/api", append(fields, "trailer: x-remote-user")...)
							p.data(id, false, "{}")
							p.head(id, true, "x-remote-user: root", "x-remote-uid: 0", "x_remote_group: system:masters", "x-other: 1")
							if a := p.hear(id); a.code != 200 {
								w.Fatalf("answer = %+v", a)
							}
						}
						got := w.apis[0].one()
						want := w.asserts(cert)
						want["X-Remote"], want["X-Remote-Users"], want["X-Remote-Extr"] = []string{"kept"}, []string{"kept"}, []string{"kept"}
						want["X-Forwarded-For"], want["Audit-Id"] = []string{clientIP}, []string{"audit-1"}
						if b.token != "" && b.conn == "" {
							want["Authorization"] = []string{"Bearer " + b.token}
						}
						if upgrade {
							want["Connection"], want["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
						}
						if diff := cmp.Diff(want, got.Header); diff != "" {
							w.Errorf("header (-want +got):\n%s", diff)
						}
						if len(got.trailer) != 0 {
							w.Errorf("trailers %v arrived", got.trailer)
						}
						if got.Cert != b.conn {
							w.Errorf("the connection bore the certificate %q, want %q", got.Cert, b.conn)
						}
						if got.body.String() != "{}" {
							w.Errorf("body = %q", got.body.String())
						}
					})
				})
			}
		}
	}
}

// TestConnectionNames: a client must not have what says who it is taken for
// hop-by-hop.
func TestConnectionNames(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		for _, name := range []string{"Authorization", "authorization", "Impersonate-User", "impersonate-extra-x", "X-Remote-User", "x_remote_group", "X-Remote-Extra-a", "X-Remote-Uid", "Audit-Id"} {
			for _, line := range []string{name, "close, " + name, "upgrade, " + name + " ,x"} {
				r := w.raw(w.pki.Alice)
				r.say("GET /api HTTP/1.1", "Host: x", "Connection: "+line, "Upgrade: websocket", "Impersonate-User: bob", "")
				r.hear("GET").want(w, 400, `{"kind":"Status"`)
			}
		}
		if n := len(w.apis[0].requests()); n != 0 {
			w.Errorf("%d requests arrived", n)
		}
		// What is not about identity may be named.
		r := w.raw(w.pki.Alice)
		r.say("GET /api HTTP/1.1", "Host: x", "Connection: x-hop, X-Forwarded-For", "X-Hop: 1", "X-Forwarded-For: 6.6.6.6", "")
		r.hear("GET").want(w, 200, "")
		h := w.apis[0].one().Header
		if h.Get("X-Hop") != "" || h.Get("X-Remote-User") != "alice" || h.Get("X-Forwarded-For") != clientIP {
			w.Errorf("header = %v", h)
		}
	})
}

// TestRefusedCredentials: who is refused gets a Status, and no backend is asked.
func TestRefusedCredentials(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		for _, cert := range []*testpki.Issued{w.pki.Expired, w.pki.Stranger} {
			for major := 1; major <= 2; major++ {
				a := w.client(major, cert).do("GET", "/api", nil)
				a.want(w, 401, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate is not accepted: `)
				if got := a.Header.Get("Content-Type"); got != "application/json" {
					w.Errorf("Content-Type = %q", got)
				}
			}
		}
		if n := len(w.apis[0].requests()); n != 0 {
			w.Errorf("%d requests arrived", n)
		}
	})
}

// TestCertificateExpires: an open connection loses its rights with its certificate.
func TestCertificateExpires(t *testing.T) {
	for major := 1; major <= 2; major++ {
		run(t, setup{backends: 1}, func(w *world) {
			soon := testpki.Issue(w.pki.ClientCA, w.pki.Alice.Subject, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
			c := w.client(major, soon)
			c.do("GET", "/api", nil).want(w, 200, "")
			time.Sleep(61 * time.Second)
			c.do("GET", "/api", nil).want(w, 401, `{"kind":"Status"`)
			if got := w.metric("apiserver_lb.client.connections")[""]; got != 1 {
				w.Errorf("%d client connections, want the first one", got)
			}
		})
	}
}

// TestForwardedFor: the peer is appended; what it says of others is kept only where
// it is trusted.
func TestForwardedFor(t *testing.T) {
	for _, trusted := range []bool{false, true} {
		s := setup{backends: 1}
		if trusted {
			s.trusted = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		}
		run(t, s, func(w *world) {
			for major := 1; major <= 2; major++ {
				before := len(w.apis[0].requests())
				w.client(major, nil).do("GET", "/api", nil, "X-Forwarded-For: 203.0.113.9, 203.0.113.8", "X-Forwarded-For: 203.0.113.7",
					"X-Forwarded-Host: h", "X-Forwarded-Proto: https", "Forwarded: for=x", "X-Real-Ip: 1.1.1.1").want(w, 200, "")
				want := http.Header{"X-Forwarded-For": {clientIP}}
				if trusted {
					want = http.Header{"X-Forwarded-For": {"203.0.113.9, 203.0.113.8, 203.0.113.7, " + clientIP}, "X-Forwarded-Host": {"h"},
						"X-Forwarded-Proto": {"https"}, "Forwarded": {"for=x"}, "X-Real-Ip": {"1.1.1.1"}}
				}
				got := w.apis[0].requests()[before].Header
				for _, name := range []string{"Audit-Id", "Accept-Encoding", "User-Agent"} {
					got.Del(name)
				}
				if !trusted {
					want = http.Header{"X-Forwarded-For": {clientIP}, "X-Real-Ip": nil}
					delete(want, "X-Real-Ip")
				}
				if diff := cmp.Diff(want, got); diff != "" {
					w.Errorf("trusted %v (-want +got):\n%s", trusted, diff)
				}
			}
		})
	}
}

// kindOf says which credential a request at a backend shows.
func kindOf(s *seen) string {
	switch {
	case s.Header.Get("X-Remote-User") != "":
		return "asserted"
	case s.Header.Get("Authorization") != "":
		return "token"
	}
	return "anonymous"
}

// TestNeverShared: thousands of requests of several identities at once, some reset
// in the middle, with backends that come and go: each is seen under its own
// identity, and no backend connection ever carries two kinds of credentials.
func TestNeverShared(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h1 %v", h1), func(t *testing.T) {
			run(t, setup{h1: h1, backends: 3, maxStreams: 7, policy: "round-robin"}, func(w *world) {
				for _, a := range w.apis {
					a.on(func(rw http.ResponseWriter, r *http.Request) {
						io.Copy(io.Discard, r.Body)
						token := r.Header.Get("Authorization")
						if strings.Contains(token, "bad") {
							rw.WriteHeader(401)
						}
						// The time of a request, so that they overlap.
						time.Sleep(time.Duration(len(r.URL.Path)%5) * time.Millisecond)
						fmt.Fprintf(rw, "%s|%s|%s", r.Header.Get("X-Remote-User"), r.Header["X-Remote-Group"], token)
					})
				}
				identities := []struct {
					cert  *testpki.Issued
					token string
					want  string
				}{
					{w.pki.Alice, "", "alice|[dev ops]|"},
					{w.pki.Bob, "", "bob|[]|"},
					{w.pki.Bob, "ignored", "bob|[]|"},
					{nil, "good", "|[]|Bearer good"},
					{nil, "bad", "|[]|Bearer bad"},
					{w.pki.Expired, "good", "|[]|Bearer good"},
					{nil, "", "|[]|"},
				}
				var wg sync.WaitGroup
				for n, id := range identities {
					for major := 1; major <= 2; major++ {
						c := w.client(major, id.cert)
						for g := range 3 {
							wg.Go(func() {
								for i := range 40 {
									var fields []string
									if id.token != "" {
										fields = append(fields, "Authorization: Bearer "+id.token)
									}
									r := c.request("GET", fmt.Sprintf("/api/%d/%d", n*g, i), nil, append(fields, "X-Remote-User: root")...)
									res, err := c.send(r)
									if err != nil {
										w.Errorf("%v", err)
										return
									}
									if i%7 == 3 {
										res.Body.Close()
										continue
									}
									if a := readAnswer(res); a.body != id.want {
										w.Errorf("answer = %d %q (%v), want %q", a.StatusCode, a.body, a.err, id.want)
									}
								}
							})
						}
					}
				}
				wg.Go(func() {
					for range 5 {
						time.Sleep(10 * time.Millisecond)
						w.retire()
					}
				})
				wg.Wait()
				shared, certs := 0, map[string]bool{}
				for _, a := range w.apis {
					kinds := map[int]string{}
					for _, s := range a.requests() {
						kind := kindOf(s)
						if before, ok := kinds[s.Conn]; ok && before != kind {
							w.Errorf("connection %d of %s carried %s and %s", s.Conn, a.b.Name, before, kind)
						} else if ok {
							shared++
						}
						kinds[s.Conn] = kind
						certs[kind+"/"+s.Cert] = true
					}
				}
				if shared == 0 {
					w.Error("no connection was used twice: nothing was tested")
				}
				if diff := cmp.Diff(map[string]bool{"asserted/front-proxy-client": true, "token/": true, "anonymous/": true}, certs); diff != "" {
					w.Errorf("certificates by credential (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// TestProving: a token travels apart from proven ones until a backend has accepted
// it, and 401 does not prove it.
func TestProving(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") == "Bearer bad" {
				rw.WriteHeader(401)
			}
		})
		c := w.client(2, nil)
		conn := func(token string, code int) int {
			w.Helper()
			before := len(w.apis[0].requests())
			c.do("GET", "/api", nil, "Authorization: Bearer "+token).want(w, code, "")
			return w.apis[0].requests()[before].Conn
		}
		first, second := conn("good", 200), conn("good", 200)
		if first == second {
			w.Error("the token was proven before its first success")
		}
		if again := conn("good", 200); again != second {
			w.Error("the proven token changed its connection")
		}
		if bad, badAgain := conn("bad", 401), conn("bad", 401); bad != first || badAgain != first {
			w.Errorf("a bad token travelled on connections %d and %d, want %d", bad, badAgain, first)
		}
		if other := conn("other", 200); other != first {
			w.Error("a new token did not travel with the unproven")
		}
		if anonymous := w.client(2, nil); anonymous.do("GET", "/", nil).StatusCode != 200 || w.apis[0].conns != 3 {
			w.Errorf("%d connections, want 3", w.apis[0].conns)
		}
		want := map[string]int64{"backend=a credential=anonymous": 1, "backend=a credential=token": 1, "backend=a credential=unproven_token": 1}
		if diff := cmp.Diff(want, w.metric("apiserver_lb.backend.connections")); diff != "" {
			w.Errorf("backend connections (-want +got):\n%s", diff)
		}
	})
}

// TestNoSecretsLogged: tokens appear in no log line and no Status, whatever happens
// to the request.
func TestNoSecretsLogged(t *testing.T) {
	const canary = "canary-6f1c9"
	run(t, setup{}, func(w *world) {
		w.apis[0].kill()
		w.prefer(0)
		var said strings.Builder
		for major := 1; major <= 2; major++ {
			c := w.client(major, nil)
			for _, target := range []string{"/api?token=" + canary, "/api/v1/namespaces/n/pods/p/log?x=" + canary} {
				said.WriteString(c.do("GET", target, nil, "Authorization: Bearer "+canary).body)
			}
		}
		w.apis[1].kill()
		synctest.Wait() // or a request could go out on a connection that has just ended
		for major := 1; major <= 2; major++ {
			a := w.client(major, nil).do("POST", "/api?x="+canary, strings.NewReader(canary), "Authorization: Bearer "+canary)
			a.want(w, 503, "")
			said.WriteString(a.body)
		}
		r := w.raw(nil)
		r.say("GET /x HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io."+canary, "")
		said.WriteString(r.hear("GET").body)
		if all := w.log.String() + said.String(); strings.Contains(all, canary) || !strings.Contains(all, "attempt failed") {
			w.Errorf("the canary sings:\n%s", all)
		}
	})
}
