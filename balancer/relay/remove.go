package relay

import (
	"slices"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
)

// EndWatches ends watches of a backend that gets no more requests: cleanly, and each at
// a random time until by. It is to be called from time to time, for it ends those that
// are due.
func (r *Relay) EndWatches(b *backend.Backend, by time.Time) {
	r.eachAt(b, func(s *stream) {
		if s.resumable() && s.answered && s.cc.sh.now.After(s.endBy(by)) {
			s.endWatch()
		}
	})
}

// Unstall sends requests that wait for an answer of the backend elsewhere, where they may
// be sent again (balancer.Stalled).
func (r *Relay) Unstall(b *backend.Backend) {
	r.eachAt(b, func(s *stream) {
		if !s.answered && !s.down.end && !s.done {
			s.failed(balancer.Stalled, errStalled)
		}
	})
}

// eachAt calls f for every stream at the backend, under its shard's lock.
func (r *Relay) eachAt(b *backend.Backend, f func(s *stream)) {
	r.each(func(sh *shard) {
		for key, p := range sh.pools {
			if key.backend != b {
				continue
			}
			for _, bc := range slices.Clone(p.conns) {
				for _, s := range bc.streams.all() {
					if s.via == bc { // still: f may have ended others
						f(s)
					}
				}
			}
			for _, c := range slices.Clone(p.http1) {
				if c.s != nil {
					f(c.s)
				}
			}
		}
	})
}

// Forget closes what connections there are to a backend that has been taken out of the
// configuration, as Cut does, and lets go of it.
func (r *Relay) Forget(b *backend.Backend) {
	r.each(func(sh *shard) {
		for key, p := range sh.pools {
			if key.backend == b {
				p.cut(errRemoved)
				delete(sh.pools, key)
			}
		}
	})
}
