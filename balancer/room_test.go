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
