package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

const grace = 30 * time.Second

// shutdown drains in the background. It returns a channel that yields how many
// connections were cut, and what ends it at once.
func (w *world) shutdown() (cut <-chan int, second context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan int, 1)
	go func() { ch <- w.srv.Shutdown(ctx, grace) }()
	return ch, cancel
}

// TestShutdownIdle: connections without a request end at once, those of HTTP/2
// after a GOAWAY.
func TestShutdownIdle(t *testing.T) {
	run(t, setup{}, func(w *world) {
		r := w.raw(nil)
		r.say("GET /api HTTP/1.1", "Host: x", "")
		r.hear("GET").want(w, 200, "")
		p := w.h2(nil)
		if a := p.hear(p.ask(true, "GET", "/api")); a.code != 200 {
			w.Fatalf("answer = %+v", a)
		}
		begun := time.Now()
		cut, stop := w.shutdown()
		defer stop()
		if rest := r.rest(); rest != "" {
			w.Errorf("rest = %q", rest)
		}
		f, err := p.frame()
		if goAway, ok := f.(*http2.GoAwayFrame); !ok || goAway.ErrCode != http2.ErrCodeNo {
			w.Errorf("got %v, %v, want GOAWAY", f, err)
		}
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
		if took := time.Since(begun); took > 5*time.Second {
			w.Errorf("it took %v", took)
		}
		if _, err := w.net.Dial(context.Background(), "tcp", frontAddress); err == nil {
			w.Error("the listener is open")
		}
	})
}

// TestShutdownYoung: a connection that was accepted before the drain and brings its
// first request only then is answered; one that never brings any holds nobody up.
func TestShutdownYoung(t *testing.T) {
	run(t, setup{h1: true}, func(w *world) {
		r := w.raw(nil)
		w.raw(nil) // silent
		synctest.Wait()
		begun := time.Now()
		cut, stop := w.shutdown()
		defer stop()
		time.Sleep(time.Second)
		r.say("GET /api HTTP/1.1", "Host: x", "")
		a := r.hear("GET")
		a.want(w, 200, "")
		if !a.Close {
			w.Error("the connection was to be kept")
		}
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
		if took := time.Since(begun); took > 10*time.Second {
			w.Errorf("it took %v", took)
		}
	})
}

// TestShutdownInFlight: requests that have begun are answered in full.
func TestShutdownInFlight(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			time.Sleep(5 * time.Second)
			flushed(rw, "first half,")
			time.Sleep(5 * time.Second)
			io.WriteString(rw, "second half")
		})
		c := w.client(major, w.pki.Alice)
		answers := make(chan answer, 2)
		body, write := io.Pipe()
		go func() { answers <- c.do("GET", "/api", nil) }()
		go func() { answers <- c.do("POST", "/api", body) }()
		io.WriteString(write, "half a body,")
		synctest.Wait()
		begun := time.Now()
		cut, stop := w.shutdown()
		defer stop()
		time.Sleep(time.Second)
		io.WriteString(write, "and the rest")
		write.Close()
		for range 2 {
			a := await(w, answers, "an answer")
			a.want(w, 200, "first half,second half")
			if major == 1 && !a.Close {
				w.Error("HTTP/1.1: the connection was to be kept")
			}
		}
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
		if took := time.Since(begun); took < 10*time.Second || took > 14*time.Second {
			w.Errorf("it took %v", took)
		}
	})
}

// TestShutdownWatches: watches end cleanly, spread over the grace period, and not
// all at once.
func TestShutdownWatches(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].holding()
		var (
			wg   sync.WaitGroup
			mu   sync.Mutex
			ends []time.Duration
		)
		const watches = 40
		begun := time.Now()
		c := w.client(major, w.pki.Alice)
		for range watches {
			res, lines := c.watching()
			wg.Go(func() {
				if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
					w.Errorf("a watch ended with %q, %v", rest, err)
				}
				res.Body.Close()
				mu.Lock()
				defer mu.Unlock()
				ends = append(ends, time.Since(begun))
			})
		}
		cut, stop := w.shutdown()
		defer stop()
		wg.Wait()
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
		slices.Sort(ends)
		// The chance that 40 watches miss the first or the last third by luck is
		// one in ten million.
		if first, last := ends[0], ends[watches-1]; first > grace*8/30 || last < grace*16/30 || last > grace*24/30 {
			w.Errorf("watches ended between %v and %v", first, last)
		}
		if took := time.Since(begun); took >= grace {
			w.Errorf("it took %v", took)
		}
	})
}

// TestShutdownDeadline: what does not end by itself lasts until the end of the
// grace period, and is cut then: a log stream by a reset, a tunnel with its
// connection.
func TestShutdownDeadline(t *testing.T) {
	for _, second := range []bool{false, true} {
		t.Run(fmt.Sprintf("second signal %v", second), func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Upgrade") == "websocket" {
						switching("websocket", "", func(conn net.Conn, from *bufio.Reader) { io.Copy(conn, from) })(rw, r)
						return
					}
					if !strings.Contains(r.URL.Path, "silent") {
						flushed(rw, "begin\n")
					}
					<-r.Context().Done()
				})
				r := w.raw(w.pki.Alice)
				r.exec("GET", "websocket", "")
				r.switched()
				asking := w.raw(w.pki.Alice) // an upgrade that waits for its answer
				asking.say("GET /silent HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: foo", "")
				ignored := w.raw(w.pki.Alice) // and one that got a stream instead
				ignored.say("GET /stream HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: foo", "")
				for ignored.line() != "" {
				}
				var wg sync.WaitGroup
				ended := make(chan string, 10)
				for major := 1; major <= 2; major++ {
					c := w.client(major, nil)
					for _, target := range []string{logTarget, listTarget, "/silent"} {
						wg.Go(func() {
							res, err := c.send(c.request("GET", target, nil))
							if err == nil {
								_, err = io.ReadAll(res.Body)
								res.Body.Close()
							}
							if err == nil {
								w.Errorf("h%d %s ended well", major, target)
							}
							ended <- target
						})
					}
				}
				synctest.Wait()
				begun := time.Now()
				cut, stop := w.shutdown()
				defer stop()
				if second {
					time.Sleep(7 * time.Second)
				} else {
					time.Sleep(grace - time.Second)
				}
				synctest.Wait()
				if len(ended) != 0 {
					w.Errorf("%s ended early", <-ended)
				}
				io.WriteString(r, "still there")
				r.expect("still there")
				if second {
					stop()
				}
				// 3 HTTP/1.1, 1 HTTP/2, 2 that ask for upgrades and a tunnel.
				if n := await(w, cut, "the end of the drain"); n != 7 {
					w.Errorf("%d connections were cut", n)
				}
				want := grace
				if second {
					want = 7 * time.Second
				}
				if took := time.Since(begun); took < want || took > want+time.Second {
					w.Errorf("it took %v", took)
				}
				wg.Wait()
				r.rest()
				asking.rest()
				ignored.rest()
				synctest.Wait()
				w.atRest()
			})
		})
	}
}

// TestShutdownTunnelEnds: a drain ends when its last tunnel does.
func TestShutdownTunnelEnds(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(switching("websocket", "", func(conn net.Conn, from *bufio.Reader) { io.Copy(conn, from) }))
		var tunnels []*raw
		for range 3 {
			r := w.raw(nil)
			r.exec("GET", "websocket", "")
			r.switched()
			tunnels = append(tunnels, r)
		}
		begun := time.Now()
		cut, stop := w.shutdown()
		defer stop()
		for _, r := range tunnels {
			time.Sleep(3 * time.Second)
			r.CloseWrite()
			if rest := r.rest(); rest != "" {
				w.Errorf("rest = %q", rest)
			}
		}
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
		if took := time.Since(begun); took != 9*time.Second {
			w.Errorf("it took %v", took)
		}
	})
}

// TestShutdownLateWatch: a watch that begins while the drain is under way ends
// within it too.
func TestShutdownLateWatch(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			w.apis[0].pause()
			flushed(rw, "begin\n")
			<-r.Context().Done()
		})
		c := w.client(2, nil)
		done := make(chan answer, 1)
		go func() { done <- c.do("GET", watchTarget, nil) }()
		synctest.Wait()
		cut, stop := w.shutdown()
		defer stop()
		time.Sleep(2 * time.Second)
		w.step <- struct{}{}
		await(w, done, "the end of the watch").want(w, 200, "begin\n")
		if n := await(w, cut, "the end of the drain"); n != 0 {
			w.Errorf("%d connections were cut", n)
		}
	})
}

// TestShutdownNoGrace: without a grace period everything ends at once, and whoever
// waits gets an end, not silence.
func TestShutdownNoGrace(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].holding()
		c := w.client(1, nil)
		res, lines := c.watching()
		begun := time.Now()
		w.srv.Shutdown(context.Background(), 0)
		if _, err := io.ReadAll(lines); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			w.Errorf("the watch ended with %v", err)
		}
		res.Body.Close()
		if took := time.Since(begun); took > time.Second {
			w.Errorf("it took %v", took)
		}
	})
}
