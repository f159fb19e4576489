package balancer

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/tlsconf"
)

// recorder is an access log that keeps its lines as text.
type recorder struct{ lines []string }

func (r *recorder) log(edit func(*AccessLog)) *Records {
	l := &AccessLog{Ratio: 1, Write: func(l *Line) { r.lines = append(r.lines, string(l.Append(nil))) }}
	if edit != nil {
		edit(l)
	}
	return &Records{Log: l}
}

// fields returns the members of a line, without the time.
func fields(t *testing.T, line string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(line), &m); err != nil {
		t.Fatalf("%v: %q", err, line)
	}
	delete(m, "time")
	return m
}

func TestRecordLine(t *testing.T) {
	t.Parallel()
	jane := tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane", Groups: []string{"dev", "ops"}}}
	tests := []struct {
		name    string
		verdict tlsconf.Verdict
		head    Head
		want    string
	}{
		{"a certificate, a resource", jane, Head{Method: "PATCH", Path: "/apis/apps/v1/namespaces/shop/deployments/web/scale", RawQuery: "fieldManager=s3cret", UserAgent: "kubectl/v1.36", Chain: anyChain},
			`{"stage":"ResponseComplete","auditID":"new-id","credential":"certificate","user":"jane","groups":2,"source":"192.0.2.7:40000","verb":"patch","apiGroup":"apps","apiVersion":"v1","resource":"deployments","subresource":"scale","namespace":"shop","code":200,"bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1,"userAgent":"kubectl/v1.36"}`},
		{"a token, impersonation", tlsconf.Verdict{}, Head{Method: "GET", Path: "/api/v1/secrets/s3cret", Authorization: "Bearer s3cret", AuditID: "theirs", ImpersonateUser: []string{" bob ", "eve"}},
			`{"stage":"ResponseComplete","auditID":"theirs","credential":"unproven_token","impersonatedUser":"bob","source":"192.0.2.7:40000","verb":"get","apiVersion":"v1","resource":"secrets","code":200,"bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1}`},
		{"what may be anything", tlsconf.Verdict{}, Head{Method: "GET", Path: "/api/v1/namespaces/S3cret_/pods/x/S3cret"},
			`{"stage":"ResponseComplete","auditID":"new-id","credential":"anonymous","source":"192.0.2.7:40000","verb":"get","apiVersion":"v1","resource":"pods","subresource":"?","namespace":"?","code":200,"bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1}`},
		{"a known path", tlsconf.Verdict{}, Head{Method: "GET", Path: "/openapi/v3/s3cret"},
			`{"stage":"ResponseComplete","auditID":"new-id","credential":"anonymous","source":"192.0.2.7:40000","verb":"get","path":"/openapi/...","code":200,"bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1}`},
		{"an unknown path and method", tlsconf.Verdict{}, Head{Method: "S3CRET", Path: "/s3cret"},
			`{"stage":"ResponseComplete","auditID":"new-id","credential":"anonymous","source":"192.0.2.7:40000","verb":"other","path":"/...","code":200,"bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1}`},
		{"refused, by a certificate", jane, Head{Method: "TRACE", Path: "/version", AuditID: "theirs", Chain: anyChain},
			`{"stage":"ResponseComplete","auditID":"theirs","credential":"anonymous","source":"192.0.2.7:40000","verb":"other","path":"/version","code":200,"reason":"method","bytesIn":7,"bytesOut":9,"seconds":0.25,"backend":"a","retries":1}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var r recorder
			cl := clientAt("192.0.2.7")
			d := new(Decision)
			refusal := decider(tt.verdict).DecideInto(d, &tt.head, cl, t0)
			x := r.log(nil).Begin(d, &tt.head, cl, t0)
			x.Received(3)
			x.Received(4)
			x.Sent(9)
			x.Retried("b", Lost)
			if refusal != nil {
				x.Refused(refusal.Reason)
				x.Refused(ReasonClientGone)
			}
			x.Started(200, "a") // it is short
			x.End(&Observation{Code: 200, Backend: "a", Took: 250 * time.Millisecond})
			if len(r.lines) != 1 || !strings.HasPrefix(r.lines[0], `{"time":"2026-05-01T12:00:00.000000Z","stage"`) {
				t.Fatalf("lines %q", r.lines)
			}
			if strings.Contains(strings.ToLower(r.lines[0]), "s3cret") {
				t.Errorf("a secret in %s", r.lines[0])
			}
			if d := cmp.Diff(fields(t, tt.want), fields(t, r.lines[0])); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// A certificate that is refused for where it comes from is still told.
func TestRecordRefusedCertificate(t *testing.T) {
	t.Parallel()
	core := decider(tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane", Groups: []string{"dev"}}})
	core.Guards = NewGuards([]SourceGuard{{Users: []string{"jane"}, From: Networks{netip.MustParsePrefix("10.0.0.0/8")}}}, false, nil)
	var r recorder
	h, cl, d := Head{Method: "GET", Path: "/api/v1/pods", Chain: anyChain}, clientAt("192.0.2.7"), new(Decision)
	if core.DecideInto(d, &h, cl, t0) == nil {
		t.Fatal("let in")
	}
	r.log(nil).Begin(d, &h, cl, t0).End(&Observation{Code: 403})
	if got := fields(t, r.lines[0]); got["user"] != "jane" || got["credential"] != "certificate" || got["groups"] != 1.0 {
		t.Errorf("line %v", got)
	}
}

func TestRecordRules(t *testing.T) {
	t.Parallel()
	get, watch, health := "/api/v1/pods/a", "/api/v1/pods?watch=1", "/readyz/etcd"
	failures := func(l *AccessLog) { l.Ratio, l.Codes[5], l.SlowerThan = 0, true, time.Second }
	tests := []struct {
		name   string
		target string
		code   int
		took   time.Duration
		rules  func(*AccessLog)
		want   string // stages
	}{
		{"all", get, 200, 0, nil, "ResponseComplete"},
		{"long-running", watch, 200, time.Hour, nil, "ResponseStarted ResponseComplete"},
		{"long-running that is refused", watch, 403, 0, nil, "ResponseComplete"},
		{"a health check", health, 200, 0, nil, ""},
		{"a health check that is wanted", health, 200, 0, func(l *AccessLog) { l.HealthChecks = true }, "ResponseComplete"},
		{"a resource of that name", "/api/v1/readyz", 200, 0, nil, "ResponseComplete"},
		{"none", get, 200, 0, func(l *AccessLog) { l.Ratio = 0 }, ""},
		{"another verb", get, 200, 0, func(l *AccessLog) { l.Verbs = map[string]bool{"list": true} }, ""},
		{"the verb", get, 200, 0, func(l *AccessLog) { l.Verbs = map[string]bool{"get": true} }, "ResponseComplete"},
		{"a failure", get, 502, 0, failures, "ResponseComplete"},
		{"no failure", get, 404, 0, failures, ""},
		{"no answer", get, 0, 0, failures, ""},
		{"an odd code", get, 999, 0, failures, ""},
		{"slow", get, 200, time.Second, failures, "ResponseComplete"},
		{"long-running, which is never slow", watch, 200, time.Hour, failures, ""},
		{"long-running with such a code", watch, 200, time.Hour, func(l *AccessLog) { l.Ratio, l.Codes[2] = 0, true }, "ResponseStarted ResponseComplete"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var r recorder
			h := Head{Method: "GET"}
			h.Path, h.RawQuery, _ = strings.Cut(tt.target, "?")
			d := Decision{Attributes: Attribute(h.Method, h.Path, h.RawQuery)}
			x := r.log(tt.rules).Begin(&d, &h, clientAt("192.0.2.7"), t0)
			x.Started(tt.code, "a")
			x.End(&Observation{Code: tt.code, Took: tt.took})
			var stages []string
			for _, l := range r.lines {
				stages = append(stages, fields(t, l)["stage"].(string))
			}
			if got := strings.Join(stages, " "); got != tt.want {
				t.Errorf("stages %q, want %q", got, tt.want)
			}
		})
	}
}

func TestRecordRatio(t *testing.T) {
	t.Parallel()
	var r recorder
	records := r.log(func(l *AccessLog) { l.Ratio = 0.1 })
	const n = 20000
	for range n {
		records.Begin(&Decision{}, &Head{}, clientAt("192.0.2.7"), t0).End(&Observation{Code: 200})
	}
	if got := len(r.lines); got < n/20 || got > n/5 {
		t.Errorf("%d of %d requests are logged, want a tenth", got, n)
	}
}

// What is off costs no allocation.
func TestRecordOff(t *testing.T) {
	d, h, cl := &Decision{}, &Head{Path: "/readyz"}, clientAt("192.0.2.7")
	for name, r := range map[string]*Records{"off": nil, "filtered": new(recorder).log(nil), "not sampled": {Traces: new(Traces)}} {
		if n := testing.AllocsPerRun(100, func() {
			x := r.Begin(d, h, cl, t0)
			x.Received(1)
			x.Sent(1)
			x.Retried("b", Lost)
			x.Refused("x")
			x.Started(200, "a")
			x.End(&Observation{})
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// likeJSON is what encoding/json makes of a string.
func likeJSON(t *testing.T, s string) string {
	t.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// FuzzLine holds a line to encoding/json, to one line, and to UTF-8.
func FuzzLine(f *testing.F) {
	for _, s := range []string{"", "jane", `"\`, "\b\f\n\r\t\x00\x1f\x7f", "\xff\xc3(", "\u2028\u2029\u202a\ufffd€😀", "</script>&", "a\xf0\x9f"} {
		f.Add(s, "kubectl", "get", 200)
		f.Add("x", s, s, -1)
	}
	f.Fuzz(func(t *testing.T, user, agent, path string, code int) {
		if got, want := string(appendString(nil, user)), likeJSON(t, user); got != want {
			t.Fatalf("%q is %s, want %s", user, got, want)
		}
		l := Line{At: t0, User: user, UserAgent: agent, Path: path, Verb: user, Reason: agent, Code: code, Peer: netip.MustParseAddrPort("[fe80::1]:7")}
		b := l.Append(nil)
		if bytes.IndexByte(b, '\n') != len(b)-1 || !utf8.Valid(b) {
			t.Fatalf("not one line of UTF-8: %q", b)
		}
		var m struct {
			User, UserAgent, Path, Verb, Reason, Source string
			Code                                        int
		}
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatalf("%v: %q", err, b)
		}
		var want struct{ User, UserAgent, Path string }
		for to, s := range map[*string]string{&want.User: user, &want.UserAgent: agent, &want.Path: path} {
			if err := json.Unmarshal([]byte(likeJSON(t, s)), to); err != nil {
				t.Fatal(err)
			}
		}
		if m.User != want.User || m.UserAgent != want.UserAgent || m.Path != want.Path || m.Verb != want.User || m.Code != code || m.Source != "[fe80::1]:7" {
			t.Fatalf("%q came back as %+v", b, m)
		}
	})
}

func BenchmarkRecord(b *testing.B) {
	lines := make(chan *Line, 1)
	r := &Records{Log: &AccessLog{Ratio: 1, Write: func(l *Line) { lines <- l }}}
	d, h, cl := &Decision{Attributes: Attribute("GET", "/api/v1/namespaces/default/pods/a", ""), AuditID: "a7a2f4c8-2b1c-4d5e-8f6a-0b1c2d3e4f50", User: "jane"}, &Head{UserAgent: "kubectl/v1.36.0 (linux/amd64)"}, clientAt("192.0.2.7")
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		x := r.Begin(d, h, cl, t0)
		x.End(&Observation{Code: 200, Backend: "a", Took: time.Millisecond})
		buf = (<-lines).Append(buf[:0])
	}
}
