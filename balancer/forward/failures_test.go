package forward

import (
	"io"
	"net/http"
	"testing"

	"golang.org/x/net/http2"
)

// The two answers of a kube-apiserver that shuts down
// (k8s.io/apiserver/pkg/server/filters/with_retry_after.go and waitgroup.go).
func shutdown429(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "5")
	w.Header().Set("Connection", "close")
	http.Error(w, "The apiserver is shutting down, please try again later.", http.StatusTooManyRequests)
}

const shutdown503Body = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"apiserver is shutting down","reason":"ServiceUnavailable","code":503}` + "\n"

func shutdown503(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "1")
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(503)
	io.WriteString(w, shutdown503Body)
}

// failure is a way in which the first backend fails.
type failure struct {
	name    string
	event   string                        // as metrics call it
	raw     func(*h2stream)               // what it does with a request, at a raw backend
	handle  func(*world) http.HandlerFunc // or at one of net/http
	prepare func(*world)                  // or before anything
	verdict string                        // that health must hear; empty: none
	sent    bool                          // it may have acted on the request
	code    int                           // of the answer where there is no second backend
	tries   int                           // that go to the first backend before the second; 0: 1
}

func failures() []failure {
	return []failure{
		{name: "dial refused", event: "dial_failed", prepare: func(w *world) { w.apis[0].kill() }, verdict: "a dial_failed", code: 503},
		{name: "dial hangs", event: "dial_failed", prepare: func(w *world) { w.net.Swallow(w.apis[0].b.Address, true) }, verdict: "a dial_failed", code: 503},
		{name: "no TLS", event: "dial_failed", prepare: func(w *world) { w.apis[0].kill(); w.rudeListener(w.apis[0].b.Address) }, verdict: "a dial_failed", code: 503},
		{name: "wrong server name", event: "dial_failed", prepare: func(w *world) { w.apis[0].b.ServerName = "other" }, verdict: "a dial_failed", code: 503},
		{name: "REFUSED_STREAM", event: "refused", raw: func(s *h2stream) { s.reset(s.id, http2.ErrCodeRefusedStream) }, code: 503, tries: 7},
		{name: "GOAWAY", event: "refused", raw: func(s *h2stream) { s.goAway(s.id-1, http2.ErrCodeNo) }, code: 503, tries: 7},
		{name: "GOAWAY with an error", event: "refused", raw: func(s *h2stream) { s.goAway(0, http2.ErrCodeEnhanceYourCalm) }, code: 503, tries: 7},
		{name: "shutdown 429", event: "shutting_down", handle: func(*world) http.HandlerFunc { return shutdown429 }, verdict: "a shutdown_announced", code: 429},
		{name: "shutdown 503", event: "shutting_down", handle: func(*world) http.HandlerFunc { return shutdown503 }, verdict: "a shutdown_announced", code: 503},
		{name: "stream reset", event: "lost", raw: func(s *h2stream) { s.reset(s.id, http2.ErrCodeInternal) }, verdict: "a connection_lost", sent: true, code: 502},
		{name: "GOAWAY that includes the stream, and end", event: "lost", raw: func(s *h2stream) { s.goAway(s.id, http2.ErrCodeNo); s.conn.Close() }, verdict: "a connection_lost", sent: true, code: 502},
		{name: "end of file", event: "lost", raw: func(s *h2stream) { s.conn.Close() }, verdict: "a connection_lost", sent: true, code: 502},
		{name: "kill -9", event: "lost", handle: func(w *world) http.HandlerFunc {
			return func(http.ResponseWriter, *http.Request) { w.apis[0].kill() }
		}, verdict: "a connection_lost", sent: true, code: 502},
		{name: "black hole", event: "lost", handle: func(w *world) http.HandlerFunc {
			return func(_ http.ResponseWriter, r *http.Request) {
				w.apis[0].ln.SinkAll()
				<-w.apis[0].stopped
			}
		}, verdict: "a connection_lost", sent: true, code: 502},
		{name: "declared dead", event: "died", handle: func(w *world) http.HandlerFunc {
			return func(http.ResponseWriter, *http.Request) {
				w.dead(w.apis[0])
				<-w.apis[0].stopped
			}
		}, sent: true, code: 504},
		{name: "nonsense", event: "lost", raw: func(s *h2stream) { io.WriteString(s.conn, "HTTP/1.1 400 Bad Request\r\n\r\n") }, verdict: "a connection_lost", sent: true, code: 502},
	}
}

// over returns the failure as a client of the protocol given sees it: the relay of
// HTTP/2 knows a black hole by the PING that nobody answers, where net/http's
// transport only loses the connection.
func (f failure) over(major int) failure {
	if f.name == "black hole" && major == 2 {
		f.event, f.verdict, f.code = "died", "a no_answer", 504
	}
	return f
}

// rudeListener accepts connections and closes them.
func (w *world) rudeListener(address string) {
	l := w.net.Listen(address)
	w.clients = append(w.clients, l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

// failing runs a test in a world whose first backend fails so, and is preferred.
func (f failure) failing(t *testing.T, s setup, test func(w *world)) {
	t.Helper()
	if f.raw != nil {
		s.raw = h2script(nil, f.raw, nil)
	}
	run(t, s, func(w *world) {
		if f.handle != nil {
			w.apis[0].on(f.handle(w))
		}
		if f.prepare != nil {
			f.prepare(w)
		}
		w.prefer(0)
		test(w)
	})
}
