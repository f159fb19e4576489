package balancer

import (
	"fmt"
	"net/netip"
	"testing"

	"apiserver-lb/tlsconf"
)

func networks(list ...string) (n Networks) {
	for _, s := range list {
		n = append(n, netip.MustParsePrefix(s))
	}
	return n
}

func TestNetworksContains(t *testing.T) {
	n := networks("10.0.0.0/8", "fd00::/8", "fe80::/10")
	for address, want := range map[string]bool{
		"10.1.2.3": true, "11.0.0.1": false, "::ffff:10.1.2.3": true, "fd00::1": true, "fe80::1%eth0": true, "::1": false,
	} {
		if got := n.Contains(netip.MustParseAddr(address)); got != want {
			t.Errorf("%s: %v, want %v", address, got, want)
		}
	}
	if n.Contains(netip.Addr{}) || Networks(nil).Contains(netip.MustParseAddr("10.0.0.1")) || networks("::/0", "0.0.0.0/0").Contains(netip.Addr{}) {
		t.Error("an address where there is none, or in no network")
	}
}

func TestNewGuardsOff(t *testing.T) {
	if NewGuards(nil, false, []string{"/livez"}) != nil {
		t.Error("guards that guard nothing")
	}
}

func TestGuardSources(t *testing.T) {
	guards := NewGuards([]SourceGuard{
		{Groups: []string{"system:masters"}, From: networks("10.9.0.0/24", "fd09::/64")},
		{Users: []string{"root", "admin"}, Groups: []string{"ops"}, From: networks("10.9.0.0/16")},
		{Users: []string{"root"}, From: networks("10.9.1.0/24")},
	}, false, nil)
	certificate := func(user string, groups ...string) tlsconf.Verdict {
		return tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: user, Groups: groups}}
	}
	var (
		none    tlsconf.Verdict
		expired = tlsconf.Verdict{Kind: tlsconf.Invalid, Reason: "it expired", Identity: &tlsconf.Identity{User: "root", Groups: []string{"system:masters"}}}
	)
	const (
		inside  = "10.9.0.7"
		outside = "192.0.2.7"
	)
	tests := []struct {
		name    string
		verdict tlsconf.Verdict
		token   string
		as      []string // Impersonate-User
		asGroup []string
		from    string
		want    string // of the message; empty: let in
	}{
		{name: "group, inside", verdict: certificate("jane", "dev", "system:masters"), from: inside},
		{name: "group, inside by IPv6", verdict: certificate("jane", "system:masters"), from: "fd09::1"},
		{name: "group, inside by IPv4 as IPv6", verdict: certificate("jane", "system:masters"), from: "::ffff:10.9.0.7"},
		{name: "group, outside", verdict: certificate("jane", "dev", "system:masters"), from: outside, want: `a member of the group "system:masters"`},
		{name: "group, the next network", verdict: certificate("jane", "system:masters"), from: "10.9.1.7", want: `a member of the group "system:masters"`},
		{name: "user, inside", verdict: certificate("admin"), from: inside},
		{name: "user, outside", verdict: certificate("admin"), from: outside, want: `the user "admin"`},
		{name: "user of two guards, inside one", verdict: certificate("root"), from: inside, want: `the user "root"`},
		{name: "user of two guards, inside both", verdict: certificate("root"), from: "10.9.1.1"},
		{name: "names are exact", verdict: certificate("Admin", "System:Masters", "system:masters2"), from: outside},
		{name: "not guarded, outside", verdict: certificate("jane", "dev"), from: outside},
		{name: "a token's user is not known", verdict: none, token: "t", from: outside},
		{name: "anonymous", verdict: none, from: outside},
		// The certificate counts for nothing, so neither do its groups.
		{name: "expired certificate and token", verdict: expired, token: "t", from: outside},

		{name: "certificate as a user, outside", verdict: certificate("jane"), as: []string{"admin"}, from: outside, want: `whoever impersonates the user "admin"`},
		{name: "certificate as a user, inside", verdict: certificate("jane"), as: []string{"admin"}, from: inside},
		{name: "token as a user, outside", verdict: none, token: "t", as: []string{"admin"}, from: outside, want: `whoever impersonates the user "admin"`},
		{name: "token as a group, outside", verdict: none, token: "t", as: []string{"x"}, asGroup: []string{"dev", "system:masters"}, from: outside, want: `whoever impersonates the group "system:masters"`},
		{name: "token as a group, inside", verdict: none, token: "t", as: []string{"x"}, asGroup: []string{"system:masters"}, from: inside},
		{name: "anonymous as a group, outside", verdict: none, asGroup: []string{"ops"}, from: outside, want: `whoever impersonates the group "ops"`},
		{name: "as a second user", verdict: none, token: "t", as: []string{"x", "admin"}, from: outside, want: `whoever impersonates the user "admin"`},
		// HTTP/1.1 on the way to a backend takes the white space away.
		{name: "as a group with spaces around", verdict: none, token: "t", as: []string{"x"}, asGroup: []string{"\t system:masters "}, from: outside, want: `whoever impersonates the group "system:masters"`},
		{name: "as a user with spaces around", verdict: none, token: "t", as: []string{" admin"}, from: outside, want: `whoever impersonates the user "admin"`},
		{name: "as another, outside", verdict: none, token: "t", as: []string{"x"}, asGroup: []string{"dev"}, from: outside},
		{name: "guarded as another, outside", verdict: certificate("admin"), as: []string{"x"}, from: outside, want: `the user "admin"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := decider(tt.verdict)
			c.Guards = guards
			// What a header says of the source is a claim.
			h := &Head{Method: "GET", Path: "/api/v1/pods", ImpersonateUser: tt.as, ImpersonateGroup: tt.asGroup, ForwardedFor: []string{inside}}
			c.Trusted = networks("0.0.0.0/0")
			if tt.verdict.Kind != tlsconf.NoCertificate {
				h.Chain = anyChain
			}
			if tt.token != "" {
				h.Authorization = "Bearer " + tt.token
			}
			_, r := c.Decide(h, clientAt(tt.from), t0)
			want := ""
			if tt.want != "" {
				want = fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":%q,"reason":"Forbidden","code":403}`+"\n",
					"lb-1: "+tt.want+" is not let in from "+netip.MustParseAddr(tt.from).Unmap().String()+" (guards.sources in the balancer's configuration)")
			}
			if got := statusOf(r); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if r != nil && r.Reason != ReasonSource {
				t.Errorf("counted as %q", r.Reason)
			}
		})
	}
}

// A transport without addresses is in no network.
func TestGuardSourceUnknown(t *testing.T) {
	c := decider(tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "admin"}})
	c.Guards = NewGuards([]SourceGuard{{Users: []string{"admin"}, From: networks("0.0.0.0/0", "::/0")}}, false, nil)
	if _, r := c.Decide(&Head{Method: "GET", Path: "/", Chain: anyChain}, new(Client), t0); r == nil || r.Code != 403 {
		t.Errorf("%v, want 403", r)
	}
}

func TestGuardAnonymous(t *testing.T) {
	guards := NewGuards(nil, true, []string{"/livez", "/readyz", "/version/"})
	const refused = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: requests without a credential are not let in here (guards.anonymous in the balancer's configuration); use a client certificate or a bearer token","reason":"Unauthorized","code":401}` + "\n"
	websocket := func(protocols ...string) Head {
		return Head{Method: "GET", Path: "/api", Upgrade: "websocket", Subprotocols: protocols}
	}
	get := func(path string) Head { return Head{Method: "GET", Path: path} }
	authorized := func(v string) Head { return Head{Method: "GET", Path: "/api", Authorization: v} }
	tests := []struct {
		name string
		head Head
		in   bool
	}{
		{"livez", get("/livez"), true},
		{"livez with a query", Head{Method: "GET", Path: "/livez", RawQuery: "verbose"}, true},
		{"POST", Head{Method: "POST", Path: "/livez"}, true}, // kube-apiserver's to judge
		{"another", get("/api"), false},
		{"beneath", get("/livez/etcd"), false},
		{"with a slash", get("/livez/"), false},
		{"version with a slash", get("/version/"), true},
		{"version without", get("/version"), false},
		{"dots", get("/livez/../api"), false},
		{"encoded dots", get("/livez/%2e%2e/api"), false},
		{"encoded slash", get("/livez%2f..%2fapi"), false},
		{"encoded letter", get("/%6civez"), false},
		{"two slashes", get("//livez"), false},
		{"semicolon", get("/livez;/api"), false},
		{"case", get("/LIVEZ"), false},
		{"NUL", get("/livez%00"), false},
		{"star", Head{Method: "OPTIONS", Path: "*"}, false},
		{"empty", get(""), false},
		{"bearer", authorized("Bearer t"), true},
		{"bad token, kube-apiserver's to judge", authorized("Bearer \x01"), true},
		{"basic is no credential", authorized("Basic dTpw"), false},
		{"empty bearer", authorized("Bearer "), false},
		{"two spaces", authorized("Bearer  t"), false},
		{"websocket token", websocket("v5.channel.k8s.io", websocketTokenPrefix+"dA"), true},
		{"broken websocket token", websocket("v5.channel.k8s.io", websocketTokenPrefix+"=="), true},
		{"empty websocket token", websocket("v5.channel.k8s.io", websocketTokenPrefix), false},
		{"websocket token without an upgrade", Head{Method: "GET", Path: "/api", Subprotocols: []string{websocketTokenPrefix + "dA"}}, false},
		{"websocket token of another upgrade", Head{Method: "GET", Path: "/api", Upgrade: "SPDY/3.1", Subprotocols: []string{"x", websocketTokenPrefix + "dA"}}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := decider(tlsconf.Verdict{})
			c.Guards = guards
			_, r := c.Decide(&tt.head, clientAt("192.0.2.7"), t0)
			want := refused
			if tt.in {
				want = ""
			}
			if got := statusOf(r); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if r != nil && r.Reason != ReasonAnonymous {
				t.Errorf("counted as %q", r.Reason)
			}
			c.Guards = nil
			if _, r := c.Decide(&tt.head, clientAt("192.0.2.7"), t0); r != nil {
				t.Errorf("without the guard: %v", r)
			}
		})
	}
	c := decider(tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane"}})
	c.Guards = guards
	if _, r := c.Decide(&Head{Method: "GET", Path: "/api", Chain: anyChain}, clientAt("192.0.2.7"), t0); r != nil {
		t.Errorf("a certificate: %v", r)
	}
}

// TestGuardServiceAccounts: an impersonated service account is in the groups that
// kube-apiserver gives it, unless the request names others.
func TestGuardServiceAccounts(t *testing.T) {
	const namespace = "kube-system"
	guards := NewGuards([]SourceGuard{
		{Groups: []string{"system:serviceaccounts:" + namespace}, From: networks("10.9.0.0/24")},
	}, false, nil)
	for _, tt := range []struct {
		user, group, from string
		let               bool
	}{
		{"system:serviceaccount:" + namespace + ":x", "", "10.9.0.1", true},
		{"system:serviceaccount:" + namespace + ":x", "", "192.0.2.7", false},
		{" system:serviceaccount:" + namespace + ":x\t", "", "192.0.2.7", false},
		{"system:serviceaccount:" + namespace + ":x", "dev", "192.0.2.7", true},
		{"system:serviceaccount:" + namespace + ":x", "system:serviceaccounts:" + namespace, "192.0.2.7", false},
		{"system:serviceaccount:default:x", "", "192.0.2.7", true},
		{"system:serviceaccount:" + namespace, "", "192.0.2.7", true},
		{"jane", "", "192.0.2.7", true},
	} {
		h := &Head{Method: "GET", Path: "/api", ImpersonateUser: []string{tt.user}}
		if tt.group != "" {
			h.ImpersonateGroup = []string{tt.group}
		}
		refusal := guards.check(Token, nil, h, &Client{Peer: netip.MustParseAddrPort(tt.from + ":1")})
		if (refusal == nil) != tt.let || refusal != nil && (refusal.Code != 403 || refusal.Reason != ReasonSource) {
			t.Errorf("%+v: %+v", tt, refusal)
		}
	}
}
