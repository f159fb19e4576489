package forward

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer"
)

// ways in which a backend's answer can break off in the middle.
var ways = map[string]func(w *world, rw http.ResponseWriter, r *http.Request){
	"kill -9": func(w *world, _ http.ResponseWriter, _ *http.Request) { w.apis[0].kill() },
	"declared dead": func(w *world, _ http.ResponseWriter, _ *http.Request) {
		w.dead(w.apis[0])
		<-w.apis[0].stopped
	},
	"reset":      func(*world, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	"black hole": func(w *world, _ http.ResponseWriter, _ *http.Request) { w.apis[0].ln.SinkAll(); <-w.apis[0].stopped },
}

// TestBreakingOff: a watch whose backend is lost ends cleanly, mid-event or not, so
// that its client resumes it; anything else that breaks off is an error, never a
// clean end in the middle of an object.
func TestBreakingOff(t *testing.T) {
	for name, breakOff := range ways {
		t.Run(name, func(t *testing.T) {
			legs(t, func(w *world, major int) {
				if name == "black hole" && w.apis[0].setup.h1 {
					t.Log("HTTP/1.1 has no ping: the health checks must notice")
					return
				}
				for _, c := range []struct {
					target string
					code   int
					length bool
					clean  bool
				}{
					{watchTarget, 200, false, true},
					{"/api/v1/watch/pods", 200, false, true},
					{watchTarget, 410, false, false},
					{listTarget, 200, false, false},
					{listTarget, 200, true, false},
					{logTarget, 200, false, false},
					{proxyTarget, 200, false, false},
				} {
					w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
						event := `{"type":"ADDED"}` + "\n" + `{"ty`
						if c.length { // what has a length is not flushed event by event
							event = strings.Repeat(event, 1000)
							rw.Header().Set("Content-Length", "100000")
						}
						rw.WriteHeader(c.code)
						flushed(rw, event)
						w.apis[0].pause()
						breakOff(w, rw, r)
					})
					cl := w.client(major, w.pki.Alice)
					res, err := cl.send(cl.request("GET", c.target, nil))
					if err != nil {
						w.Fatal(err)
					}
					half := make([]byte, 21)
					if _, err := io.ReadFull(res.Body, half); err != nil {
						w.Fatal(err)
					}
					begun := time.Now()
					w.step <- struct{}{}
					rest, err := io.ReadAll(res.Body)
					res.Body.Close()
					if len(rest) != 0 && !c.length || (err == nil) != c.clean {
						w.Errorf("%s %d: the end is %q, %v; clean must be %v", c.target, c.code, rest, err, c.clean)
					}
					if took := time.Since(begun); took > 16*time.Second {
						w.Errorf("%s: the end came after %v", c.target, took)
					}
					synctest.Wait()
					w.quiet()
					w.reviveFirst()
				}
			})
		})
	}
}

// reviveFirst brings the first backend back.
func (w *world) reviveFirst() {
	a := w.apis[0]
	a.kill()
	w.cut(a)
	synctest.Wait()
	a.b.SetState(1, time.Now())
	a.start()
}

// TestCleanEndOnTheWire: the end of a watch, literally.
func TestCleanEndOnTheWire(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			flushed(rw, "event\n")
			w.apis[0].pause()
			panic(http.ErrAbortHandler)
		})
		r := w.raw(w.pki.Alice)
		r.say("GET "+watchTarget+" HTTP/1.1", "Host: x", "")
		for r.line() != "" {
		}
		if a, b := r.line(), r.line(); a != "6" || b != "event" {
			w.Fatalf("got %q, %q", a, b)
		}
		r.line()
		w.step <- struct{}{}
		if a, b := r.line(), r.line(); a != "0" || b != "" {
			w.Errorf("the end is %q, %q", a, b)
		}
		w.apis[0].on(nil)
		r.say("GET /api HTTP/1.1", "Host: x", "") // the connection goes on
		r.hear("GET").want(w, 200, `{"from":"a"}`)

		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			flushed(rw, "event\n")
			w.apis[0].pause()
			panic(http.ErrAbortHandler)
		})
		p := w.h2(nil)
		id := p.ask(true, "GET", watchTarget)
		go func() { w.step <- struct{}{} }()
		if a := p.hear(id); a.reset || a.err != nil || a.code != 200 || a.body != "event\n" {
			w.Errorf("answer = %+v", a)
		}
		id = p.ask(true, "GET", logTarget)
		go func() { w.step <- struct{}{} }()
		if a := p.hear(id); !a.reset || a.err != nil || a.code != 200 {
			w.Errorf("answer = %+v", a)
		}
	})
}

// TestClientLeaves: when a client turns its back on an answer, the backend's work
// ends at once, whether the client resets a stream or a connection, and the places
// are free.
func TestClientLeaves(t *testing.T) {
	legs(t, func(w *world, major int) {
		for _, target := range []string{watchTarget, logTarget, listTarget, proxyTarget} {
			for _, silent := range []bool{true, false} {
				ended := make(chan time.Time, 1)
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					flushed(rw, "begin")
					for silent && r.Context().Err() == nil {
						<-r.Context().Done()
					}
					for r.Context().Err() == nil {
						flushed(rw, strings.Repeat("x", 1000))
						time.Sleep(time.Millisecond)
					}
					ended <- time.Now()
				})
				ctx, cancel := context.WithCancel(context.Background())
				c := w.client(major, w.pki.Alice)
				res, err := c.send(c.request("GET", target, nil).WithContext(ctx))
				if err != nil {
					w.Fatal(err)
				}
				if _, err := io.ReadFull(res.Body, make([]byte, 5)); err != nil {
					w.Fatal(err)
				}
				begun := time.Now()
				cancel()
				res.Body.Close()
				if took := await(w, ended, "the end of the backend's work").Sub(begun); took > 10*time.Millisecond {
					w.Errorf("%s: the backend worked on for %v", target, took)
				}
				synctest.Wait()
				w.quiet()
			}
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestClientLeavesUpload: a client that goes away in the middle of a body is no
// fault of the backend, and what it sent is not taken for the whole.
func TestClientLeavesUpload(t *testing.T) {
	legs(t, func(w *world, major int) {
		read := make(chan error, 1)
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			_, err := io.ReadAll(r.Body)
			read <- err
		})
		if major == 1 {
			r := w.raw(w.pki.Alice)
			r.say("POST /api HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "", "4", "half")
			time.Sleep(2 * balancer.StrangerBodyWait)
			r.Close()
		} else {
			p := w.h2(nil)
			id := p.ask(false, "POST", "/api")
			p.data(id, false, "half")
			time.Sleep(2 * balancer.StrangerBodyWait)
			p.reset(id, 8)
		}
		if err := await(w, read, "the end of the body"); err == nil {
			w.Error("the body ended well")
		}
		synctest.Wait()
		w.quiet()
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestObserved: each request is counted once, with what became of it.
func TestObserved(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "log") {
				flushed(rw, "x")
				panic(http.ErrAbortHandler)
			}
			w.apis[0].answer(rw, r)
		})
		c := w.client(2, w.pki.Alice)
		c.do("GET", "/api/v1/pods", nil)
		c.do("POST", "/api/v1/namespaces/n/pods", strings.NewReader("{}"))
		c.do("GET", logTarget, nil)
		w.client(1, nil).do("GET", watchTarget, nil)
		w.client(1, w.pki.Expired).do("GET", watchTarget, nil)
		synctest.Wait()
		for _, want := range []string{
			"backend=a class=short code=200 credential=certificate verb=list",
			"backend=a class=short code=200 credential=certificate verb=create",
			"backend=a class=long code=200 credential=certificate verb=get",
			"backend=a class=long code=200 credential=anonymous verb=watch",
			"backend= class=long code=401 credential=anonymous verb=watch",
		} {
			if got := w.metric("apiserver_lb.requests"); got[want] != 1 {
				w.Errorf("%s = %d in %s", want, got[want], strings.ReplaceAll(fmt.Sprint(got), ": ", "\n"))
			}
		}
	})
}

// TestLostUpload: a client that is silent in the middle of a body is told at once
// that its backend is lost.
func TestLostUpload(t *testing.T) {
	for name, breakOff := range ways {
		t.Run(name, func(t *testing.T) {
			legs(t, func(w *world, major int) {
				if (name == "black hole" || name == "reset") && w.apis[0].setup.h1 {
					t.Log("HTTP/1.1 has no ping, and Go's server does not end a connection before the body on it: the health checks must notice")
					return
				}
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					w.apis[0].pause()
					breakOff(w, rw, r)
				})
				body, write := io.Pipe()
				defer write.Close()
				c := w.client(major, w.pki.Alice)
				answered := make(chan answer, 1)
				go func() { answered <- c.do("POST", "/api", body) }()
				io.WriteString(write, "half a body")
				begun := time.Now()
				w.step <- struct{}{}
				if a := await(w, answered, "the answer"); a.StatusCode != 502 && a.StatusCode != 504 {
					w.Errorf("answer = %d %s", a.StatusCode, a.body)
				}
				if took := time.Since(begun); took > 16*time.Second {
					w.Errorf("it took %v", took)
				}
			})
		})
	}
}
