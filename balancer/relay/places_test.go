package relay

import (
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
)

// TestNoStreamsAllowed: connections to a backend that takes no more streams on each do
// not stay.
func TestNoStreamsAllowed(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		for range 20 {
			id := c.ask(true, "GET", logPath)
			b := w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0})
			b.wantRequest(true, "GET", logPath)
			b.finish(1, c, id)
		}
		synctest.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		if n := w.conns["a anonymous"]; n > 1 {
			w.Errorf("%d connections stay", n)
		}
	})
}

// TestAnswerWaitsElsewhere: an answer that has come whole, and waits for its client, takes
// no place among the streams that its backend allows.
func TestAnswerWaitsElsewhere(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(b *peer, id uint32)
	}{
		{"DATA", func(b *peer, id uint32) { b.data(id, true, "hello") }},
		{"trailers", func(b *peer, id uint32) { b.data(id, false, "hello"); b.headers(id, true, "x-a: b") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				slow := w.client(nil).greet(initialWindow(0))
				var b *peer
				for i := range 2 {
					id := slow.ask(true, "GET", logPath)
					if i == 0 {
						b = w.apis[0].accepted(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
					}
					b.wantRequest(true, "GET", logPath)
					b.headers(id, false, ":status: 200")
					slow.wantStatus(id, false, 200)
					tt.end(b, id)
				}
				c := w.client(nil).greet()
				c.ask(true, "GET", logPath)
				w.apis[0].wantNoConn()
				b.wantRequest(true, "GET", logPath)
				b.finish(5, c, 1)
				for _, id := range []uint32{1, 3} { // it has all of it when it takes it
					slow.window(id, 100)
				}
				if n := total(slow.drain()); n[1] != 5 || n[3] != 5 {
					w.Errorf("the slow client has got %v", n)
				}
			})
		})
	}
}
