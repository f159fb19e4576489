package forward

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
)

// legs runs a test over both protocols on both sides, with one backend.
func legs(t *testing.T, test func(w *world, major int)) {
	legsTo(t, setup{backends: 1}, test)
}

// legsTo is legs with a setup of the test's own.
func legsTo(t *testing.T, s setup, test func(w *world, major int)) {
	for _, h1 := range []bool{false, true} {
		for _, major := range []int{1, 2} {
			t.Run(fmt.Sprintf("h%d-to-%s", major, map[bool]string{false: "h2", true: "h1"}[h1]), func(t *testing.T) {
				s.h1 = h1
				run(t, s, func(w *world) { test(w, major) })
			})
		}
	}
}

// ask sends one request with a target taken literally, without a certificate.
func (w *world) ask(major int, method, target string, fields ...string) (code int, body string) {
	w.Helper()
	return w.askAs(nil, major, method, target, fields...)
}

// askAs is ask with a certificate.
func (w *world) askAs(cert *testpki.Issued, major int, method, target string, fields ...string) (code int, body string) {
	w.Helper()
	if major == 2 {
		p := w.h2(cert)
		a := p.hear(p.ask(true, method, target, fields...))
		if a.err != nil || a.reset {
			w.Errorf("%s %s: reset %v, %v", method, target, a.reset, a.err)
		}
		return a.code, a.body
	}
	r := w.raw(cert)
	r.say(append(append([]string{method + " " + target + " HTTP/1.1", "Host: balancer.example"}, fields...), "")...)
	a := r.hear(method)
	return a.StatusCode, a.body
}

// TestTargets: a path is kube-apiserver's to judge, and arrives byte for byte.
func TestTargets(t *testing.T) {
	targets := []struct{ method, target string }{
		{"GET", "/"},
		{"GET", "/api/v1/namespaces?limit=500"},
		{"GET", "//x"},
		{"GET", "//x?a=%2f"},
		{"GET", "///"},
		{"GET", "/a//b/"},
		{"GET", "/a/../b/./c"},
		{"GET", "/%2f%2F/%41"},
		{"GET", "//%2f"},
		{"GET", "/api/v1/namespaces/n/services/https:name:8443/proxy/x;y=1/"},
		{"GET", "/x?a=1;b=2"},
		{"GET", "/x?a=%zz&b"},
		{"GET", "/x?"},
		{"GET", "//x?"},
		{"GET", "/x??"},
		{"GET", "/x?a?b=/../"},
		{"GET", "/ü/\u4e16?q=é"},
		{"GET", "/x#fragment?y"},
		{"GET", `/"<>\^{|}` + "`"},
		{"GET", "/a+b:c@d&e=f,g$h!i'j(k)*"},
		{"GET", "*"},
		{"OPTIONS", "*"},
		{"OPTIONS", "/api"},
		{"DELETE", "/api/v1/pods?x=" + strings.Repeat("y", 60<<10)},
		{"GET", "/" + strings.Repeat("z/", 30<<10)},
	}
	legs(t, func(w *world, major int) {
		for _, c := range targets {
			before := len(w.apis[0].requests())
			if code, body := w.askAs(w.pki.Alice, major, c.method, c.target); code != 200 {
				w.Errorf("%.60s: %d %s", c.target, code, body)
				continue
			}
			got := w.apis[0].requests()[before:]
			if len(got) != 1 || got[0].Target != c.target || got[0].Method != c.method || got[0].Host != "balancer.example" {
				w.Errorf("%s %.60q arrived as %s %.60q at %s", c.method, c.target, got[0].Method, got[0].Target, got[0].Host)
			}
		}
	})
}

// TestDoubleSlashAbsolute: what net/http can send over HTTP/1.1 only in absolute form
// still names the same resource.
func TestDoubleSlashAbsolute(t *testing.T) {
	const target, absolute = "//ü?q", "https://balancer.example//ü?q"
	for _, c := range []struct {
		h1, known bool
		want      string
	}{{true, true, absolute}, {false, false, absolute}, {false, true, target}} {
		run(t, setup{h1: c.h1, backends: 1}, func(w *world) {
			var cert *testpki.Issued
			if c.known {
				cert = w.pki.Alice
			}
			if code, _ := w.askAs(cert, 1, "GET", target); code != 200 {
				w.Errorf("code = %d", code)
			}
			if got := w.apis[0].one(); got.Target != c.want || got.Host != "balancer.example" {
				w.Errorf("arrived as %q at %q", got.Target, got.Host)
			}
		})
	}
}

// TestAbsoluteForm: the form that is used with proxies loses scheme and authority,
// and nothing else. Whom it names is whom Host names; else the request is refused, which
// a proxy must send on for the one (RFC 9112, section 3.2.2) and others may for the other.
func TestAbsoluteForm(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		for _, c := range []struct{ target, want, host string }{
			{"https://other.example/a%2f?b;c", "/a%2f?b;c", "other.example"},
			{"https://other.example:8443//a", "//a", "other.example:8443"},
			{"https://other.example", "/", "other.example"},
			{"https://other.example?x=1", "/?x=1", "other.example"},
			{"http://other.example/x?y=http://z/", "/x?y=http://z/", "other.example"},
		} {
			before := len(w.apis[0].requests())
			if code, _ := w.ask(1, "GET", c.target); code != 400 {
				w.Errorf("%s with another host: %d", c.target, code)
			}
			r := w.raw(w.pki.Alice)
			r.say("GET "+c.target+" HTTP/1.1", "Host: "+c.host, "")
			r.hear("GET").want(w, 200, "")
			if got := w.apis[0].requests()[before]; got.Target != c.want || got.Host != c.host {
				w.Errorf("%s arrived as %s at %s", c.target, got.Target, got.Host)
			}
		}
	})
}

// TestMalformed: what cannot be passed on unchanged is refused, is not taken for a
// fault of the backend and reaches none.
func TestMalformed(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		for _, c := range []struct {
			name string
			head []string
		}{
			{"opaque target", []string{"GET mailto:x HTTP/1.1", "Host: balancer.example"}},
			{"host not ASCII", []string{"GET / HTTP/1.1", "Host: b\u00fccher.example"}},
			{"host that is no IDN", []string{"GET / HTTP/1.1", "Host: \xff\xfe"}},
			{"host not ASCII, upgrade", []string{"GET / HTTP/1.1", "Host: \xff", "Connection: Upgrade", "Upgrade: websocket"}},
			{"space in the target", []string{"GET /a b HTTP/1.1", "Host: balancer.example"}},
			{"control character in the target", []string{"GET /\x01 HTTP/1.1", "Host: balancer.example"}},
			{"no host", []string{"GET / HTTP/1.1"}},
			{"two hosts", []string{"GET / HTTP/1.1", "Host: a", "Host: b"}},
			{"length and chunks", []string{"POST / HTTP/1.1", "Host: a", "Content-Length: 3", "Transfer-Encoding: chunked, identity"}},
			{"two lengths", []string{"POST / HTTP/1.1", "Host: a", "Content-Length: 3", "Content-Length: 4"}},
		} {
			r := w.raw(w.pki.Alice)
			r.say(append(c.head, "")...)
			if a := r.hear("GET"); a.StatusCode != 400 && a.StatusCode != 501 {
				w.Errorf("%s: %d %s", c.name, a.StatusCode, a.body)
			}
		}
		p := w.h2(nil)
		for _, target := range []string{"/a b", "mailto:x", "x"} {
			if a := p.hear(p.ask(true, "GET", target)); a.code != 400 && !a.reset {
				w.Errorf(":path %q: %d %s (reset %v, %v)", target, a.code, a.body, a.reset, a.err)
			}
		}
		for id, host := range map[uint32]string{101: "b\u00fccher.example", 103: "\xff\xfe", 105: "xn--\u00fc"} {
			p := w.h2(nil)
			p.head(id, true, ":method: GET", ":scheme: https", ":authority: "+host, ":path: /")
			if a := p.hear(id); a.code != 400 && !a.reset {
				w.Errorf(":authority %q: %d %s (%v)", host, a.code, a.body, a.err)
			}
		}
		if got := w.apis[0].requests(); len(got) != 0 {
			w.Errorf("%d requests reached the backend, the first for %q", len(got), got[0].Target)
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestEmptyHost: HTTP/1.1 allows an empty Host, HTTP/2 needs an authority.
func TestEmptyHost(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{backends: 1, h1: h1}, func(w *world) {
			for _, target := range []string{"/x", "//x", "//ü"} {
				r := w.raw(w.pki.Alice)
				r.say("GET "+target+" HTTP/1.1", "Host:", "")
				r.hear("GET").want(w, 200, "")
				r = w.raw(w.pki.Alice)
				r.say("GET "+target+" HTTP/1.0", "")
				r.hear("GET").want(w, 200, "")
				r = w.raw(w.pki.Alice)
				r.say("GET "+target+" HTTP/1.1", "Host:", "Connection: upgrade", "Upgrade: websocket", "")
				r.hear("GET").want(w, 200, "")
			}
			if got := w.verdicts(); len(got) != 0 {
				w.Errorf("health heard %q", got)
			}
		})
	}
}

// TestHeaders: header fields arrive in full, repeated ones apart and in order, and
// those that concern one connection do not.
func TestHeaders(t *testing.T) {
	big := strings.Repeat("x", 60<<10)
	legs(t, func(w *world, major int) {
		fields := []string{
			"accept: application/json", "accept: application/vnd.kubernetes.protobuf",
			"x-one: 1", "x-two: a", "x-one: 2", "x-one: ", "x-big: " + big, "user-agent: kubectl/v1.36.0", "x-obs: \xff\u00e9",
			"impersonate-user: bob", "impersonate-group: g1", "impersonate-group: g2", "impersonate-extra-scopes: s",
			"authorization: Bearer t", "audit-id: my-audit-id", "x-real-ip: 1.2.3.4", "te: trailers",
		}
		hop := []string{"connection: x-hop, keep-alive", "x-hop: 1", "keep-alive: timeout=5", "proxy-connection: keep-alive", "proxy-authorization: Basic x"}
		want := http.Header{
			"Accept": {"application/json", "application/vnd.kubernetes.protobuf"},
			"X-One":  {"1", "2", ""}, "X-Two": {"a"}, "X-Big": {big}, "User-Agent": {"kubectl/v1.36.0"}, "X-Obs": {"\xff\u00e9"},
			"Impersonate-User": {"bob"}, "Impersonate-Group": {"g1", "g2"}, "Impersonate-Extra-Scopes": {"s"},
			"Authorization": {"Bearer t"}, "Audit-Id": {"my-audit-id"}, "X-Forwarded-For": {clientIP}, "Te": {"trailers"},
		}
		if major == 1 {
			fields = append(fields, hop...)
		}
		for range 2 { // the token is proven then, and has other connections
			if code, body := w.ask(major, "GET", "/api", fields...); code != 200 {
				w.Fatalf("%d %s", code, body)
			}
		}
		for _, got := range w.apis[0].requests() {
			if diff := cmp.Diff(want, got.Header); diff != "" {
				w.Errorf("header over %s (-want +got):\n%s", got.Proto, diff)
			}
		}
	})
}

// TestNothingAdded: a client that sends nothing but the target has nothing added
// but what the balancer must say.
func TestNothingAdded(t *testing.T) {
	legs(t, func(w *world, major int) {
		if code, body := w.ask(major, "GET", "/api"); code != 200 {
			w.Fatalf("%d %s", code, body)
		}
		want := http.Header{"X-Forwarded-For": {clientIP}, "Audit-Id": {"audit-1"}}
		if diff := cmp.Diff(want, w.apis[0].one().Header); diff != "" {
			w.Errorf("header (-want +got):\n%s", diff)
		}
	})
}

// TestHeaderTooLarge: a header that the client may send, and that is too large for
// the backend with what is added to it, is the request's fault.
func TestHeaderTooLarge(t *testing.T) {
	run(t, setup{}, func(w *world) {
		p := w.h2(nil)
		if a := p.hear(p.ask(true, "GET", "/")); a.code != 200 { // now the limit is known
			w.Fatalf("answer = %+v", a)
		}
		before := len(w.apis[0].requests()) + len(w.apis[1].requests())
		// A field counts its name, its value and 32 bytes. Go's server takes 320
		// more than its limit, and this is 20 less than that.
		pad := 1<<20 + 320 - 20 - len(":methodGET:schemehttps:authoritybalancer.example:path/x-a") - 5*32
		a := p.hear(p.ask(true, "GET", "/", "x-a: "+strings.Repeat("a", pad)))
		if a.code != 431 || !strings.Contains(a.body, "lb-1: the request header") {
			w.Errorf("answer = %d %s (reset %v, %v)", a.code, a.body, a.reset, a.err)
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
		if n := len(w.apis[0].requests()) + len(w.apis[1].requests()); n != before {
			w.Errorf("%d backends were asked", n-before)
		}
	})
}

// TestRequestBodies: length and bytes of request bodies arrive, however they are
// framed.
func TestRequestBodies(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 3<<19/16) // 1.5 MB
	legs(t, func(w *world, major int) {
		c := w.client(major, w.pki.Alice)
		for _, b := range []struct {
			method, body string
			chunked      bool
			length       int64
		}{
			{"PUT", large, false, 3 << 19},
			{"PUT", large, true, -1},
			{"POST", "{}", false, 2},
			{"POST", "{}", true, -1},
			{"POST", "", false, 0},
			{"DELETE", `{"kind":"DeleteOptions"}`, false, 24},
			{"DELETE", "", false, 0},
			{"GET", "", false, 0},
			{"GET", "x", false, 1},
		} {
			var body io.Reader = strings.NewReader(b.body)
			if b.chunked {
				body = io.MultiReader(body)
			}
			before := len(w.apis[0].requests())
			c.do(b.method, "/api", body).want(w, 200, "")
			got := w.apis[0].requests()[before]
			if got.body.String() != b.body {
				w.Errorf("%s of %d bytes arrived as %d", b.method, len(b.body), len(got.body.String()))
			}
			if got.length != b.length {
				w.Errorf("%s of %d bytes: length %d, want %d", b.method, len(b.body), got.length, b.length)
			}
		}
	})
}

// TestAnswers: answers pass as they are.
func TestAnswers(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			h := rw.Header()
			h["X-Two"] = []string{"a", "b"}
			if r.ProtoMajor == 1 {
				h.Set("Connection", "x-hop")
				h.Set("X-Hop", "1")
			}
			switch r.URL.Path {
			case "/gzip":
				h.Set("Content-Encoding", "gzip")
				io.WriteString(rw, "\x1f\x8bnot really")
			case "/head":
				h.Set("Content-Length", "1234")
				h.Set("Content-Type", "application/json")
			case "/204":
				rw.WriteHeader(204)
			case "/304":
				h.Set("Etag", `"1"`)
				rw.WriteHeader(304)
			case "/302":
				h.Set("Location", "https://elsewhere.example/")
				rw.WriteHeader(302)
			case "/429":
				h.Set("Retry-After", "1")
				h.Set("X-Kubernetes-Pf-Flowschema-Uid", "u")
				h.Set("X-Kubernetes-Pf-Prioritylevel-Uid", "v")
				rw.WriteHeader(429)
				io.WriteString(rw, "Too many requests, apiserver is shutting down they say")
			case "/500":
				rw.WriteHeader(500)
				io.WriteString(rw, "broken")
			}
		})
		c := w.client(major, w.pki.Alice)
		for _, b := range []struct {
			method, path string
			code         int
			body         string
			header       http.Header
		}{
			{"GET", "/gzip", 200, "\x1f\x8bnot really", http.Header{"Content-Encoding": {"gzip"}, "Content-Length": {"12"}}},
			{"HEAD", "/head", 200, "", http.Header{"Content-Length": {"1234"}, "Content-Type": {"application/json"}}},
			{"GET", "/204", 204, "", nil},
			{"GET", "/304", 304, "", http.Header{"Etag": {`"1"`}}},
			{"GET", "/302", 302, "", http.Header{"Location": {"https://elsewhere.example/"}, "Content-Length": {"0"}}},
			{"POST", "/429", 429, "Too many requests, apiserver is shutting down they say", http.Header{"Retry-After": {"1"}, "Content-Length": {"54"},
				"Content-Type": {"text/plain; charset=utf-8"}, "X-Kubernetes-Pf-Flowschema-Uid": {"u"}, "X-Kubernetes-Pf-Prioritylevel-Uid": {"v"}}},
			{"GET", "/500", 500, "broken", http.Header{"Content-Length": {"6"}, "Content-Type": {"text/plain; charset=utf-8"}}},
		} {
			a := c.do(b.method, b.path, nil)
			a.want(w, b.code, b.body)
			a.Header.Del("Date")
			if b.header == nil {
				b.header = http.Header{}
			}
			b.header["X-Two"] = []string{"a", "b"}
			if diff := cmp.Diff(b.header, a.Header); diff != "" {
				w.Errorf("%s %s (-want +got):\n%s", b.method, b.path, diff)
			}
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestManyFields: the head of a request has a bound to its fields over either protocol, also
// where net/http speaks HTTP/2 with clients.
func TestManyFields(t *testing.T) {
	legs(t, func(w *world, major int) {
		c := w.client(major, w.pki.Alice)
		for _, tt := range []struct{ fields, code int }{{balancer.MaxFields - 20, 200}, {balancer.MaxFields + 1, 431}} {
			if a := c.do("GET", "/api", nil, slices.Repeat([]string{"X-Many: y"}, tt.fields)...); a.StatusCode != tt.code {
				w.Errorf("%d fields: %d %s, want %d", tt.fields, a.StatusCode, a.body, tt.code)
			}
		}
	})
}
