package balancer

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"apiserver-lb/tlsconf"
)

// requestOf is a decision on a request of somebody.
func requestOf(who string, class Class) *Decision {
	d := &Decision{Attributes: Attributes{Verb: "get", Class: class}}
	switch kind, name := who[0], who[1:]; kind {
	case 'u':
		d.Credential, d.User = Asserted, name
	case 't':
		d.Credential, d.Token = Token, TokenKey([]byte(fmt.Sprintf("%-16s", name)))
	case 'n':
		d.Credential = Unproven
		d.Token = TokenKey([]byte(fmt.Sprintf("%-16s", name)))
	}
	return d
}

// limited is a Core with limits.
func limited(all Limit, overrides ...LimitOverride) *Core {
	return &Core{Limits: NewLimits(all, overrides)}
}

// atRest checks that nothing is counted in flight, and returns how many accounts there are.
func (l *Limits) atRest(t interface{ Errorf(string, ...any) }) (accounts int) {
	for i := range l.shards {
		s := &l.shards[i]
		accounts += len(s.accounts)
		ring := 0
		for a := s.resting.next; a != &s.resting; a = a.next {
			ring++
			if s.accounts[a.who] != a {
				t.Errorf("%v rests and has no account", a.who)
			}
		}
		if ring != s.n || ring != len(s.accounts) {
			t.Errorf("%d accounts, %d at rest, %d counted so", len(s.accounts), ring, s.n)
		}
		for who, a := range s.accounts {
			if a.short != 0 || a.long != 0 {
				t.Errorf("%v has %d short and %d long requests in flight", who, a.short, a.long)
			}
		}
	}
	return accounts
}

func TestLimitsOff(t *testing.T) {
	if NewLimits(Limit{Burst: 5}, []LimitOverride{{Users: []string{"a"}}}) != nil {
		t.Error("limits that limit nothing")
	}
	var c Core
	x, r := c.Admit(requestOf("uanna", Short), clientAt("192.0.2.7"), t0)
	if r != nil {
		t.Error(r)
	}
	x.Release()
	if n := testing.AllocsPerRun(100, func() {
		x, _ := c.Admit(shortRequest, nil, t0)
		x.Release()
	}); n != 0 {
		t.Errorf("%v allocations where nothing is limited", n)
	}
}

// Whoever comes again and again costs no memory.
func TestLimitsAllocations(t *testing.T) {
	for _, l := range []Limit{{InFlight: 5}, {Rate: 1e6, Burst: 1e6}} {
		c, cl, d, now := limited(l), clientAt("192.0.2.7"), requestOf("uanna", Short), t0
		if n := testing.AllocsPerRun(100, func() {
			now = now.Add(time.Second)
			x, _ := c.Admit(d, cl, now)
			x.Release()
		}); n != 0 {
			t.Errorf("%+v: %v allocations for a request", l, n)
		}
	}
}

func TestLimitInFlight(t *testing.T) {
	c := limited(Limit{InFlight: 2, LongRunning: 1})
	cl := clientAt("192.0.2.7")
	admit := func(who string, class Class) (Admission, string) {
		x, r := c.Admit(requestOf(who, class), cl, t0)
		return x, statusOf(r)
	}
	const anna = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the user \"anna\" has 2 requests in flight, as many as allowed (requestLimits in the balancer's configuration); nothing has been done","reason":"TooManyRequests","details":{"retryAfterSeconds":1},"code":429}` + "\n"
	const watches = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the user \"anna\" has 1 watches and other long-running requests, as many as allowed (requestLimits in the balancer's configuration); nothing has been done","reason":"TooManyRequests","details":{"retryAfterSeconds":1},"code":429}` + "\n"
	first, refused := admit("uanna", Short)
	second, again := admit("uanna", Short)
	if refused != "" || again != "" {
		t.Fatal(refused, again)
	}
	if _, got := admit("uanna", Short); got != anna {
		t.Errorf("got  %s\nwant %s", got, anna)
	}
	for _, who := range []string{"ubob", "tanna", "nanna"} { // somebody else, if by the same name
		x, got := admit(who, Short)
		if got != "" {
			t.Errorf("%s: %s", who, got)
		}
		defer x.Release()
	}
	// Long ones are counted apart.
	watch, refused := admit("uanna", Long)
	if refused != "" {
		t.Error(refused)
	}
	if _, got := admit("uanna", Upgrade); got != watches {
		t.Errorf("got  %s\nwant %s", got, watches)
	}
	first.Release()
	first.Release() // once
	third, got := admit("uanna", Short)
	if got != "" {
		t.Errorf("after a release: %s", got)
	}
	if _, got := admit("uanna", Short); got != anna {
		t.Errorf("a place was given back twice: %q", got)
	}
	watch.Release()
	if watch, got = admit("uanna", Upgrade); got != "" {
		t.Errorf("after a release: %s", got)
	}
	second.Release()
	third.Release()
	watch.Release()
}

func TestLimitRate(t *testing.T) {
	c := limited(Limit{Rate: 0.5, Burst: 3})
	cl := clientAt("192.0.2.7")
	for _, tt := range []struct {
		at   time.Duration
		wait int // Retry-After; 0: admitted
	}{
		{0, 0}, {0, 0}, {0, 0}, {0, 2}, {0, 2}, {time.Second, 1}, {1900 * time.Millisecond, 1}, {2 * time.Second, 0}, {2 * time.Second, 2},
		{1500 * time.Millisecond, 2}, // another clock
		{5 * time.Second, 0}, {5 * time.Second, 1},
		{time.Hour, 0}, {time.Hour, 0}, {time.Hour, 0}, {time.Hour, 2},
	} {
		x, r := c.Admit(requestOf("tx", Short), cl, t0.Add(tt.at))
		x.Release()
		got := 0
		if r != nil {
			got = r.RetryAfter
			if r.Code != 429 || r.Reason != ReasonRate {
				t.Errorf("%d, counted as %s", r.Code, r.Reason)
			}
		}
		if got != tt.wait {
			t.Errorf("at %v: Retry-After %d, want %d", tt.at, got, tt.wait)
		}
	}
	for _, tt := range []struct {
		l    Limit
		want float64
	}{{Limit{Rate: 0.1}, 1}, {Limit{Rate: 2.5}, 3}, {Limit{Rate: 100}, 100}, {Limit{Rate: 100, Burst: 7}, 7}} {
		if got := tt.l.burst(); got != tt.want {
			t.Errorf("burst of %+v: %v, want %v", tt.l, got, tt.want)
		}
	}
}

// Who a request counts for, and what the limit of that is.
func TestLimitRequester(t *testing.T) {
	c := limited(Limit{InFlight: 1},
		LimitOverride{Users: []string{"anna"}, Groups: []string{"ops"}, Limit: Limit{InFlight: 2}},
		LimitOverride{Groups: []string{"dev", "free"}, Sources: networks("192.0.2.0/24"), Limit: Limit{InFlight: 3}},
		LimitOverride{Users: []string{"free", "anna"}, Groups: []string{"ops"}},
		LimitOverride{Sources: networks("192.0.2.7/32", "2001:db8:1::/48"), Limit: Limit{InFlight: 4}},
	)
	user := func(name string, groups ...string) *Decision {
		d := requestOf("u"+name, Short)
		d.groups = groups
		return d
	}
	tests := []struct {
		name  string
		d     *Decision
		from  string
		limit int
		whose string
	}{
		{"a user", user("bob"), "192.0.2.7", 1, `the user "bob"`},
		{"a user of an override", user("anna", "dev"), "192.0.2.7", 2, `the user "anna"`},
		{"a group", user("bob", "x", "dev"), "192.0.2.7", 3, `the user "bob"`},
		{"the first group", user("bob", "dev", "ops"), "192.0.2.7", 2, `the user "bob"`},
		{"the user before the group", user("free", "ops"), "192.0.2.7", 0, ""},
		{"a token", requestOf("tanna", Short), "192.0.2.7", 1, "this token"},
		{"an unproven token", requestOf("nanna", Short), "198.51.100.7", 1, "the address 198.51.100.7, with tokens that no kube-apiserver has accepted of late,"},
		{"anonymous", requestOf("-", Short), "198.51.100.7", 1, "the address 198.51.100.7"},
		{"the first network", requestOf("-", Short), "192.0.2.7", 3, "the address 192.0.2.7"},
		{"IPv4 as IPv6", requestOf("-", Short), "::ffff:192.0.2.8", 3, "the address 192.0.2.8"},
		{"IPv6", requestOf("-", Short), "2001:db8:1::7", 4, "the network 2001:db8:1::/64"},
		{"IPv6 of no override", requestOf("-", Short), "2001:db8:2:3:4:5:6:7", 1, "the network 2001:db8:2:3::/64"},
		{"IPv6 with a zone", requestOf("-", Short), "fe80::1%eth0", 1, "the network fe80::/64"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			who := c.Limits.requester(tt.d, clientAt(tt.from))
			if got := c.Limits.limits[who.limit].InFlight; got != tt.limit {
				t.Errorf("limit %d, want %d", got, tt.limit)
			}
			if tt.whose != "" && who.name() != tt.whose {
				t.Errorf("held against %s, want %s", who.name(), tt.whose)
			}
		})
	}
	one, two := clientAt("2001:db8::1"), clientAt("2001:db8::2")
	if c.Limits.requester(requestOf("nx", Short), one) != c.Limits.requester(requestOf("ny", Short), two) {
		t.Error("two addresses of one /64, with tokens that are not known, are two requesters")
	}
	if c.Limits.requester(requestOf("nx", Short), one) == c.Limits.requester(requestOf("-", Short), one) {
		t.Error("whoever shows nothing takes from those whose tokens are not proven yet")
	}
	if got := c.Limits.requester(requestOf("-", Short), new(Client)).name(); got != "this client" {
		t.Errorf("without an address: %s", got)
	}
}

func TestUnlimited(t *testing.T) {
	for _, tt := range []struct {
		method, path, query string
		want                bool
	}{
		{"GET", "/livez", "", true},
		{"GET", "/readyz", "verbose", true},
		{"GET", "/healthz", "", true},
		{"HEAD", "/livez", "", true},
		{"POST", "/livez", "", false},
		{"DELETE", "/healthz", "", false},
		{"GET", "/livez/etcd", "", false},
		{"GET", "/%6civez", "", false},
		{"GET", "/version", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-scheduler", "", true},
		{"PUT", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-1", "timeout=10s", true},
		{"PATCH", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-1", "", true},
		{"POST", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", "", true},
		{"GET", "/apis/coordination.k8s.io/v1beta1/namespaces/a/leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io/x/namespaces/a/leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io//namespaces/a/leases/b", "", false},
		{"GET", "//apis/coordination.k8s.io/v1/namespaces/a/leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces//leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b//c", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b/", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leases/", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leases", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leasecandidates/b", "", false},
		{"PUT", "/apis/coordination.k8s.io/v1/namespaces/a/leases", "", false},
		{"POST", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b", "", false},
		{"BREW", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b", "", false},
		{"DELETE", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-scheduler", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/leases", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/leases", "watch=1", false},
		{"DELETE", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/watch/namespaces/a/leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/proxy/namespaces/a/leases/b", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b/proxy", "", false},
		{"GET", "/apis/coordination.k8s.io/v1/namespaces/a/pods/b", "", false},
		{"GET", "/apis/example.com/v1/namespaces/a/leases/b", "", false},
		{"GET", "/api/v1/namespaces/a/leases/b", "", false},
		{"GET", "/api/v1/nodes", "", false},
	} {
		d := Decision{Credential: Asserted, Attributes: Attribute(tt.method, tt.path, tt.query)}
		if got := d.isUnlimited(tt.method, tt.path); got != tt.want {
			t.Errorf("%s %s?%s: %v, want %v", tt.method, tt.path, tt.query, got, tt.want)
		}
		for c := range Credential(Credentials) {
			d.Credential = c
			want := tt.want && (c == Asserted || c == Token || !strings.Contains(tt.path, "leases"))
			if got := d.isUnlimited(tt.method, tt.path); got != want {
				t.Errorf("%s %s?%s with %s: %v, want %v", tt.method, tt.path, tt.query, c, got, want)
			}
		}
		d.Credential, d.Class = Asserted, Upgrade
		if d.isUnlimited(tt.method, tt.path) {
			t.Errorf("%s %s passes as an upgrade", tt.method, tt.path)
		}
	}
	// The decision says so.
	c := decider(tlsconf.Verdict{Kind: tlsconf.Valid, Identity: &tlsconf.Identity{User: "jane"}})
	c.Limits = NewLimits(Limit{InFlight: 1}, nil)
	cl := clientAt("192.0.2.7")
	for _, path := range []string{"/api/v1/nodes", "/livez", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b"} {
		for i := range 3 {
			d, r := c.Decide(&Head{Method: "GET", Path: path, Chain: anyChain}, cl, t0)
			if r == nil {
				_, r = c.Admit(d, cl, t0)
			}
			if refused := path == "/api/v1/nodes" && i > 0; (r != nil) != refused {
				t.Errorf("request %d of %s: %v", i, path, r)
			}
		}
	}
}

// However many come: those who rest are few, and whoever has something in flight is
// never forgotten.
func TestLimitsMemory(t *testing.T) {
	const most = 2
	l := newLimits(Limit{InFlight: 1, Rate: 0.001, Burst: 1}, nil, most)
	admit := func(i int, at time.Time) (Admission, *Refusal) {
		return l.admit(requester{source: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)}, false, at)
	}
	var kept []Admission
	for i := range 100 {
		x, _ := admit(i, t0)
		kept = append(kept, x)
	}
	for i := 100; i < 20_000; i++ {
		x, r := admit(i, t0)
		if r != nil {
			t.Fatal(r)
		}
		x.Release()
	}
	for i := range 100 {
		if _, r := admit(i, t0); r == nil || r.Reason != ReasonInFlight {
			t.Fatalf("requester %d was forgotten: %v", i, r)
		}
	}
	for i := range kept {
		kept[i].Release()
	}
	if n := l.atRest(t); n > most*limitShards {
		t.Errorf("%d accounts of those who rest, want at most %d", n, most*limitShards)
	}
	// Those whose rate has recovered go as others come.
	later := t0.Add(time.Hour)
	for i := range 2000 {
		x, _ := admit(1_000_000+i, later)
		x.Release()
	}
	for i := range l.shards {
		for _, a := range l.shards[i].accounts {
			if a.at.Before(later) {
				t.Errorf("%v is still there an hour later", a.who)
			}
		}
	}
}

// model is what the limits must come to for one requester.
type model struct {
	limit       Limit
	short, long int
	times       []time.Duration // of those admitted
}

// The limits against their definition: never more in flight than allowed, never more
// in any span than burst and rate allow, nobody refused without a reason, everything
// given back.
func TestLimitsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := func(name string) Limit {
			return Limit{
				InFlight:    rapid.IntRange(0, 3).Draw(t, name+" in flight"),
				LongRunning: rapid.IntRange(0, 2).Draw(t, name+" long"),
				Rate:        rapid.SampledFrom([]float64{0, 0.5, 1, 3}).Draw(t, name+" rate"),
				Burst:       rapid.IntRange(0, 4).Draw(t, name+" burst"),
			}
		}
		all, bobs := limit("all"), limit("bob")
		l := NewLimits(all, []LimitOverride{{Users: []string{"bob"}, Limit: bobs}})
		if l == nil {
			return
		}
		c := &Core{Limits: l}
		who := []string{"uanna", "ubob", "ta", "tb", "na", "nb", "-"}
		models := map[string]*model{}
		for _, w := range who {
			key := w
			if w[0] == 'n' {
				key = "n" // unproven: by address, apart from the anonymous
			}
			if models[key] == nil {
				models[key] = &model{limit: all}
			}
			models[w] = models[key]
		}
		models["ubob"].limit = bobs
		type taken struct {
			m     *model
			x     Admission
			class Class
		}
		var open []taken
		var now time.Duration
		release := func(i int) {
			o := open[i]
			o.x.Release()
			if o.class == Short {
				o.m.short--
			} else {
				o.m.long--
			}
			open = slices.Delete(open, i, i+1)
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0, 1:
				w := rapid.SampledFrom(who).Draw(t, "who")
				class := rapid.SampledFrom([]Class{Short, Short, Long, Upgrade}).Draw(t, "class")
				m := models[w]
				x, r := c.Admit(requestOf(w, class), clientAt("192.0.2.7"), t0.Add(now))
				full := class == Short && m.limit.InFlight > 0 && m.short == m.limit.InFlight ||
					class != Short && m.limit.LongRunning > 0 && m.long == m.limit.LongRunning
				fast := !m.fits(now)
				if (r != nil) != (full || fast) {
					t.Fatalf("%s %v at %v: %v, want refused %v or %v", w, class, now, r, full, fast)
				}
				if r != nil {
					if !full && m.fits(now+time.Duration(r.RetryAfter)*time.Second-time.Second) && r.RetryAfter > 1 {
						t.Fatalf("%s is told to wait %d s, and a second less is enough", w, r.RetryAfter)
					}
					if !full && !m.fits(now+time.Duration(r.RetryAfter)*time.Second) {
						t.Fatalf("%s is told to wait %d s, which is not enough", w, r.RetryAfter)
					}
					continue
				}
				m.times = append(m.times, now)
				if class == Short {
					m.short++
				} else {
					m.long++
				}
				open = append(open, taken{m, x, class})
			case 2:
				if len(open) > 0 {
					release(rapid.IntRange(0, len(open)-1).Draw(t, "which"))
				}
			case 3:
				now += time.Duration(rapid.IntRange(1, 40).Draw(t, "tenths")) * 125 * time.Millisecond
			}
		}
		for len(open) > 0 {
			release(0)
		}
		l.atRest(t)
	})
}

// fits reports whether one more at the time given stays within burst and rate over
// every span that ends then.
func (m *model) fits(now time.Duration) bool {
	if m.limit.Rate == 0 {
		return true
	}
	for i, from := range m.times {
		allowed := m.limit.burst() + (now-from).Seconds()*m.limit.Rate
		if float64(len(m.times)-i+1) > math.Floor(allowed+1e-9) {
			return false
		}
	}
	return true
}
