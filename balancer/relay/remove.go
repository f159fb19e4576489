package relay

import (
	"math/rand/v2"
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
					if s.bc == bc && s.resumable() && s.answered && sh.now.After(s.leaveBy(by)) {
						s.endWatch()
					}
				}
			}
		}
	})
}

// leaveBy is endBy where it is the backend that leaves, until by.
func (s *stream) leaveBy(by time.Time) time.Time {
	sh := s.cc.sh
	if s.endAt == 0 {
		s.endAt = sh.now.Sub(sh.r.epoch)
		if left := by.Sub(sh.now); left > 0 {
			s.endAt += rand.N(left)
		}
	}
	return sh.r.epoch.Add(s.endAt)
}
