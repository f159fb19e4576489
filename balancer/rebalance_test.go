package balancer

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/health"
)

// crowd is clients that send requests at rates of their own.
type crowd struct {
	core    *Core
	now     time.Time
	clients []*Client
	rates   []float64
	random  *rand.Rand
	moves   int
	served  map[string]float64 // requests in the last ten seconds
}

func newCrowd(slowStart time.Duration, backends int, rates []float64) *crowd {
	f := &crowd{now: t0, rates: rates, random: rand.New(rand.NewPCG(1, 2)), served: map[string]float64{}}
	var all []*backend.Backend
	for i := range backends {
		b := &backend.Backend{Name: fmt.Sprint(i), Weight: 1}
		b.SetState(health.Ready, t0)
		all = append(all, b)
	}
	f.core = &Core{Backends: backend.NewBackends(backend.NewSet(slowStart, all...)), Bound: pick.Bound{Factor: 1.25, Floor: 16}, Rebalance: NewRebalance(slowStart)}
	for range rates {
		f.clients = append(f.clients, new(Client))
	}
	return f
}

// run lets clients send requests for a number of seconds, and calls each at the end of
// every one of them.
func (f *crowd) run(seconds int, each func(second int)) {
	const ticks = 20
	for second := range seconds {
		if seconds-second == 10 {
			clear(f.served)
		}
		f.core.Rebalance.step(f.core.Backends.Set(), f.now)
		for range ticks {
			f.now = f.now.Add(time.Second / ticks)
			for i, cl := range f.clients {
				for p := f.rates[i] / ticks; p > 0; p-- {
					if p < 1 && f.random.Float64() >= p {
						continue
					}
					before := cl.Home.At()
					slot := f.core.Pick(cl, &Decision{}, nil, f.now)
					f.served[slot.Backend.Name]++
					slot.Release()
					if before != nil && before.Ready() && before != cl.Home.At() {
						f.moves++
					}
				}
			}
		}
		if each != nil {
			each(second)
		}
	}
}

// ratio is that of the largest to the smallest part of what was served.
func (f *crowd) ratio() float64 {
	var least, most float64
	for i, b := range f.core.Backends.Set().All() {
		n := f.served[b.Name]
		if i == 0 || n < least {
			least = n
		}
		most = max(most, n)
	}
	return most / max(least, 1)
}

func (f *crowd) fail(i int) {
	f.core.Backends.Set().All()[i].SetState(health.Dead, f.now)
}

func (f *crowd) recover(i int) {
	f.core.Backends.Set().All()[i].SetState(health.Ready, f.now)
}

func rates(n int, rate float64) []float64 {
	list := make([]float64, n)
	for i := range list {
		list[i] = rate
	}
	return list
}

// A backend that has come back gets its share of the clients that stand, and only then
// does anybody move.
func TestRebalance(t *testing.T) {
	mixed := append(rates(200, 0.5), rates(30, 5)...)
	for i := range 9 {
		mixed = append(mixed, float64(10+i))
	}
	for _, tt := range []struct {
		name      string
		rates     []float64
		slowStart time.Duration
		within    int // seconds
	}{
		{"like clients", rates(60, 5), 10 * time.Second, 60},
		{"30 workers and 9 that are idle", append(rates(30, 10), rates(9, 0)...), 30 * time.Second, 60},
		{"kubelets", rates(2000, 0.1), 30 * time.Second, 85},
		{"all kinds", mixed, 30 * time.Second, 60},
		{"without a slow start", rates(60, 5), 0, 55},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newCrowd(tt.slowStart, 3, tt.rates)
			f.run(20, nil)
			if f.moves != 0 {
				t.Fatalf("%d moves before anything has happened", f.moves)
			}
			f.fail(0)
			f.run(20, nil)
			f.recover(0)
			f.moves = 0
			var most, before int
			f.run(tt.within, func(int) {
				most = max(most, f.moves-before)
				before = f.moves
			})
			if r := f.ratio(); r > 1.3 {
				t.Errorf("%v: the largest part is %.2f of the smallest after %d s", f.served, r, tt.within)
			}
			if n := len(tt.rates); most > 1+n/10 {
				t.Errorf("%d of %d clients moved within a second", most, n)
			}
			f.run(100, nil)
			f.moves = 0
			f.run(30, nil)
			if f.moves != 0 || f.core.Rebalance.active.Load() {
				t.Errorf("%d moves long after", f.moves)
			}
		})
	}
}

// A client that is more than the excess stays: it would only be the excess elsewhere.
func TestRebalanceLeavesTheHeavyOne(t *testing.T) {
	f := newCrowd(0, 2, append(rates(10, 1), 200))
	f.run(10, nil)
	heavy := f.clients[10]
	f.fail(1)
	f.run(5, nil)
	home := heavy.Home.At()
	f.recover(1)
	f.run(60, func(second int) {
		if heavy.Home.At() != home {
			t.Fatalf("moved in second %d", second)
		}
	})
	if f.moves > 10 {
		t.Errorf("%d moves of ten clients", f.moves)
	}
}

func TestExcessOfNobody(t *testing.T) {
	r := NewRebalance(0)
	set := backend.NewSet(0)
	r.step(set, t0)
	r.step(set, t0.Add(time.Second))
	if r.move(new(Client), &backend.Backend{}, t0) != nil {
		t.Error("moved")
	}
}
