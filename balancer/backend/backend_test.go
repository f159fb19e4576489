package backend

import (
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"apiserver-lb/balancer/pick"
	"apiserver-lb/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var t0 = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func TestSlotIsReleasedOnce(t *testing.T) {
	var b Backend
	first, second := b.Acquire(false), b.Acquire(false)
	watch := b.Acquire(true)
	if short, long, _ := b.Load(); short != 2 || long != 1 {
		t.Fatalf("load %d short, %d long", short, long)
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(first.Release)
	}
	wg.Wait()
	if short, long, _ := b.Load(); short != 1 || long != 1 {
		t.Errorf("load %d short, %d long after one of two has ended, ten times over", short, long)
	}
	watch.Release()
	watch.Release()
	second.Release()
	if short, long, _ := b.Load(); short != 0 || long != 0 {
		t.Errorf("load %d short, %d long at the end", short, long)
	}
	if first.Backend != &b {
		t.Error("a slot of another backend")
	}
}

func TestLastAnswer(t *testing.T) {
	var b Backend
	if !b.LastAnswer().IsZero() {
		t.Errorf("an answer at %v before any", b.LastAnswer())
	}
	b.Answered(t0)
	if !b.LastAnswer().Equal(t0) {
		t.Errorf("last answer %v, want %v", b.LastAnswer(), t0)
	}
}

func TestRamp(t *testing.T) {
	const slow = 20 * time.Second
	tests := []struct {
		name   string
		states []health.State // one after the other, at t0
		slow   time.Duration
		after  time.Duration
		want   float64
	}{
		{"never judged", nil, slow, 0, 1},
		{"ready at the first verdict", []health.State{health.Ready}, slow, 0, 1},
		{"back from the dead", []health.State{health.Ready, health.Dead, health.Ready}, slow, 0, 0.1},
		{"back from draining", []health.State{health.Ready, health.Draining, health.Ready}, slow, 0, 0.1},
		{"dead, draining, back", []health.State{health.Dead, health.Draining, health.Ready}, slow, 0, 0.1},
		{"dead at the first verdict, then up", []health.State{health.Dead, health.Ready}, slow, 0, 0.1},
		{"ready twice is no coming back", []health.State{health.Ready, health.Ready}, slow, 0, 1},
		{"the floor lasts a tenth of the time", []health.State{health.Dead, health.Ready}, slow, 2 * time.Second, 0.1},
		{"a quarter", []health.State{health.Dead, health.Ready}, slow, 5 * time.Second, 0.25},
		{"half", []health.State{health.Dead, health.Ready}, slow, 10 * time.Second, 0.5},
		{"almost", []health.State{health.Dead, health.Ready}, slow, 19 * time.Second, 0.95},
		{"done", []health.State{health.Dead, health.Ready}, slow, 20 * time.Second, 1},
		{"long done", []health.State{health.Dead, health.Ready}, slow, time.Hour, 1},
		{"off", []health.State{health.Dead, health.Ready}, 0, 0, 1},
		{"the clock set back", []health.State{health.Dead, health.Ready}, slow, -time.Hour, 0.1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b Backend
			for _, s := range tt.states {
				b.SetState(s, t0)
			}
			if got := b.ramp(tt.slow, t0.Add(tt.after)); math.Abs(got-tt.want) > 1e-9 {
				t.Errorf("ramp = %v, want %v", got, tt.want)
			}
		})
	}
}

func TestRampBeginsAnew(t *testing.T) {
	var b Backend
	const slow = 10 * time.Second
	b.SetState(health.Dead, t0)
	b.SetState(health.Ready, t0)
	if got := b.ramp(slow, t0.Add(slow)); got != 1 {
		t.Fatalf("ramp = %v at the end", got)
	}
	b.SetState(health.Dead, t0.Add(time.Minute))
	b.SetState(health.Ready, t0.Add(2*time.Minute))
	if got := b.ramp(slow, t0.Add(2*time.Minute+5*time.Second)); got != 0.5 {
		t.Errorf("ramp = %v in the middle of the second time, want 0.5", got)
	}
}

func TestView(t *testing.T) {
	const slow = 10 * time.Second
	backends := make([]*Backend, 4)
	for i := range backends {
		backends[i] = &Backend{Name: fmt.Sprint(i), Weight: i + 1}
	}
	set := NewSet(slow, backends...)
	states := func(ss ...health.State) {
		for i, s := range ss {
			backends[i].SetState(s, t0)
		}
	}
	usable := func(tried ...*Backend) (got []bool) {
		for _, c := range set.View(nil, tried, t0) {
			got = append(got, c.Usable)
		}
		return got
	}
	tests := []struct {
		name      string
		states    []health.State
		tried     []*Backend
		want      []bool
		panicking bool
	}{
		{"before any verdict", []health.State{0, 0, 0, 0}, nil, []bool{true, true, true, true}, false},
		{"all ready", []health.State{health.Ready, health.Ready, health.Ready, health.Ready}, nil, []bool{true, true, true, true}, false},
		{"ready beat the others", []health.State{health.Ready, health.Draining, health.Dead, health.Unknown}, nil, []bool{true, false, false, false}, false},
		{"those tried are out", []health.State{health.Ready, health.Ready, health.Dead, health.Draining}, backends[:1], []bool{false, true, false, false}, false},
		{"no ready one is left", []health.State{health.Ready, health.Ready, health.Dead, health.Draining}, backends[:2], []bool{false, false, false, true}, false},
		{"but the dead", []health.State{health.Ready, health.Ready, health.Dead, health.Draining}, []*Backend{backends[0], backends[1], backends[3]}, []bool{false, false, true, false}, false},
		{"nothing is left", []health.State{health.Ready, health.Ready, health.Ready, health.Ready}, backends, []bool{false, false, false, false}, false},
		{"panic", []health.State{health.Draining, health.Dead, health.Unknown, health.Dead}, nil, []bool{true, false, true, false}, true},
		{"panic with nobody alive", []health.State{health.Dead, health.Dead, health.Dead, health.Dead}, nil, []bool{true, true, true, true}, true},
		{"somebody else's backend has been tried", []health.State{health.Dead, health.Dead, health.Dead, health.Ready}, []*Backend{{}}, []bool{false, false, false, true}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			states(tt.states...)
			if diff := cmp.Diff(tt.want, usable(tt.tried...)); diff != "" {
				t.Errorf("usable (-want +got)\n%s", diff)
			}
			if got := set.Panicking(); got != tt.panicking {
				t.Errorf("Panicking = %v", got)
			}
		})
	}
}

func TestViewOfLoads(t *testing.T) {
	a, b := &Backend{Weight: 2}, &Backend{Weight: 10}
	set := NewSet(10*time.Second, a, b)
	a.SetState(health.Ready, t0)
	b.SetState(health.Dead, t0)
	b.SetState(health.Ready, t0)
	a.Acquire(false)
	a.Acquire(false)
	a.Acquire(true)
	var h Home
	h.Move(nil, b)

	prior := pick.Candidate{Short: 99}
	got := set.View([]pick.Candidate{prior}, nil, t0.Add(5*time.Second))
	want := []pick.Candidate{prior, {Usable: true, Weight: 2, Short: 2, Long: 1}, {Usable: true, Weight: 5, Homed: 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// More backends than the view has room for on the stack.
func TestViewOfMany(t *testing.T) {
	var all []*Backend
	for range 20 {
		b := &Backend{Weight: 1}
		b.SetState(health.Ready, t0)
		all = append(all, b)
	}
	set := NewSet(0, all...)
	var room [8]pick.Candidate
	view := set.View(room[:0], all[:5], t0)
	for i, c := range view {
		if c.Usable != (i >= 5) {
			t.Errorf("backend %d: usable %v", i, c.Usable)
		}
	}
	if len(view) != 20 || set.Index(all[19]) != 19 || set.Index(&Backend{}) >= 0 || set.Index(nil) >= 0 || len(set.All()) != 20 {
		t.Error("not every backend has its place")
	}
}

func TestViewOfNone(t *testing.T) {
	set := NewSet(0)
	if got := set.View(nil, nil, t0); len(got) != 0 || set.Panicking() {
		t.Errorf("%v, panicking %v", got, set.Panicking())
	}
}

func TestHomeMove(t *testing.T) {
	a, b := &Backend{}, &Backend{}
	homed := func(want1, want2 int64) {
		t.Helper()
		if a.homed.Load() != want1 || b.homed.Load() != want2 {
			t.Errorf("%d and %d homes, want %d and %d", a.homed.Load(), b.homed.Load(), want1, want2)
		}
	}
	var h Home
	if h.At() != nil {
		t.Error("the zero Home has one")
	}
	if got := h.Move(nil, a); got != a || h.At() != a {
		t.Error("not moved")
	}
	homed(1, 0)
	if got := h.Move(nil, b); got != a || h.At() != a {
		t.Error("a move from where the client is not has taken place")
	}
	homed(1, 0)
	if got := h.Move(a, a); got != a {
		t.Error("cannot stay")
	}
	homed(1, 0)
	if got := h.Move(a, b); got != b || h.At() != b {
		t.Error("not moved")
	}
	homed(0, 1)
	if got := h.Move(b, nil); got != nil || h.At() != nil {
		t.Error("not moved out")
	}
	homed(0, 0)
	h.Move(nil, b)
	h.Leave()
	h.Leave()
	homed(0, 0)
	if got := h.Move(nil, a); got != nil || h.At() != nil {
		t.Error("a client that has left has a home again")
	}
	if got := h.Move(b, a); got != nil {
		t.Error("a client that has left has a home again")
	}
	homed(0, 0)
}

func TestHomeLeaveWithout(t *testing.T) {
	var h Home
	h.Leave()
	if h.At() != nil {
		t.Error("a home out of nothing")
	}
}

// Moves and leaves in any order, from right and from wrong places.
func TestHomeModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		backends := []*Backend{{Name: "a"}, {Name: "b"}, {Name: "c"}}
		anyone := rapid.SampledFrom(append(backends, nil))
		homes := make([]Home, 4)
		at := make([]*Backend, len(homes))
		left := make([]bool, len(homes))
		t.Repeat(map[string]func(*rapid.T){
			"move": func(t *rapid.T) {
				i := rapid.IntRange(0, len(homes)-1).Draw(t, "client")
				from, to := anyone.Draw(t, "from"), anyone.Draw(t, "to")
				if !left[i] && at[i] == from {
					at[i] = to
				}
				if got := homes[i].Move(from, to); got != at[i] {
					t.Fatalf("Move = %v, want %v", got, at[i])
				}
			},
			"leave": func(t *rapid.T) {
				i := rapid.IntRange(0, len(homes)-1).Draw(t, "client")
				homes[i].Leave()
				at[i], left[i] = nil, true
			},
			"": func(t *rapid.T) {
				for _, b := range backends {
					var want int64
					for i := range at {
						if at[i] == b {
							want++
						}
					}
					if _, _, got := b.Load(); got != want {
						t.Fatalf("backend %s counts %d homes, want %d", b.Name, got, want)
					}
				}
				for i := range homes {
					if homes[i].At() != at[i] {
						t.Fatalf("client %d is at %v, want %v", i, homes[i].At(), at[i])
					}
				}
			},
		})
	})
}

// Seen by others at any moment, no count is ever negative, and none is left over.
func TestHomeCountsUnderRace(t *testing.T) {
	backends := []*Backend{{}, {}, {}}
	stop := make(chan struct{})
	var watcher, movers sync.WaitGroup
	watcher.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for i, b := range backends {
				if n := b.homed.Load(); n < 0 {
					t.Errorf("backend %d counts %d homes", i, n)
					return
				}
			}
		}
	})
	for range 300 {
		var h Home
		for g := range 4 {
			movers.Go(func() {
				for i := range 20 {
					h.Move(h.At(), backends[(g+i)%len(backends)])
				}
			})
		}
		movers.Go(h.Leave)
		movers.Wait()
	}
	close(stop)
	watcher.Wait()
	for i, b := range backends {
		if n := b.homed.Load(); n != 0 {
			t.Errorf("backend %d is left with %d homes", i, n)
		}
	}
}
