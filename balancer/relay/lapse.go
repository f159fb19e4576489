package relay

import (
	"time"

	"apiserver-lb/balancer"
)

// lapseGrace is how long an answer that is whole, or a watch that is to end cleanly,
// has to reach a client whose certificate has lapsed.
const lapseGrace = 2 * time.Second

// EndLapsed ends what runs under client certificates that do not count any more, and
// has these clients come again on new connections. It is to be called every few
// seconds, and when a CA, a CRL or the deny list has changed.
//
// Chains are verified outside the shards' locks: after such a change that is a
// signature check or more for each connection.
func (r *Relay) EndLapsed() {
	for _, cc := range balancer.AssertedFirst(r.certified(), func(cc *clientConn) *balancer.Client { return cc.client }) {
		l := cc.client.Lapsed(r.Core.Verifier, cc.chain)
		if l == nil {
			continue
		}
		cc.sh.lock()
		watches, others := cc.lapse(l)
		cc.sh.unlockAndFlush()
		if watches+others > 0 {
			r.Refusals.Lapsed(l, cc.client, watches, others)
		}
	}
}

// certified returns the connections whose clients have shown certificates.
func (r *Relay) certified() (list []*clientConn) {
	for _, sh := range r.shards {
		list = sh.appendCertified(list)
	}
	return list
}

func (sh *shard) appendCertified(list []*clientConn) []*clientConn {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for cc := range sh.clients {
		if len(cc.chain) > 0 {
			list = append(list, cc)
		}
	}
	return list
}

// lapse ends the requests that the lapse does not spare, and returns how many watches
// and others have been told to. A watch ends cleanly, so that nothing is lost where the
// client has another certificate to come with; what has ended and is not sent yet has
// until the next time for it. Whatever else is reset.
func (cc *clientConn) lapse(l *balancer.Lapse) (watches, others int) {
	if cc.over || cc.closing {
		return 0, 0
	}
	now := cc.sh.now
	if cc.lapsed.IsZero() {
		cc.lapsed = now
	}
	inTime := now.Sub(cc.lapsed) < lapseGrace
	for _, s := range cc.streams.all() {
		switch {
		case l.Spares(s.credential):
			continue
		case s.answered && s.down.end && inTime:
			continue
		case s.answered && s.resumable() && !s.down.end:
			s.record.Refused(balancer.ReasonLapsed)
			s.endWatch()
			watches++
		default:
			s.record.Refused(balancer.ReasonLapsed)
			cc.undo(s.id, codeCancel)
			s.finish()
			others++
		}
		cc.sh.r.Metrics.Refused(balancer.ReasonLapsed)
	}
	cc.leave()
	return watches, others
}

// CertificateUses tells of each connection as whose client certificate's user requests have
// come.
func (r *Relay) CertificateUses(add func(balancer.CertificateUse)) {
	for _, cc := range r.certified() {
		if u, ok := cc.client.CertificateUse(cc.chain); ok {
			add(u)
		}
	}
}
