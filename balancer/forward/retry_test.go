package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
	"apiserver-lb/health"
)

// retried returns how often requests were sent again, "backend=a reason=lost" -> n.
func (w *world) retried() map[string]int64 { return w.metric("apiserver_lb.retries") }

const patchBody = `{"metadata":{"labels":{"a":"ü"}}}`

// TestSafeMethods: whatever happens to one backend, a read is answered by the other.
func TestSafeMethods(t *testing.T) {
	for _, f := range failures() {
		for major := 1; major <= 2; major++ {
			t.Run(fmt.Sprintf("%s h%d", f.name, major), func(t *testing.T) {
				f := f.over(major)
				f.failing(t, setup{}, func(w *world) {
					begun := time.Now()
					a := w.client(major, w.pki.Alice).do("GET", "/api/v1/pods?a;b", nil, "X-A: 1")
					a.want(w, 200, `{"from":"b"}`)
					if took := time.Since(begun); took > 16*time.Second {
						w.Errorf("it took %v", took)
					}
					got := w.apis[1].one()
					if got.Target != "/api/v1/pods?a;b" || got.Header.Get("X-A") != "1" || got.Header.Get("X-Remote-User") != "alice" {
						w.Errorf("the second backend got %s %v", got.Target, got.Header)
					}
					want := map[string]int64{"backend=a reason=" + f.event: int64(max(1, f.tries))}
					if diff := cmp.Diff(want, w.retried()); diff != "" {
						w.Errorf("retries (-want +got):\n%s", diff)
					}
					var verdicts []string
					if f.verdict != "" {
						verdicts = []string{f.verdict}
					}
					if diff := cmp.Diff(verdicts, w.verdicts()); diff != "" {
						w.Errorf("verdicts (-want +got):\n%s", diff)
					}
				})
			})
		}
	}
}

// TestWrites: a write goes to the other backend, byte for byte, where the first one
// has not acted on it; where it may have, it is not sent again, and the client is
// not invited to either.
func TestWrites(t *testing.T) {
	for _, f := range failures() {
		for _, method := range []string{"POST", "PATCH", "DELETE"} {
			t.Run(f.name+" "+method, func(t *testing.T) {
				f := f.over(2)
				f.failing(t, setup{}, func(w *world) {
					body := strings.Repeat(patchBody, 100)
					a := w.client(2, w.pki.Alice).do(method, "/api/v1/namespaces/n/pods/p", strings.NewReader(body), "Content-Type: application/x")
					if !f.sent {
						a.want(w, 200, `{"from":"b"}`)
						got := w.apis[1].one()
						if got.body.String() != body || got.length != int64(len(body)) || got.Method != method || got.Header.Get("Content-Type") != "application/x" {
							w.Errorf("the second backend got %s, %d bytes of %d, %v", got.Method, len(got.body.String()), got.length, got.Header)
						}
						return
					}
					a.want(w, f.code, `{"kind":"Status"`)
					if a.Header.Get("Retry-After") != "" || strings.Contains(a.body, "retryAfterSeconds") || !strings.Contains(a.body, "whether the "+method+" took effect is not known") {
						w.Errorf("answer = %v %s", a.Header, a.body)
					}
					if n := len(w.apis[1].requests()); n != 0 {
						w.Errorf("the second backend got %d requests", n)
					}
					if len(w.retried()) != 0 {
						w.Errorf("retries = %v", w.retried())
					}
				})
			})
		}
	}
}

// TestNoSecondBackend: what the client is told where there is no other backend.
// What was not acted on may be replayed by any client, so it says when.
func TestNoSecondBackend(t *testing.T) {
	for _, f := range failures() {
		for _, method := range []string{"GET", "POST"} {
			t.Run(f.name+" "+method, func(t *testing.T) {
				f.failing(t, setup{backends: 1}, func(w *world) {
					a := w.client(1, w.pki.Alice).do(method, "/api", strings.NewReader("x"))
					after := a.Header.Get("Retry-After")
					switch f.name {
					case "shutdown 429":
						a.want(w, 429, "The apiserver is shutting down, please try again later.\n")
						if after != "5" {
							w.Errorf("Retry-After = %q", after)
						}
						return
					case "shutdown 503":
						a.want(w, 503, shutdown503Body)
						if after != "1" || len(a.body) != len(shutdown503Body) {
							w.Errorf("Retry-After = %q, body = %q", after, a.body)
						}
						return
					}
					a.want(w, f.code, `{"kind":"Status"`)
					if want := map[bool]string{false: "1", true: ""}[f.sent]; after != want || strings.Contains(a.body, "retryAfterSeconds") == f.sent {
						w.Errorf("Retry-After = %q, want %q; %s", after, want, a.body)
					}
				})
			})
		}
	}
}

// TestNotAgain: what exec and proxying reach may act on the first byte: only where
// nothing at all was sent does another backend get it.
func TestNotAgain(t *testing.T) {
	for _, f := range failures() {
		t.Run(f.name, func(t *testing.T) {
			f := f.over(2)
			f.failing(t, setup{}, func(w *world) {
				a := w.client(2, w.pki.Alice).do("GET", proxyTarget, nil)
				if f.event == "dial_failed" {
					a.want(w, 200, `{"from":"b"}`)
					return
				}
				a.want(w, f.code, "")
				if n := len(w.apis[1].requests()); n != 0 {
					w.Errorf("the second backend got %d requests", n)
				}
				// What is proxied can say what it likes: a workload must not be
				// able to have kube-apiservers drained.
				for _, v := range w.verdicts() {
					if strings.Contains(v, "shutdown") {
						w.Errorf("health heard %q", v)
					}
				}
			})
		})
	}
}

// TestErrors: the texts of net/http's errors, on which it depends what is sent
// again, are still the same.
func TestErrors(t *testing.T) {
	b := newAPI(&world{}, 0, setup{}).b
	for _, c := range []struct {
		text string
		want balancer.Event
	}{
		{textGoAway, balancer.Refused},
		{textUnusable, balancer.Refused},
		{textNotEstablished, balancer.Refused},
		{textGoAwayError + "PROTOCOL_ERROR", balancer.Refused},
		{"http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR, debug=\"\"", balancer.Lost},
		{"http2: client connection lost", balancer.Lost},
		{"http2: client connection force closed via ClientConn.Close", balancer.Lost},
		{"unexpected EOF", balancer.Lost},
	} {
		if got := eventOf(fmt.Errorf("%s", c.text), b); got != c.want {
			t.Errorf("%q is %v, want %v", c.text, got, c.want)
		}
	}
	for code, want := range map[http2.ErrCode]balancer.Event{http2.ErrCodeRefusedStream: balancer.Refused, http2.ErrCodeCancel: balancer.Lost} {
		if got := eventOf(http2.StreamError{StreamID: 1, Code: code}, b); got != want {
			t.Errorf("%v is %v, want %v", code, got, want)
		}
	}
	// What "not usable" and "not established" stand for cannot be timed from
	// outside: a connection that ends between the choice of it and its use.
	for _, used := range []bool{false, true} {
		run(t, setup{backends: 1}, func(w *world) {
			ctx := context.Background()
			cc, err := w.pools.get(ctx, w.apis[0].b, balancer.Asserted, false)
			if err != nil {
				w.Fatal(err)
			}
			ask := func() error {
				r, _ := http.NewRequest("GET", "https://x/", nil)
				res, err := cc.RoundTrip(r)
				if err == nil {
					res.Body.Close()
				}
				return err
			}
			want := textNotEstablished
			if used {
				want = textUnusable
				if err := ask(); err != nil {
					w.Fatal(err)
				}
				synctest.Wait()
				if err := cc.Reserve(); err != nil {
					w.Fatal(err)
				}
			}
			w.apis[0].ln.ResetAll()
			synctest.Wait()
			if err := ask(); err == nil || err.Error() != want {
				w.Errorf("net/http says %v, want %q", err, want)
			}
		})
	}
}

// TestLostOnce: a read whose backend was lost is sent once more, not for ever: it
// may be what kills them.
func TestLostOnce(t *testing.T) {
	run(t, setup{backends: 3}, func(w *world) {
		for _, a := range w.apis {
			a.on(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		}
		a := w.client(2, nil).do("GET", "/", nil)
		a.want(w, 502, `{"kind":"Status"`)
		if a.Header.Get("Retry-After") != "" {
			w.Error("the client is invited to try again")
		}
		n := 0
		for _, a := range w.apis {
			n += len(a.requests())
		}
		if n != 2 {
			w.Errorf("it was sent %d times", n)
		}
	})
}

// TestRefusedByAll: a request that every backend refuses ends.
func TestRefusedByAll(t *testing.T) {
	for _, handle := range []http.HandlerFunc{shutdown429, shutdown503} {
		run(t, setup{backends: 3}, func(w *world) {
			for _, a := range w.apis {
				a.on(handle)
			}
			a := w.client(2, nil).do("POST", "/", strings.NewReader(patchBody))
			if a.StatusCode != 429 && a.StatusCode != 503 || !strings.Contains(a.body, "apiserver is shutting down") || a.Header.Get("Retry-After") == "" || a.err != nil {
				w.Errorf("answer = %d %q %v", a.StatusCode, a.body, a.err)
			}
			for _, a := range w.apis {
				if got := a.one().body.String(); got != patchBody && got != "" {
					w.Errorf("%s got %q", a.b.Name, got)
				}
			}
		})
	}
}

// TestBudget: retries are bounded; failed dials cost nothing.
func TestBudget(t *testing.T) {
	failures := failures()
	for _, f := range []failure{failures[0], failures[4], failures[7]} {
		f.failing(t, setup{share: "none"}, func(w *world) {
			a := w.client(2, w.pki.Alice).do("POST", "/", strings.NewReader("x"))
			if f.event == "dial_failed" {
				a.want(w, 200, `{"from":"b"}`)
				return
			}
			a.want(w, f.code, "")
			if a.Header.Get("Retry-After") == "" {
				w.Errorf("%s: no Retry-After", f.name)
			}
			if got := w.metric("apiserver_lb.refusals"); f.event == "refused" && got["reason=retry_budget"] != 1 {
				w.Errorf("%s: refusals = %v", f.name, got)
			}
		})
	}
}

// TestHeldBound: a body is sent again as long as all of it is held, and no longer.
func TestHeldBound(t *testing.T) {
	const limit = 10_000
	for _, c := range []struct {
		size int
		want bool
	}{{1, true}, {limit, true}, {limit + 1, false}, {3 * limit, false}} {
		// The backend refuses when it has read everything.
		script := h2script(nil, func(*h2stream) {}, func(p *h2peer, f *http2.DataFrame) {
			if f.StreamEnded() {
				p.reset(f.StreamID, http2.ErrCodeRefusedStream)
			}
		})
		run(t, setup{raw: script, maxHeld: limit}, func(w *world) {
			w.prefer(0)
			body := strings.Repeat("x", c.size-1) + "y"
			a := w.client(2, nil).do("POST", "/", strings.NewReader(body))
			if !c.want {
				a.want(w, 503, `{"kind":"Status"`)
				if a.Header.Get("Retry-After") != "1" || len(w.apis[1].requests()) != 0 {
					w.Errorf("%d bytes: Retry-After = %q, %d requests", c.size, a.Header.Get("Retry-After"), len(w.apis[1].requests()))
				}
				return
			}
			a.want(w, 200, `{"from":"b"}`)
			if got := w.apis[1].one().body.String(); got != body {
				w.Errorf("%d bytes arrived as %d", c.size, len(got))
			}
		})
	}
}

// TestSlowUpload: a request moves to another backend while its client is in the
// middle of sending the body, and silent.
func TestSlowUpload(t *testing.T) {
	for name, refuse := range map[string]func(*h2stream){
		"refused": func(s *h2stream) { s.reset(s.id, http2.ErrCodeRefusedStream) },
		"goaway":  func(s *h2stream) { s.goAway(s.id-1, http2.ErrCodeNo) },
	} {
		for major := 1; major <= 2; major++ {
			t.Run(fmt.Sprintf("%s h%d", name, major), func(t *testing.T) {
				script := h2script(nil, func(s *h2stream) {
					go func() {
						<-s.w.step
						refuse(s)
					}()
				}, nil)
				run(t, setup{raw: script}, func(w *world) {
					w.prefer(0)
					body, write := io.Pipe()
					c := w.client(major, w.pki.Alice)
					answered := make(chan answer, 1)
					go func() { answered <- c.do("POST", "/", body) }()
					io.WriteString(write, "first,")
					synctest.Wait()
					close(w.step)
					time.Sleep(time.Millisecond)
					synctest.Wait()
					// The client has said nothing since.
					if got := w.apis[1].one().body.String(); got != "first," {
						w.Errorf("the second backend has got %q", got)
					}
					io.WriteString(write, "second,")
					synctest.Wait()
					io.WriteString(write, "third")
					write.Close()
					await(w, answered, "the answer").want(w, 200, `{"from":"b"}`)
					if got := w.apis[1].one().body.String(); got != "first,second,third" {
						w.Errorf("the second backend got %q", got)
					}
				})
			})
		}
	}
}

// TestSlowUploadShutdown: so does one that is turned away before its body has been
// read.
func TestSlowUploadShutdown(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		for _, others := range []int{0, 1} {
			t.Run(fmt.Sprintf("h1 %v others %d", h1, others), func(t *testing.T) {
				run(t, setup{h1: h1, backends: 1 + others}, func(w *world) {
					w.apis[0].on(shutdown429)
					w.prefer(0)
					body, write := io.Pipe()
					c := w.client(2, w.pki.Alice)
					answered := make(chan answer, 1)
					go func() { answered <- c.do("POST", "/", body) }()
					io.WriteString(write, "first,")
					synctest.Wait()
					if others == 0 {
						await(w, answered, "the answer").want(w, 429, "The apiserver is shutting down, please try again later.\n")
						write.Close()
						return
					}
					io.WriteString(write, "second")
					write.Close()
					await(w, answered, "the answer").want(w, 200, `{"from":"b"}`)
					if got := w.apis[1].one().body.String(); got != "first,second" {
						w.Errorf("the second backend got %q", got)
					}
				})
			})
		}
	}
}

// TestOverlap: large uploads move to another backend at any point of them; what
// arrives is whole.
func TestOverlap(t *testing.T) {
	var part atomic.Int64
	script := h2script([]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 20}}, func(*h2stream) {}, func(p *h2peer, f *http2.DataFrame) {
		if part.Add(int64(len(f.Data()))) > 0 {
			p.reset(f.StreamID, http2.ErrCodeRefusedStream)
		}
	})
	run(t, setup{raw: script}, func(w *world) {
		w.prefer(0)
		c := w.client(2, nil)
		for i := range 30 {
			size := 1 + i*9973
			part.Store(-int64(size / 2))
			body := strings.Repeat(fmt.Sprintf("%09d|", i), size/10+1)[:size]
			before := len(w.apis[1].requests())
			c.do("POST", "/", &trickle{body: body, w: w}).want(w, 200, `{"from":"b"}`)
			if got := w.apis[1].requests()[before].body.String(); got != body {
				w.Errorf("%d bytes arrived as %d", size, len(got))
			}
		}
	})
}

// trickle is a body that comes in small pieces.
type trickle struct {
	w    *world
	body string
	n    int
}

func (t *trickle) Read(p []byte) (int, error) {
	if t.body == "" {
		return 0, io.EOF
	}
	if t.n++; t.n%7 == 0 {
		time.Sleep(time.Millisecond)
	}
	n := copy(p[:min(len(p), 1+t.n*131)], t.body)
	t.body = t.body[n:]
	return n, nil
}

// TestAbandoned: the answer that a request turned its back on is not left open on
// the backend until the new one ends.
func TestAbandoned(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{h1: h1}, func(w *world) {
			gone := make(chan struct{})
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				rw.Header().Set("Retry-After", "1")
				rw.WriteHeader(503)
				flushed(rw, "apiserver is shutting down"+strings.Repeat(" ", balancer.ShutdownBodyBytes))
				<-r.Context().Done()
				close(gone)
			})
			w.apis[1].on(func(rw http.ResponseWriter, r *http.Request) {
				flushed(rw, "event\n")
				<-r.Context().Done()
			})
			w.prefer(0)
			c := w.client(2, nil)
			res, err := c.send(c.request("GET", watchTarget, nil))
			if err != nil {
				w.Fatal(err)
			}
			if res.StatusCode != 200 {
				w.Errorf("code = %d", res.StatusCode)
			}
			await(w, gone, "the first backend's request to end")
			res.Body.Close()
		})
	}
}

// TestNoBackend: the literal answer when nothing can be reached.
func TestNoBackend(t *testing.T) {
	run(t, setup{}, func(w *world) {
		for _, a := range w.apis {
			a.kill()
		}
		const want = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: no kube-apiserver could take the request; nothing has been done",` +
			`"reason":"ServiceUnavailable","details":{"retryAfterSeconds":1},"code":503}` + "\n"
		for major := 1; major <= 2; major++ {
			c := w.client(major, w.pki.Alice)
			for _, method := range []string{"GET", "POST", "HEAD"} {
				a := c.do(method, "/api", nil, "Audit-Id: mine")
				body := want
				if method == "HEAD" {
					body = ""
				}
				if a.body != body || a.StatusCode != 503 {
					w.Errorf("%s h%d: %d %s", method, major, a.StatusCode, a.body)
				}
				a.Header.Del("Date")
				wantHeader := http.Header{"Content-Type": {"application/json"}, "Content-Length": {fmt.Sprint(len(want))}, "Retry-After": {"1"}, "Audit-Id": {"mine"}}
				if diff := cmp.Diff(wantHeader, a.Header); diff != "" {
					w.Errorf("%s h%d: header (-want +got):\n%s", method, major, diff)
				}
			}
		}
		r := w.raw(w.pki.Alice)
		r.say("GET /api/v1/namespaces/n/pods/p/exec HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket", "")
		r.hear("GET").want(w, 503, want)
		r.rest()
	})
}

// TestPanicMode: where no backend is ready, those that fail their checks are used.
func TestPanicMode(t *testing.T) {
	for _, state := range []health.State{health.Draining, health.Dead} {
		run(t, setup{}, func(w *world) {
			for _, a := range w.apis {
				a.b.SetState(state, time.Now())
			}
			w.apis[0].kill()
			w.prefer(0)
			w.client(2, nil).do("POST", "/", strings.NewReader("x")).want(w, 200, `{"from":"b"}`)
		})
	}
}

// TestClientGone: a client that goes away while its request waits says nothing of
// the backend, and the request goes nowhere else.
func TestClientGone(t *testing.T) {
	for _, waits := range []string{"answer", "dial"} {
		for major := 1; major <= 2; major++ {
			for _, upgrade := range []bool{false, true} {
				if upgrade && major == 2 {
					continue
				}
				t.Run(fmt.Sprintf("%s h%d upgrade %v", waits, major, upgrade), func(t *testing.T) {
					run(t, setup{}, func(w *world) {
						ended := make(chan struct{})
						w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
							<-r.Context().Done()
							close(ended)
							panic(http.ErrAbortHandler)
						})
						if waits == "dial" {
							w.net.Swallow(w.apis[0].b.Address, true)
						}
						w.prefer(0)
						var fields []string
						if upgrade {
							fields = []string{"Connection: Upgrade", "Upgrade: websocket"}
						}
						c := w.client(major, w.pki.Alice)
						ctx, cancel := context.WithCancel(context.Background())
						done := make(chan error, 1)
						go func() {
							_, err := c.send(c.request("GET", "/api", nil, fields...).WithContext(ctx))
							done <- err
						}()
						synctest.Wait()
						cancel()
						if err := await(w, done, "the client's request to end"); err == nil {
							w.Error("there was an answer")
						}
						if waits == "answer" {
							await(w, ended, "the backend's request to end")
						}
						synctest.Wait()
						w.quiet()
						time.Sleep(5 * time.Second)
						if got := w.verdicts(); len(got) != 0 && waits == "answer" || len(got) > 0 && upgrade {
							w.Errorf("health heard %q", got)
						}
						if n := len(w.apis[1].requests()); n != 0 {
							w.Errorf("the second backend got %d requests", n)
						}
						if got := w.metric("apiserver_lb.refusals"); got["reason=client_gone"] != 1 {
							w.Errorf("refusals = %v", got)
						}
					})
				})
			}
		}
	}
}

// TestUnaskedSwitch: a backend that switches protocols unasked gets no say.
func TestUnaskedSwitch(t *testing.T) {
	script := func(_ *world, c *tls.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
			io.Copy(io.Discard, c)
		}
	}
	for major := 1; major <= 2; major++ {
		run(t, setup{raw: script, rawALPN: []string{"http/1.1"}}, func(w *world) {
			w.prefer(0)
			w.client(major, w.pki.Alice).do("GET", watchTarget, nil).want(w, 502, `{"kind":"Status"`)
		})
	}
}
