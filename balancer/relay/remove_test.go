package relay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
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

// Where a new set of backends has one that speaks HTTP/1.1 only, clients come again: who
// is there, and who was let in at the same time and comes after them.
func TestResettle(t *testing.T) {
	run(t, setup{backends: 2}, func(w *world) {
		old := w.apis[1].b
		w.core.Backends.Replace(backend.NewSet(0, w.apis[0].b))
		old.SpeaksHTTP2(false)
		c := w.client(nil).greet()
		w.relay.Resettle() // nothing has changed for requests
		if c.alive(time.Second); strings.Contains(texts(c.all()), "GOAWAY") {
			w.Errorf("client hears %s", texts(c.all()))
		}
		w.core.Backends.Replace(backend.NewSet(0, w.apis[0].b, old))
		late := w.client(nil)
		late.raw([]byte(http2.ClientPreface))
		late.settings()
		late.until("GOAWAY 2147483647 NO_ERROR")
		w.relay.Resettle()
		c.until("GOAWAY 2147483647 NO_ERROR")
		old.SpeaksHTTP2(true)
	})
}

// TestUnstall: reads that wait for a backend which fails its checks are answered by
// another one, those whose answer is held in part too. All else waits on, as does
// everything where there is no other backend.
func TestUnstall(t *testing.T) {
	run(t, setup{backends: 2, options: patientWithBackends}, func(w *world) {
		w.prefer(0)
		c := w.client(nil).greet()
		list := c.ask(true, "GET", "/api/v1/pods")
		b := w.apis[0].accepted()
		held := c.ask(true, "GET", "/api/v1/namespaces/x/pods/y")
		log := c.ask(true, "GET", logPath)
		post := c.ask(true, "POST", "/")
		exec := c.ask(true, "GET", "/api/v1/namespaces/x/pods/y/proxy/z")
		var at [5]uint32
		for i := range at {
			at[i] = b.hear("a request").id
		}
		b.headers(at[1], false, ":status: 200", "content-type: application/json")
		b.data(at[1], false, "{")
		b.headers(at[2], false, ":status: 200")
		b.data(at[2], false, "begun")
		c.until(fmt.Sprintf("DATA %d end=false", log))
		c.drain()

		w.apis[1].b.SetState(health.Dead, time.Now())
		w.relay.Unstall(w.apis[0].b)
		b.wantNothing()
		c.wantNothing()

		w.apis[1].b.SetState(health.Ready, time.Now())
		w.relay.Unstall(w.apis[1].b)
		b.wantNothing()
		w.relay.Unstall(w.apis[0].b)
		resets := []string{b.hear("a reset").text, b.hear("a reset").text}
		if slices.Sort(resets); resets[0] != fmt.Sprintf("RST_STREAM %d CANCEL", at[0]) || resets[1] != fmt.Sprintf("RST_STREAM %d CANCEL", at[1]) {
			w.Errorf("backend a hears %q", resets)
		}
		b.wantNothing()
		b2 := w.apis[1].accepted()
		for range 2 { // in any order
			e := b2.hear("a request")
			id := list
			if strings.Contains(e.text, "/pods/y") {
				id = held
			}
			b2.finish(e.id, c, id)
		}
		w.relay.Unstall(w.apis[0].b)
		c.wantNothing()
		b.finish(at[3], c, post)
		b.finish(at[4], c, exec)
		b.data(at[2], true, "")
		c.until(fmt.Sprintf("DATA %d end=true", log))
		if got := fmt.Sprint(w.metric("apiserver_lb.retries")); got != "map[backend=a reason=stalled:2]" {
			w.Errorf("retries: %s", got)
		}
	})
}
