package relay

import (
	"cmp"
	"slices"

	"apiserver-lb/balancer"
)

// waiting is what the connection and its requests hold here, in bytes: what waits to be
// sent to either side, what is kept to be sent again, heads among it, and the part that has
// come of a header block.
func (cc *clientConn) waiting() int {
	n := len(cc.out) + cap(cc.block)
	for _, e := range cc.streams.slots {
		if e.id == 0 {
			continue
		}
		n += e.s.up.buf.size() + e.s.down.buf.size()
		if e.s.ask != nil {
			n += int(listSize(e.s.ask.head) + listSize(e.s.ask.pending))
		}
	}
	return n
}

// leastRelief is what a connection holds, in bytes, to be worth ending.
const leastRelief = 256 << 10

// Relieve makes n bytes of memory free, as far as it can, and returns how many clients it
// has cost their connections. First request bodies are let go of that are only kept to
// be sent again, then connections end, from the one for which most waits: clients that
// do not read, before all others.
func (r *Relay) Relieve(n int) (ended int) {
	type burden struct {
		cc    *clientConn
		bytes int
	}
	var all []burden
	r.each(func(sh *shard) {
		for cc := range sh.clients {
			if cc.over || cc.closing {
				continue
			}
			before := cc.waiting()
			if before < leastRelief {
				continue
			}
			for _, s := range cc.streams.all() {
				s.dropBody()
			}
			after := cc.waiting()
			n -= before - after
			if after >= leastRelief {
				all = append(all, burden{cc, after})
			}
		}
	})
	slices.SortFunc(all, func(a, b burden) int { return cmp.Compare(b.bytes, a.bytes) })
	for _, b := range all {
		if n <= 0 {
			break
		}
		n -= b.bytes
		ended++
		sh := b.cc.sh
		sh.lock()
		b.cc.sayGoAway(&connError{codeEnhanceYourCalm, "too much waits for this client, and memory is short"})
		sh.unlockAndFlush()
		r.Metrics.Refused(balancer.ReasonMemory)
	}
	return ended
}
