package relay

import (
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestRedial: kube-apiserver ends its connection with each request of nobody in particular.
// Those who come meanwhile share the next one, which is not made at once; whoever has shown
// who he is does not wait.
func TestRedial(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		began := time.Now()
		id := c.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		b.goAway(1, http2.ErrCodeNo)
		b.finish(1, c, id)
		if took := time.Since(began); took >= redialAfter {
			w.Errorf("the first connection took %v", took)
		}

		var ids []uint32
		for range 5 {
			ids = append(ids, c.ask(true, "GET", logPath)) // HTTP/1.1 is for short ones
		}
		alice := w.client(w.pki.Alice).greet()
		alice.ask(true, "GET", logPath)
		of := w.apis[0].accepted()
		of.wantRequest(true, "GET", logPath)
		if took := time.Since(began); took >= redialAfter {
			w.Errorf("that of a certificate was made after %v", took)
		}
		of.finish(1, alice, 1)

		time.Sleep(redialAfter - time.Since(began) - time.Nanosecond)
		w.apis[0].wantNoConn()
		time.Sleep(time.Nanosecond)
		b = w.apis[0].accepted()
		for i, id := range ids {
			b.wantRequest(true, "GET", logPath)
			b.finish(uint32(2*i+1), c, id)
		}
	})
}
