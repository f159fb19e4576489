package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"

	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/health"
)

// holding makes a backend answer with a stream that lasts until its client leaves,
// or until the test has taken a step for it.
func (a *api) holding() {
	a.on(func(rw http.ResponseWriter, r *http.Request) {
		flushed(rw, "begin\n")
		select {
		case <-r.Context().Done():
		case <-a.w.step:
			flushed(rw, "end\n")
		case <-a.stopped:
		}
	})
}

// watching begins a watch and returns the rest of it, after its first line.
func (c *client) watching() (*http.Response, *bufio.Reader) {
	c.w.Helper()
	r := c.request("GET", watchTarget, nil)
	res, err := c.t.RoundTrip(r) // without a limit
	if err != nil {
		c.w.Fatal(err)
	}
	lines := bufio.NewReader(res.Body)
	if line, err := lines.ReadString('\n'); line != "begin\n" {
		c.w.Fatalf("a watch begins with %q, %v", line, err)
	}
	return res, lines
}

// perConn returns how many requests each of the backend's connections carried.
func (a *api) perConn() []int {
	n := map[int]int{}
	for _, s := range a.requests() {
		n[s.Conn]++
	}
	var counts []int
	for _, c := range n {
		counts = append(counts, c)
	}
	slices.Sort(counts)
	return counts
}

// TestOneDial: those who find no connection wait for one dial, and all get it.
func TestOneDial(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		open := w.net.Gate(w.apis[0].b.Address)
		c := w.client(2, nil)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { c.do("GET", "/api", nil).want(w, 200, `{"from":"a"}`) })
		}
		synctest.Wait()
		open()
		wg.Wait()
		if n := w.net.Dialled(w.apis[0].b.Address); n != 1 {
			w.Errorf("%d dials", n)
		}
	})
}

// TestDialFailsAll: they also fail with it, and go elsewhere.
func TestDialFailsAll(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.net.Swallow(w.apis[0].b.Address, true)
		w.prefer(0)
		c := w.client(2, nil)
		var wg sync.WaitGroup
		begun := time.Now()
		for range 20 {
			wg.Go(func() { c.do("POST", "/api", nil).want(w, 200, `{"from":"b"}`) })
		}
		wg.Wait()
		if n := w.net.Dialled(w.apis[0].b.Address); n != 1 {
			w.Errorf("%d dials", n)
		}
		if took := time.Since(begun); took > 3*time.Second {
			w.Errorf("it took %v", took)
		}
	})
}

// TestDialOutlivesClient: a client that leaves does not take the dial with it for
// which others wait.
func TestDialOutlivesClient(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		open := w.net.Gate(w.apis[0].b.Address)
		c := w.client(2, nil)
		ctx, cancel := context.WithCancel(context.Background())
		first, second := make(chan error, 1), make(chan answer, 1)
		go func() {
			_, err := c.send(c.request("GET", "/api", nil).WithContext(ctx))
			first <- err
		}()
		synctest.Wait()
		go func() { second <- c.do("GET", "/api", nil) }()
		synctest.Wait()
		cancel()
		if err := await(w, first, "the end of the first"); err == nil {
			w.Error("the first was answered")
		}
		time.Sleep(time.Second)
		open()
		await(w, second, "the second answer").want(w, 200, "")
		if n := w.net.Dialled(w.apis[0].b.Address); n != 1 {
			w.Errorf("%d dials", n)
		}
	})
}

// TestStreamLimit: another connection is opened where all are at the limit of the
// backend, and none is taken beyond it.
func TestStreamLimit(t *testing.T) {
	run(t, setup{backends: 1, maxStreams: 3}, func(w *world) {
		a := w.apis[0]
		c := w.client(2, nil)
		c.do("GET", "/api", nil) // the limit is known from now on
		a.holding()
		var all []*http.Response
		for range 8 {
			res, _ := c.watching()
			all = append(all, res)
		}
		if diff := cmp.Diff([]int{2, 3, 4}, a.perConn()); diff != "" {
			w.Errorf("requests by connection (-want +got):\n%s", diff)
		}
		for _, res := range all {
			res.Body.Close()
		}
		synctest.Wait()
		a.on(nil)
		for range 8 {
			c.do("GET", "/api", nil).want(w, 200, "")
		}
		if n := w.net.Dialled(a.b.Address); n != 3 {
			w.Errorf("%d connections were opened", n)
		}
	})
}

// TestHTTP1Pool: a connection of HTTP/1.1 carries one request at a time, and the
// next one after it.
func TestHTTP1Pool(t *testing.T) {
	run(t, setup{backends: 1, h1: true}, func(w *world) {
		a := w.apis[0]
		c := w.client(2, nil)
		for _, method := range []string{"GET", "HEAD", "POST"} {
			for range 5 {
				c.do(method, "/api", nil).want(w, 200, "")
			}
		}
		if n := w.net.Dialled(a.b.Address); n != 1 {
			w.Errorf("%d connections for requests one after the other", n)
		}
		a.holding()
		var all []*http.Response
		for range 5 {
			res, _ := c.watching()
			all = append(all, res)
		}
		if n := a.ln.Open(); n != 5 {
			w.Errorf("%d connections for 5 requests at once", n)
		}
		for _, res := range all {
			res.Body.Close()
		}
		synctest.Wait()
		if n := a.ln.Open(); n != 0 {
			w.Errorf("%d connections are open whose answers were not read to the end", n)
		}
	})
}

// TestIdleClosed: connections that a backend closes while they are idle are noticed
// and replaced; a write is never lost to one.
func TestIdleClosed(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{backends: 1, h1: h1}, func(w *world) {
			c := w.client(2, nil)
			for i := range 5 {
				c.do("POST", "/api", nil).want(w, 200, "")
				synctest.Wait()
				conns := w.apis[0].ln.Accepted()
				if len(conns) != i+1 {
					w.Errorf("h1 %v: %d connections after %d requests", h1, len(conns), i+1)
				}
				conns[i].Close()
				synctest.Wait()
				if n := w.metric("apiserver_lb.backend.connections")["backend=a credential=anonymous"]; n != 0 {
					w.Errorf("h1 %v: %d connections are counted", h1, n)
				}
			}
			if got := w.verdicts(); len(got) != 0 {
				w.Errorf("h1 %v: health heard %q", h1, got)
			}
		})
	}
}

// TestRetire: new requests get new connections; what runs on the old ones goes on,
// and those that are idle close.
func TestRetire(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h1 %v", h1), func(t *testing.T) {
			run(t, setup{backends: 1, h1: h1}, func(w *world) {
				a := w.apis[0]
				c := w.client(2, w.pki.Alice)
				c.do("GET", "/api", nil)
				w.retire()
				synctest.Wait()
				if n := a.ln.Open(); n != 0 {
					w.Errorf("%d idle connections are open after Retire", n)
				}
				a.holding()
				res, lines := c.watching()
				testpki.RotateProxy(w, w.dir, w.store, w.pki, "next-proxy") // which retires
				synctest.Wait()
				if n := a.ln.Open(); n != 1 {
					w.Errorf("%d connections are open, want that of the watch", n)
				}
				a.on(nil)
				c.do("GET", "/api", nil).want(w, 200, "")
				all := a.requests()
				if first, last := all[1], all[2]; first.Cert != "front-proxy-client" || last.Cert != "next-proxy" || first.Conn == last.Conn {
					w.Errorf("the requests came on connections %d with %q and %d with %q", first.Conn, first.Cert, last.Conn, last.Cert)
				}
				if n := a.ln.Open(); n != 2 {
					w.Errorf("%d connections are open", n)
				}
				w.step <- struct{}{}
				if rest, err := io.ReadAll(lines); string(rest) != "end\n" || err != nil {
					w.Errorf("the watch ended with %q, %v", rest, err)
				}
				res.Body.Close()
				synctest.Wait()
				if n := a.ln.Open(); n != 1 {
					w.Errorf("%d connections are open, want the new one", n)
				}
				if n := w.metric("apiserver_lb.backend.connections")["backend=a credential=certificate"]; n != 1 {
					w.Errorf("%d connections are counted", n)
				}
			})
		})
	}
}

// TestRetireWhileDialling: a connection whose handshake may have used the old
// certificate is not used either.
func TestRetireWhileDialling(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		a := w.apis[0]
		open := w.net.Gate(a.b.Address)
		c := w.client(2, w.pki.Alice)
		answered := make(chan answer, 1)
		go func() { answered <- c.do("POST", "/api", nil) }()
		synctest.Wait()
		w.retire()
		open()
		await(w, answered, "the answer").want(w, 200, "")
		synctest.Wait()
		if n, o := w.net.Dialled(a.b.Address), a.ln.Open(); n != 2 || o != 1 {
			w.Errorf("%d dials, %d open connections", n, o)
		}
	})
}

// TestCutWhileDialling: those who wait for a backend that is found dead go
// elsewhere at once.
func TestCutWhileDialling(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.net.Swallow(w.apis[0].b.Address, true)
		w.prefer(0)
		c := w.client(2, nil)
		answered := make(chan answer, 1)
		begun := time.Now()
		go func() { answered <- c.do("POST", "/api", nil) }()
		synctest.Wait()
		w.dead(w.apis[0])
		await(w, answered, "the answer").want(w, 200, `{"from":"b"}`)
		if took := time.Since(begun); took > 0 {
			w.Errorf("it took %v", took)
		}
	})
}

// TestCut: nothing stays on a dead backend, and it is usable again afterwards.
func TestCut(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{backends: 1, h1: h1}, func(w *world) {
			a := w.apis[0]
			for _, cert := range []*testpki.Issued{w.pki.Alice, nil} {
				c := w.client(2, cert)
				c.do("GET", "/api", nil)
				a.holding()
				_, lines := c.watching()
				w.retire() // one retired, one idle
				a.on(nil)
				c.do("GET", "/api", nil)
				w.cut(a)
				if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
					w.Errorf("the watch ended with %q, %v", rest, err)
				}
				synctest.Wait()
				if n := a.ln.Open(); n != 0 {
					w.Errorf("%d connections are open after Cut", n)
				}
				c.do("GET", "/api", nil).want(w, 200, "")
			}
		})
	}
}

// TestGoAway: a connection whose backend has said GOAWAY gets no new requests, what
// runs on it goes on, and no request fails.
func TestGoAway(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		a := w.apis[0]
		c := w.client(2, w.pki.Alice)
		a.holding()
		res, lines := c.watching()
		a.on(func(rw http.ResponseWriter, r *http.Request) { rw.Header().Set("Connection", "close") }) // Go's server says GOAWAY then
		for range 3 {
			c.do("POST", "/api", nil).want(w, 200, "")
			synctest.Wait()
		}
		a.on(nil)
		for range 3 {
			c.do("POST", "/api", nil).want(w, 200, "")
		}
		if diff := cmp.Diff([]int{1, 1, 2, 3}, a.perConn()); diff != "" {
			w.Errorf("requests by connection (-want +got):\n%s", diff)
		}
		w.step <- struct{}{}
		if rest, err := io.ReadAll(lines); string(rest) != "end\n" || err != nil {
			w.Errorf("the watch ended with %q, %v", rest, err)
		}
		res.Body.Close()
		time.Sleep(2 * time.Second)
		if n := a.ln.Open(); n != 1 {
			w.Errorf("%d connections are open", n)
		}
	})
}

// TestGoAwayStorm: others can have a backend say GOAWAY again and again; requests
// that come meanwhile are all answered.
func TestGoAwayStorm(t *testing.T) {
	run(t, setup{}, func(w *world) {
		for _, a := range w.apis {
			a.on(func(rw http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				time.Sleep(time.Millisecond)
				if r.Header.Get("Authorization") == "" {
					rw.Header().Set("Connection", "close")
				}
				fmt.Fprint(rw, r.Header.Get("Authorization"))
			})
		}
		var wg sync.WaitGroup
		for i := range 10 {
			c := w.client(2, nil)
			wg.Go(func() {
				for range 30 {
					if i%2 == 0 {
						c.do("POST", "/api", nil, "Authorization: Bearer t").want(w, 200, "Bearer t")
					} else {
						c.do("POST", "/api", nil).want(w, 200, "")
					}
				}
			})
		}
		wg.Wait()
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestPing: a connection on which nothing comes back is given up, and a request
// that waits on it goes elsewhere.
func TestPing(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.apis[0].holding()
		w.prefer(0)
		c := w.client(2, nil)
		_, lines := c.watching()
		w.apis[0].ln.SinkAll()
		begun := time.Now()
		c.do("GET", "/api", nil).want(w, 200, `{"from":"b"}`)
		if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
			w.Errorf("the watch ended with %q, %v", rest, err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			w.Errorf("it took %v", took)
		}
		if diff := cmp.Diff([]string{"a no_answer"}, w.verdicts()); diff != "" {
			w.Errorf("verdicts (-want +got):\n%s", diff)
		}
	})
}

// TestAffinity: a client connection keeps its backend while that is ready, and new
// ones spread.
func TestAffinity(t *testing.T) {
	run(t, setup{backends: 3}, func(w *world) {
		home := func(c *client) string { return c.do("GET", "/api", nil).body }
		homes := map[string]int{}
		var clients []*client
		for range 9 {
			c := w.client(2, nil)
			clients = append(clients, c)
			at := home(c)
			homes[at]++
			for range 5 {
				if got := home(c); got != at {
					w.Errorf("a client moved from %s to %s", at, got)
				}
			}
		}
		if diff := cmp.Diff(map[string]int{`{"from":"a"}`: 3, `{"from":"b"}`: 3, `{"from":"c"}`: 3}, homes); diff != "" {
			w.Errorf("homes (-want +got):\n%s", diff)
		}
		w.apis[0].b.SetState(health.Draining, time.Now())
		for _, c := range clients {
			if got := home(c); got == `{"from":"a"}` {
				w.Error("a request went to a draining backend")
			}
		}
		if _, _, homed := w.apis[0].b.Load(); homed != 0 {
			w.Errorf("the draining backend is home to %d", homed)
		}
	})
}

// TestHostileBackend: a backend that breaks the rules of HTTP/2 costs only the
// requests that it got.
func TestHostileBackend(t *testing.T) {
	frame := func(kind http2.FrameType, flags http2.Flags, payload string) func(*h2stream) {
		return func(s *h2stream) {
			s.mu.Lock()
			defer s.mu.Unlock()
			_ = s.fr.WriteRawFrame(kind, flags, s.id, []byte(payload))
		}
	}
	for name, do := range map[string]func(*h2stream){
		"data without a head":   func(s *h2stream) { s.data(s.id, true, "x") },
		"window update of zero": frame(http2.FrameWindowUpdate, 0, "\x00\x00\x00\x00"),
		"bad header block":      frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, "\xff\xff\xff\xff\xff\xff"),
		"no status":             func(s *h2stream) { s.h2peer.head(s.id, true, "x: y") },
		"settings with frame size 0": func(s *h2stream) {
			_ = s.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 0})
		},
		"frame cut short": func(s *h2stream) { io.WriteString(s.conn, "\x00\x10\x00\x01\x04\x00\x00\x00\x01abc"); s.conn.Close() },
		"push":            frame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, "\x00\x00\x00\x02"),
		"endless continuation": func(s *h2stream) {
			_ = s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: s.id})
			for range 2000 {
				if s.fr.WriteContinuation(s.id, false, make([]byte, 1<<10)) != nil {
					return
				}
			}
		},
		// Left out is an overflow of a stream's window: on that, the client of
		// net/http (Go 1.26, processWindowUpdate) locks itself up for good.
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{raw: h2script(nil, do, nil)}, func(w *world) {
				w.prefer(0)
				w.client(2, nil).do("GET", "/api", nil).want(w, 200, `{"from":"b"}`)
				w.prefer(0)
				a := w.client(2, nil).do("POST", "/api", nil)
				if a.StatusCode != 502 && a.StatusCode != 503 {
					w.Errorf("POST: %d %s", a.StatusCode, a.body)
				}
			})
		})
	}
	// Frames of unknown types are ignored (RFC 9113, section 4.1).
	run(t, setup{backends: 1, raw: h2script(nil, func(s *h2stream) {
		for kind := http2.FrameType(0x0a); kind <= 0x0f; kind++ {
			frame(kind, 0xff, "xyz")(s)
		}
		s.reply(200, false)
		s.data(s.id, true, "fine")
	}, nil)}, func(w *world) {
		w.client(2, nil).do("GET", "/api", nil).want(w, 200, "fine")
	})
}

// TestBadStatus: what is no status code is no answer, and what a backend says of leaving
// HTTP/2 before its answer does not reach a client of HTTP/1.1. Nothing is left behind.
func TestBadStatus(t *testing.T) {
	for _, target := range []string{"/api", "/api/v1/pods?watch=1"} {
		for _, code := range []string{"042", "0", "-200", "1000", "99999"} {
			t.Run(code+target, func(t *testing.T) {
				run(t, setup{raw: h2script(nil, func(s *h2stream) {
					s.h2peer.head(s.id, false, ":status: "+code)
					s.data(s.id, true, "fine")
				}, nil)}, func(w *world) {
					w.prefer(0)
					w.client(1, w.pki.Alice).do("GET", target, nil).want(w, 200, `{"from":"b"}`)
					w.prefer(0)
					w.client(1, w.pki.Alice).do("POST", target, nil).want(w, 502, `{"kind":"Status"`)
				})
			})
		}
		t.Run("101"+target, func(t *testing.T) {
			run(t, setup{backends: 1, raw: h2script(nil, func(s *h2stream) {
				s.reply(101, false)
				s.reply(200, false)
				s.data(s.id, true, "fine")
			}, nil)}, func(w *world) {
				r := w.raw(w.pki.Alice)
				r.say("GET "+target+" HTTP/1.1", "Host: a", "Connection: close", "", "")
				if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
					t.Errorf("answer %q", got)
				}
			})
		})
	}
	t.Run("HTTP/1.1", func(t *testing.T) {
		run(t, setup{backends: 1, h1: true, rawALPN: []string{"http/1.1"}, raw: func(_ *world, c *tls.Conn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				io.WriteString(c, "HTTP/1.1 099 Odd\r\nContent-Length: 4\r\n\r\nfine")
			}
		}}, func(w *world) {
			w.client(1, w.pki.Alice).do("GET", "/api", nil).want(w, 502, `{"kind":"Status"`)
		})
	})
}
