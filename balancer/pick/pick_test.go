package pick

import (
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

func ready(weight float64, short, long, homed int64) Candidate {
	return Candidate{Usable: true, Weight: weight, Short: short, Long: long, Homed: homed}
}

func TestAffinity(t *testing.T) {
	b := Bound{Factor: 1.25, Floor: 16}
	down := Candidate{}
	tests := []struct {
		name       string
		cs         []Candidate
		home       int
		long       bool
		want       int
		wantRehome bool
	}{
		{"a quiet client stays, whatever the others hold", []Candidate{ready(1, 15, 0, 1), ready(1, 0, 0, 0)}, 0, false, 0, false},
		{"within the bound of the mean", []Candidate{ready(1, 20, 0, 1), ready(1, 18, 0, 1)}, 0, false, 0, false},
		{"beyond the bound one request spills over and the home stays", []Candidate{ready(1, 40, 0, 1), ready(1, 3, 0, 9)}, 0, false, 1, false},
		{"a heavier backend carries more before it spills", []Candidate{ready(4, 40, 0, 1), ready(1, 9, 0, 9)}, 0, false, 0, false},
		{"idle watches are no load for a short request", []Candidate{ready(1, 0, 5000, 1), ready(1, 0, 0, 0)}, 0, false, 0, false},
		{"watches spill by watches", []Candidate{ready(1, 0, 5000, 1), ready(1, 0, 10, 0)}, 0, true, 1, false},
		{"a new connection goes where the fewest are at home", []Candidate{ready(1, 0, 0, 3), ready(1, 9, 9, 2), ready(1, 0, 0, 4)}, -1, false, 1, true},
		{"by weight", []Candidate{ready(1, 0, 0, 3), ready(4, 0, 0, 8)}, -1, false, 1, true},
		{"requests in flight decide between equals", []Candidate{ready(1, 4, 0, 3), ready(1, 1, 0, 3)}, -1, false, 1, true},
		{"home lost", []Candidate{down, ready(1, 500, 0, 9)}, 0, false, 1, true},
		{"home no longer in the set", []Candidate{ready(1, 0, 0, 0)}, 7, false, 0, true},
		{"none usable", []Candidate{down, down}, 0, false, -1, false},
		{"the only one keeps all", []Candidate{ready(1, 900, 0, 9), down}, 0, false, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, rehome := Affinity(tt.cs, tt.home, tt.long, b, 42)
			if got != tt.want || rehome != tt.wantRehome {
				t.Errorf("Affinity = %d, %v; want %d, %v", got, rehome, tt.want, tt.wantRehome)
			}
		})
	}
}

func TestNewConnectionsSpreadOverEquals(t *testing.T) {
	cs := []Candidate{ready(1, 0, 0, 0), ready(1, 0, 0, 0), ready(1, 0, 0, 0)}
	r := rand.New(rand.NewPCG(1, 2))
	var got [3]int
	for range 3000 {
		i, _ := Affinity(cs, -1, false, Bound{1.25, 16}, r.Uint64())
		got[i]++
	}
	for i, n := range got {
		if n < 850 || n > 1150 {
			t.Errorf("backend %d got %d of 3000 connections, want about 1000", i, n)
		}
	}
}

func TestSharesFollowWeights(t *testing.T) {
	cs := []Candidate{ready(1, 0, 0, 0), {}, ready(2, 0, 0, 0), ready(5, 0, 0, 0)}
	want := []float64{1. / 8, 0, 2. / 8, 5. / 8}
	var got [4]float64
	longestRun, run, last := 0, 0, -1
	for n := range uint64(8000) {
		i := RoundRobin(cs, n)
		got[i]++
		if i == last {
			run++
		} else {
			run, last = 1, i
		}
		longestRun = max(longestRun, run)
	}
	for i := range want {
		if math.Abs(got[i]/8000-want[i]) > 0.005 {
			t.Errorf("round-robin: backend %d got a share of %.3f, want %.3f", i, got[i]/8000, want[i])
		}
	}
	if longestRun > 4 {
		t.Errorf("round-robin gave one backend %d turns in a row, want at most 4: a share of 5/8 meets the end of the interval", longestRun)
	}
}

// Queueing with a fixed service time: the loads must settle by weight.
func TestLeastRequestsEvensLoad(t *testing.T) {
	cs := []Candidate{ready(1, 60, 0, 0), ready(1, 0, 0, 0), ready(2, 0, 0, 0)}
	r := rand.New(rand.NewPCG(3, 4))
	for range 20000 {
		cs[LeastRequests(cs, false, r.Uint64())].Short++
		for done := false; !done; { // one of those in flight ends
			i := r.IntN(len(cs))
			if cs[i].Short > 0 {
				cs[i].Short--
				done = true
			}
		}
	}
	if a, b := cs[0].load(false), cs[1].load(false); math.Abs(a-b) > 10 {
		t.Errorf("loads by weight %v, %v, want about equal", a, b)
	}
}

func candidates() *rapid.Generator[[]Candidate] {
	one := rapid.Custom(func(t *rapid.T) Candidate {
		return Candidate{
			Usable: rapid.Bool().Draw(t, "usable"),
			Weight: rapid.Float64Range(0.01, 1000).Draw(t, "weight"),
			Short:  rapid.Int64Range(0, 1e6).Draw(t, "short"),
			Long:   rapid.Int64Range(0, 1e6).Draw(t, "long"),
			Homed:  rapid.Int64Range(0, 1e6).Draw(t, "homed"),
		}
	})
	return rapid.SliceOfN(one, 0, 12)
}

// Whatever the loads: a usable backend is found if there is one, and only a usable one.
func TestEveryPolicyFindsUsable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cs := candidates().Draw(t, "candidates")
		home := rapid.IntRange(-1, 13).Draw(t, "home")
		long := rapid.Bool().Draw(t, "long")
		rnd := rapid.Uint64().Draw(t, "rnd")
		any := false
		for _, c := range cs {
			any = any || c.Usable
		}
		a, rehome := Affinity(cs, home, long, Bound{1.25, 16}, rnd)
		for name, got := range map[string]int{"affinity": a, "least-requests": LeastRequests(cs, long, rnd), "round-robin": RoundRobin(cs, rnd)} {
			if any != (got >= 0) {
				t.Fatalf("%s chose %d of %+v", name, got, cs)
			}
			if got >= 0 && !cs[got].Usable {
				t.Fatalf("%s chose the unusable %d of %+v", name, got, cs)
			}
		}
		if homeUsable := home >= 0 && home < len(cs) && cs[home].Usable; rehome && homeUsable {
			t.Fatalf("a usable home %d was left for good", home)
		}
	})
}
