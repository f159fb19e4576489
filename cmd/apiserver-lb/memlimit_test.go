package main

import (
	"testing"
	"time"
)

func TestMemoryGuard(t *testing.T) {
	const mib = 1 << 20
	// A limit of 100 MiB, so that MiB are percent.
	type reading struct {
		after   time.Duration // the end of the one before
		used    uint64        // MiB, with garbage
		needed  uint64        // MiB, after a collection
		took    time.Duration // that
		collect bool
		short   bool
		relief  uint64 // MiB
	}
	ms := time.Millisecond
	for _, tt := range []struct {
		name     string
		limit    uint64
		readings []reading
	}{
		{"no limit", 0, []reading{{0, 1 << 20, 1 << 20, ms, false, false, 0}}},
		{"little in use", 100, []reading{{0, 79, 79, ms, false, false, 0}, {time.Hour, 10, 10, ms, false, false, 0}}},
		{"garbage", 100, []reading{{0, 99, 30, ms, true, false, 0}, {50 * ms, 99, 30, ms, false, false, 0}, {50 * ms, 99, 30, ms, true, false, 0}}},
		{"long collections are rare", 100, []reading{{0, 99, 30, 30 * ms, true, false, 0}, {299 * ms, 99, 30, 30 * ms, false, false, 0}, {ms, 99, 30, time.Minute, true, false, 0},
			{999 * ms, 99, 30, ms, false, false, 0}, {ms, 99, 30, ms, true, false, 0}}},
		{"short, and enough", 100, []reading{
			{0, 80, 80, ms, true, true, 0},
			{100 * ms, 75, 70, ms, true, true, 0}, // collects, although nobody allocates
			{100 * ms, 70, 69, ms, true, false, 0},
			{100 * ms, 79, 79, ms, false, false, 0},
		}},
		{"very short", 100, []reading{
			{0, 89, 89, ms, true, true, 0},
			{100 * ms, 90, 90, ms, true, true, 10},
			{100 * ms, 120, 110, ms, true, true, 30},
			{100 * ms, 60, 60, ms, true, false, 0},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := memoryGuard{limit: tt.limit * mib}
			now := time.Now()
			for i, r := range tt.readings {
				now = now.Add(r.after)
				m := memory{mapped: (r.used + 3) * mib, free: 3 * mib}
				collect := g.collects(now, m)
				if collect != r.collect {
					t.Errorf("reading %d: collects = %v", i, collect)
				}
				var relief uint64
				if collect {
					now = now.Add(r.took)
					m = memory{mapped: (r.needed + 10) * mib, free: 3 * mib, objects: 20 * mib, live: 13 * mib}
					relief = g.judge(now, r.took, m)
				}
				if g.short != r.short || relief != r.relief*mib {
					t.Errorf("reading %d: short %v, relief %d; want %v, %d MiB", i, g.short, relief, r.short, r.relief)
				}
			}
		})
	}
}

func TestHolds(t *testing.T) {
	for _, tt := range []struct{ limit, want uint64 }{{0, 64}, {1024, 64}, {512, 64}, {80, 10}} {
		if got := holds(64<<20, tt.limit<<20); got != int64(tt.want)<<20 {
			t.Errorf("a limit of %d MiB: %d bytes, want %d MiB", tt.limit, got, tt.want)
		}
	}
}
