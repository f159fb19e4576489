package balancer

import (
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Limit bounds what one requester may ask for. 0: no bound.
type Limit struct {
	InFlight    int     // short requests at once
	LongRunning int     // watches and other long-running requests, and upgrades, at once
	Rate        float64 // requests of all kinds, per second
	Burst       int     // that may come at once where Rate is set; 0: those of a second
}

// none reports whether it bounds nothing.
func (l *Limit) none() bool { return l.InFlight == 0 && l.LongRunning == 0 && l.Rate == 0 }

// burst is how many requests may come at once.
func (l *Limit) burst() float64 {
	if l.Burst > 0 {
		return float64(l.Burst)
	}
	return max(1, math.Ceil(l.Rate))
}

// LimitOverride is a limit for some, in place of that for all.
type LimitOverride struct {
	Users, Groups []string // of certificates
	Sources       Networks // of requests that go by neither a certificate nor a proven token
	Limit
}

// Limits hold each requester to a limit: the user of a certificate, the bearer of a
// token that a backend has accepted of late, and all others by their address, where those
// who show a token are apart from those who show nothing. To take every token for a
// requester of its own would let anybody be as many as he likes.
type Limits struct {
	// Static after construction.
	limits  []Limit        // that for all, then the overrides
	users   map[string]int // the first override that names a user, and so on
	groups  map[string]int
	sources []Networks // of each of limits
	seed    maphash.Seed
	shards  [limitShards]limitShard
}

// limitShards is how many locks the accounts share; it is held for less than a
// microsecond.
const limitShards = 64

// restingAccounts bounds the accounts of requesters who have nothing in flight, which
// are kept until their rate has recovered and somebody else comes. Each takes about 300
// bytes.
const restingAccounts = 1 << 16

type limitShard struct {
	most int // static: how many accounts may rest

	mu       sync.Mutex
	accounts map[requester]*account // guarded by mu
	resting  account                // guarded by mu: the ring of those who have nothing in flight, next is the latest
	n        int                    // guarded by mu: how many those are
}

// requester is who is held to a limit.
type requester struct {
	user   string       // of a certificate
	token  TokenKey     // that a backend has accepted
	source netip.Prefix // of all others
	bearer bool         // beside source: with a token
	limit  int          // which: certificates of one user may name different groups
}

// account is what a requester has in flight, and what is left of its rate.
type account struct {
	// Static after construction.
	shard *limitShard
	who   requester
	limit *Limit

	// Guarded by shard.mu.
	short, long int
	tokens      float64   // requests that may come at once
	at          time.Time // when tokens was worked out
	prev, next  *account  // in the ring of those at rest; nil: in none
}

// NewLimits returns limits for all with exceptions, of which the first that fits
// counts: for a certificate, the first that names its user, else the first that names
// one of its groups. It returns nil where nothing is limited.
func NewLimits(all Limit, overrides []LimitOverride) *Limits {
	return newLimits(all, overrides, restingAccounts/limitShards)
}

func newLimits(all Limit, overrides []LimitOverride, most int) *Limits {
	l := &Limits{limits: []Limit{all}, users: map[string]int{}, groups: map[string]int{}, sources: []Networks{nil}, seed: maphash.MakeSeed()}
	for i, o := range overrides {
		l.limits = append(l.limits, o.Limit)
		l.sources = append(l.sources, o.Sources)
		first(l.users, o.Users, i+1)
		first(l.groups, o.Groups, i+1)
	}
	if !slices.ContainsFunc(l.limits, func(x Limit) bool { return !x.none() }) {
		return nil
	}
	for i := range l.shards {
		s := &l.shards[i]
		s.most, s.accounts = most, map[requester]*account{}
		s.resting.prev, s.resting.next = &s.resting, &s.resting
	}
	return l
}

// first notes the index under each name that has none yet.
func first(index map[string]int, names []string, i int) {
	for _, name := range names {
		if _, ok := index[name]; !ok {
			index[name] = i
		}
	}
}

// requester says who makes a request and which limit is his.
func (l *Limits) requester(d *Decision, cl *Client) requester {
	switch d.Credential {
	case Asserted:
		return requester{user: d.User, limit: l.ofUser(d)}
	case Token:
		return requester{token: d.Token}
	}
	a := bareAddr(cl.Peer.Addr())
	who := requester{source: sourceOf(a), bearer: d.Credential == Unproven}
	if i := slices.IndexFunc(l.sources, func(n Networks) bool { return n.Contains(a) }); i >= 0 {
		who.limit = i
	}
	return who
}

func (l *Limits) ofUser(d *Decision) int {
	if i, ok := l.users[d.User]; ok {
		return i
	}
	best := 0
	for _, g := range d.groups {
		if i, ok := l.groups[g]; ok && (best == 0 || i < best) {
			best = i
		}
	}
	return best
}

// sourceOf is what counts as one source: an IPv4 address, or the /64 that an IPv6 host
// has to itself.
func sourceOf(a netip.Addr) netip.Prefix {
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{} // a transport without addresses
	}
	return p
}

// Admission is the place that a request takes within a limit. The zero Admission is of
// a request that takes none.
type Admission struct {
	account *account
	long    bool
}

// Admit counts a request in that has been decided on, or refuses it with 429. Release
// must be called when all of the answer has gone, or nothing more of it will.
func (c *Core) Admit(d *Decision, cl *Client, now time.Time) (Admission, *Refusal) {
	if c.Limits == nil || d.unlimited {
		return Admission{}, nil
	}
	return c.Limits.admit(c.Limits.requester(d, cl), d.Class != Short, now)
}

func (l *Limits) admit(who requester, long bool, now time.Time) (Admission, *Refusal) {
	limit := &l.limits[who.limit]
	if limit.none() {
		return Admission{}, nil
	}
	s := &l.shards[maphash.Comparable(l.seed, who)%limitShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.accounts[who]
	if a == nil {
		a = &account{shard: s, who: who, limit: limit, tokens: limit.burst(), at: now}
		s.accounts[who] = a
	}
	s.wake(a)
	s.sweep(now)
	if r := a.take(long, now); r != nil {
		s.rest(a)
		return Admission{}, r
	}
	return Admission{a, long}, nil
}

// Release gives the place back, once.
func (x *Admission) Release() {
	a := x.account
	if a == nil {
		return
	}
	x.account = nil
	a.shard.mu.Lock()
	defer a.shard.mu.Unlock()
	if x.long {
		a.long--
	} else {
		a.short--
	}
	a.shard.rest(a)
}

// retryAfter is in how many seconds a client that has too much in flight may come again,
// as with kube-apiserver's own limit (k8s.io/apiserver/pkg/server/filters/maxinflight.go).
const retryAfter = 1

// take counts a request in, or says why not.
func (a *account) take(long bool, now time.Time) *Refusal {
	l := a.limit
	a.refill(now)
	switch {
	case !long && l.InFlight > 0 && a.short >= l.InFlight:
		return tooMany(ReasonInFlight, retryAfter, fmt.Sprintf("%s has %d requests in flight, as many as allowed", a.who.name(), a.short))
	case long && l.LongRunning > 0 && a.long >= l.LongRunning:
		return tooMany(ReasonLongRunning, retryAfter, fmt.Sprintf("%s has %d watches and other long-running requests, as many as allowed", a.who.name(), a.long))
	case l.Rate > 0 && a.tokens < 1:
		wait := math.Ceil((1 - a.tokens) / l.Rate)
		return tooMany(ReasonRate, int(min(max(wait, 1), math.MaxInt32)), fmt.Sprintf("%s makes more than %v requests per second", a.who.name(), l.Rate))
	}
	if l.Rate > 0 {
		a.tokens--
	}
	if long {
		a.long++
	} else {
		a.short++
	}
	return nil
}

func tooMany(reason string, wait int, message string) *Refusal {
	return &Refusal{Code: 429, Reason: reason, RetryAfter: wait, Message: message + " (requestLimits in the balancer's configuration); nothing has been done"}
}

// name says who it is to himself.
func (r requester) name() string {
	switch {
	case r.user != "":
		return fmt.Sprintf("the user %q", r.user)
	case r.token != TokenKey{}:
		return "this token"
	}
	name := "this client"
	switch {
	case r.source.IsSingleIP():
		name = "the address " + r.source.Addr().String()
	case r.source.IsValid():
		name = "the network " + r.source.String()
	}
	if r.bearer {
		name += ", with tokens that no kube-apiserver has accepted of late,"
	}
	return name
}

func (a *account) refill(now time.Time) {
	if since := now.Sub(a.at); since > 0 { // clocks of several callers may differ a little
		a.tokens = min(a.limit.burst(), a.tokens+since.Seconds()*a.limit.Rate)
		a.at = now
	}
}

// wake takes an account out of the ring of those at rest.
func (s *limitShard) wake(a *account) {
	if a.next == nil {
		return
	}
	a.prev.next, a.next.prev = a.next, a.prev
	a.prev, a.next = nil, nil
	s.n--
}

// rest puts an account that has nothing in flight into the ring, and forgets the one
// that has been there for longest where there are too many.
func (s *limitShard) rest(a *account) {
	if a.short > 0 || a.long > 0 {
		return
	}
	a.prev, a.next = &s.resting, s.resting.next
	a.prev.next, a.next.prev = a, a
	s.n++
	if s.n > s.most {
		s.forget(s.resting.prev)
	}
}

func (s *limitShard) forget(a *account) {
	s.wake(a)
	delete(s.accounts, a.who)
}

// sweep forgets those who are no different from somebody who has never come: a few at
// a time, and more than can be added meanwhile.
func (s *limitShard) sweep(now time.Time) {
	for range 2 {
		oldest := s.resting.prev
		if oldest == &s.resting {
			return
		}
		if oldest.refill(now); oldest.tokens < oldest.limit.burst() {
			return
		}
		s.forget(oldest)
	}
}

// isUnlimited reports whether a request is never held to a limit: health checks, and
// what keeps a lease, so that a node's heartbeat or a leader does not starve beside its
// own other requests. That is what kube-apiserver exempts or prefers (the flow schemas
// probes, system-node-high and system-leader-election,
// k8s.io/apiserver/pkg/apis/flowcontrol/bootstrap/default.go), from those who have proven
// who they are; and nothing that only looks alike. path is as on the wire.
func (d *Decision) isUnlimited(method, path string) bool {
	if d.Class != Short {
		return false
	}
	switch path {
	case "/livez", "/readyz", "/healthz":
		return method == "GET" || method == "HEAD"
	}
	if d.Credential != Asserted && d.Credential != Token {
		return false
	}
	// v1 is the only version of a Lease that is served since 1.22.
	rest, ok := strings.CutPrefix(path, "/apis/coordination.k8s.io/v1/namespaces/")
	if !ok {
		return false
	}
	namespace, rest, _ := strings.Cut(rest, "/")
	leases, name, named := strings.Cut(rest, "/")
	if namespace == "" || leases != "leases" || strings.Contains(name, "/") {
		return false
	}
	switch method {
	case "POST":
		return !named
	case "GET", "PUT", "PATCH":
		return name != ""
	}
	return false
}
