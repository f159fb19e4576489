package balancer

import (
	"testing"
	"time"
)

func TestBucket(t *testing.T) {
	t0 := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	var b Bucket
	r := Refill{Burst: 10, Rate: 2}
	for i, s := range []struct {
		cost  float64
		after time.Duration // since t0
		want  bool
	}{
		{6, 0, true}, // of 10, it begins full
		{4, 0, true},
		{0.1, 0, false},
		{0, 0, true},
		{1, 400 * time.Millisecond, false}, // 2 a second
		{1, 500 * time.Millisecond, true},
		{10, time.Hour, true}, // never more than 10
		{0.1, time.Hour, false},
		{11, 2 * time.Hour, false},
		{10, 2 * time.Hour, true}, // what was refused cost nothing
	} {
		if got := b.Spend(s.cost, r, t0.Add(s.after)); got != s.want {
			t.Errorf("step %d: Spend(%v) = %v", i, s.cost, got)
		}
	}
}
