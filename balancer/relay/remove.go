package relay

import (
	"time"

	"apiserver-lb/balancer/backend"
)

// EndWatches ends watches of a backend that gets no more requests: cleanly, and each at
// a random time until by. It is to be called from time to time, for it ends those that
// are due.
func (r *Relay) EndWatches(b *backend.Backend, by time.Time) {
	r.each(func(sh *shard) {
		for key, p := range sh.pools {
			if key.backend != b {
				continue
			}
			for _, bc := range p.conns {
				for _, s := range bc.streams.all() {
					if s.bc == bc && s.resumable() && s.answered && sh.now.After(s.endBy(by)) {
						s.endWatch()
					}
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
