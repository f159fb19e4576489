package main

import "testing"

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
