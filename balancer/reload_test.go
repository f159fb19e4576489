package balancer

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// TestPickAcrossReloads replaces the backends while they are picked: once nothing runs
// on one that has been removed, nothing begins there any more, whatever the policy.
func TestPickAcrossReloads(t *testing.T) {
	for _, policy := range []Policy{PolicyAffinity, PolicyLeastRequests, PolicyRoundRobin} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			f := newFleet(policy, 0, 1, 1)
			var (
				wg   sync.WaitGroup
				stop atomic.Bool
				gone sync.Map // of *backend.Backend: what is at rest
			)
			for range 4 {
				wg.Go(func() {
					cl := new(Client)
					d := &Decision{}
					for !stop.Load() {
						s := f.Pick(cl, d, nil, t0)
						if s == nil {
							t.Error("no backend")
							return
						}
						if _, ok := gone.Load(s.Backend); ok {
							t.Error("a backend that was at rest after its removal was picked")
							return
						}
						s.Release()
					}
					cl.Home.Leave()
				})
			}
			for range 2000 {
				var next []*backend.Backend
				for range 2 {
					b := &backend.Backend{Name: "next", Weight: 1}
					b.SetState(health.Ready, t0)
					next = append(next, b)
				}
				before := f.Backends.Set()
				f.Backends.Replace(backend.NewSet(0, next...))
				for _, b := range before.All() {
					for {
						if short, long, _ := b.Load(); short+long == 0 {
							break
						}
						time.Sleep(time.Microsecond)
					}
					gone.Store(b, true)
				}
			}
			stop.Store(true)
			wg.Wait()
			for _, b := range f.Backends.Set().All() {
				if short, long, homed := b.Load(); short+long+homed != 0 {
					t.Errorf("%d, %d requests and %d homes at the end", short, long, homed)
				}
			}
		})
	}
}

// TestHomeAcrossReloads: a client whose home is removed gets another one with its next
// request; one whose home stays, stays.
func TestHomeAcrossReloads(t *testing.T) {
	f := newFleet(PolicyAffinity, 0, 1, 1, 1)
	cl, d := new(Client), &Decision{}
	f.Pick(cl, d, nil, t0).Release()
	home := cl.Home.At()
	others := func() (list []*backend.Backend) {
		for _, b := range f.b {
			if b != home {
				list = append(list, b)
			}
		}
		return list
	}()
	f.Backends.Replace(backend.NewSet(0, others[0], home))
	f.Pick(cl, d, nil, t0).Release()
	if cl.Home.At() != home {
		t.Fatal("the home moved although it is still in the set")
	}
	f.Backends.Replace(backend.NewSet(0, others...))
	s := f.Pick(cl, d, nil, t0)
	s.Release()
	if s.Backend == home || cl.Home.At() != s.Backend {
		t.Fatalf("picked %s, home %s: want a new home", s.Backend.Name, cl.Home.At().Name)
	}
	if _, _, homed := home.Load(); homed != 0 {
		t.Errorf("%d homes at the removed backend", homed)
	}
}
