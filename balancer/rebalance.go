package balancer

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/pick"
)

// Rebalance moves client connections to a backend that has come back, or is new: under
// PolicyAffinity the connections that stand would stay where they are for good. It
// gives them another home, one by one, busy ones first, and only for a while after a
// backend has come; at all other times it does nothing and costs an atomic load.
//
// Clients notice nothing: their next request goes to the new home, and watches that are
// open stay where they are until they end. A GOAWAY, the other way to make them go,
// would cost each a TLS handshake.
type Rebalance struct {
	slowStart time.Duration // static
	active    atomic.Bool
	episode   atomic.Int64 // how often it has become active

	mu sync.Mutex
	// Guarded by mu.
	parts map[*backend.Backend]*part
	order []*backend.Backend // of parts
	from  time.Time          // when it became active
	until time.Time          // when to stop
	last  time.Time          // the last step
}

// part is a backend's part of the requests while clients are moved.
type part struct {
	ready  bool
	count  float64 // short requests since the last step
	rate   float64 // per second, smoothed
	usable bool
	weight float64
	excess float64 // requests per second above its share
	credit float64 // requests per second that may be moved away now
}

const (
	// rebalanceFor is how long clients are moved after a backend has come, beyond its
	// slow start.
	rebalanceFor = time.Minute
	// rebalanceEvery is the time between two looks at the shares.
	rebalanceEvery = time.Second
	// rebalancePace is how much of its excess a backend may lose in a second.
	rebalancePace = 0.2
	// rebalanceTolerance is how far above its share a backend may stay.
	rebalanceTolerance = 0.05
	// meterAfter is how long the requests of clients are counted before any is moved.
	meterAfter = 3 * time.Second
)

// NewRebalance returns a Rebalance at rest, for backends with the slow start given.
func NewRebalance(slowStart time.Duration) *Rebalance {
	return &Rebalance{slowStart: slowStart, parts: map[*backend.Backend]*part{}}
}

// Run looks after the backends until ctx is done.
func (r *Rebalance) Run(ctx context.Context, backends *backend.Backends) error {
	tick := time.NewTicker(rebalanceEvery)
	defer tick.Stop()
	for {
		r.step(backends.Set(), time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// step notes which backends have come, and what may be moved until the next step.
func (r *Rebalance) step(set *backend.Set, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.meet(set, now)
	elapsed := now.Sub(r.last).Seconds()
	first := !r.active.Load()
	r.last = now
	active := now.Before(r.until)
	if active && first {
		r.episode.Add(1)
		r.from = now
	}
	r.active.Store(active)
	if !active || first {
		for _, p := range r.parts {
			*p = part{ready: p.ready}
		}
		return
	}
	var room [8]pick.Candidate
	shares := make([]pick.Share, len(r.order))
	for i, v := range set.View(room[:0], nil, now) {
		p := r.parts[r.order[i]]
		rate := p.count / elapsed
		if p.rate > 0 {
			rate = (p.rate + rate) / 2
		}
		p.rate, p.count = rate, 0
		p.usable, p.weight = v.Usable, v.Weight
		shares[i] = pick.Share{Usable: v.Usable, Weight: v.Weight, Rate: rate}
	}
	for i, excess := range pick.Excess(shares, rebalanceTolerance) {
		p := r.parts[r.order[i]]
		p.excess = excess
		if now.Sub(r.from) > meterAfter {
			p.credit = min(excess, p.credit+excess*rebalancePace*elapsed)
		}
	}
}

// meet takes up the backends of the set. One that was not ready before, or was not
// there, has come; at the very beginning none has.
func (r *Rebalance) meet(set *backend.Set, now time.Time) {
	begun := !r.last.IsZero()
	r.order = set.All()
	for _, b := range r.order {
		p := r.parts[b]
		known := p != nil
		if !known {
			p = new(part)
			r.parts[b] = p
		}
		ready := b.Ready()
		if begun && ready && !p.ready {
			r.until = now.Add(r.slowStart + rebalanceFor)
		}
		p.ready = ready
	}
	for b := range r.parts {
		if set.Index(b) < 0 {
			delete(r.parts, b)
		}
	}
}

// move is told of a short request of a client that goes to its home. It returns the
// backend that is to be its home from now on, nil where it stays.
func (r *Rebalance) move(cl *Client, home *backend.Backend, now time.Time) *backend.Backend {
	if !r.active.Load() {
		return nil
	}
	count := cl.meterOf().request(r.episode.Load())
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.parts[home]
	if from == nil {
		return nil
	}
	from.count++
	// A client with more than the excess would only take it along.
	rate := count / max(now.Sub(r.from), meterAfter).Seconds()
	if from.credit < rate || from.excess < rate {
		return nil
	}
	var to *part
	var at *backend.Backend
	for _, b := range r.order {
		p := r.parts[b]
		if p == from || !p.usable || !b.Ready() || p.weight <= 0 {
			continue
		}
		if to == nil || p.rate/p.weight < to.rate/to.weight {
			to, at = p, b
		}
	}
	if to == nil || (to.rate+rate)/to.weight >= from.rate/from.weight {
		return nil
	}
	from.credit -= rate
	from.excess -= rate
	from.rate -= rate
	to.rate += rate
	from.count--
	to.count++
	return at
}

// meter counts the requests of a client while clients are moved.
type meter struct {
	mu sync.Mutex
	// Guarded by mu.
	episode int64 // of Rebalance
	count   float64
}

// request counts one and returns how many there have been in the episode.
func (m *meter) request(episode int64) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.episode != episode {
		m.episode, m.count = episode, 0
	}
	m.count++
	return m.count
}

// meterOf returns the client's meter, a new one where it has none.
func (c *Client) meterOf() *meter {
	if m := c.meter.Load(); m != nil {
		return m
	}
	c.meter.CompareAndSwap(nil, new(meter))
	return c.meter.Load()
}
