package relay

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

// stallLate is the latest at which a request that stands still is ended.
const stallLate = time.Minute + time.Minute/stallLooks + 2*tickEvery

// TestStalledBody: a body of which nothing comes ends its request with 408, and the
// backend's stream; one that brings something now and then goes on.
func TestStalledBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		stalls := c.ask(false, "POST", "/api/v1/pods")
		b := w.apis[0].accepted()
		at := b.wantRequest(false, "POST", "/api/v1/pods").id
		drips := c.ask(false, "POST", "/api/v1/pods")
		dripsAt := b.wantRequest(false, "POST", "/api/v1/pods").id
		c.data(stalls, false, "some")
		b.wantData(at, false, "some")
		for range 12 {
			stay(5*time.Second, b)
			c.data(drips, false, "x")
			b.until("DATA 3")
		}
		if got := texts(c.drain()); strings.Contains(got, "RST_STREAM") {
			w.Errorf("the end comes too early: %s", got)
		}
		stay(stallLate-time.Minute, b)
		b.until("RST_STREAM 1 CANCEL")
		if e := c.until("HEADERS 1"); e.get(":status") != "408" {
			w.Errorf("the client hears %s", e.text)
		}
		if e := c.until("DATA 1"); !strings.Contains(string(e.data), "http.stallTimeout") {
			w.Errorf("the client hears %s", e.data)
		}
		c.wantRST(stalls, http2.ErrCodeNo)
		c.data(drips, true, "end")
		b.until("DATA 3")
		b.headers(dripsAt, true, ":status: 201")
		c.wantStatus(drips, true, 201)
		if n := w.metric("apiserver_lb.refusals")["reason="+balancer.ReasonBodyStalled]; n != 1 {
			w.Errorf("the metrics know of %d", n)
		}
	})
}

// TestStalledAnswer: a short answer whose client takes nothing of it is ended; one that
// is taken slowly is not, nor is any that is long-running.
func TestStalledAnswer(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		var ids []uint32
		for _, path := range []string{"/api/v1/pods", "/api/v1/pods", watchPath, logPath} {
			ids = append(ids, c.ask(true, "GET", path))
		}
		b := w.apis[0].accepted()
		for _, e := range b.drain() {
			b.headers(e.id, false, ":status: 200")
			b.data(e.id, false, strings.Repeat("x", 5000))
		}
		// The two short ones are held no longer than this.
		for _, id := range []uint32{1, 3} {
			b.headers(id, true, "grpc-status: 0")
		}
		synctest.Wait()
		for range 30 {
			stay(5*time.Second, b, c)
			c.window(ids[1], 1)
		}
		got := texts(c.drain())
		if !strings.Contains(got, "RST_STREAM 1 CANCEL") {
			w.Errorf("the answer that is not taken goes on: %s", got)
		}
		if n := strings.Count(got, "RST_STREAM"); n != 1 {
			w.Errorf("%d streams are reset, want 1: %s", n, got)
		}
		if n := w.metric("apiserver_lb.refusals")["reason="+balancer.ReasonAnswerStalled]; n != 1 {
			w.Errorf("the metrics know of %d", n)
		}
		for _, id := range ids[1:] {
			c.reset(id, http2.ErrCodeCancel)
		}
		synctest.Wait()
	})
}

// stay lets time pass in which the peers are seen to be there.
func stay(d time.Duration, peers ...*peer) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, p := range peers {
			p.pong("alive?!?")
		}
		time.Sleep(min(time.Second, time.Until(end)))
	}
	synctest.Wait()
}

// TestStalledRefusal: a refusal, here because the backend says nothing, that is not taken is ended too, whatever was asked for.
func TestStalledRefusal(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		id := c.ask(true, "GET", watchPath)
		stay(100*time.Second, c)
		if got := texts(c.drain()); !strings.Contains(got, `":status: 504"`) || !strings.Contains(got, fmt.Sprintf("RST_STREAM %d CANCEL", id)) {
			w.Errorf("the client hears %s", got)
		}
	})
}

// TestWithoutRequest: a connection on which no request comes is ended as soon as one on
// which no head comes to its end; one that has had a request may rest.
func TestWithoutRequest(t *testing.T) {
	run(t, setup{options: patientWithBackends}, func(w *world) {
		idle, used := w.client(nil).greet(), w.client(nil).greet()
		id := used.ask(true, "GET", "/")
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		b.finish(1, used, id)
		begun := time.Now()
		for !idle.ended() && time.Since(begun) < time.Minute {
			stay(time.Second, used, idle)
		}
		if got := texts(idle.drain()); !strings.Contains(got, "GOAWAY") || !idle.ended() {
			w.Errorf("after %v the client hears %s", time.Since(begun), got)
		}
		if used.ended() {
			w.Error("the connection that has had a request has ended")
		}
	})
}
