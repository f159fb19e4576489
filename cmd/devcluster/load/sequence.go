package load

import (
	"sync"
	"time"
)

// objects is how many ConfigMaps the sequence numbers go to in turn.
const objects = 5

// written keeps which sequence numbers were written.
type written struct {
	mu    sync.Mutex
	began map[int]time.Time // guarded by mu: by number, when the write that was acknowledged began
	last  int               // guarded by mu: the newest that was acknowledged
}

func newWritten() *written { return &written{began: map[int]time.Time{}} }

// add notes that a write of this number, which began then, was acknowledged.
func (w *written) add(number int, began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.began[number] = began
	w.last = max(w.last, number)
}

// newest is the newest number that was acknowledged.
func (w *written) newest() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// between are the writes of the numbers after from, up to to.
func (w *written) between(from, to int) map[int]time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[int]time.Time{}
	for number, began := range w.began {
		if number > from && number <= to {
			out[number] = began
		}
	}
	return out
}

// seen keeps which informer saw which sequence numbers when.
type seen struct {
	mu     sync.Mutex
	first  []map[int]time.Time // guarded by mu: by informer and number
	newest [][objects]int      // guarded by mu: by informer and object
}

func newSeen(informers int) *seen {
	s := &seen{newest: make([][objects]int, informers)}
	for range informers {
		s.first = append(s.first, map[int]time.Time{})
	}
	return s
}

// add notes that an informer has seen a number. Only the first time counts.
func (s *seen) add(informer, number int, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.first[informer][number]; !ok {
		s.first[informer][number] = at
	}
	object := number % objects
	s.newest[informer][object] = max(s.newest[informer][object], number)
}

// settled reports whether every informer knows every object as these writes have left it,
// or newer.
func (s *seen) settled(writes map[int]time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for number := range writes {
		for _, newest := range s.newest {
			if newest[number%objects] < number {
				return false
			}
		}
	}
	return true
}

// fill writes into a report how many writes there were, what of them was never seen, and how
// long after its write each was.
func (s *seen) fill(r *Report, writes map[int]time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Events = len(writes)
	var lags []time.Duration
	for number, began := range writes {
		for _, first := range s.first {
			at, ok := first[number]
			if !ok {
				r.Missed++
				continue
			}
			// An attempt before the one that was acknowledged may have taken effect.
			lags = append(lags, max(0, at.Sub(began)))
		}
	}
	r.Lag50, r.Lag99, r.LagMax = Percentile(lags, .5), Percentile(lags, .99), Percentile(lags, 1)
}
