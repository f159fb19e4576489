package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// How much garbage may gather before it is collected. The runtime lets it grow to as
// much again as is in use. Here that is too little while few are connected, so that a
// busy balancer collects dozens of times a second, and too much when thousands of
// connections do nothing: those are most of the memory, and no garbage.
const (
	gcLeast   = 8 << 20 // bytes, however little is in use
	gcPercent = 50      // of what is in use, beyond that
	gcMost    = 200     // however little is in use: a load may come within gcEvery
	gcEvery   = 100 * time.Millisecond
)

// gcTarget returns the GOGC for the bytes in use. GOGC is a share of the heap in use
// and of what is scanned beside it, stacks and globals.
func gcTarget(live uint64) int {
	live = max(live, 1<<20)
	return min(gcMost, max(gcPercent, int(100*gcLeast/live)))
}

// inUse are the metrics whose sum GOGC is a share of.
var inUse = []string{"/gc/heap/live:bytes", "/gc/scan/stack:bytes", "/gc/scan/globals:bytes"}

// tuneGC sets GOGC as memory in use grows and shrinks, unless the environment has set
// it, until ctx is done.
func tuneGC(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	var samples []metrics.Sample
	for _, name := range inUse {
		samples = append(samples, metrics.Sample{Name: name})
	}
	tick := time.NewTicker(gcEvery)
	defer tick.Stop()
	for current := gcPercent; ; {
		metrics.Read(samples)
		var live uint64
		for _, s := range samples {
			live += s.Value.Uint64()
		}
		// To set it stops the world for a moment, so small changes are not worth it.
		if want := gcTarget(live); want > current*5/4 || want < current*4/5 {
			debug.SetGCPercent(want)
			current = want
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
