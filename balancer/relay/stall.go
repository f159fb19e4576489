package relay

import "apiserver-lb/balancer"

// stallLooks is how often a stream is looked at within Options.StallTimeout: that needs
// no clock in each of them. One that stands still is ended at the next look after that.
const stallLooks = 4

// lookForStalls ends the requests that stand still because of the client. kube-apiserver
// would give them up too, but only those that it knows of, and at a time of its own; here
// they hold a place on a connection that is everybody's.
//
// Long-running requests are not ended so: a watch whose window is shut cannot be told
// from one with a slow reader, holds no more than its window here, and kube-apiserver
// ends a watch that falls behind. Where the answer is a refusal, nothing runs. A socket of
// which nothing is read at all is ended by TCP_USER_TIMEOUT, and by the PING that then has
// no answer.
func (cc *clientConn) lookForStalls() {
	if cc.streams.n == 0 || cc.sh.now.Before(cc.lookAt) {
		return
	}
	cc.lookAt = cc.sh.now.Add(cc.sh.r.StallTimeout / stallLooks)
	var stalled []*stream
	for _, e := range cc.streams.slots {
		if e.id == 0 {
			continue
		}
		if s := e.s; !s.waitsForClient() {
			s.idle = 0
		} else if s.idle++; s.idle > stallLooks {
			stalled = append(stalled, s)
		}
	}
	for _, s := range stalled {
		if !s.done {
			s.stalled()
		}
	}
}

// waitsForClient reports whether it is the client that a short request waits for.
func (s *stream) waitsForClient() bool {
	switch {
	case s.class != balancer.Short && !s.down.refusal || s.done:
		return false
	case s.answered:
		return s.down.buf.waiting() > 0
	}
	// What has come of the body has gone to the backend, and there is more to come.
	return !s.up.end && s.up.buf.waiting() == 0 && s.code == 0
}

// stalled ends a request that has stood still for too long.
func (s *stream) stalled() {
	r := s.cc.sh.r
	if !s.answered {
		s.refuse(balancer.BodyStalled(r.StallTimeout))
		return
	}
	r.Metrics.Refused(balancer.ReasonAnswerStalled)
	s.record.Refused(balancer.ReasonAnswerStalled)
	s.cc.undo(s.id, codeCancel)
	s.finish()
}
