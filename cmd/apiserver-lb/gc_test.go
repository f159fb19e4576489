package main

import (
	"runtime/metrics"
	"testing"
	"time"
)

func TestGCTarget(t *testing.T) {
	for _, tt := range []struct {
		live uint64
		want int
	}{
		{0, 200}, {1 << 20, 200}, {4 << 20, 200}, {8 << 20, 100}, {10 << 20, 80}, {16 << 20, 50}, {1 << 30, 50},
	} {
		if got := gcTarget(tt.live); got != tt.want {
			t.Errorf("%d bytes in use: GOGC %d, want %d", tt.live, got, tt.want)
		}
	}
}

func TestRest(t *testing.T) {
	type reading struct {
		after time.Duration // the one before
		made  uint64        // since then
		live  uint64
		spare uint64
		want  bool
	}
	const mib = 1 << 20
	for _, tt := range []struct {
		name     string
		readings []reading
	}{
		{"a burst, then nothing", []reading{
			{0, 50 * mib, 20 * mib, 10 * mib, false},
			{900 * time.Millisecond, 0, 20 * mib, 10 * mib, false},
			{100 * time.Millisecond, 0, 20 * mib, 10 * mib, true},
		}},
		{"probes go on", []reading{
			{0, 50 * mib, 20 * mib, 10 * mib, false},
			{500 * time.Millisecond, 100 << 10, 20 * mib, 10 * mib, false},
			{500 * time.Millisecond, 100 << 10, 20 * mib, 10 * mib, true},
		}},
		{"busy", []reading{
			{0, 50 * mib, 20 * mib, 10 * mib, false},
			{time.Second, mib, 20 * mib, 10 * mib, false},
			{time.Second, mib, 20 * mib, 10 * mib, false},
		}},
		{"not worth it", []reading{
			{0, 50 * mib, 20 * mib, mib, false},
			{2 * time.Second, 0, 20 * mib, mib, false},
			{2 * time.Second, 0, 100 * mib, 9 * mib, false},
			{2 * time.Second, 0, 80 * mib, 9 * mib, true},
		}},
		{"not again and again", []reading{
			{0, 50 * mib, 20 * mib, 10 * mib, false},
			{2 * time.Second, 0, 20 * mib, 10 * mib, true},
			{2 * time.Second, 0, 20 * mib, 10 * mib, false},
			{7 * time.Second, 0, 20 * mib, 10 * mib, false},
			{2 * time.Second, 0, 20 * mib, 10 * mib, true},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r rest
			now, made := time.Now(), uint64(0)
			for i, x := range tt.readings {
				now, made = now.Add(x.after), made+x.made
				m := memory{live: x.live, objects: x.live + x.spare/2, free: x.spare - x.spare/2, made: made}
				if got := r.due(now, m); got != x.want {
					t.Errorf("reading %d: %v, want %v", i, got, x.want)
				}
			}
		})
	}
}

func TestReadMemory(t *testing.T) {
	var samples []metrics.Sample
	for _, name := range readings {
		samples = append(samples, metrics.Sample{Name: name})
	}
	m := readMemory(samples)
	for _, s := range samples {
		if s.Value.Kind() != metrics.KindUint64 {
			t.Errorf("the runtime has no %s", s.Name)
		}
	}
	if m.objects == 0 || m.made < m.objects || m.scanned == 0 {
		t.Errorf("%+v", m)
	}
}
