// Package pick chooses one backend of several. Its policies are pure functions
// over a view of the backends: they read no clock, hold no state and draw their
// random numbers from the caller, so that each choice can be tested by a table.
//
// Load is counted apart for short requests and for long-running ones (watch,
// exec, logs -f, ...): a thousand idle watches are many streams but little work,
// and a policy that added them to the short requests would send all of those to
// the backend that has just come back and holds no watch yet.
package pick

import "math"

// Candidate is what a policy needs to know of one backend.
type Candidate struct {
	Usable bool    // may be chosen at all
	Weight float64 // configured weight times slow-start ramp; > 0 where Usable
	Short  int64   // short requests in flight
	Long   int64   // long-running requests in flight
	Homed  int64   // client connections whose home this backend is
}

// load returns the candidate's load of the class in question, by weight.
func (c *Candidate) load(long bool) float64 {
	if long {
		return float64(c.Long) / c.Weight
	}
	return float64(c.Short) / c.Weight
}

// Bound limits how far affinity may go.
type Bound struct {
	Factor float64 // of the mean load by weight, above which single requests spill over; > 1
	Floor  int64   // requests in flight below which nothing spills over
}

// Affinity keeps a client connection with its home, so that what it reads stays
// monotonic and it reads its own writes: the watch caches of two kube-apiservers
// lag one another.
//
// home is the index of the connection's home, or negative where it has none. The
// choice is the home as long as it is usable and within the bound; a request
// beyond the bound spills over to the least loaded backend, and the home stays.
// Where there is no usable home, the backend with the fewest homed connections by
// weight becomes it (fewest requests, then rnd, decide a tie).
//
// It returns the index of the chosen backend, negative where none is usable, and
// whether the choice is to be the connection's home from now on.
func Affinity(cs []Candidate, home int, long bool, b Bound, rnd uint64) (chosen int, rehome bool) {
	if home >= 0 && home < len(cs) && cs[home].Usable {
		if !overBound(cs, home, long, b) {
			return home, false
		}
		if i := least(cs, rnd, func(c Candidate) (float64, float64) { return c.load(long), float64(c.Homed) / c.Weight }); i >= 0 {
			return i, false
		}
		return home, false
	}
	i := least(cs, rnd, func(c Candidate) (float64, float64) { return float64(c.Homed) / c.Weight, c.load(long) })
	return i, i >= 0
}

// overBound reports whether the backend at i carries more than the bound allows.
// The mean counts the request that is about to be placed, so that a lone client's
// first requests never look like an excess.
func overBound(cs []Candidate, i int, long bool, b Bound) bool {
	carried := cs[i].Short
	if long {
		carried = cs[i].Long
	}
	if carried < b.Floor {
		return false
	}
	var total, weight float64
	for k := range cs {
		if !cs[k].Usable {
			continue
		}
		total += cs[k].load(long) * cs[k].Weight
		weight += cs[k].Weight
	}
	return cs[i].load(long) > b.Factor*(total+1)/weight
}

// LeastRequests picks by the power of two choices: of two usable backends drawn
// at random, in proportion to their weights, the one with the lower load of the
// class. It returns a negative index where none is usable.
func LeastRequests(cs []Candidate, long bool, rnd uint64) int {
	a := weighted(cs, fraction(uint32(rnd)), -1)
	if a < 0 {
		return a
	}
	b := weighted(cs, fraction(uint32(rnd>>32)), a)
	if b < 0 {
		return a
	}
	if cs[b].load(long) < cs[a].load(long) {
		return b
	}
	return a
}

// goldenRatio spreads successive turns evenly over the unit interval, so that
// backends of different weights alternate instead of coming in runs.
const goldenRatio = 0.6180339887498949

// RoundRobin gives turn n (a counter of the caller's) to a usable backend in
// proportion to its weight. It returns a negative index where none is usable.
func RoundRobin(cs []Candidate, n uint64) int {
	_, f := math.Modf(float64(n%(1<<32)) * goldenRatio)
	return weighted(cs, f, -1)
}

// fraction maps 32 random bits to [0, 1).
func fraction(bits uint32) float64 { return float64(bits) / (1 << 32) }

// weighted returns the usable candidate on which the point f of the unit interval
// falls when the candidates, without the one at index except, are laid over it in
// proportion to their weights.
func weighted(cs []Candidate, f float64, except int) int {
	var total float64
	for i := range cs {
		if cs[i].Usable && i != except {
			total += cs[i].Weight
		}
	}
	point, last := f*total, -1
	for i := range cs {
		if !cs[i].Usable || i == except {
			continue
		}
		last = i
		if point < cs[i].Weight {
			return i
		}
		point -= cs[i].Weight
	}
	return last // rounding left the point beyond the last one
}

// least returns the usable candidate with the lowest cost; a second cost decides
// between equals, and rnd between those that are still equal.
func least(cs []Candidate, rnd uint64, cost func(Candidate) (first, second float64)) int {
	chosen, ties := -1, uint64(0)
	var c1, c2 float64
	for i := range cs {
		if !cs[i].Usable {
			continue
		}
		f, s := cost(cs[i])
		switch {
		case chosen < 0 || f < c1 || f == c1 && s < c2:
			chosen, c1, c2, ties = i, f, s, 1
		case f == c1 && s == c2:
			// Reservoir sampling: the n-th equal replaces the choice with probability 1/n.
			ties++
			if rnd%ties == 0 {
				chosen = i
			}
			rnd = rnd*6364136223846793005 + 1442695040888963407
		}
	}
	return chosen
}
