package balancer

import (
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http/httpguts"
	"pgregory.net/rapid"

	"apiserver-lb/tlsconf"
)

var usualHeaders = NewIdentityHeaders(nil, nil, nil, nil)

// customHeaders stands for a cluster with names of its own.
var customHeaders = NewIdentityHeaders(
	[]string{"X-Corp-User", "X-Sso_Login"}, []string{"X-Corp-Groups"}, []string{"X-Corp-Uid"}, []string{"X-Corp-Attr-", "X-Odd%-"})

func TestForged(t *testing.T) {
	tests := []struct {
		name          string
		usual, custom bool
	}{
		{"X-Remote-User", true, true},
		{"x-remote-user", true, true},
		{"X-REMOTE-USER", true, true},
		{"x-ReMoTe-UsEr", true, true},
		{"X_Remote_User", true, true},
		{"x_remote-user", true, true},
		{"X-Remote-Group", true, true},
		{"X_REMOTE_GROUP", true, true},
		{"X-Remote-Uid", true, true},
		{"X-Remote-UID", true, true},
		{"x-remote-extra-scopes", true, true},
		{"X-Remote-Extra-", true, true},
		{"X_Remote_Extra_Scopes", true, true},
		{"X-Remote-Extra-Authentication.kubernetes.io%2fcredential-Id", true, true},
		{"X-Remote-Extra-%zz", true, true},
		{"X-Remote-Extra-%", true, true},
		{"X%2DRemote%2DUser", true, true},
		{"x%2dremote%2duser", true, true},
		{"%58-Remote-User", true, true},
		{"X%5FRemote%5fUser", true, true},
		{"X-Remote%2DExtra%2Dx", true, true},
		{"X%2DRemote-Extra-%zz", true, true}, // one bad escape does not shield the rest
		{"%58-Remote-Extra-%", true, true},

		{"X-Corp-User", false, true},
		{"x_corp_user", false, true},
		{"X-Sso-Login", false, true}, // configured with an underscore
		{"X-Sso_Login", false, true},
		{"X-Corp-Groups", false, true},
		{"X-CORP-UID", false, true},
		{"X-Corp-Attr-Team", false, true},
		{"X-Odd%-x", false, true},
		{"X-Odd%-%zz", false, true},
		{"x-odd%25-x", false, true},

		{"X-Remote", false, false},
		{"X-Remote-Users", false, false},
		{"X-Remote-User-Agent", false, false},
		{"X-Remote-Extra", false, false},
		{"XRemoteUser", false, false},
		{"X--Remote-User", false, false},
		{"X-Remote-User%", false, false},
		{"X-Remote%252DUser", false, false}, // decoded once, as everybody does
		{"X-Corp", false, false},
		{"Impersonate-User", false, false},
		{"Impersonate-Extra-scopes", false, false},
		{"Authorization", false, false},
		{"", false, false},
		{"%", false, false},
		{"%4", false, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := usualHeaders.Forged(tt.name); got != tt.usual {
				t.Errorf("usual names: Forged(%q) = %v", tt.name, got)
			}
			if got := customHeaders.Forged(tt.name); got != tt.custom {
				t.Errorf("names of its own: Forged(%q) = %v", tt.name, got)
			}
		})
	}
}

// wire writes fields as they would stand in HTTP/1.1.
func wire(fields []Field) string {
	var b strings.Builder
	for _, f := range fields {
		b.WriteString(f.Name + ": " + f.Value + "\n")
	}
	return b.String()
}

func TestAssert(t *testing.T) {
	tests := []struct {
		name    string
		headers *IdentityHeaders
		id      tlsconf.Identity
		want    string
	}{
		{"a user alone", usualHeaders, tlsconf.Identity{User: "jane"}, "X-Remote-User: jane\n"},
		{
			"a kubelet", usualHeaders,
			tlsconf.Identity{User: "system:node:n1", Groups: []string{"system:nodes"}, Extra: map[string][]string{tlsconf.CredentialIDKey: {"X509SHA256=00ff"}}},
			`X-Remote-User: system:node:n1
X-Remote-Group: system:nodes
X-Remote-Extra-authentication.kubernetes.io%2Fcredential-id: X509SHA256=00ff
`,
		},
		{
			"UID, twelve groups in the order of the certificate, twice the same", usualHeaders,
			tlsconf.Identity{User: "jane", UID: "1-2-3", Groups: []string{"l", "k", "j", "i", "h", "g", "f", "e", "d", "c", "b, a", "l"}},
			`X-Remote-User: jane
X-Remote-Uid: 1-2-3
X-Remote-Group: l
X-Remote-Group: k
X-Remote-Group: j
X-Remote-Group: i
X-Remote-Group: h
X-Remote-Group: g
X-Remote-Group: f
X-Remote-Group: e
X-Remote-Group: d
X-Remote-Group: c
X-Remote-Group: b, a
X-Remote-Group: l
`,
		},
		{
			"extras by key, values in order, nothing altered", usualHeaders,
			tlsconf.Identity{User: "Jörg, <a>", Extra: map[string][]string{"b": {"2", "1"}, "A/%": {"x y"}, "ä": {"ü"}}},
			"X-Remote-User: Jörg, <a>\n" +
				"X-Remote-Extra-A%2F%25: x y\n" +
				"X-Remote-Extra-b: 2\n" +
				"X-Remote-Extra-b: 1\n" +
				"X-Remote-Extra-%C3%A4: ü\n",
		},
		{
			"the first of the configured names", customHeaders,
			tlsconf.Identity{User: "jane", UID: "u", Groups: []string{"g"}, Extra: map[string][]string{"k": {"v"}}},
			"X-Corp-User: jane\nX-Corp-Uid: u\nX-Corp-Groups: g\nX-Corp-Attr-k: v\n",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.headers.Assert(&tt.id)
			if diff := cmp.Diff(tt.want, wire(got)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			for _, f := range got {
				if !tt.headers.Forged(f.Name) {
					t.Errorf("a client could send %s itself", f.Name)
				}
				if !httpguts.ValidHeaderFieldName(f.Name) {
					t.Errorf("%q is no header name", f.Name)
				}
			}
		})
	}
}

// The right-hand sides are what headerKeyEscape of client-go yields.
func TestEscapeExtraKey(t *testing.T) {
	tests := []struct{ key, want string }{
		{"", ""},
		{"scopes", "scopes"},
		{"Scopes", "Scopes"},
		{"authentication.kubernetes.io/credential-id", "authentication.kubernetes.io%2Fcredential-id"},
		{"!#$&'*+-.^_`|~09azAZ", "!#$&'*+-.^_`|~09azAZ"},
		{"%", "%25"},
		{"%2f", "%252f"},
		{"a b:c=d@e[f]g{h}", "a%20b%3Ac%3Dd%40e%5Bf%5Dg%7Bh%7D"},
		{"\x00\r\n\x7f", "%00%0D%0A%7F"},
		{"alpaca/ümlaut", "alpaca%2F%C3%BCmlaut"},
		{"\xff", "%FF"},
	}
	for _, tt := range tests {
		if got := escapeExtraKey(tt.key); got != tt.want {
			t.Errorf("escapeExtraKey(%q) = %q, want %q", tt.key, got, tt.want)
		}
	}
}

// asciiLower lowers letters as HTTP/2 does with header names; other bytes stay.
func asciiLower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

// kube-apiserver lower-cases the name of the header and then unescapes it.
func TestExtraKeyRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := string(rapid.OneOf(
			rapid.SliceOf(rapid.Byte()),
			rapid.Map(rapid.String(), func(s string) []byte { return []byte(s) }),
			rapid.Map(rapid.StringMatching(`[A-Za-z%/2fF._-]{0,12}`), func(s string) []byte { return []byte(s) }),
		).Draw(t, "key"))
		name := escapeExtraKey(key)
		if name != "" && !httpguts.ValidHeaderFieldName(name) {
			t.Fatalf("%q is no header name", name)
		}
		got, err := url.PathUnescape(strings.ToLower(name))
		if want := asciiLower(key); err != nil || got != want {
			t.Fatalf("%q arrives as %q (%v), want %q", key, got, err, want)
		}
	})
}

func TestConnectionForbids(t *testing.T) {
	tests := []struct {
		name       string
		connection []string
		want       string
	}{
		{"absent", nil, ""},
		{"usual", []string{"keep-alive"}, ""},
		{"upgrade", []string{"Keep-Alive, Upgrade"}, ""},
		{"close, and what nobody minds", []string{"close", "TE, X-Custom, HTTP2-Settings"}, ""},
		{"empty elements", []string{", ,", ""}, ""},
		{"user", []string{"X-Remote-User"}, "X-Remote-User"},
		{"group, in a list and another case", []string{"close, x-remote-GROUP"}, "x-remote-GROUP"},
		{"uid, in a second line", []string{"close", "X-Remote-Uid"}, "X-Remote-Uid"},
		{"extra", []string{"X-Remote-Extra-Scopes"}, "x-remote-extra-*"},
		{"underscores", []string{"x_remote_user"}, "x_remote_user"},
		{"percent-encoded", []string{"x%2dremote%2duser"}, "x%2dremote%2duser"},
		{"authorization", []string{"Upgrade,\tAuthorization "}, "Authorization"},
		{"impersonation", []string{"Impersonate-User"}, "impersonate-*"},
		{"impersonation of a group", []string{"a,IMPERSONATE_GROUP,b"}, "impersonate-*"},
		{"impersonation of an extra", []string{"impersonate-extra-reason"}, "impersonate-*"},
		{"a token in a subprotocol", []string{"Upgrade, Sec-WebSocket-Protocol"}, "Sec-WebSocket-Protocol"},
		{"the audit ID", []string{"Audit-ID"}, "Audit-ID"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := usualHeaders.connectionForbids(tt.connection); got != tt.want {
				t.Errorf("connectionForbids(%q) = %q, want %q", tt.connection, got, tt.want)
			}
		})
	}
	if got := customHeaders.connectionForbids([]string{"close, X-Corp-Attr-Team"}); got != "x-corp-attr-*" {
		t.Errorf("a configured name passes: %q", got)
	}
}

func TestDrop(t *testing.T) {
	peer := netip.MustParseAddr("192.0.2.7")
	id := &tlsconf.Identity{User: "jane"}
	edits := map[string]Edits{
		"anonymous":           editsOf(usualHeaders, Anonymous, nil, addressOf(peer), false, nil, ""),
		"token":               editsOf(usualHeaders, Token, nil, addressOf(peer), false, nil, ""),
		"unproven":            editsOf(usualHeaders, Unproven, nil, addressOf(peer), false, nil, ""),
		"certificate":         editsOf(usualHeaders, Asserted, id, addressOf(peer), false, nil, ""),
		"certificate, behind": editsOf(usualHeaders, Asserted, id, addressOf(peer), true, nil, ""),
		"token, behind":       editsOf(usualHeaders, Token, nil, addressOf(peer), true, nil, ""),
	}
	all := []string{"anonymous", "token", "unproven", "certificate", "certificate, behind", "token, behind"}
	tests := []struct {
		name string
		by   []string // who drops it; nobody else does
	}{
		{"X-Remote-User", all},
		{"x-remote-extra-a", all},
		{"X_Remote_Group", all},
		{"X-Remote-Uid", all},
		{"X-Forwarded-For", all}, // what is kept of it is in Add
		{"x-forwarded-for", all},
		{"Authorization", []string{"certificate", "certificate, behind"}},
		{"AUTHORIZATION", []string{"certificate", "certificate, behind"}},
		{"Forwarded", []string{"anonymous", "token", "unproven", "certificate"}},
		{"X-Forwarded-Host", []string{"anonymous", "token", "unproven", "certificate"}},
		{"x-forwarded-proto", []string{"anonymous", "token", "unproven", "certificate"}},
		{"X-Real-IP", []string{"anonymous", "token", "unproven", "certificate"}},
		{"Impersonate-User", nil},
		{"Impersonate-Extra-A", nil},
		{"Audit-Id", nil},
		{"Sec-Websocket-Protocol", nil},
		{"Accept", nil},
		{"Proxy-Authorization", nil}, // hop-by-hop: not the edits' to remove
		{"Authorization-Info", nil},
		{"", nil},
	}
	for _, tt := range tests {
		want := map[string]bool{}
		for _, who := range tt.by {
			want[who] = true
		}
		for who, e := range edits {
			if got := e.Drop(tt.name); got != want[who] {
				t.Errorf("%s: Drop(%q) = %v", who, tt.name, got)
			}
		}
	}
}

func TestEditsAdd(t *testing.T) {
	jane := &tlsconf.Identity{User: "jane", Groups: []string{"dev"}}
	tests := []struct {
		name    string
		cred    Credential
		id      *tlsconf.Identity
		peer    netip.Addr
		trusted bool
		forward []string
		auditID string
		want    string
	}{
		{"a stranger's word on who sent it counts for nothing", Token, nil, netip.MustParseAddr("192.0.2.7"), false, []string{"1.2.3.4"}, "",
			"X-Forwarded-For: 192.0.2.7\n"},
		{"a trusted proxy's is kept, in order", Token, nil, netip.MustParseAddr("10.0.0.1"), true, []string{"1.2.3.4, 5.6.7.8", "9.9.9.9"}, "",
			"X-Forwarded-For: 1.2.3.4, 5.6.7.8, 9.9.9.9, 10.0.0.1\n"},
		{"a trusted proxy that says nothing", Token, nil, netip.MustParseAddr("10.0.0.1"), true, nil, "",
			"X-Forwarded-For: 10.0.0.1\n"},
		{"nor an empty line", Token, nil, netip.MustParseAddr("10.0.0.1"), true, []string{""}, "",
			"X-Forwarded-For: 10.0.0.1\n"},
		{"IPv6", Token, nil, netip.MustParseAddr("2001:db8::7"), false, nil, "",
			"X-Forwarded-For: 2001:db8::7\n"},
		{"a zone is of this machine only", Token, nil, netip.MustParseAddr("fe80::1%eth0"), false, nil, "",
			"X-Forwarded-For: fe80::1\n"},
		{"an IPv4 peer of an IPv6 socket", Token, nil, netip.MustParseAddr("::ffff:192.0.2.7"), false, nil, "",
			"X-Forwarded-For: 192.0.2.7\n"},
		{"a peer without an address", Token, nil, netip.Addr{}, false, []string{"1.2.3.4"}, "a-1",
			"Audit-Id: a-1\n"},
		{"identity, then the rest", Asserted, jane, netip.MustParseAddr("192.0.2.7"), false, nil, "a-1",
			"X-Remote-User: jane\nX-Remote-Group: dev\nX-Forwarded-For: 192.0.2.7\nAudit-Id: a-1\n"},
		// An invalid certificate beside a token has no identity, and a valid one is
		// asserted on its own connections only.
		{"no identity but on its own connections", Token, jane, netip.MustParseAddr("192.0.2.7"), false, nil, "",
			"X-Forwarded-For: 192.0.2.7\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := editsOf(usualHeaders, tt.cred, tt.id, addressOf(tt.peer), tt.trusted, tt.forward, tt.auditID)
			if diff := cmp.Diff(tt.want, wire(e.Add)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// Of two Audit-Ids kube-apiserver reads the first: where ours is set, what the client
// sent (an empty one) must not stand before it.
func TestAuditIDStandsAlone(t *testing.T) {
	for _, id := range []string{"", "a-1"} {
		e := editsOf(usualHeaders, Token, nil, "", false, nil, id)
		for _, name := range []string{"audit-id", "Audit-Id", "AUDIT-ID"} {
			if got := e.Drop(name); got != (id != "") {
				t.Errorf("ours is %q: Drop(%q) = %v", id, name, got)
			}
		}
	}
}

// Should the front-proxy certificate not be accepted, a token that is left beside
// the asserted identity would make the request somebody else's.
func TestTokenIsWithheldFromAssertedSubprotocols(t *testing.T) {
	token := websocketTokenPrefix + "YWJj"
	tests := []struct {
		name      string
		protocols []string
		drop      bool
		want      string
	}{
		{"none", nil, false, ""},
		{"no token", []string{"v5.channel.k8s.io, v4.channel.k8s.io"}, false, ""},
		{"a token first", []string{token + ", v5.channel.k8s.io, v4.channel.k8s.io"}, true, "Sec-Websocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io\n"},
		{"over several lines", []string{"a," + token, " b ", token}, true, "Sec-Websocket-Protocol: a, b\n"},
		{"nothing else", []string{token + " ,"}, true, ""},
		{"empty token", []string{websocketTokenPrefix, "a"}, true, "Sec-Websocket-Protocol: a\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := editsOf(usualHeaders, Asserted, &tlsconf.Identity{User: "u"}, "", false, nil, "")
			e.Add = nil
			e.withholdToken(tt.protocols)
			if got := e.Drop("Sec-WebSocket-Protocol"); got != tt.drop {
				t.Errorf("Drop = %v", got)
			}
			if diff := cmp.Diff(tt.want, wire(e.Add)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// No spelling of an identity header that a kube-apiserver would read survives, on
// whatever pool. It canonicalises names (HTTP/1.1) or gets them in lower case
// (HTTP/2), and compares without case (headerrequest/requestheader.go).
func FuzzForgedHeadersAreDropped(f *testing.F) {
	for _, s := range []string{"X-Remote-User", "x_remote_user", "X-Remote-Extra-%zz", "X%2DRemote-Uid", "X-Odd%-%", "X-Corp-Attr-", "x-remote-extra-\u212a", "X-SSO_LOGIN"} {
		f.Add(s)
	}
	readers := []struct {
		headers *IdentityHeaders
		exact   []string
		prefix  []string
	}{
		{usualHeaders, []string{"X-Remote-User", "X-Remote-Group", "X-Remote-Uid"}, []string{"X-Remote-Extra-"}},
		{customHeaders,
			[]string{"X-Corp-User", "X-Sso_Login", "X-Corp-Groups", "X-Corp-Uid", "X-Remote-User", "X-Remote-Group", "X-Remote-Uid"},
			[]string{"X-Corp-Attr-", "X-Odd%-", "X-Remote-Extra-"}},
	}
	f.Fuzz(func(t *testing.T, name string) {
		for _, r := range readers {
			read := false
			unescaped, err := url.PathUnescape(name)
			if err != nil {
				unescaped = name
			}
			for _, spelling := range []string{name, http.CanonicalHeaderKey(name), strings.ToLower(name), strings.ReplaceAll(name, "_", "-"), unescaped} {
				for _, exact := range r.exact {
					read = read || strings.EqualFold(spelling, exact) && httpguts.ValidHeaderFieldName(spelling)
				}
				for _, p := range r.prefix {
					read = read || len(spelling) >= len(p) && strings.EqualFold(spelling[:len(p)], p)
				}
			}
			if !read {
				continue
			}
			for _, cred := range []Credential{Anonymous, Unproven, Token, Asserted} {
				e := editsOf(r.headers, cred, &tlsconf.Identity{User: "u"}, "", true, nil, "")
				if !e.Drop(name) {
					t.Errorf("%q reaches the %s pool", name, cred)
				}
			}
			if r.headers.connectionForbids([]string{name}) == "" && !strings.Contains(name, ",") && name == strings.TrimSpace(name) {
				t.Errorf("Connection: %s is let through", name)
			}
		}
	})
}

// addressOf returns the address as edits gets it of a client.
func addressOf(peer netip.Addr) string {
	return (&Client{Peer: netip.AddrPortFrom(peer, 1)}).addressText()
}

// editsOf works out the edits for an identity.
func editsOf(h *IdentityHeaders, cred Credential, id *tlsconf.Identity, peer string, trusted bool, forwardedFor []string, auditID string) Edits {
	var e Edits
	var asserted []Field
	if cred == Asserted {
		asserted = h.Assert(id)
	}
	h.edit(&e, cred, asserted, peer, trusted, forwardedFor, auditID)
	return e
}

// FuzzAssert: what kube-apiserver reads from the headers that assert an identity is that
// identity. It takes the first non-empty user, all groups that are not empty, and of an
// extra's header the rest of its name, lower-cased and unescaped
// (k8s.io/apiserver/pkg/authentication/request/headerrequest/requestheader.go).
func FuzzAssert(f *testing.F) {
	f.Add("jane", "1", "dev", "system:masters", "scopes", "view")
	f.Add("jané", "", "a,b", "a b", "authentication.kubernetes.io/credential-id", "X509SHA256=00")
	f.Add("u", "x", "g", "h", "a%2Fb%", "v")
	f.Add("u", "x", "g", "h", "X_Remote-User", "\xff")
	f.Add("u", "x", "g", "h", "", "v")
	f.Fuzz(func(t *testing.T, user, uid, group1, group2, key, value string) {
		for _, v := range []string{user, group1, group2, value} {
			if v == "" || !httpguts.ValidHeaderFieldValue(v) || textproto.TrimString(v) != v {
				t.Skip("tlsconf refuses it")
			}
		}
		if !httpguts.ValidHeaderFieldValue(uid) || textproto.TrimString(uid) != uid {
			t.Skip("tlsconf refuses it")
		}
		id := &tlsconf.Identity{User: user, UID: uid, Groups: []string{group1, group2}, Extra: map[string][]string{key: {value}}}
		for _, headers := range []*IdentityHeaders{usualHeaders, customHeaders} {
			got := tlsconf.Identity{Extra: map[string][]string{}}
			h := http.Header{}
			for _, f := range headers.Assert(id) {
				if !httpguts.ValidHeaderFieldName(f.Name) {
					t.Fatalf("%q is no header name", f.Name)
				}
				h.Add(f.Name, f.Value)
			}
			first := func(names []string) string {
				for _, name := range names {
					if v := h.Get(name); v != "" {
						return v
					}
				}
				return ""
			}
			got.User, got.UID = first(headers.user), first(headers.uid)
			for _, name := range headers.group {
				got.Groups = append(got.Groups, h.Values(name)...)
			}
			for name, values := range h {
				for _, prefix := range headers.extra {
					if len(name) < len(prefix) || !strings.EqualFold(name[:len(prefix)], prefix) {
						continue
					}
					k := strings.ToLower(name[len(prefix):])
					if unescaped, err := url.PathUnescape(k); err == nil {
						k = unescaped
					}
					got.Extra[k] = append(got.Extra[k], values...)
				}
			}
			want := tlsconf.Identity{User: user, UID: uid, Groups: id.Groups, Extra: map[string][]string{asciiLower(key): {value}}}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("kube-apiserver reads another identity (-want +got):\n%s", diff)
			}
		}
	})
}
