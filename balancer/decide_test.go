package balancer

import (
	"crypto/x509"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/tlsconf"
)

var t0 = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// verifierFunc is a Verifier whose verdicts never stand for a second request.
type verifierFunc func(chain []*x509.Certificate) tlsconf.Verdict

func (f verifierFunc) Verify(chain []*x509.Certificate) tlsconf.Verdict { return f(chain) }
func (verifierFunc) Current(tlsconf.Verdict) bool                       { return false }

// anyChain is what a client shows; the fake verdict says what it is worth.
var anyChain = []*x509.Certificate{{}}

func decider(v tlsconf.Verdict) *Core {
	return &Core{
		Verifier:   verifierFunc(func([]*x509.Certificate) tlsconf.Verdict { return v }),
		FrontProxy: func(time.Time) FrontProxy { return FrontProxyValid },
		Headers:    usualHeaders,
		Tokens:     NewTokens(8, time.Minute),
		NewAuditID: func() string { return "new-id" },
	}
}

func clientAt(addr string) *Client {
	return &Client{Peer: netip.AddrPortFrom(netip.MustParseAddr(addr), 40000)}
}

// statusOf is the Status that the client sees, or nothing.
func statusOf(r *Refusal) string {
	if r == nil {
		return ""
	}
	return string(r.Status("lb-1"))
}

// The table of identity.md: certificate by token.
func TestDecideCredential(t *testing.T) {
	jane := &tlsconf.Identity{User: "jane", UID: "7", Groups: []string{"dev", "ops"}, Extra: map[string][]string{tlsconf.CredentialIDKey: {"X509SHA256=ab"}}}
	const (
		janeHeaders = "X-Remote-User: jane\nX-Remote-Uid: 7\nX-Remote-Group: dev\nX-Remote-Group: ops\n" +
			"X-Remote-Extra-authentication.kubernetes.io%2Fcredential-id: X509SHA256=ab\n"
		plain    = "X-Forwarded-For: 192.0.2.7\nAudit-Id: new-id\n"
		invalid  = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate is not accepted: it expired","reason":"Unauthorized","code":401}` + "\n"
		nameless = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate names no user, because its common name is empty","reason":"Unauthorized","code":401}` + "\n"
		revoked  = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate is revoked: listed","reason":"Unauthorized","code":401}` + "\n"
		unable   = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate of \"jane\" cannot be passed on, because this balancer has no front-proxy certificate ` +
			`(frontProxy.certFile and frontProxy.keyFile in its configuration); use a bearer token, or a kube-apiserver directly","reason":"Unauthorized","code":401}` + "\n"
		lapsed = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the client certificate of \"jane\" cannot be passed on, because the balancer's own front-proxy certificate ` +
			`(frontProxy.certFile in its configuration) has expired; use a bearer token, or a kube-apiserver directly","reason":"Unauthorized","code":401}` + "\n"
	)
	var (
		none    = tlsconf.Verdict{} // and no chain
		valid   = tlsconf.Verdict{Kind: tlsconf.Valid, Identity: jane}
		emptyCN = tlsconf.Verdict{Kind: tlsconf.NoOpinion}
		expired = tlsconf.Verdict{Kind: tlsconf.Invalid, Reason: "it expired"}
		listed  = tlsconf.Verdict{Kind: tlsconf.Revoked, Reason: "listed"}
	)
	type token struct {
		authorization string
		protocols     []string
	}
	var (
		noToken   = token{}
		bearer    = token{authorization: "Bearer t"}
		websocket = token{protocols: []string{"v5.channel.k8s.io", websocketTokenPrefix + "dA"}}
		basic     = token{authorization: "Basic dTpw"}
		emptyWS   = token{protocols: []string{"v5.channel.k8s.io", websocketTokenPrefix}}
		brokenWS  = token{protocols: []string{"v5.channel.k8s.io", websocketTokenPrefix + "=="}}
	)
	tests := []struct {
		name         string
		verdict      tlsconf.Verdict
		token        token
		noFrontProxy bool
		expired      bool // the front-proxy certificate

		want      Credential
		wantToken string // whose key the decision bears
		dropToken bool   // Authorization stays behind
		add       string
		refusal   string // the Status; empty: none
	}{
		{name: "valid, no token", verdict: valid, token: noToken, want: Asserted, dropToken: true, add: janeHeaders + plain},
		{name: "valid, bearer", verdict: valid, token: bearer, want: Asserted, dropToken: true, add: janeHeaders + plain},
		{name: "valid, websocket", verdict: valid, token: websocket, want: Asserted, dropToken: true, add: janeHeaders + plain + "Sec-Websocket-Protocol: v5.channel.k8s.io\n"},
		{name: "valid, basic", verdict: valid, token: basic, want: Asserted, dropToken: true, add: janeHeaders + plain},
		// x509 has no opinion, but request-header has one of every certificate that
		// its CA did not sign: an error, which rules out the anonymous.
		{name: "empty CN, no token", verdict: emptyCN, token: noToken, refusal: nameless},
		{name: "empty CN, an empty websocket token is none", verdict: emptyCN, token: emptyWS, refusal: nameless},
		{name: "empty CN, bearer", verdict: emptyCN, token: bearer, want: Unproven, wantToken: "t", add: plain},
		{name: "empty CN, websocket", verdict: emptyCN, token: websocket, want: Unproven, wantToken: "t", add: plain},
		{name: "invalid, no token", verdict: expired, token: noToken, refusal: invalid},
		{name: "invalid, basic is no token", verdict: expired, token: basic, refusal: invalid},
		{name: "invalid, an empty websocket token is none", verdict: expired, token: emptyWS, refusal: invalid},
		{name: "invalid, bearer", verdict: expired, token: bearer, want: Unproven, wantToken: "t", add: plain},
		{name: "invalid, websocket", verdict: expired, token: websocket, want: Unproven, wantToken: "t", add: plain},
		{name: "revoked, no token", verdict: listed, token: noToken, refusal: revoked},
		{name: "revoked, bearer", verdict: listed, token: bearer, refusal: revoked},
		{name: "revoked, websocket", verdict: listed, token: websocket, refusal: revoked},
		{name: "none, bearer", verdict: none, token: bearer, want: Unproven, wantToken: "t", add: plain},
		{name: "none, websocket", verdict: none, token: websocket, want: Unproven, wantToken: "t", add: plain},
		{name: "none, bearer before websocket", verdict: none, token: token{"Bearer b", websocket.protocols}, want: Unproven, wantToken: "b", add: plain},
		{name: "none, broken websocket token is not anonymous", verdict: none, token: brokenWS, want: Unproven, wantToken: websocketTokenPrefix + "==", add: plain},
		{name: "none, empty websocket token", verdict: none, token: emptyWS, want: Anonymous, add: plain},
		{name: "none, none", verdict: none, token: noToken, want: Anonymous, add: plain},
		{name: "none, basic", verdict: none, token: basic, want: Anonymous, add: plain},

		{name: "front proxy expired: valid, no token", expired: true, verdict: valid, token: noToken, refusal: lapsed},
		{name: "front proxy expired: none, bearer", expired: true, verdict: none, token: bearer, want: Unproven, wantToken: "t", add: plain},
		{name: "no front proxy: valid, no token", noFrontProxy: true, verdict: valid, token: noToken, refusal: unable},
		{name: "no front proxy: valid, bearer is another user", noFrontProxy: true, verdict: valid, token: bearer, refusal: unable},
		{name: "no front proxy: empty CN, bearer", noFrontProxy: true, verdict: emptyCN, token: bearer, want: Unproven, wantToken: "t", add: plain},
		{name: "no front proxy: none, none", noFrontProxy: true, verdict: none, token: noToken, want: Anonymous, add: plain},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			core := decider(tt.verdict)
			if tt.expired {
				core.FrontProxy = func(time.Time) FrontProxy { return FrontProxyExpired }
			}
			if tt.noFrontProxy {
				core.FrontProxy = func(time.Time) FrontProxy { return FrontProxyNone }
			}
			h := &Head{Method: "GET", Path: "/api/v1/namespaces/n/pods/p/exec", Upgrade: "websocket",
				Authorization: tt.token.authorization, Subprotocols: tt.token.protocols}
			if tt.verdict.Kind != tlsconf.NoCertificate {
				h.Chain = anyChain
			}
			d, refusal := core.Decide(h, clientAt("192.0.2.7"), t0)
			if diff := cmp.Diff(tt.refusal, statusOf(refusal)); diff != "" {
				t.Fatalf("refusal (-want +got)\n%s", diff)
			}
			if refusal != nil {
				if d != nil {
					t.Errorf("a refused request has the decision %+v", d)
				}
				if refusal.RetryAfter != 0 {
					t.Error("a refused credential is to be tried again")
				}
				return
			}
			if d.Credential != tt.want {
				t.Errorf("credential %s, want %s", d.Credential, tt.want)
			}
			wantKey, wantUser := TokenKey{}, ""
			if tt.wantToken != "" {
				wantKey = core.Tokens.Key(tt.wantToken)
			}
			if tt.want == Asserted {
				wantUser = "jane"
			}
			if d.Token != wantKey {
				t.Error("the decision bears the key of another token")
			}
			if d.User != wantUser {
				t.Errorf("user %q, want %q", d.User, wantUser)
			}
			if got := d.Edits.Drop("Authorization"); got != tt.dropToken {
				t.Errorf("Drop(Authorization) = %v", got)
			}
			if diff := cmp.Diff(tt.add, wire(d.Edits.Add)); diff != "" {
				t.Errorf("added fields (-want +got)\n%s", diff)
			}
		})
	}
}

// A certificate that we failed to verify is refused like any other, and counted as our
// own mistake.
func TestDecidePanicked(t *testing.T) {
	core := decider(tlsconf.Verdict{Kind: tlsconf.Invalid, Panicked: true, Reason: "x"})
	_, r := core.Decide(&Head{Method: "GET", Path: "/api", Chain: anyChain}, clientAt("192.0.2.7"), t0)
	if r == nil || r.Code != 401 || r.Reason != ReasonInternal {
		t.Errorf("%+v", r)
	}
}

// A subprotocol is read as a token of WebSocket requests only, as there.
func TestDecideReadsSubprotocolsOfWebSocketOnly(t *testing.T) {
	for _, tt := range []struct {
		upgrade string
		want    Credential
		class   Class
	}{
		{"", Anonymous, Long},
		{"SPDY/3.1", Anonymous, Upgrade},
		{"h2c", Anonymous, Upgrade},
		{"websocket", Unproven, Upgrade},
		{"WebSocket", Unproven, Upgrade},
		{"websocket, SPDY/3.1", Anonymous, Upgrade},
	} {
		h := &Head{Method: "GET", Path: "/api/v1/namespaces/n/pods/p/exec", Upgrade: tt.upgrade, Subprotocols: []string{"x", websocketTokenPrefix + "dA"}}
		d, refusal := decider(tlsconf.Verdict{}).Decide(h, clientAt("192.0.2.7"), t0)
		if refusal != nil {
			t.Fatal(refusal)
		}
		if d.Credential != tt.want || d.Class != tt.class {
			t.Errorf("upgrade %q: credential %s, class %s, want %s, %s", tt.upgrade, d.Credential, d.Class, tt.want, tt.class)
		}
	}
}

func TestDecideRefusals(t *testing.T) {
	tests := []struct {
		name string
		head Head
		want string
	}{
		{"CONNECT", Head{Method: "CONNECT", Path: "/"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the method CONNECT is not served","reason":"MethodNotAllowed","code":405}` + "\n"},
		{"TRACE", Head{Method: "TRACE", Path: "/"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the method TRACE is not served","reason":"MethodNotAllowed","code":405}` + "\n"},
		{"Connection names impersonation", Head{Method: "GET", Path: "/", Connection: []string{"close, Impersonate-User"}},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the header Connection must not name \"impersonate-*\": it would remove what authentication or audit depends on","reason":"BadRequest","code":400}` + "\n"},
		{"Connection names an identity header", Head{Method: "GET", Path: "/", Connection: []string{"x_remote_user"}},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the header Connection must not name \"x_remote_user\": it would remove what authentication or audit depends on","reason":"BadRequest","code":400}` + "\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d, refusal := decider(tlsconf.Verdict{}).Decide(&tt.head, clientAt("192.0.2.7"), t0)
			if diff := cmp.Diff(tt.want, statusOf(refusal)); diff != "" || d != nil {
				t.Errorf("decision %+v, refusal (-want +got)\n%s", d, diff)
			}
		})
	}
}

func TestDecideAuditID(t *testing.T) {
	core := decider(tlsconf.Verdict{})
	d, _ := core.Decide(&Head{Method: "GET", Path: "/", AuditID: "theirs"}, clientAt("192.0.2.7"), t0)
	if d.AuditID != "theirs" || strings.Contains(wire(d.Edits.Add), "Audit-Id") {
		t.Errorf("audit ID %q, added %q: the client's stands, and is not sent twice", d.AuditID, wire(d.Edits.Add))
	}
	d, _ = core.Decide(&Head{Method: "GET", Path: "/"}, clientAt("192.0.2.7"), t0)
	if d.AuditID != "new-id" || !strings.Contains(wire(d.Edits.Add), "Audit-Id: new-id\n") {
		t.Errorf("audit ID %q, added %q: want a new one", d.AuditID, wire(d.Edits.Add))
	}
}

func TestDecideTrustsProxies(t *testing.T) {
	core := decider(tlsconf.Verdict{})
	core.Trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("2001:db8::1/128")}
	for _, tt := range []struct {
		peer string
		want string
	}{
		{"10.1.2.3", "X-Forwarded-For: 1.2.3.4, 10.1.2.3\n"},
		{"::ffff:10.1.2.3", "X-Forwarded-For: 1.2.3.4, 10.1.2.3\n"},
		{"fe80::1%eth0", "X-Forwarded-For: 1.2.3.4, fe80::1\n"},
		{"2001:db8::1", "X-Forwarded-For: 1.2.3.4, 2001:db8::1\n"},
		{"11.1.2.3", "X-Forwarded-For: 11.1.2.3\n"},
		{"2001:db8::2", "X-Forwarded-For: 2001:db8::2\n"},
		{"::ffff:11.1.2.3", "X-Forwarded-For: 11.1.2.3\n"},
	} {
		d, refusal := core.Decide(&Head{Method: "GET", Path: "/", AuditID: "a", ForwardedFor: []string{"1.2.3.4"}}, clientAt(tt.peer), t0)
		if refusal != nil {
			t.Fatal(refusal)
		}
		if got := wire(d.Edits.Add); got != tt.want {
			t.Errorf("from %s: %q, want %q", tt.peer, got, tt.want)
		}
	}
	unannounced := clientAt("10.1.2.3")
	unannounced.Unannounced = true
	d, _ := core.Decide(&Head{Method: "GET", Path: "/", AuditID: "a", ForwardedFor: []string{"1.2.3.4"}}, unannounced, t0)
	if got := wire(d.Edits.Add); got != "X-Forwarded-For: 10.1.2.3\n" {
		t.Errorf("from nobody knows where: %q", got)
	}
	d, refusal := core.Decide(&Head{Method: "GET", Path: "/", AuditID: "a", ForwardedFor: []string{"1.2.3.4"}}, &Client{}, t0)
	if refusal != nil || len(d.Edits.Add) != 0 || !d.Edits.Drop("X-Forwarded-For") {
		t.Errorf("a peer without an address: %v, %q", refusal, wire(d.Edits.Add))
	}
}

// Which answers move a token to the connections of good ones, and off them.
func TestConcluded(t *testing.T) {
	tests := []struct {
		name    string
		request string
		upgrade string
		code    int
		want    Credential // of the next request with the same token
	}{
		{"served", "GET /api/v1/pods", "", 200, Token},
		{"created", "POST /api/v1/pods", "", 201, Token},
		{"accepted", "DELETE /api/v1/pods/p", "", 202, Token},
		{"known and not allowed", "GET /api/v1/pods", "", 403, Token},
		{"known, and nothing there", "GET /nothing", "", 404, Token},
		{"conflict", "PUT /api/v1/nodes/n", "", 409, Token},
		{"refused object", "POST /api/v1/pods", "", 422, Token},
		{"unauthorized", "GET /api/v1/pods", "", 401, Unproven},

		// A bad token draws these too: they come before authentication.
		{"CORS preflight", "OPTIONS /api/v1/pods", "", 204, Unproven},
		{"timeout that does not parse", "GET /api/v1/pods?timeout=x", "", 400, Unproven},
		{"path that does not parse", "GET /api/v1/watch", "", 500, Unproven},
		{"shutting down", "GET /api/v1/pods", "", 429, Unproven},
		{"shutting down", "GET /api/v1/pods", "", 503, Unproven},
		{"authentication too slow", "GET /api/v1/pods", "", 504, Unproven},
		{"bad gateway", "GET /api/v1/pods", "", 502, Unproven},
		{"header too large", "GET /api/v1/pods", "", 431, Unproven},

		// 101 may be owed to a good token among the subprotocols.
		{"upgraded", "GET /api/v1/namespaces/n/pods/p/exec", "websocket", 101, Unproven},
		{"upgrade answered", "GET /api/v1/namespaces/n/pods/p/exec", "websocket", 404, Unproven},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			core, cl := decider(tlsconf.Verdict{}), clientAt("192.0.2.7")
			method, target, _ := strings.Cut(tt.request, " ")
			path, query, _ := strings.Cut(target, "?")
			h := &Head{Method: method, Path: path, RawQuery: query, Upgrade: tt.upgrade, Authorization: "Bearer t"}
			d, _ := core.Decide(h, cl, t0)
			if d.Credential != Unproven {
				t.Fatalf("a new token is %s", d.Credential)
			}
			core.Concluded(d, tt.code, t0)
			next := &Head{Method: "GET", Path: "/api", Authorization: "Bearer t"}
			d, _ = core.Decide(next, cl, t0)
			if d.Credential != tt.want {
				t.Errorf("after %d the token is %s, want %s", tt.code, d.Credential, tt.want)
			}
			if d, _ := core.Decide(&Head{Method: "GET", Path: "/api", Authorization: "Bearer u"}, cl, t0); d.Credential != Unproven {
				t.Errorf("another token is %s", d.Credential)
			}
		})
	}
}

// A token that expires must not go on drawing GOAWAYs on the connections of good
// ones for as long as it is remembered.
func TestConcludedForgetsRefusedToken(t *testing.T) {
	core, cl := decider(tlsconf.Verdict{}), clientAt("192.0.2.7")
	h := &Head{Method: "GET", Path: "/api", Authorization: "Bearer t"}
	d, _ := core.Decide(h, cl, t0)
	core.Concluded(d, 200, t0)
	d, _ = core.Decide(h, cl, t0.Add(70*time.Second)) // of the generation before
	if d.Credential != Token {
		t.Fatalf("a good token is %s", d.Credential)
	}
	core.Concluded(d, 503, t0.Add(70*time.Second))
	if d, _ = core.Decide(h, cl, t0.Add(70*time.Second)); d.Credential != Token {
		t.Errorf("after 503 the token is %s", d.Credential)
	}
	core.Concluded(d, 401, t0.Add(70*time.Second))
	if d, _ = core.Decide(h, cl, t0.Add(70*time.Second)); d.Credential != Unproven {
		t.Errorf("after 401 the token is %s", d.Credential)
	}
}

// A token in use stays proven for as long as answers prove it, and no longer.
func TestConcludedRenewsTokens(t *testing.T) {
	for _, tt := range []struct {
		code    int
		upgrade string
		lost    bool // the token is taken for unproven in the meantime
	}{{200, "", false}, {404, "", false}, {503, "", true}, {200, "websocket", true}} {
		core, cl := decider(tlsconf.Verdict{}), clientAt("192.0.2.7") // who remembers for one to two minutes
		h := &Head{Method: "GET", Path: "/api", Authorization: "Bearer t"}
		d, _ := core.Decide(h, cl, t0)
		core.Concluded(d, 200, t0)
		h.Upgrade = tt.upgrade
		lost := false
		for i := range 20 {
			now := t0.Add(time.Duration(i) * 30 * time.Second)
			d, _ = core.Decide(h, cl, now)
			lost = lost || d.Credential != Token
			core.Concluded(d, tt.code, now)
		}
		if lost != tt.lost {
			t.Errorf("in ten minutes of %d %s: lost %v, want %v", tt.code, tt.upgrade, lost, tt.lost)
		}
	}
}

// Answers to other credentials say nothing of tokens.
func TestConcludedOfOtherCredentials(t *testing.T) {
	core := decider(tlsconf.Verdict{})
	for _, c := range []Credential{Anonymous, Token, Asserted} {
		core.Concluded(&Decision{Credential: c, Token: core.Tokens.Key("t")}, 200, t0)
	}
	if accepted(core.Tokens, core.Tokens.Key("t"), t0) {
		t.Error("accepted without a token of its own")
	}
}

// recordingVerifier counts verifications; current says whether a verdict stands.
type recordingVerifier struct {
	verdict  tlsconf.Verdict
	current  bool
	verified int
	asked    []tlsconf.Verdict
}

func (v *recordingVerifier) Verify([]*x509.Certificate) tlsconf.Verdict {
	v.verified++
	return v.verdict
}

func (v *recordingVerifier) Current(old tlsconf.Verdict) bool {
	v.asked = append(v.asked, old)
	return v.current
}

func TestJudge(t *testing.T) {
	v := &recordingVerifier{verdict: tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane"}, Generation: 1}, current: true}
	var c Client
	step := func(chain []*x509.Certificate, wantKind tlsconf.VerdictKind, wantVerified int) {
		t.Helper()
		if got := c.judge(v, chain); got.Kind != wantKind || v.verified != wantVerified {
			t.Errorf("verdict %s after %d verifications, want %s after %d", got.Kind, v.verified, wantKind, wantVerified)
		}
	}
	step(nil, tlsconf.NoCertificate, 0)
	step(anyChain, tlsconf.Valid, 1)
	step(anyChain, tlsconf.Valid, 1)
	step(anyChain, tlsconf.Valid, 1)

	// The CA is withdrawn, or the certificate expires.
	v.current, v.verdict = false, tlsconf.Verdict{Kind: tlsconf.Invalid, Reason: "expired", Generation: 2}
	step(anyChain, tlsconf.Invalid, 2)
	v.current = true
	step(anyChain, tlsconf.Invalid, 2)
	if last := v.asked[len(v.asked)-1]; last.Generation != 2 {
		t.Errorf("asked of generation %d, want that of the fresh verdict, 2", last.Generation)
	}

	// And revoked while nothing else changes.
	v.current, v.verdict = false, tlsconf.Verdict{Kind: tlsconf.Revoked}
	step(anyChain, tlsconf.Revoked, 3)
	step(nil, tlsconf.NoCertificate, 3)
}

// An open connection loses its rights with its certificate.
func TestDecideJudgesEveryRequest(t *testing.T) {
	v := &recordingVerifier{verdict: tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane"}}, current: true}
	core, cl := decider(tlsconf.Verdict{}), clientAt("192.0.2.7")
	core.Verifier = v
	h := &Head{Method: "GET", Path: "/api", Chain: anyChain}
	if d, refusal := core.Decide(h, cl, t0); refusal != nil || d.Credential != Asserted {
		t.Fatalf("%+v, %v", d, refusal)
	}
	v.current, v.verdict = false, tlsconf.Verdict{Kind: tlsconf.Invalid, Reason: "expired"}
	if d, refusal := core.Decide(h, cl, t0); refusal == nil || refusal.Code != 401 {
		t.Errorf("the expired certificate still gives %+v, %v", d, refusal)
	}
}
