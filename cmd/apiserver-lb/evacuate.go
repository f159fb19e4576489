package main

import (
	"context"
	"slices"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
)

const (
	// evacuateEvery is how often backends that fail their checks are looked at.
	evacuateEvery = 250 * time.Millisecond
	// evacuateWatches is how long the watches of one take to end, so that their clients
	// do not all come to the others at once. Where whole connections end, they take as long
	// as in a shutdown of the balancer.
	evacuateWatches = 5 * time.Second
)

// evacuate moves what waits for a backend that has failed its checks for a while, as long
// as others are ready: reads go elsewhere, watches end cleanly and resume elsewhere.
// Writes, logs and tunnels wait on. Of one that an operator has drained, watches are ended
// over as long as in a shutdown of the balancer.
func (p *process) evacuate(ctx context.Context) error {
	tick := time.NewTicker(evacuateEvery)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			p.evacuateAt(now)
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *process) evacuateAt(now time.Time) {
	set := p.backends.Set()
	if set.Panicking() {
		return
	}
	for _, b := range set.All() {
		if drained := b.Drained(); !drained.IsZero() && othersReady(set, b) {
			by := drained.Add(p.spread)
			p.front.EndWatches(b, by)
			continue
		}
		failing := b.Failing(now)
		if failing < balancer.StalledAfter {
			continue
		}
		by := now.Add(balancer.StalledAfter + p.evacuation - failing)
		p.front.Unstall(b)
		p.front.EndWatches(b, by)
	}
}

// othersReady reports whether a backend other than the one given gets new requests.
func othersReady(set *backend.Set, b *backend.Backend) bool {
	return slices.ContainsFunc(set.All(), func(o *backend.Backend) bool { return o != b && o.Ready() })
}
