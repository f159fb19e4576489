package passthrough

import (
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, tt := range []struct {
		over     time.Duration
		random   float64
		from, by time.Duration
	}{
		{12 * time.Second, 0, 0, 2 * time.Second},
		{12 * time.Second, 0.5, 5 * time.Second, 7 * time.Second},
		{12 * time.Second, 0.9999999999, 10 * time.Second, 12 * time.Second},
		{time.Second, 0.5, 0, time.Second},
		{0, 0.5, 0, 0},
		{-time.Second, 0.5, 0, 0},
	} {
		e := spread(now, now.Add(tt.over), tt.random)
		if from, by := e.from.Sub(now).Round(time.Millisecond), e.by.Sub(now).Round(time.Millisecond); from != tt.from || by != tt.by {
			t.Errorf("over %v at %v: from %v, by %v, want %v, %v", tt.over, tt.random, from, by, tt.from, tt.by)
		}
	}
}

func TestAged(t *testing.T) {
	begun := time.Unix(1000, 0)
	if e := aged(begun, 0, 0.5); e.due(begun.Add(time.Hour), time.Hour) {
		t.Error("a connection without a maximal age ends")
	}
	e := aged(begun, 100*time.Second, 0.5)
	if e.from.Sub(begun) != 85*time.Second || e.by.Sub(begun) != 100*time.Second {
		t.Errorf("from %v, by %v", e.from.Sub(begun), e.by.Sub(begun))
	}
}

func TestDue(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(1000+s), 0) }
	e := ending{from: at(10), by: at(12)}
	for _, tt := range []struct {
		now   time.Time
		quiet time.Duration
		want  bool
	}{
		{at(9), time.Hour, false},
		{at(10), 0, false},
		{at(10), quietFor, true},
		{at(11), quietFor - 1, false},
		{at(12), 0, true},
	} {
		if got := e.due(tt.now, tt.quiet); got != tt.want {
			t.Errorf("due(%v, quiet for %v) = %v", tt.now.Sub(at(0)), tt.quiet, got)
		}
	}
	if (ending{}).due(at(100), time.Hour) {
		t.Error("what does not have to end ends")
	}
}
