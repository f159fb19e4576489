package relay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

// fieldsOf makes a header list of "name: value".
func fieldsOf(lines ...string) []hpack.Field {
	var list []hpack.Field
	for _, l := range lines {
		i := strings.Index(l[1:], ":") + 1
		list = append(list, hpack.Field{Name: l[:i], Value: strings.TrimPrefix(l[i+1:], " ")})
	}
	return list
}

func linesOf(list []hpack.Field) []string {
	var lines []string
	for _, f := range list {
		lines = append(lines, f.Name+": "+f.Value)
	}
	return lines
}

// TestParseRequest: each rule of RFC 9113, sections 8.2 and 8.3.
func TestParseRequest(t *testing.T) {
	const m, s, a, p = ":method: GET", ":scheme: https", ":authority: h", ":path: /"
	usual := []string{m, s, a, p}
	for _, tt := range []struct {
		name string
		list []string
		ok   bool
	}{
		{"usual", usual, true},
		{"any order", []string{p, a, s, m}, true},
		{"no authority", []string{m, s, p}, true},
		{"http", []string{m, ":scheme: http", a, p}, true},
		{"fields", append(usual, "x-a: b", "x-a: c", "x-empty: "), true},

		{"nothing", nil, false},
		{"no method", []string{s, a, p}, false},
		{"no scheme", []string{m, a, p}, false},
		{"no path", []string{m, s, a}, false},
		{"two methods", append([]string{m}, usual...), false},
		{"two schemes", append([]string{s}, usual...), false},
		{"two authorities", append([]string{a}, usual...), false},
		{"two paths", append([]string{p}, usual...), false},
		{"an empty method", []string{":method: ", s, a, p}, false},
		{"an empty scheme", []string{m, ":scheme: ", a, p}, false},
		{"an empty path", []string{m, s, a, ":path: "}, false},
		{"an empty path and another", []string{m, s, a, ":path: ", p}, false},
		{"a method with a space", []string{":method: GET /", s, a, p}, false},
		{"a method with a newline", []string{":method: GET\n", s, a, p}, false},
		{"a path with a newline", []string{m, s, a, ":path: /\r\nx: y"}, false},
		{"a path with NUL", []string{m, s, a, ":path: /\x00"}, false},
		{"an authority with a newline", []string{m, s, ":authority: h\n", p}, false},
		{"an unknown pseudo-header", append([]string{":protocol: websocket"}, usual...), false},
		{"one of answers", append([]string{":status: 200"}, usual...), false},
		{"a pseudo-header after others", []string{m, s, a, "x-a: b", p}, false},
		{"a pseudo-header at the end", append(slices.Clone(usual), "x-a: b", m), false},

		{"upper case", append(slices.Clone(usual), "X-A: b"), false},
		{"one upper case letter", append(slices.Clone(usual), "x-aB: b"), false},
		{"an empty name", append(slices.Clone(usual), "::x"), false},
		{"a space in a name", append(slices.Clone(usual), "x a: b"), false},
		{"a newline in a name", append(slices.Clone(usual), "x\n: b"), false},
		{"DEL in a name", append(slices.Clone(usual), "x\x7f: b"), false},
		{"a byte beyond ASCII in a name", append(slices.Clone(usual), "x\xe9: b"), false},
		{"NUL in a value", append(slices.Clone(usual), "x-a: \x00"), false},
		{"LF in a value", append(slices.Clone(usual), "x-a: b\nx-b: c"), false},
		{"CR in a value", append(slices.Clone(usual), "x-a: b\r"), false},
		{"bytes beyond ASCII in a value", append(slices.Clone(usual), "x-a: \xc3\xa9\xff"), true},
		{"a tab in a value", append(slices.Clone(usual), "x-a: b\tc"), true},

		{"connection", append(slices.Clone(usual), "connection: close"), false},
		{"keep-alive", append(slices.Clone(usual), "keep-alive: x"), false},
		{"proxy-connection", append(slices.Clone(usual), "proxy-connection: x"), false},
		{"transfer-encoding", append(slices.Clone(usual), "transfer-encoding: chunked"), false},
		{"upgrade", append(slices.Clone(usual), "upgrade: websocket"), false},
		{"te", append(slices.Clone(usual), "te: gzip"), false},
		{"te: trailers", append(slices.Clone(usual), "te: trailers"), true},
		{"te twice", append(slices.Clone(usual), "te: trailers", "te: gzip"), false},

		{"content-length", append(slices.Clone(usual), "content-length: 5"), true},
		{"content-length twice, the same", append(slices.Clone(usual), "content-length: 5", "content-length: 5"), true},
		{"content-length twice", append(slices.Clone(usual), "content-length: 5", "content-length: 6"), false},
		{"content-length +5", append(slices.Clone(usual), "content-length: +5"), false},
		{"content-length -5", append(slices.Clone(usual), "content-length: -5"), false},
		{"content-length 0x5", append(slices.Clone(usual), "content-length: 0x5"), false},
		{"content-length 5, 5", append(slices.Clone(usual), "content-length: 5, 5"), false},
		{"content-length empty", append(slices.Clone(usual), "content-length: "), false},
		{"content-length 2^63", append(slices.Clone(usual), "content-length: 9223372036854775808"), false},
		{"content-length 2^63-1", append(slices.Clone(usual), "content-length: 9223372036854775807"), true},

		{"host", []string{m, s, p, "host: h"}, true},
		{"host as authority", append(slices.Clone(usual), "host: H"), true},
		{"another host", append(slices.Clone(usual), "host: other"), false},
		{"two hosts", []string{m, s, p, "host: h", "host: i"}, false},

		{"CONNECT", []string{":method: CONNECT", a}, true}, // refused later
		{"CONNECT with a path", []string{":method: CONNECT", a, p}, false},
		{"CONNECT with a scheme", []string{":method: CONNECT", a, s}, false},
	} {
		h, problem := parseRequest(fieldsOf(tt.list...))
		if (problem == "") != tt.ok {
			t.Errorf("%s: %q, want ok %v", tt.name, problem, tt.ok)
		}
		if tt.ok && (h.method == "" || h.authority != "h" && tt.name != "no authority") {
			t.Errorf("%s: %+v", tt.name, h)
		}
	}
	h, _ := parseRequest(fieldsOf(m, s, p, "content-length: 7", "host: x"))
	if h.length != 7 || h.authority != "x" || h.method != "GET" || h.path != "/" || len(h.fields) != 2 {
		t.Errorf("%+v", h)
	}
	if h, _ = parseRequest(fieldsOf(usual...)); h.length != -1 {
		t.Errorf("length %d of none", h.length)
	}
}

// TestUnusable: what HTTP/2 allows and some backend could take for something else.
func TestUnusable(t *testing.T) {
	for path, ok := range map[string]bool{
		"/": true, "*": true, "//": true, "/../a/%2f;b?c d=": false, "/a b": false, "/a\tb": false,
		"a": false, "https://h/": false, "?x": false, "/%20": true, "/\xc3\xa9": true, "/api?x=/../": true, "**": false,
	} {
		h := requestHead{method: "GET", authority: "h", path: path}
		if r := h.unusable(); (r == nil) != ok {
			t.Errorf("%q: %v", path, r)
		}
	}
	for host, ok := range map[string]bool{"h": true, "h:443": true, "[::1]:443": true, "": true, "h\xe9": false} {
		h := requestHead{method: "GET", authority: host, path: "/"}
		if r := h.unusable(); (r == nil) != ok {
			t.Errorf("host %q: %v", host, r)
		}
	}
}

func TestParseAnswer(t *testing.T) {
	const s = ":status: 200"
	for _, tt := range []struct {
		name string
		list []string
		want string // code and fields; empty: malformed
	}{
		{"usual", []string{s, "x-a: b"}, `200 ["x-a: b"]`},
		{"interim", []string{":status: 103", "x-a: b"}, `103 ["x-a: b"]`},
		{"999", []string{":status: 999"}, `999 []`},
		{"nothing", nil, ""},
		{"no status", []string{"x-a: b"}, ""},
		{"status not first", []string{"x-a: b", s}, ""},
		{"two statuses", []string{s, s}, ""},
		{"an empty status", []string{":status: "}, ""},
		{"99", []string{":status: 99"}, ""},
		{"1000", []string{":status: 1000"}, ""},
		{"099", []string{":status: 099"}, ""},
		{"101", []string{":status: 101"}, ""},
		{"-20", []string{":status: -20"}, ""},
		{"2 0", []string{":status: 2 0"}, ""},
		{"another pseudo-header", []string{s, ":path: /"}, ""},
		{"a pseudo-header after others", []string{s, "x-a: b", ":x: y"}, ""},
		{"upper case", []string{s, "X-A: b"}, ""},
		{"LF", []string{s, "x-a: b\n"}, ""},
		{"of HTTP/1.1", []string{s, "connection: close", "x-a: b", "keep-alive: 1", "transfer-encoding: chunked", "upgrade: x", "proxy-connection: x"}, `200 ["x-a: b"]`},
		{"lengths that differ", []string{s, "content-length: 1", "content-length: 2"}, ""},
		{"a bad length", []string{s, "content-length: x"}, ""},
		{"a length", []string{s, "content-length: 12", "content-type: a/b"}, `200 ["content-length: 12" "content-type: a/b"]`},
	} {
		h, problem := parseAnswer(fieldsOf(tt.list...))
		got := ""
		if problem == "" {
			got = fmt.Sprintf("%d %q", h.code, linesOf(h.fields))
		}
		if got != tt.want {
			t.Errorf("%s: %s (%s), want %s", tt.name, got, problem, tt.want)
		}
	}
	h, _ := parseAnswer(fieldsOf(s, "content-length: 12", "content-type: a/b", "retry-after: 1"))
	if h.length != 12 || h.contentType != "a/b" || h.get("Retry-After") != "1" || h.get("x") != "" {
		t.Errorf("%+v", h)
	}
}

// TestOutgoing: the header list that a backend gets.
func TestOutgoing(t *testing.T) {
	h, problem := parseRequest(fieldsOf(":path: /x?y", ":method: GET", ":scheme: http", "host: h", "trailer: x-t", "te: trailers",
		"x-remote-user: admin", "x_remote_group: masters", "x-remote-extra-a: b", "x-forwarded-for: 1.2.3.4", "forwarded: for=1",
		"authorization: Bearer x", "impersonate-user: u", "cookie: c", "x-plain: p", "x-plain: q"))
	if problem != "" {
		t.Fatal(problem)
	}
	out := h.outgoing(&decide(t, &h).Edits, nil)
	want := []string{":method: GET", ":scheme: https", ":authority: h", ":path: /x?y", "te: trailers",
		"authorization: Bearer x", "impersonate-user: u", "cookie: c", "x-plain: p", "x-plain: q",
		"x-forwarded-for: 198.51.100.7", "audit-id: id"}
	if got := linesOf(out); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, f := range out {
		sensitive := slices.Contains([]string{"authorization", "impersonate-user", "cookie", "audit-id", "x-forwarded-for"}, f.Name)
		if f.Sensitive != sensitive {
			t.Errorf("%s: never indexed %v, want %v", f.Name, f.Sensitive, sensitive)
		}
	}
}

// decide decides for a request without a certificate.
func decide(t testing.TB, h *requestHead) *balancer.Decision {
	t.Helper()
	core := &balancer.Core{
		FrontProxy: func(time.Time) balancer.FrontProxy { return balancer.FrontProxyValid },
		Headers:    balancer.NewIdentityHeaders(nil, nil, nil, nil), Tokens: balancer.NewTokens(10, time.Hour),
		NewAuditID: func() string { return "id" },
	}
	head := h.decisive()
	d, refusal := core.Decide(&head, &balancer.Client{Peer: netip.MustParseAddrPort(clientIP + ":1234")}, time.Now())
	if refusal != nil {
		t.Fatal(refusal)
	}
	return d
}

// TestDecisive: what decisions get to see.
func TestDecisive(t *testing.T) {
	h, _ := parseRequest(fieldsOf(":path: /x?y?z", ":method: GET", ":scheme: https", ":authority: h",
		"authorization: first", "authorization: second", "x-forwarded-for: a", "x-forwarded-for: b, c",
		"audit-id: 1", "audit-id: 2", "sec-websocket-protocol: p"))
	d := h.decisive()
	want := balancer.Head{Method: "GET", Path: "/x", RawQuery: "y?z", Authorization: "first", ForwardedFor: []string{"a", "b, c"},
		AuditID: "1", Subprotocols: []string{"p"}}
	if got, want := fmt.Sprintf("%+v", d), fmt.Sprintf("%+v", want); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
