package balancer

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestTurnAway(t *testing.T) {
	for _, tt := range []struct {
		name        string
		limits      SourceLimits
		open, total int
		want        string
	}{
		{"no limits", SourceLimits{}, 1 << 30, 1 << 30, ""},
		{"the last connection", SourceLimits{Connections: 10}, 9, 10, ""},
		{"one too many", SourceLimits{Connections: 10}, 10, 11, ReasonSourceConnections},
		{"a source alone", SourceLimits{Most: 900}, 799, 800, ""},
		{"a source alone that leaves a ninth", SourceLimits{Most: 900}, 801, 802, ReasonSourceShare},
		{"a newcomer beside it", SourceLimits{Most: 900}, 0, 802, ""},
		{"a newcomer at the last connection", SourceLimits{Most: 900}, 0, 900, ""},
		{"its second at the last but one", SourceLimits{Most: 900}, 1, 899, ""},
		{"its second at the last", SourceLimits{Most: 900}, 1, 900, ReasonSourceShare},
		{"one of ten large ones", SourceLimits{Most: 900}, 95, 890, ReasonSourceShare},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.limits.turnAway(tt.open, tt.total); got != tt.want {
				t.Errorf("turnAway = %q, want %q", got, tt.want)
			}
		})
	}
}

var sourcesBegin = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func TestSourcesExempt(t *testing.T) {
	s := NewSources(SourceLimits{Connections: 1, Most: 1, Exempt: Networks{netip.MustParsePrefix("10.1.0.0/24")}})
	for _, a := range []string{"10.1.0.7", "::ffff:10.1.0.7"} {
		for range 3 {
			if c, away := s.Open(netip.MustParseAddr(a), 3, sourcesBegin); c != nil || away != nil {
				t.Errorf("Open(%s) = %v, %v, want it to be of no source", a, c, away)
			}
		}
	}
	if c, away := s.Open(netip.Addr{}, 3, sourcesBegin); c != nil || away != nil {
		t.Errorf("Open(no address) = %v, %v", c, away)
	}
	var none *SourceConn
	none.Begun()
	none.Close(sourcesBegin)
	if !none.Spend(AbuseResets, 1e9, sourcesBegin) {
		t.Error("what is exempt has a budget")
	}
}

// A source is told of once a minute, however often it is turned away.
func TestSourcesTell(t *testing.T) {
	s := NewSources(SourceLimits{Connections: 1})
	a := netip.MustParseAddr("192.0.2.7")
	c, _ := s.Open(a, 1, sourcesBegin)
	told := 0
	for i := range 300 {
		if _, away := s.Open(a, 1, sourcesBegin.Add(time.Duration(i)*time.Second)); away.Tell {
			told++
		}
	}
	if told != 5 {
		t.Errorf("told %d times in 5 minutes", told)
	}
	c.Close(sourcesBegin.Add(299 * time.Second))
	if len(s.rest) != 1 {
		t.Error("who has just been told of is forgotten, to be told of again at once")
	}
}

// What was spent stays spent when the connection has gone, and comes back with time; so
// does memory.
func TestSourcesBudget(t *testing.T) {
	var l SourceLimits
	l.Abuse[AbuseResets] = Refill{Burst: 10, Rate: 1}
	s := NewSources(l)
	a, b, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("2001:db8:0:1::1")
	open := func(a netip.Addr, now time.Time) *SourceConn {
		c, away := s.Open(a, 1, now)
		if away != nil {
			t.Fatal(away)
		}
		return c
	}
	now := sourcesBegin
	c := open(a, now)
	if !c.Spend(AbuseResets, 10, now) {
		t.Error("a new source has no budget")
	}
	if !c.Spend(AbuseControl, 1e9, now) {
		t.Error("there is a limit where none is set")
	}
	c.Close(now)
	c = open(b, now.Add(time.Second))
	if c.Spend(AbuseResets, 2, now.Add(time.Second)) {
		t.Error("to connect anew has filled the budget")
	}
	if !c.Spend(AbuseResets, 1, now.Add(time.Second)) {
		t.Error("a second has brought nothing")
	}
	if d := open(other, now); !d.Spend(AbuseResets, 10, now) {
		t.Error("another /64 has to pay")
	}
	c.Close(now.Add(time.Second))
	if len(s.rest) != 1 {
		t.Errorf("%d sources at rest, want 1", len(s.rest))
	}
	open(netip.MustParseAddr("192.0.2.1"), now.Add(time.Hour))
	if len(s.rest) != 0 {
		t.Errorf("%d sources at rest after an hour", len(s.rest))
	}
}

// The table does not grow without end.
func TestSourcesBounded(t *testing.T) {
	var l SourceLimits
	l.Abuse[AbuseResets] = Refill{Burst: 10, Rate: 1}
	s := NewSources(l)
	for i := range maxResting + 100 {
		c, _ := s.Open(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1, sourcesBegin)
		c.Spend(AbuseResets, 1, sourcesBegin)
		c.Close(sourcesBegin)
	}
	if len(s.rest) != maxResting || len(s.table) != 0 {
		t.Errorf("%d sources at rest, %d with connections", len(s.rest), len(s.table))
	}
}

// Whoever has a /48 of IPv6 is not 65,536 sources.
func TestSourcesSite(t *testing.T) {
	address := func(site, i int) netip.Addr {
		return netip.MustParseAddr(fmt.Sprintf("2001:db8:%x:%x::1", site, i))
	}
	for _, tt := range []struct {
		name   string
		limits SourceLimits
		most   int // that one site gets
		reason string
	}{
		{"connections", SourceLimits{Connections: 10}, 80, ReasonSourceConnections},
		{"share", SourceLimits{Most: 650}, 640, ReasonSourceShare},
		{"no limits", SourceLimits{}, 1000, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewSources(tt.limits)
			var conns []*SourceConn
			open := func(a netip.Addr) *TurnedAway {
				c, away := s.Open(a, len(conns)+1, sourcesBegin)
				if away == nil {
					conns = append(conns, c)
				}
				return away
			}
			var away *TurnedAway
			for i := 0; i < 1000 && away == nil; i++ {
				away = open(address(1, i))
			}
			if n := len(conns); n < tt.most || n > tt.most+siteSources {
				t.Errorf("%d connections of one site, want %d", n, tt.most)
			}
			if tt.reason != "" {
				if away == nil || away.Reason != tt.reason || away.Source != netip.MustParsePrefix("2001:db8:1::/48") || away.Open != len(conns) || !away.Tell {
					t.Errorf("turned away: %+v", away)
				}
			}
			for _, a := range []netip.Addr{address(2, 1), address(3, 1), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")} {
				if away := open(a); away != nil {
					t.Errorf("%s is turned away: %+v", a, away)
				}
			}
			for _, c := range conns {
				c.Close(sourcesBegin)
				c.Close(sourcesBegin)
			}
			if len(s.sites)+len(s.table) > 0 {
				t.Errorf("left behind: %v, %v", s.sites, s.table)
			}
		})
	}
}

// may reports whether it is the connection's turn.
func (c *SourceConn) may() bool {
	if c.turn == nil {
		return true
	}
	select {
	case <-c.turn:
		return true
	default:
		return false
	}
}

// Who waits has its turn when another one of the source begins or is gone, in order, and
// hears why when it does not come in time.
func TestSourcesWait(t *testing.T) {
	s := NewSources(SourceLimits{Unfinished: 1})
	from := netip.MustParseAddr("192.0.2.1")
	open := func() *SourceConn {
		t.Helper()
		c, away := s.Open(from, 1, sourcesBegin)
		if away != nil {
			t.Fatal(away)
		}
		return c
	}
	first, second, third, fourth := open(), open(), open(), open()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	want := &TurnedAway{Reason: ReasonSourceUnfinished, Source: netip.MustParsePrefix("192.0.2.1/32"), Open: 4, Tell: true}
	if diff := cmp.Diff(want, third.Wait(over), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("Wait (-want +got)\n%s", diff)
	}
	if !first.may() || second.may() {
		t.Error("not the first one alone may begin")
	}
	third.Close(sourcesBegin)
	first.Begun()
	if away := second.Wait(t.Context()); away != nil || fourth.may() {
		t.Errorf("after the first has begun: %v", away)
	}
	second.Close(sourcesBegin)
	if away := fourth.Wait(t.Context()); away != nil {
		t.Errorf("after the second is gone: %v", away)
	}
}

// Whatever comes and goes: no limit is exceeded, who has no connection gets one as long
// as there is any, counts are right, and all is forgotten in the end.
func TestSourcesRapid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := SourceLimits{
			Connections: rapid.IntRange(0, 6).Draw(t, "connections"),
			Unfinished:  rapid.IntRange(0, 4).Draw(t, "unfinished"),
			Most:        rapid.IntRange(1, 20).Draw(t, "most"),
		}
		s := NewSources(l)
		now := sourcesBegin
		type conn struct {
			*SourceConn
			source, state int // 0: waiting or unfinished, 1: begun
		}
		var open []conn
		count := func(source, state int) (n int) {
			for _, c := range open {
				if c.source == source && c.state <= state {
					n++
				}
			}
			return n
		}
		address := func(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", i)) }
		t.Repeat(map[string]func(*rapid.T){
			"open": func(t *rapid.T) {
				i := rapid.IntRange(0, 9).Draw(t, "source")
				if len(open) == l.Most {
					t.Skip("the server is full")
				}
				mine := count(i, 1)
				c, away := s.Open(address(i), len(open)+1, now)
				over := l.Connections > 0 && mine >= l.Connections
				switch {
				case over && away == nil:
					t.Fatalf("source %d has %d, and gets one more", i, mine)
				case !over && mine == 0 && away != nil:
					t.Fatalf("a newcomer is turned away: %+v", away)
				case away != nil && away.Open != mine:
					t.Fatalf("source %d is said to have %d, and has %d", i, away.Open, mine)
				case away == nil:
					open = append(open, conn{c, i, 0})
				}
				// Whoever has less gets one where this one did.
				for j := range 10 {
					if n := count(j, 1); away == nil && n < mine && l.turnAway(n, len(open)) == ReasonSourceShare {
						t.Fatalf("source %d with %d got one, source %d with %d would not", i, mine, j, n)
					}
				}
			},
			"begin": func(t *rapid.T) {
				if len(open) == 0 {
					t.Skip("none is open")
				}
				i := rapid.IntRange(0, len(open)-1).Draw(t, "connection")
				if !open[i].may() {
					t.Skip("it waits")
				}
				open[i].Begun()
				open[i].state = 1
			},
			"close": func(t *rapid.T) {
				if len(open) == 0 {
					t.Skip("none is open")
				}
				i := rapid.IntRange(0, len(open)-1).Draw(t, "connection")
				open[i].Close(now)
				open[i].Close(now)
				open = slices.Delete(open, i, i+1)
			},
			"": func(t *rapid.T) {
				for i := range 10 {
					src := s.table[sourceOf(address(i))]
					n, want := count(i, 1), count(i, 0)
					if l.Unfinished > 0 {
						want = min(want, l.Unfinished)
					}
					if n == 0 != (src == nil) || n > 0 && (src.open != n || src.unfinished != want) {
						t.Fatalf("source %d has %d, want %d unfinished: %+v", i, n, want, src)
					}
					// Those who came first are those who may.
					var waits bool
					for _, c := range open {
						if c.source != i || c.state != 0 {
							continue
						}
						if may := c.may(); may {
							want--
							if waits {
								t.Fatalf("source %d: one may that came after one that waits", i)
							}
						} else {
							waits = true
						}
					}
					if n > 0 && want != 0 {
						t.Fatalf("source %d: %d fewer may than could", i, want)
					}
				}
			},
		})
		for _, c := range open {
			c.Close(now)
		}
		now = now.Add(time.Hour)
		s.sweep(now)
		if len(s.table)+len(s.rest) > 0 {
			t.Fatalf("%d sources with connections, %d at rest at the end", len(s.table), len(s.rest))
		}
	})
}
