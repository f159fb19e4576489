package forward

import (
	"math/rand/v2"
	"sync"
	"time"

	"apiserver-lb/balancer/backend"
)

// kind says how a long-running request ends when the balancer drains.
type kind uint8

const (
	// stream lasts until the end of the grace period: logs, proxying.
	stream kind = iota
	// watch may be ended cleanly at any time.
	watch
	// tunnel lasts as stream does, on a connection that net/http does not know
	// any more.
	tunnel
)

// drain knows the requests that would outlast a shutdown.
type drain struct {
	mu       sync.Mutex
	next     uint64
	ends     map[uint64]ending
	draining bool
	until    time.Time // by which watches end
	tunnels  int
	idle     chan struct{} // closed when tunnels falls to 0; nil: nobody waits
}

type ending struct {
	backend *backend.Backend
	kind    kind
	at      time.Time // when a watch ends because its backend is leaving; zero: not chosen yet
	end     func()    // must not block, may be called more than once
}

// add notes a long-running request on a backend that end would end, and returns what
// forgets it.
func (d *drain) add(b *backend.Backend, k kind, end func()) (forget func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ends == nil {
		d.ends = map[uint64]ending{}
	}
	id := d.next
	d.next++
	d.ends[id] = ending{backend: b, kind: k, end: end}
	if k == tunnel {
		d.tunnels++
	}
	if d.draining && k == watch {
		d.schedule(end)
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.ends, id)
		if k != tunnel {
			return
		}
		if d.tunnels--; d.tunnels == 0 && d.idle != nil {
			close(d.idle)
			d.idle = nil
		}
	}
}

// begin ends the watches, each at a random time within spread, so that their
// clients do not all come to the next balancer at once.
func (d *drain) begin(spread time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.draining, d.until = true, time.Now().Add(spread)
	for _, e := range d.ends {
		if e.kind == watch {
			d.schedule(e.end)
		}
	}
}

// endWatches ends those watches of a backend whose time has come: a random one until
// by, chosen when a watch is seen for the first time.
func (d *drain) endWatches(b *backend.Backend, by time.Time) {
	now := time.Now()
	d.mu.Lock()
	var due []func()
	for id, e := range d.ends {
		if e.backend != b || e.kind != watch {
			continue
		}
		if e.at.IsZero() {
			e.at = now
			if left := by.Sub(now); left > 0 {
				e.at = now.Add(rand.N(left))
			}
			d.ends[id] = e
		}
		if !now.Before(e.at) {
			due = append(due, e.end)
		}
	}
	d.mu.Unlock()
	for _, end := range due {
		end()
	}
}

// schedule ends one watch at its time. d.mu is held.
func (d *drain) schedule(end func()) {
	left := time.Until(d.until)
	if left <= 0 {
		go end() // it may want to be forgotten at once
		return
	}
	time.AfterFunc(rand.N(left), end)
}

// noTunnels returns a channel that is closed as soon as no tunnel is open.
func (d *drain) noTunnels() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.idle == nil {
		d.idle = make(chan struct{})
	}
	idle := d.idle
	if d.tunnels == 0 {
		close(d.idle)
		d.idle = nil
	}
	return idle
}

// finish ends all that is left, now, and returns how many tunnels were among it.
func (d *drain) finish() (tunnels int) {
	d.mu.Lock()
	var ends []func()
	for _, e := range d.ends {
		ends = append(ends, e.end)
	}
	tunnels = d.tunnels
	d.mu.Unlock()
	for _, end := range ends {
		end()
	}
	return tunnels
}
