package relay

import (
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestEndWatches: the watches of a backend that leaves end cleanly, at different times,
// and those of others and whatever is no watch go on.
func TestEndWatches(t *testing.T) {
	run(t, setup{backends: 2, options: patientWithBackends}, func(w *world) {
		const spread = 20 * time.Second
		w.prefer(0)
		c := w.client(nil).greet()
		b, watches := c.openWatches(w.apis[0], 20)
		long := c.ask(true, "GET", logPath)
		e := b.wantRequest(true, "GET", logPath)
		b.headers(e.id, false, ":status: 200")
		c.wantStatus(long, false, 200)

		w.relay.EndWatches(w.apis[1].b, time.Now())
		time.Sleep(time.Second)
		if n := len(c.endOf(watches)); n != 0 {
			t.Errorf("%d watches have ended with another backend", n)
		}

		by := time.Now().Add(spread)
		var counts []int
		for range 25 {
			w.relay.EndWatches(w.apis[0].b, by)
			time.Sleep(time.Second)
			c.pong("notasked")
			counts = append(counts, len(c.endOf(watches)))
		}
		if n := counts[9]; n == 0 || n == len(watches) {
			t.Errorf("%d of %d watches had ended in half the time", n, len(watches))
		}
		if n := counts[24]; n != len(watches) {
			t.Errorf("%d of %d watches have ended", n, len(watches))
		}
		if len(c.endOf([]uint32{long})) != 0 {
			t.Error("what is no watch has ended")
		}
		c.reset(long, http2.ErrCodeCancel)
	})
}

// openWatches opens watches that the backend, whose first connection they are on, begins
// to answer.
func (p *peer) openWatches(a *kubeAPIServer, n int) (b *peer, ids []uint32) {
	for range n {
		id := p.ask(true, "GET", watchPath)
		if b == nil {
			b = a.accepted()
		}
		e := b.wantRequest(true, "GET", watchPath)
		b.headers(e.id, false, ":status: 200")
		p.wantStatus(id, false, 200)
		ids = append(ids, id)
	}
	return b, ids
}
