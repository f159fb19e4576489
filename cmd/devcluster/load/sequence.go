package load

import (
	"sync"
	"time"
)

// sequence keeps which sequence numbers were written, and which informer saw them when.
type sequence struct {
	mu      sync.Mutex
	written map[int]time.Time   // guarded by mu: when the write that was acknowledged began
	last    map[int]int         // guarded by mu: by object, the newest number that was acknowledged
	seen    []map[int]time.Time // guarded by mu: by informer, when it first saw the number
}

func newSequence(informers int) *sequence {
	s := &sequence{written: map[int]time.Time{}, last: map[int]int{}}
	for range informers {
		s.seen = append(s.seen, map[int]time.Time{})
	}
	return s
}

// wrote notes that a write of this number, which began then, was acknowledged.
func (s *sequence) wrote(object, number int, began time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written[number] = began
	s.last[object] = number
}

// saw notes that an informer has seen a number. Only the first time counts.
func (s *sequence) saw(informer, number int, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.seen[informer][number]; !ok {
		s.seen[informer][number] = at
	}
}

// settled reports whether every informer has seen the newest number of every object.
func (s *sequence) settled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seen := range s.seen {
		for _, number := range s.last {
			if _, ok := seen[number]; !ok {
				return false
			}
		}
	}
	return true
}

// fill writes into a report what was written, what of it was never seen, and how long
// after its write each number was.
func (s *sequence) fill(r *Report) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Events, r.Missed = len(s.written), 0
	var lags []time.Duration
	for number, began := range s.written {
		for _, seen := range s.seen {
			at, ok := seen[number]
			if !ok {
				r.Missed++
				continue
			}
			// An attempt before the one that was acknowledged may have taken effect.
			lags = append(lags, max(0, at.Sub(began)))
		}
	}
	r.Lag50, r.Lag99, r.LagMax = percentile(lags, .5), percentile(lags, .99), percentile(lags, 1)
}
