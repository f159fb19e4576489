package forward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
)

const (
	watchTarget = "/api/v1/pods?watch=1"
	logTarget   = "/api/v1/namespaces/n/pods/p/log?follow=true"
	proxyTarget = "/api/v1/namespaces/n/services/https:s:443/proxy/stream"
	listTarget  = "/api/v1/pods"
)

// TestStreams: the head of a stream comes before its first event, and each event
// before the backend writes the next one.
func TestStreams(t *testing.T) {
	legs(t, func(w *world, major int) {
		for _, target := range []string{watchTarget, logTarget, proxyTarget, listTarget, proxyTarget + "?length"} {
			next := make(chan string)
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				if strings.HasSuffix(target, "length") {
					rw.Header().Set("Content-Length", "48") // known, and slow all the same
				}
				flushed(rw, "")
				for event := range next {
					flushed(rw, event)
				}
				flushed(rw, "the end\n")
			})
			c := w.client(major, w.pki.Alice)
			res, err := c.send(c.request("GET", target, nil))
			if err != nil {
				w.Fatalf("%s: no head before the first event: %v", target, err)
			}
			lines := bufio.NewReader(res.Body)
			for i := range 5 {
				next <- fmt.Sprintf("event %d\n", i)
				if got, err := lines.ReadString('\n'); err != nil || got != fmt.Sprintf("event %d\n", i) {
					w.Fatalf("%s: event %d = %q, %v", target, i, got, err)
				}
			}
			if short, long, _ := w.apis[0].b.Load(); short+long != 1 || (long == 1) != (target != listTarget) {
				w.Errorf("%s: load is %d short, %d long", target, short, long)
			}
			close(next)
			if rest, err := io.ReadAll(lines); string(rest) != "the end\n" || err != nil {
				w.Errorf("%s: end = %q, %v", target, rest, err)
			}
			res.Body.Close()
		}
	})
}

// TestIdleStream: nothing cuts a long-running request while nothing happens on it.
func TestIdleStream(t *testing.T) {
	legs(t, func(w *world, major int) {
		proceed := make(chan struct{})
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			flushed(rw, "first\n")
			<-proceed
			flushed(rw, "last\n")
		})
		c := w.client(major, w.pki.Alice)
		r := c.request("GET", watchTarget, nil)
		res, err := c.t.RoundTrip(r)
		if err != nil {
			w.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		close(proceed)
		readAnswer(res).want(w, 200, "first\nlast\n")
	})
}

// TestInformational: 1xx answers pass.
func TestInformational(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Link", "</x>")
			rw.WriteHeader(103)
			rw.Header().Del("Link")
			io.WriteString(rw, "final")
		})
		var hints []string
		c := w.client(major, w.pki.Alice)
		r := c.request("GET", "/", nil)
		r = r.WithContext(httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprintf("%d %s", code, h.Get("Link")))
			return nil
		}}))
		res, err := c.send(r)
		if err != nil {
			w.Fatal(err)
		}
		a := readAnswer(res)
		a.want(w, 200, "final")
		if a.Header.Get("Link") != "" {
			w.Error("a field of the 103 is in the answer")
		}
		if diff := cmp.Diff([]string{"103 </x>"}, hints); diff != "" {
			w.Errorf("hints (-want +got):\n%s", diff)
		}
	})
}

// silent checks that nothing comes from the balancer for some time.
func (r *raw) silent(d time.Duration) {
	r.w.Helper()
	r.SetReadDeadline(time.Now().Add(d))
	defer r.SetReadDeadline(time.Now().Add(patience))
	if b, err := r.from.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		r.w.Fatalf("got %q, %v, want silence", b, err)
	}
	r.from.Reset(r.Conn)
}

// TestExpectContinue: the client is asked for its body when the backend asks.
func TestExpectContinue(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{h1: h1, backends: 1}, func(w *world) {
			ask := make(chan struct{})
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				<-ask
				w.apis[0].answer(rw, r)
			})
			r := w.raw(w.pki.Alice)
			r.say("PUT /api HTTP/1.1", "Host: x", "Content-Length: 4", "Expect: 100-continue", "")
			r.silent(500 * time.Millisecond)
			if got := w.apis[0].one(); h1 && got.Header.Get("Expect") != "100-continue" { // net/http hides it of HTTP/2
				w.Errorf("the backend was not told: %v", got.Header)
			}
			close(ask)
			if got := r.line(); got != "HTTP/1.1 100 Continue" {
				w.Fatalf("h1 %v: got %q", h1, got)
			}
			r.line()
			io.WriteString(r, "body")
			r.hear("PUT").want(w, 200, `{"from":"a"}`)
			if got := w.apis[0].one().body.String(); got != "body" {
				w.Errorf("h1 %v: body = %q", h1, got)
			}
			// The connection goes on.
			r.say("GET /api HTTP/1.1", "Host: x", "")
			r.hear("GET").want(w, 200, "")
		})
	}
}

// TestExpectRefused: a backend that refuses at once gets no body, the client is
// not asked for it, and the connection, whose next bytes may be that body, ends.
func TestExpectRefused(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		for _, stranger := range []bool{false, true} {
			run(t, setup{h1: h1, backends: 1}, func(w *world) {
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) { http.Error(rw, "no", http.StatusUnauthorized) })
				cert := w.pki.Alice
				if stranger {
					cert = nil
				}
				r := w.raw(cert)
				r.say("PUT /api HTTP/1.1", "Host: x", "Content-Length: 4", "Expect: 100-continue", "")
				a := r.hear("PUT")
				a.want(w, 401, "no")
				if !a.Close {
					w.Error("the connection was to be kept")
				}
				if got := w.apis[0].one().body.String(); got != "" {
					w.Errorf("h1 %v: body %q was sent", h1, got)
				}
			})
		}
	}
}

// TestEarlyAnswer: an answer that comes while the request body is still being sent
// reaches the client, which may wait for it.
func TestEarlyAnswer(t *testing.T) {
	for _, code := range []int{200, 413, 503} {
		legs(t, func(w *world, major int) {
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				if r.ProtoMajor == 1 {
					http.NewResponseController(rw).EnableFullDuplex()
				}
				io.ReadFull(r.Body, make([]byte, 4))
				rw.WriteHeader(code)
				io.WriteString(rw, "early")
			})
			if major == 1 {
				for _, framing := range []string{"Content-Length: 1000", "Content-Length: 10000000", "Transfer-Encoding: chunked"} {
					r := w.raw(nil)
					r.say("POST /api HTTP/1.1", "Host: x", framing, "", "4", "abcd")
					r.SetReadDeadline(time.Now().Add(5 * time.Second))
					a := r.hear("POST")
					a.want(w, code, "early")
					if !a.Close {
						w.Errorf("%s: the connection was to be kept although the body had not ended", framing)
					}
				}
				return
			}
			p := w.h2(nil)
			p.conn.SetDeadline(time.Now().Add(5 * time.Second))
			id := p.ask(false, "POST", "/api")
			p.data(id, false, "abcd")
			if a := p.hear(id); a.code != code || a.body != "early" || a.reset || a.err != nil {
				w.Errorf("answer = %+v", a)
			}
		})
	}
}

// TestNoBackendBeforeBody: so does a refusal.
func TestRefusedBeforeBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		for _, a := range w.apis {
			a.kill()
		}
		r := w.raw(nil)
		r.say("POST /api HTTP/1.1", "Host: x", "Content-Length: 1000", "", "begun")
		r.SetReadDeadline(time.Now().Add(5 * time.Second))
		a := r.hear("POST")
		a.want(w, 503, `{"kind":"Status"`)
		if !a.Close {
			w.Error("the connection was to be kept although the body had not ended")
		}
	})
}

// TestBrokenBody: a request body that cannot be read is the client's fault, and
// what follows it is not taken for a request.
func TestBrokenBody(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{h1: h1}, func(w *world) {
			r := w.raw(w.pki.Alice)
			r.say("POST /first HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "", "2", "{}", "zz", "", "GET /smuggled HTTP/1.1", "Host: x", "", "GET /smuggled HTTP/1.1", "Host: x", "")
			if rest := r.rest(); !strings.HasPrefix(rest, "HTTP/1.1 400 Bad Request\r\n") || strings.Count(rest, "HTTP/1.1") != 1 {
				w.Errorf("h1 %v: answer = %q", h1, rest)
			}
			for _, a := range w.apis {
				for _, s := range a.requests() {
					if s.Target != "/first" {
						w.Errorf("h1 %v: %s reached backend %s", h1, s.Target, a.b.Name)
					}
				}
			}
			if got := w.verdicts(); len(got) != 0 {
				w.Errorf("h1 %v: health heard %q", h1, got)
			}
		})
	}
}

// TestBothWays: what goes both ways at once, does.
func TestBothWays(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 1 {
				http.NewResponseController(rw).EnableFullDuplex()
			}
			flushed(rw, "")
			lines := bufio.NewScanner(r.Body)
			for lines.Scan() {
				flushed(rw, "echo "+lines.Text()+"\n")
			}
		})
		c := w.client(major, w.pki.Alice)
		body, write := io.Pipe()
		res, err := c.send(c.request("POST", proxyTarget, body))
		if err != nil {
			w.Fatal(err)
		}
		lines := bufio.NewReader(res.Body)
		for i := range 5 {
			fmt.Fprintf(write, "%d\n", i)
			if got, err := lines.ReadString('\n'); err != nil || got != fmt.Sprintf("echo %d\n", i) {
				w.Fatalf("line %d = %q, %v", i, got, err)
			}
		}
		write.Close()
		if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
			w.Errorf("end = %q, %v", rest, err)
		}
		res.Body.Close()
	})
}

// TestTrailers: those of answers pass, announced or not, and beside a length,
// which is possible in HTTP/2 only.
func TestTrailers(t *testing.T) {
	legs(t, func(w *world, major int) {
		for i := range 4 {
			flush, held := i&1 != 0, i&2 != 0
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				if held {
					rw.Header().Set("Content-Type", "application/json")
				}
				rw.Header().Set("Trailer", "X-Announced")
				io.WriteString(rw, "body")
				if flush {
					flushed(rw, "")
				}
				rw.Header().Set("X-Announced", "1")
				rw.Header().Set(http.TrailerPrefix+"X-Late", "2")
			})
			a := w.client(major, w.pki.Alice).do("GET", "/", nil, "Te: trailers")
			a.want(w, 200, "body")
			if diff := cmp.Diff(http.Header{"X-Announced": {"1"}, "X-Late": {"2"}}, a.Trailer); diff != "" {
				w.Errorf("flush %v held %v: trailers (-want +got):\n%s", flush, held, diff)
			}
		}
	})
}

// heap returns the live heap in bytes.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestLargeList: what a slow client leaves unread of a large answer stays with the
// backend.
func TestLargeList(t *testing.T) {
	const (
		size  = 50 << 20
		bound = 3 << 20 // with what the network and the harness buffer
	)
	legs(t, func(w *world, major int) {
		var written atomic.Int64
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			// With a length, because ReverseProxy flushes what has none, and takes
			// a mutex for that on which no bubble can rest.
			rw.Header().Set("Content-Length", strconv.Itoa(size))
			chunk := []byte(strings.Repeat("x", 64<<10))
			for range size / len(chunk) {
				n, err := rw.Write(chunk)
				written.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
		before := heap()
		var read func(n int) int
		if major == 1 {
			r := w.raw(w.pki.Alice)
			r.say("GET "+listTarget+" HTTP/1.1", "Host: x", "")
			res, err := http.ReadResponse(r.from, nil)
			if err != nil {
				w.Fatal(err)
			}
			read = func(n int) int {
				k, _ := io.CopyN(io.Discard, res.Body, int64(n))
				return int(k)
			}
		} else {
			p := w.h2(nil)
			id := p.ask(true, "GET", listTarget)
			read = func(n int) (k int) {
				for k < n {
					f, err := p.frame()
					if err != nil {
						break
					}
					if f, ok := f.(*http2.DataFrame); ok {
						k += len(f.Data())
						p.mu.Lock()
						_ = p.fr.WriteWindowUpdate(0, uint32(len(f.Data()))+1)
						_ = p.fr.WriteWindowUpdate(id, uint32(len(f.Data()))+1)
						p.mu.Unlock()
						if f.StreamEnded() {
							break
						}
					}
				}
				return k
			}
		}
		total := 0
		for _, part := range []int{1000, 10 << 20, 20 << 20} {
			total += read(part)
			synctest.Wait()
			if ahead := written.Load() - int64(total); ahead > bound {
				w.Errorf("the backend was let %d bytes ahead of the client", ahead)
			}
			if grown := heap() - before; grown > bound {
				w.Errorf("after %d bytes the heap has grown by %d", total, grown)
			}
		}
		if total += read(size - total); total != size {
			w.Errorf("read %d bytes", total)
		}
	})
}
