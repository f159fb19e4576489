package balancer

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/health"
)

// fleet is a Core over backends named a, b, c..., all ready.
type fleet struct {
	*Core
	b []*backend.Backend
}

func newFleet(policy Policy, slowStart time.Duration, weights ...int) fleet {
	var f fleet
	for i, w := range weights {
		b := &backend.Backend{Name: string(rune('a' + i)), Weight: w}
		b.SetState(health.Ready, t0)
		f.b = append(f.b, b)
	}
	f.Core = &Core{Backends: backend.NewBackends(backend.NewSet(slowStart, f.b...)), Policy: policy, Bound: pick.Bound{Factor: 1.25, Floor: 16}}
	return f
}

var (
	shortRequest = &Decision{Attributes: Attributes{Verb: "get", Class: Short}}
	longRequest  = &Decision{Attributes: Attributes{Verb: "watch", Class: Long}}
)

// pickName names the backend that Pick chose; "-" where there is none.
func (f fleet) pickName(cl *Client, tried ...*backend.Backend) string {
	s := f.Pick(cl, shortRequest, tried, t0)
	if s == nil {
		return "-"
	}
	s.Release()
	return s.Backend.Name
}

func homeName(cl *Client) string {
	if h := cl.Home.At(); h != nil {
		return h.Name
	}
	return "-"
}

func TestPickKeepsHome(t *testing.T) {
	for _, policy := range []Policy{PolicyAffinity, ""} { // the zero Policy is the default
		f := newFleet(policy, 0, 1, 1, 1)
		var cl Client
		first := f.pickName(&cl)
		if homeName(&cl) != first {
			t.Errorf("home %s after %s", homeName(&cl), first)
		}
		for i := range 100 {
			if got := f.pickName(&cl); got != first {
				t.Fatalf("request %d went to %s, want the home %s", i, got, first)
			}
		}
	}
}

func TestPickSpreadsHomes(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 2, 3)
	clients := make([]Client, 60)
	for i := range clients {
		f.pickName(&clients[i])
	}
	for i, want := range []int64{10, 20, 30} {
		if _, _, homed := f.b[i].Load(); homed != want {
			t.Errorf("backend %s has %d homes, want %d", f.b[i].Name, homed, want)
		}
	}
	for i := range clients {
		clients[i].Home.Leave()
	}
	for _, b := range f.b {
		if _, _, homed := b.Load(); homed != 0 {
			t.Errorf("backend %s has %d homes after all have left", b.Name, homed)
		}
	}
}

func TestPickMovesHome(t *testing.T) {
	for _, state := range []health.State{health.Draining, health.Dead} {
		t.Run(state.String(), func(t *testing.T) {
			f := newFleet(PolicyAffinity, 0, 1, 1, 1)
			var cl Client
			f.pickName(&cl)
			old := cl.Home.At()
			old.SetState(state, t0)

			next := f.pickName(&cl)
			if next == old.Name || homeName(&cl) != next {
				t.Errorf("went to %s with the home %s, want another one than %s, and one home", next, homeName(&cl), old.Name)
			}
			if _, _, homed := old.Load(); homed != 0 {
				t.Errorf("the old home counts %d", homed)
			}
			old.SetState(health.Ready, t0)
			if got := f.pickName(&cl); got != next {
				t.Errorf("back to %s when the old home came back", got)
			}
		})
	}
}

// One request that a ready home failed goes elsewhere; the client stays.
func TestPickKeepsHomeThatFailedOnce(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 1, 1)
	var cl Client
	home := f.pickName(&cl)
	if got := f.pickName(&cl, cl.Home.At()); got == home {
		t.Fatalf("the retry went to %s again", got)
	}
	if got := homeName(&cl); got != home {
		t.Errorf("the client moved to %s, want it to stay at %s", got, home)
	}
	if got := f.pickName(&cl); got != home {
		t.Errorf("the next request went to %s, want %s", got, home)
	}
}

func TestPickLeavesTriedOut(t *testing.T) {
	for _, policy := range []Policy{PolicyAffinity, PolicyLeastRequests, PolicyRoundRobin} {
		t.Run(string(policy), func(t *testing.T) {
			f := newFleet(policy, 0, 1, 1, 1)
			for range 50 {
				var cl Client
				if got := f.pickName(&cl, f.b[0], f.b[2]); got != "b" {
					t.Fatalf("got %s with only b untried", got)
				}
				if n := f.Left(Lost, []*backend.Backend{f.b[0], f.b[2]}, t0); n != 1 {
					t.Fatalf("%d left, want 1", n)
				}
			}
			var cl Client
			if got := f.pickName(&cl, f.b...); got != "-" {
				t.Errorf("got %s with all tried", got)
			}
			if cl.Home.At() != nil {
				t.Error("a home where there is none to be had")
			}
			if n := f.Left(Lost, f.b, t0); n != 0 {
				t.Errorf("%d left of all tried", n)
			}
			if f.Left(Lost, nil, t0) != 3 {
				t.Error("not all are left at the start")
			}
		})
	}
}

// A retry goes to the draining when all ready ones have been tried, and to the dead
// at last.
func TestPickTiers(t *testing.T) {
	tests := []struct {
		name   string
		states []health.State
		tried  []int
		want   string // each that may be chosen
	}{
		{"the ready", []health.State{health.Ready, health.Draining, health.Dead, health.Ready}, nil, "ad"},
		{"the ready that are left", []health.State{health.Ready, health.Draining, health.Dead, health.Ready}, []int{0}, "d"},
		{"then the draining", []health.State{health.Ready, health.Draining, health.Dead, health.Ready}, []int{0, 3}, "b"},
		{"then the dead", []health.State{health.Ready, health.Draining, health.Dead, health.Ready}, []int{0, 1, 3}, "c"},
		{"panic: the draining", []health.State{health.Draining, health.Draining, health.Dead}, nil, "ab"},
		{"panic: the draining and the unknown", []health.State{health.Draining, health.Unknown, health.Dead}, nil, "ab"},
		{"panic: the dead", []health.State{health.Dead, health.Dead}, nil, "ab"},
		{"at the start", []health.State{health.Unknown, health.Unknown}, nil, "ab"},
		{"the first that is known to be ready", []health.State{health.Unknown, health.Ready}, nil, "b"},
	}
	for _, tt := range tests {
		for _, policy := range []Policy{PolicyAffinity, PolicyLeastRequests, PolicyRoundRobin} {
			t.Run(tt.name+"/"+string(policy), func(t *testing.T) {
				weights := make([]int, len(tt.states))
				for i := range weights {
					weights[i] = 1
				}
				f := newFleet(policy, 0, weights...)
				for i, s := range tt.states {
					f.b[i].SetState(s, t0)
				}
				var tried []*backend.Backend
				for _, i := range tt.tried {
					tried = append(tried, f.b[i])
				}
				got := map[string]bool{}
				for range 200 {
					var cl Client
					got[f.pickName(&cl, tried...)] = true
				}
				want := map[string]bool{}
				for _, r := range tt.want {
					want[string(r)] = true
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("chose %v, want %v", got, want)
				}
				if n := f.Left(Lost, tried, t0); n != len(want) {
					t.Errorf("%d left, want %d", n, len(want))
				}
			})
		}
	}
}

// One heavy client spills over beyond the bound, and keeps its home.
func TestPickSpills(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 1)
	var cl Client
	got := map[string]int{}
	for range 100 {
		s := f.Pick(&cl, shortRequest, nil, t0)
		got[s.Backend.Name]++
	}
	home := homeName(&cl)
	other := map[string]string{"a": "b", "b": "a"}[home]
	// The bound holds as long as the home carries no more than 1.25 times the mean:
	// 62.5 of 100.
	if got[home] < 61 || got[home] > 64 || got[home]+got[other] != 100 {
		t.Errorf("%v at the home %s, want about 62 of 100", got, home)
	}
	// Watches are counted apart: they stay at home.
	if s := f.Pick(&cl, longRequest, nil, t0); s.Backend.Name != home {
		t.Errorf("a watch went to %s on account of short requests", s.Backend.Name)
	}
	// A quiet client of the same home spills too, one request at a time, and comes
	// back with the load gone.
	if got := homeName(&cl); got != home {
		t.Errorf("the home has become %s", got)
	}
}

// The floor: a quiet client is never split, however idle the others are.
func TestPickDoesNotSplitQuietClient(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 1, 1)
	var cl Client
	for range 16 {
		f.Pick(&cl, shortRequest, nil, t0)
	}
	short, _, _ := cl.Home.At().Load()
	if short != 16 {
		t.Errorf("%d of 16 requests at home", short)
	}
}

func TestPickCountsClassesApart(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1)
	var cl Client
	s := f.Pick(&cl, shortRequest, nil, t0)
	l := f.Pick(&cl, longRequest, nil, t0)
	u := f.Pick(&cl, &Decision{Attributes: Attributes{Class: Upgrade}}, nil, t0)
	if short, long, homed := f.b[0].Load(); short != 1 || long != 2 || homed != 1 {
		t.Errorf("load %d short, %d long, %d homes; want 1, 2, 1", short, long, homed)
	}
	for _, slot := range []*backend.Slot{s, l, u, s, l, u} {
		slot.Release()
	}
	if short, long, _ := f.b[0].Load(); short != 0 || long != 0 {
		t.Errorf("load %d short, %d long after all has ended", short, long)
	}
}

func TestPickByWeight(t *testing.T) {
	t.Run("least-requests", func(t *testing.T) {
		f := newFleet(PolicyLeastRequests, 0, 1, 3)
		var cl Client
		for range 400 {
			f.Pick(&cl, shortRequest, nil, t0)
		}
		if a, _, _ := f.b[0].Load(); a < 90 || a > 110 {
			t.Errorf("%d of 400 requests in flight on a quarter of the weight", a)
		}
		if cl.Home.At() != nil {
			t.Error("a policy without homes has made one")
		}
	})
	t.Run("round-robin", func(t *testing.T) {
		f := newFleet(PolicyRoundRobin, 0, 1, 3)
		var cl Client
		got := map[string]int{}
		for range 400 {
			got[f.pickName(&cl)]++
		}
		if got["a"] < 98 || got["a"] > 102 {
			t.Errorf("%v, want 100 and 300", got)
		}
		if cl.Home.At() != nil {
			t.Error("a policy without homes has made one")
		}
	})
}

// The first requests of an HTTP/2 client come at once. Two runners meet before each
// client, so that both find it without a home now and then.
func TestPickConcurrentFirstRequests(t *testing.T) {
	const rounds = 20000
	f := newFleet(PolicyAffinity, 0, 1, 1, 1)
	clients := make([]Client, rounds)
	var names [2][rounds]string
	var arrived atomic.Int64
	var wg sync.WaitGroup
	for runner := range names {
		wg.Go(func() {
			for i := range clients {
				arrived.Add(1)
				for arrived.Load() < int64(len(names)*(i+1)) {
					runtime.Gosched()
				}
				names[runner][i] = f.pickName(&clients[i])
			}
		})
	}
	wg.Wait()
	for i := range clients {
		if home := homeName(&clients[i]); names[0][i] != home || names[1][i] != home {
			t.Fatalf("client %d: the requests went to %s and %s, the home is %s", i, names[0][i], names[1][i], home)
		}
		clients[i].Home.Leave()
	}
	for _, b := range f.b {
		if short, long, homed := b.Load(); short != 0 || long != 0 || homed != 0 {
			t.Errorf("backend %s is left with %d, %d, %d", b.Name, short, long, homed)
		}
	}
}

// A connection that ends while a request of it looks for a backend, or goes on to
// look for one, leaves nothing behind in the counts.
func TestPickAfterClientLeft(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 1)
	var cl Client
	f.pickName(&cl)
	cl.Home.Leave()
	if got := f.pickName(&cl); got == "-" {
		t.Error("no backend for a request that goes on")
	}
	for range 200 {
		var cl Client
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { f.pickName(&cl) })
		}
		wg.Go(cl.Home.Leave)
		wg.Wait()
	}
	for _, b := range f.b {
		if _, _, homed := b.Load(); homed != 0 {
			t.Errorf("backend %s counts %d homes of connections that have ended", b.Name, homed)
		}
	}
}

// A backend that has come back starts with a tenth of its weight.
func TestPickSlowStart(t *testing.T) {
	f := newFleet(PolicyRoundRobin, 30*time.Second, 1, 1)
	f.b[1].SetState(health.Dead, t0)
	f.b[1].SetState(health.Ready, t0)
	for _, tt := range []struct {
		after    time.Duration
		min, max int // of 1,000 turns
	}{
		{0, 85, 97},                     // 0.1 of 1.1
		{15 * time.Second, 325, 340},    // 0.5 of 1.5
		{30 * time.Second, 495, 505},    // done
		{10 * time.Second, 495, 505},    // and stays so, whatever the clock does
		{3600 * time.Second, 495, 505},  //
		{-3600 * time.Second, 495, 505}, //
	} {
		var cl Client
		n := 0
		for range 1000 {
			s := f.Pick(&cl, shortRequest, nil, t0.Add(tt.after))
			if s.Backend == f.b[1] {
				n++
			}
			s.Release()
		}
		if n < tt.min || n > tt.max {
			t.Errorf("after %v: %d of 1000, want %d to %d", tt.after, n, tt.min, tt.max)
		}
	}
}

// Clients come, ask, are retried and go; backends change state. Requests only ever
// go to a backend that is usable and untried, a home that is usable is kept, and
// the counts are those of what is there.
func TestPickModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFleet(PolicyAffinity, 10*time.Second, rapid.SliceOfN(rapid.IntRange(1, 5), 1, 4).Draw(t, "weights")...)
		now := t0
		var clients []*Client
		var slots []*backend.Slot
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) { now = now.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "seconds")) * time.Second) },
			"state": func(t *rapid.T) {
				b := rapid.SampledFrom(f.b).Draw(t, "backend")
				b.SetState(rapid.SampledFrom(health.States()).Draw(t, "state"), now)
			},
			"connect": func(*rapid.T) { clients = append(clients, &Client{}) },
			"leave": func(t *rapid.T) {
				if len(clients) == 0 {
					t.Skip("nobody is there")
				}
				i := rapid.IntRange(0, len(clients)-1).Draw(t, "client")
				clients[i].Home.Leave()
				clients = append(clients[:i], clients[i+1:]...)
			},
			"request": func(t *rapid.T) {
				if len(clients) == 0 {
					t.Skip("nobody is there")
				}
				cl := rapid.SampledFrom(clients).Draw(t, "client")
				d := rapid.SampledFrom([]*Decision{shortRequest, longRequest}).Draw(t, "request")
				tried := f.b[:rapid.IntRange(0, len(f.b)).Draw(t, "tried")]
				before := cl.Home.At()
				best, worst := health.State(255), 0
				for _, b := range f.b[len(tried):] {
					if r := rank(b.State()); r >= worst {
						worst, best = r, b.State()
					}
				}
				left := f.Left(Lost, tried, now)
				s := f.Pick(cl, d, tried, now)
				if (s == nil) != (len(tried) == len(f.b)) || (left == 0) != (s == nil) {
					t.Fatalf("slot %v with %d of %d tried, %d left", s, len(tried), len(f.b), left)
				}
				if s == nil {
					return
				}
				slots = append(slots, s)
				if i := f.Backends.Set().Index(s.Backend); i < len(tried) {
					t.Fatalf("backend %d had been tried", i)
				}
				if rank(s.Backend.State()) != worst {
					t.Fatalf("chose a %s backend where there are %s ones", s.Backend.State(), best)
				}
				if before != nil && f.Backends.Set().Index(before) >= len(tried) && rank(before.State()) == worst && cl.Home.At() != before {
					t.Fatal("a usable home was left")
				}
			},
			"answer": func(t *rapid.T) {
				if len(slots) == 0 {
					t.Skip("nothing is in flight")
				}
				slots[0].Release()
				slots[0].Release()
				slots = slots[1:]
			},
			"": func(t *rapid.T) {
				for _, b := range f.b {
					var wantHomed, inFlight int64
					for _, cl := range clients {
						if cl.Home.At() == b {
							wantHomed++
						}
					}
					for _, s := range slots {
						if s.Backend == b {
							inFlight++
						}
					}
					short, long, homed := b.Load()
					if homed != wantHomed || short+long != inFlight || short < 0 || long < 0 {
						t.Fatalf("backend %s: %d short, %d long, %d homes; want %d requests, %d homes", b.Name, short, long, homed, inFlight, wantHomed)
					}
				}
			},
		})
	})
}

// rank orders the states as health.Usable does.
func rank(s health.State) int {
	switch s {
	case health.Ready:
		return 2
	case health.Dead:
		return 0
	}
	return 1
}
