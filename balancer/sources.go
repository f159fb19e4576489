package balancer

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// SourceLimits are what the connections of one source may do together. A source is an
// IPv4 address, or a /64 of IPv6: that is what one host is given, and what it can
// choose its addresses from (RFC 4291, section 2.5.4).
type SourceLimits struct {
	Connections int // open at once; 0: any number
	// Unfinished is how many of them may be on their way to their first request head;
	// more wait for their turn, since a client that starts may well dial hundreds at
	// once. 0: any number.
	Unfinished int
	// Most is how many connections there may be of all sources: see fairShare. 0: any
	// number.
	Most int
	// Abuse are the budgets, by their kind, which all connections of a source spend
	// from. A burst of 0: no limit.
	Abuse [AbuseKinds]Refill
	// Certificates is room for those that clients have shown, as far as they are more
	// than usual: see Shown. nil: for any number.
	Certificates *Room
	// Exempt are networks whose addresses are no source: of a proxy in front, behind
	// which all clients have one address.
	Exempt Networks
}

// Abuse is what a client can do too much of.
type Abuse int

// The kinds of Abuse.
const (
	AbuseResets  Abuse = iota // requests taken back
	AbuseControl              // frames that bring nothing
	AbuseKinds
)

// fairShare is how many times the free connections a source may have. So a source alone
// gets 8 of 9 connections that there are, n of them share what a newcomer does not
// need, and whoever has most is turned away first: dynamic thresholds, as switches
// share their memory (Choudhury and Hahne, 1998). No source has to be counted for it.
const fairShare = 8

// turnAway returns the reason why a source that has open connections gets no further
// one, empty where it does. total is how many there are of all sources, the one that has
// come included.
func (l *SourceLimits) turnAway(open, total int) (reason string) {
	switch {
	case l.Connections > 0 && open >= l.Connections:
		return ReasonSourceConnections
	case l.Most > 0 && open > fairShare*max(0, l.Most-total):
		return ReasonSourceShare
	}
	return ""
}

// siteSources is how many sources the connections of one site may be worth: of the /48 of
// IPv6 that a whole site is given (RFC 6177), which has 65,536 times a /64 to be a source
// with. It is more than a cluster of 5000 nodes needs, and leaves one of 65 connections
// to those who come from elsewhere.
const siteSources = 8

// turnAwaySite is turnAway for the connections of a site.
func (l *SourceLimits) turnAwaySite(open, total int) (reason string) {
	return l.turnAway(open/siteSources, total)
}

// siteOf returns the site that a source belongs to; the zero Prefix: to none, for it is of
// IPv4, whose addresses nobody has that many of.
func siteOf(source netip.Prefix) netip.Prefix {
	if !source.Addr().Is6() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(source.Addr(), 48).Masked()
}

// Sources counts what each source has and does. It may be used by several goroutines
// at once.
type Sources struct {
	limits SourceLimits // static

	mu    sync.Mutex
	table map[netip.Prefix]*source // those with connections: no more than there are of these
	sites map[netip.Prefix]int     // how many connections a site has; of those that have any
	rest  map[netip.Prefix]*source // those without, which have spent of their budgets; at most maxResting
	swept time.Time                // when rest was gone through
}

// maxResting bounds the sources that are remembered without a connection: some 10 MB.
// One that is forgotten early begins anew with all it may spend.
const maxResting = 1 << 16

// sweepEvery is how often sources are looked for that may be forgotten.
const sweepEvery = 10 * time.Second

// tellEvery is how often it may be logged that a source is turned away.
const tellEvery = time.Minute

type source struct {
	// Guarded by Sources.mu.
	open, unfinished int
	waiting          []*SourceConn // for their turn to be unfinished, in order
	told             time.Time

	shown atomic.Int64 // bytes of memory, see Shown

	mu    sync.Mutex
	spent [AbuseKinds]Bucket // guarded by mu
}

// NewSources returns a table of sources that has seen nobody yet.
func NewSources(l SourceLimits) *Sources {
	return &Sources{limits: l, table: map[netip.Prefix]*source{}, sites: map[netip.Prefix]int{}, rest: map[netip.Prefix]*source{}}
}

// TurnedAway says why a source got no further connection.
type TurnedAway struct {
	Reason string       // one of the Reason constants
	Source netip.Prefix // or the site that it belongs to
	Open   int          // connections that this has
	Tell   bool         // it is worth a line in the log: no other has told of this source for a minute
}

// SourceConn is one connection of a source. A nil one is of no source, and unlimited.
type SourceConn struct {
	// Static after construction.
	all    *Sources
	addr   netip.Prefix
	source *source

	turn chan struct{} // closed when it may go on; nil: it may from the beginning

	// Guarded by all.mu.
	unfinished, closed bool
	shown              int64 // of source.shown
}

// Open counts a connection that has come from the address, where there are total
// connections with it, or returns why it is to be closed at once. What it returns is to
// be closed with the connection.
func (s *Sources) Open(from netip.Addr, total int, now time.Time) (*SourceConn, *TurnedAway) {
	if s == nil || !from.IsValid() || s.limits.Exempt.Contains(from) {
		return nil, nil
	}
	addr := sourceOf(bareAddr(from))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep(now)
	src := s.table[addr]
	if src == nil {
		if src = s.rest[addr]; src == nil {
			src = new(source)
		}
	}
	if reason := s.limits.turnAway(src.open, total); reason != "" {
		return nil, src.turnedAway(reason, addr, src.open, now)
	}
	site := siteOf(addr)
	if site.IsValid() {
		if reason := s.limits.turnAwaySite(s.sites[site], total); reason != "" {
			return nil, src.turnedAway(reason, site, s.sites[site], now)
		}
		s.sites[site]++
	}
	delete(s.rest, addr)
	s.table[addr] = src
	src.open++
	c := &SourceConn{all: s, addr: addr, source: src}
	if n := s.limits.Unfinished; n > 0 && src.unfinished >= n {
		c.turn = make(chan struct{})
		src.waiting = append(src.waiting, c)
		return c, nil
	}
	c.unfinished = true
	src.unfinished++
	return c, nil
}

// turnedAway is what is to be said of it, where addr has as many connections open.
// Sources.mu is held.
func (src *source) turnedAway(reason string, addr netip.Prefix, open int, now time.Time) *TurnedAway {
	t := &TurnedAway{Reason: reason, Source: addr, Open: open, Tell: now.Sub(src.told) >= tellEvery}
	if t.Tell {
		src.told = now
	}
	return t
}

// Wait waits until it is the connection's turn, before which nothing is to be read from
// it. Where that does not come before ctx is done it returns why.
func (c *SourceConn) Wait(ctx context.Context) *TurnedAway {
	if c == nil || c.turn == nil {
		return nil
	}
	select {
	case <-c.turn:
		return nil
	case <-ctx.Done():
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	return c.source.turnedAway(ReasonSourceUnfinished, c.addr, c.source.open, time.Now())
}

// Begun notes that the first request head has come.
func (c *SourceConn) Begun() {
	if c == nil {
		return
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.begin()
}

// begin is Begun. all.mu is held. Whoever waits longest takes the place.
func (c *SourceConn) begin() {
	if !c.unfinished {
		return
	}
	c.unfinished = false
	src := c.source
	for len(src.waiting) > 0 {
		next := src.waiting[0]
		src.waiting[0] = nil
		src.waiting = src.waiting[1:]
		if !next.closed {
			next.unfinished = true
			close(next.turn)
			return
		}
	}
	src.unfinished--
}

// Close is the end of the connection. It may be called again.
func (c *SourceConn) Close(now time.Time) {
	if c == nil {
		return
	}
	s := c.all
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.closed {
		return
	}
	c.begin()
	c.closed = true
	c.forgetShown()
	if site := siteOf(c.addr); s.sites[site] > 1 {
		s.sites[site]--
	} else {
		delete(s.sites, site)
	}
	if c.source.open--; c.source.open > 0 {
		return
	}
	delete(s.table, c.addr)
	if s.done(c.source, now) {
		return
	}
	if len(s.rest) >= maxResting {
		for a := range s.rest { // any
			delete(s.rest, a)
			break
		}
	}
	s.rest[c.addr] = c.source
}

// Spend takes cost from the budget of the source and reports whether there was as much.
func (c *SourceConn) Spend(a Abuse, cost float64, now time.Time) bool {
	if c == nil {
		return true
	}
	r := c.all.limits.Abuse[a]
	if r.Burst == 0 {
		return true
	}
	c.source.mu.Lock()
	defer c.source.mu.Unlock()
	return c.source.spent[a].Spend(cost, r, now)
}

// done reports whether a source without connections may be forgotten. s.mu is held.
func (s *Sources) done(src *source, now time.Time) bool {
	src.mu.Lock()
	defer src.mu.Unlock()
	for a, r := range s.limits.Abuse {
		if src.spent[a].Left(r, now) < r.Burst {
			return false
		}
	}
	return now.Sub(src.told) >= tellEvery
}

// sweep forgets sources, from time to time. s.mu is held.
func (s *Sources) sweep(now time.Time) {
	if len(s.rest) == 0 || now.Sub(s.swept) < sweepEvery {
		return
	}
	s.swept = now
	for addr, src := range s.rest {
		if s.done(src, now) {
			delete(s.rest, addr)
		}
	}
}
