package main

import (
	"context"
	"math"
	"os"
	"runtime"
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

// When little has been allocated for a while, what a burst has left behind goes back to
// the system: garbage, which nothing would collect before long, and free memory.
const (
	restAfter   = time.Second
	restBytes   = 256 << 10 // allocated in that time: probes and some watches go on
	restWorth   = 2 << 20   // bytes to be had, and
	restPercent = 10        // of what is in use, at least
	restAgain   = 10 * time.Second
)

// gcTarget returns the GOGC for the bytes in use. GOGC is a share of the heap in use
// and of what is scanned beside it, stacks and globals.
func gcTarget(live uint64) int {
	live = max(live, 1<<20)
	return min(gcMost, max(gcPercent, int(100*gcLeast/live)))
}

// memory is what the runtime tells of itself, in bytes.
type memory struct {
	live    uint64 // in use at the end of the last collection
	scanned uint64 // stacks and globals
	objects uint64 // in use now, and garbage
	free    uint64 // neither, and not given back
	made    uint64 // allocated since the start
	mapped  uint64 // all that the runtime has from the system: what GOMEMLIMIT bounds
}

// garbage is what has been allocated since the last collection, which may be in use.
func (m memory) garbage() uint64 { return m.objects - min(m.objects, m.live) }

// spare is what there is to be given back.
func (m memory) spare() uint64 { return m.free + m.garbage() }

// used is what the process uses, garbage with it: heap, stacks, and what the runtime needs.
func (m memory) used() uint64 { return m.mapped - min(m.mapped, m.free) }

// rest finds the moments at which memory is to be given back.
type rest struct {
	since time.Time // of the last reading at which much had been allocated
	made  uint64    // by then
	done  time.Time // when memory was given back
}

// due takes a reading and reports whether memory is to be given back now.
func (r *rest) due(now time.Time, m memory) bool {
	if m.made-r.made > restBytes {
		r.since, r.made = now, m.made
		return false
	}
	if now.Sub(r.since) < restAfter {
		return false
	}
	r.since, r.made = now, m.made
	if m.spare() < max(restWorth, m.live*restPercent/100) || now.Sub(r.done) < restAgain {
		return false
	}
	r.done = now
	return true
}

// readings are the metrics that make a memory.
var readings = []string{
	"/gc/heap/live:bytes", "/gc/scan/stack:bytes", "/gc/scan/globals:bytes",
	"/memory/classes/heap/objects:bytes", "/memory/classes/heap/free:bytes", "/gc/heap/allocs:bytes",
	"/memory/classes/total:bytes", "/memory/classes/heap/released:bytes",
}

func readMemory(samples []metrics.Sample) memory {
	metrics.Read(samples)
	n := func(i int) uint64 { return samples[i].Value.Uint64() }
	return memory{live: n(0), scanned: n(1) + n(2), objects: n(3), free: n(4), made: n(5), mapped: n(6) - min(n(6), n(7))}
}

// keepMemory sets GOGC as memory in use grows and shrinks, and gives memory back when the
// process is at rest, unless the environment has set GOGC; and it has the process live
// within a limit of so many bytes, if it is not 0. It returns when ctx is done.
func (p *process) keepMemory(ctx context.Context, limit uint64) error {
	tuned := os.Getenv("GOGC") == ""
	if tuned {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	}
	if limit > 0 {
		defer debug.SetMemoryLimit(debug.SetMemoryLimit(int64(min(limit, math.MaxInt64))))
	}
	var samples []metrics.Sample
	for _, name := range readings {
		samples = append(samples, metrics.Sample{Name: name})
	}
	tick := time.NewTicker(gcEvery)
	defer tick.Stop()
	var r rest
	guard := memoryGuard{limit: limit}
	for current := gcPercent; ; {
		m := readMemory(samples)
		if start := time.Now(); guard.collects(start, m) {
			runtime.GC()
			m = readMemory(samples)
			now := time.Now()
			p.memoryJudged(&guard, guard.judge(now, now.Sub(start), m), m)
		}
		// To set it stops the world for a moment, so small changes are not worth it.
		if want := gcTarget(m.live + m.scanned); tuned && (want > current*5/4 || want < current*4/5) {
			debug.SetGCPercent(want)
			current = want
		}
		if tuned && r.due(time.Now(), m) {
			debug.FreeOSMemory()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
