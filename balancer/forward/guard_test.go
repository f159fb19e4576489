package forward

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer/internal/rawhttp"
)

// got records the requests of which a backend has read all, each as METHOD TARGET HOST
// BODY.
type got struct {
	mu   sync.Mutex
	seen []string
}

func (g *got) serve(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen = append(g.seen, fmt.Sprintf("%s %s %s %s", r.Method, r.RequestURI, r.Host, body))
	io.WriteString(rw, "fine")
}

func (g *got) list() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.seen)
}

// final reads one answer, past those that are informational.
func (r *raw) final() answer {
	r.w.Helper()
	for {
		if a := r.hear("GET"); a.StatusCode >= 200 {
			return a
		}
	}
}

// TestRawRequests sends each case of package rawhttp, at once and byte by byte: each
// request that is well-formed is answered, what comes next is refused, the connection
// ends, and the backend gets what it should and no more.
func TestRawRequests(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		for _, c := range rawhttp.Requests() {
			for _, step := range []int{1 << 20, 1} {
				t.Run(fmt.Sprintf("%.70q h1 %v step %d", c.Input, h1, step), func(t *testing.T) {
					run(t, setup{backends: 1, h1: h1}, func(w *world) {
						var g got
						w.apis[0].on(g.serve)
						r := w.raw(nil)
						sending := make(chan struct{})
						go func() {
							defer close(sending)
							for i := 0; i < len(c.Input); i += step {
								if _, err := io.WriteString(r, c.Input[i:min(i+step, len(c.Input))]); err != nil {
									return // it was refused before its end
								}
							}
						}()
						for i := range c.Passed {
							if a := r.final(); a.StatusCode != 200 || a.body != "fine" {
								t.Errorf("answer %d: %d %s", i+1, a.StatusCode, a.body)
							}
						}
						if c.Code != 0 {
							a := r.final()
							if a.StatusCode != c.Code || !a.Close || !strings.HasPrefix(a.body, `{"kind":"Status","apiVersion":"v1"`) || a.Header.Get("Content-Type") != "application/json" {
								t.Errorf("the refusal is %d %s %v, close %v, want %d", a.StatusCode, a.body, a.Header, a.Close, c.Code)
							}
							if rest := r.rest(); rest != "" {
								t.Errorf("after the refusal comes %q", rest)
							}
						}
						r.Close()
						<-sending
						synctest.Wait()
						if seen := strings.Join(g.list(), "|"); seen != c.Seen {
							t.Errorf("the backend got %+q, want %+q", seen, c.Seen)
						}
					})
				})
			}
		}
	}
}

// TestBadHeadBehindSlow: a bad head that comes while the answer to the request before it
// is due does not take that away, and is answered after it.
func TestBadHeadBehindSlow(t *testing.T) {
	for _, bad := range []string{"GET / HTTP/1.1\nHost: x\r\n\r\n", "\n", "GET / HTTP/1.1\r\nHost: x\r\n x\r\n\r\n"} {
		for _, request := range []string{"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n", "POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"} {
			for _, delay := range []time.Duration{0, time.Second} {
				run(t, setup{backends: 1}, func(w *world) {
					w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
						io.Copy(io.Discard, r.Body)
						time.Sleep(5 * time.Second)
						io.WriteString(rw, "slow")
					})
					r := w.raw(nil)
					if delay == 0 {
						io.WriteString(r, request+bad)
					} else {
						io.WriteString(r, request)
						time.Sleep(delay)
						io.WriteString(r, bad)
					}
					r.hear("GET").want(w, 200, "slow")
					r.hear("GET").want(w, 400, `{"kind":"Status"`)
					if rest := r.rest(); rest != "" {
						w.Errorf("rest = %q", rest)
					}
					if n := len(w.apis[0].requests()); n != 1 {
						w.Errorf("%d requests arrived", n)
					}
					if n := w.metric("apiserver_lb.refusals")["reason=bad_request"]; n != 1 {
						w.Errorf("%d refusals are counted", n)
					}
				})
			}
		}
	}
}

// TestHeadTooLong: a head beyond the limit is answered as one, and so is a request line.
func TestHeadTooLong(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		for _, c := range []struct {
			code  int
			begin string
		}{{414, "GET /"}, {431, "GET / HTTP/1.1\r\nHost: x\r\nX: "}} {
			r := w.raw(nil)
			go io.WriteString(r, c.begin+strings.Repeat("x", 2<<20))
			a := r.hear("GET")
			if a.StatusCode != c.code || !a.Close {
				w.Errorf("%d %s, want %d", a.StatusCode, a.body, c.code)
			}
			r.Close()
		}
		r := w.raw(nil)
		r.say("GET / HTTP/1.1", "Host: x", "X: "+strings.Repeat("x", 1<<20-100), "", "GET / HTTP/1.1", "Host: x", "")
		// The backend may refuse it for what is added to it; the connection goes on.
		r.hear("GET")
		r.hear("GET").want(w, 200, "")
	})
}

// TestGoodbye: a client that neither reads nor ends is left after a while.
func TestGoodbye(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		r := w.raw(nil)
		io.WriteString(r, "\n")
		begun := time.Now()
		r.hear("GET").want(w, 400, `{"kind":"Status"`)
		for {
			if _, err := io.WriteString(r, "x"); err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(begun); took > time.Second {
			w.Errorf("it took %v", took)
		}
	})
}
