package balancer

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestRoom(t *testing.T) {
	r := NewRoom(10, nil)
	for i, step := range []struct {
		take int64
		want bool
	}{{4, true}, {7, false}, {6, true}, {1, false}, {0, true}} {
		if got := r.Take(step.take); got != step.want {
			t.Errorf("step %d: Take(%d) = %v", i, step.take, got)
		}
	}
	r.Give(3)
	if r.Take(4) || !r.Take(3) {
		t.Error("what is given back is not what can be taken")
	}
}

// TestRoomBound: whoever takes and gives at once never holds more than there is, and
// finds what there is.
func TestRoomBound(t *testing.T) {
	const limit, workers, each, rounds = 40, 8, 5, 10_000
	r := NewRoom(limit, nil) // enough for all of them
	var held atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range rounds {
				if r.Take(limit + 1) {
					t.Error("there is more room than there is")
				}
				if !r.Take(each) {
					t.Error("no room, although all have as much as they want")
					return
				}
				if n := held.Add(each); n > limit {
					t.Errorf("%d bytes are held", n)
				}
				held.Add(-each)
				r.Give(each)
			}
		})
	}
	wg.Wait()
	if !r.Take(limit) || r.Take(1) {
		t.Error("not all was given back, or more than that")
	}
}

// Nobody takes all of it: there is room for whoever comes next.
func TestRoomShare(t *testing.T) {
	r := NewRoom(100, nil)
	var held [4]atomic.Int64
	for i, want := range []int64{50, 25, 12, 6} {
		s := r.Share(&held[i])
		var n int64
		for s.Take(1) {
			n++
		}
		if n != want || held[i].Load() != want || s.Take(1) || !s.Take(0) {
			t.Errorf("the share of number %d is %d, held %d, want %d", i, n, held[i].Load(), want)
		}
	}
	first := r.Share(&held[0])
	first.Give(50)
	if held[0].Load() != 0 || !first.Take(20) || first.Take(20) {
		t.Error("what is given back cannot be taken again, as far as it is a share")
	}
	var other atomic.Int64
	if !r.Share(&other).Take(10) {
		t.Error("a newcomer finds nothing")
	}
}
