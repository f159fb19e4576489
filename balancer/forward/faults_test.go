package forward

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"apiserver-lb/balancer"
)

// What a slow client takes out of a buffer of ours is no sign of life of a backend
// that hangs: with it, probes that time out would be forgiven for as long as the
// client reads.
func TestSlowReaderHidesNoHang(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.prefer(0)
		const size = 2 * 60 << 10 // less than a stream's window: all of it arrives
		w.apis[0].on(func(rw http.ResponseWriter, _ *http.Request) {
			// With a length, because ReverseProxy flushes what has none, and takes a
			// mutex for that on which no bubble can rest.
			rw.Header().Set("Content-Length", strconv.Itoa(size+1))
			for range 2 {
				if _, err := rw.Write(make([]byte, 60<<10)); err != nil {
					w.Errorf("the answer does not fit: %v", err)
				}
			}
			if err := http.NewResponseController(rw).Flush(); err != nil {
				w.Error(err)
			}
			<-w.apis[0].stopped
		})
		r := w.raw(w.pki.Alice)
		r.say("GET /api/v1/secrets HTTP/1.1", "Host: x", "")
		time.Sleep(time.Second)
		arrived := w.apis[0].b.LastAnswer()
		if arrived.IsZero() {
			w.Fatal("the backend's answer does not count")
		}
		buf := make([]byte, size/40)
		for range 20 {
			if _, err := io.ReadFull(r.from, buf); err != nil {
				w.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if now := w.apis[0].b.LastAnswer(); !now.Equal(arrived) {
			w.Errorf("the backend has sent nothing for %v, and is taken to have answered %v ago", time.Since(arrived), time.Since(now))
		}
		r.Close()
	})
}

// A body that breaks off is the client's fault, and no evidence against a backend.
func TestUpgradeWithBrokenBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		r := w.raw(w.pki.Alice)
		r.say("POST /api/v1/namespaces/x/pods/y/exec HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: SPDY/3.1",
			"Transfer-Encoding: chunked", "", "2", "{}", "zz", "")
		if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 400 Bad Request\r\n") || !strings.Contains(got, "the request body could not be read to its end") {
			w.Errorf("answer %q", got)
		}
		if heard := w.verdicts(); len(heard) != 0 {
			w.Errorf("the health checks were told %q", heard)
		}
	})
}

// A panic of ours ends one request over HTTP/1.1, and is told in the log, with the stack
// and without the client's secrets.
func TestPanicIsLogged(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.core.NewAuditID = func() string { panic("boom") }
		c := w.client(1, w.pki.Alice)
		req := c.request("GET", "/api?access_token=canary", nil)
		req.Header.Set("Authorization", "Bearer canary")
		req.Header.Set("Cookie", "canary")
		if res, err := c.send(req); err == nil {
			res.Body.Close()
			w.Errorf("answered %d", res.StatusCode)
		}
		if text := w.log.String(); !strings.Contains(text, "goroutine ") || strings.Contains(text, "canary") {
			w.Errorf("the log has no stack, or a secret:\n%s", text)
		}
		if got := strings.Count(w.log.String(), `level=ERROR msg="panic while forwarding a request" panic=boom`); got != 1 {
			w.Errorf("%d lines in the log, want 1:\n%s", got, w.log.String())
		}
		if got := w.metric("apiserver_lb.refusals")["reason=internal"]; got != 1 {
			w.Errorf("%d counted, want 1", got)
		}
	})
}

// TestPanicGivesBack: a panic after the head of an answer has come leaves no load behind
// (world.end looks).
func TestPanicGivesBack(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.core.Records = &balancer.Records{Log: &balancer.AccessLog{Ratio: 1, Write: func(l *balancer.Line) {
			if l.Stage == balancer.ResponseStarted {
				panic("boom")
			}
		}}}
		w.apis[0].holding()
		c := w.client(1, w.pki.Alice)
		if res, err := c.send(c.request("GET", watchTarget, nil)); err == nil {
			res.Body.Close()
			w.Errorf("answered %d", res.StatusCode)
		}
	})
}

// The last that a backend says reaches the client, even if the backend does not take
// what the client says meanwhile: the exit code of a command comes so.
func TestTunnelDeliversTheLastWords(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.prefer(0)
		w.apis[0].on(func(rw http.ResponseWriter, _ *http.Request) {
			c, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				w.Error(err)
				return
			}
			if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"); err != nil {
				w.Error(err)
			}
			<-w.step // the client's bytes are on their way, and are never read
			if _, err := io.WriteString(c, strings.Repeat("last words. ", 20000)); err != nil {
				w.Error(err)
			}
			c.Close()
		})
		r := w.raw(w.pki.Alice)
		r.say("POST /api/v1/namespaces/x/pods/y/exec HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: SPDY/3.1", "Content-Length: 0", "")
		for line := r.line(); line != ""; line = r.line() {
		}
		r.say("first")
		w.step <- struct{}{}
		// The client goes on talking to a backend that has gone, and reads later.
		for range 20 {
			if _, err := io.WriteString(r, "more "); err != nil {
				w.Fatalf("the client is cut off before it could read: %v", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if got := strings.Count(r.rest(), "last words. "); got != 20000 {
			w.Errorf("%d of 20000 arrived", got)
		}
	})
}
