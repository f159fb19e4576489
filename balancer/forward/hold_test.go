package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
)

// object is an answer of a backend's, JSON of one object.
type object struct {
	size     int
	declared bool // its length is in the head
	sent     int  // how much is sent before the backend fails
}

func (o object) String() string {
	return fmt.Sprintf("%d of %d, declared %v", o.sent, o.size, o.declared)
}

// text is the body as the backend sends it.
func (o object) text(a *api) string {
	head, tail := fmt.Sprintf(`{"from":%q,"pad":"`, a.b.Name), `"}`
	return head + strings.Repeat("x", o.size-len(head)-len(tail)) + tail
}

// begin sends the head and the beginning of the body.
func (o object) begin(a *api, rw http.ResponseWriter) {
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("X-From", a.b.Name)
	if o.declared {
		rw.Header().Set("Content-Length", strconv.Itoa(o.size))
	}
	flushed(rw, "")
	if o.sent > 0 {
		flushed(rw, o.text(a)[:o.sent])
	}
}

// whole answers with all of it.
func (o object) whole(a *api) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		o.begin(a, rw)
		io.WriteString(rw, o.text(a)[o.sent:])
	}
}

// breaking answers with the beginning, and breaks off.
func (o object) breaking(a *api, breakOff func(*world, http.ResponseWriter, *http.Request)) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		o.begin(a, rw)
		// What comes with the end of a connection may get lost with it.
		time.Sleep(time.Millisecond)
		breakOff(a.w, rw, r)
	}
}

// objects are answers that are held, cut at several points.
func objects() []object {
	var list []object
	for _, declared := range []bool{false, true} {
		for _, cut := range []object{{size: 1000, sent: 0}, {size: 1000, sent: 500}, {size: 20_000, sent: 10_000},
			{size: balancer.AnswerHoldBytes, sent: 0}, {size: balancer.AnswerHoldBytes, sent: balancer.AnswerHoldBytes - 1}} {
			cut.declared = declared
			list = append(list, cut)
		}
		// Without a length, all of it may be there, and not be known to be all.
		list = append(list, object{size: 1000, sent: 1000}, object{size: balancer.AnswerHoldBytes, sent: balancer.AnswerHoldBytes})
	}
	return list
}

// TestHeldAnswer: whatever happens to a backend in the middle of a short answer, the
// client gets that of the other backend, whole and nothing else.
func TestHeldAnswer(t *testing.T) {
	for name, breakOff := range ways {
		t.Run(name, func(t *testing.T) {
			legsTo(t, setup{}, func(w *world, major int) {
				if name == "black hole" && w.apis[0].setup.h1 {
					t.Log("HTTP/1.1 has no ping: the health checks must notice")
					return
				}
				f := failure{name: name, event: "lost", verdict: "a connection_lost"}.over(major)
				if name == "declared dead" {
					f.event, f.verdict = "died", ""
				}
				want := map[string]int64{"backend=a reason=" + f.event: 0}
				for _, o := range objects() {
					w.apis[0].on(o.breaking(w.apis[0], breakOff))
					w.apis[1].on(o.whole(w.apis[1]))
					w.prefer(0)
					c := w.client(major, w.pki.Alice)
					begun := time.Now()
					a := c.do("GET", listTarget, nil)
					if took := time.Since(begun); took > 16*time.Second {
						w.Errorf("%v: it took %v", o, took)
					}
					if a.StatusCode != 200 || a.err != nil || a.body != o.text(w.apis[1]) || a.Header.Get("X-From") != "b" {
						w.Errorf("%v: answer = %d, %d bytes %.20q, %v, of %s", o, a.StatusCode, len(a.body), a.body, a.err, a.Header.Get("X-From"))
					}
					for reason := range want {
						want[reason]++
					}
					if diff := cmp.Diff(want, w.retried()); diff != "" {
						w.Errorf("%v: retries (-want +got):\n%s", o, diff)
					}
					var verdicts []string
					if f.verdict != "" {
						verdicts = []string{f.verdict}
					}
					if diff := cmp.Diff(verdicts, w.verdicts()); diff != "" {
						w.Errorf("%v: verdicts (-want +got):\n%s", o, diff)
					}
					c.Close()
					synctest.Wait()
					w.quiet()
					w.forgetHomes()
					w.reviveFirst()
				}
			})
		})
	}
}

// forgetHomes takes back what prefer did.
func (w *world) forgetHomes() {
	for _, d := range w.dummies {
		d.Leave()
	}
	w.dummies = nil
}

// TestHeldAnswerLostTwice: such a read is sent once more, not for ever.
func TestHeldAnswerLostTwice(t *testing.T) {
	legsTo(t, setup{backends: 3}, func(w *world, major int) {
		for i, o := range []object{{size: 1000, sent: 500}, {size: 1000, sent: 0, declared: true}} {
			for _, a := range w.apis {
				a.on(o.breaking(a, ways["reset"]))
			}
			c := w.client(major, w.pki.Alice)
			a := c.do("GET", listTarget, nil)
			a.want(w, 502, `{"kind":"Status"`)
			if a.Header.Get("Retry-After") != "" || a.Header.Get("X-From") != "" {
				w.Errorf("header = %v", a.Header)
			}
			n := 0
			for _, a := range w.apis {
				n += len(a.requests())
			}
			if n != 2*(i+1) {
				w.Errorf("%v: it was sent %d times", o, n-2*i)
			}
			c.Close()
			synctest.Wait()
			w.quiet()
		}
	})
}

// TestHeldAnswerBudget: and not at all where there are no retries left.
func TestHeldAnswerBudget(t *testing.T) {
	run(t, setup{share: "none"}, func(w *world) {
		w.prefer(0)
		w.apis[0].on(object{size: 1000, sent: 500}.breaking(w.apis[0], ways["reset"]))
		w.client(2, nil).do("GET", listTarget, nil).want(w, 502, `{"kind":"Status"`)
		if got := w.metric("apiserver_lb.refusals"); got["reason=retry_budget"] != 1 {
			w.Errorf("refusals = %v", got)
		}
	})
}

// TestHeldAnswerOnTheWire: ends of answers that only a peer with little sense makes.
func TestHeldAnswerOnTheWire(t *testing.T) {
	h2 := func(reply func(*h2stream)) setup { return setup{raw: h2script(nil, reply, nil)} }
	h1 := func(reply string) setup {
		return setup{rawALPN: []string{"http/1.1"}, raw: func(_ *world, c *tls.Conn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return
			}
			io.WriteString(c, reply)
		}}
	}
	for _, c := range []struct {
		name string
		s    setup
		lost bool
	}{
		{"less than declared, then END_STREAM", h2(func(s *h2stream) {
			s.reply(200, false, "content-length: 10")
			s.data(s.id, true, "12345")
		}), true},
		{"more than declared", h2(func(s *h2stream) {
			s.reply(200, false, "content-length: 10")
			s.data(s.id, true, "12345678901")
		}), true},
		// Whoever answers has processed the request.
		{"REFUSED_STREAM", h2(func(s *h2stream) {
			s.reply(200, false, "content-length: 10")
			s.reset(s.id, http2.ErrCodeRefusedStream)
		}), true},
		{"GOAWAY with a lower stream", h2(func(s *h2stream) {
			s.reply(200, false, "content-type: application/json")
			s.goAway(s.id-1, http2.ErrCodeNo)
		}), true},
		{"all that is declared, and no end", h2(func(s *h2stream) {
			s.reply(200, false, "content-length: 10")
			s.data(s.id, false, "1234567890")
			s.conn.Close()
		}), true},
		{"END_STREAM after all", h2(func(s *h2stream) {
			s.reply(200, false, "content-length: 14")
			s.data(s.id, false, `{"from":"raw"}`)
			s.data(s.id, true, "")
		}), false},
		{"shutdown, cut before it is said", h2(func(s *h2stream) {
			s.reply(429, false, "retry-after: 1", "content-length: 57")
			s.data(s.id, false, "The apiserver is shut")
			s.conn.Close()
		}), true},
		{"less than declared", h1("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"), true},
		{"no last chunk", h1("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n"), true},
		{"until the end", h1("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + `{"from":"raw"}`), false},
	} {
		for major := 1; major <= 2; major++ {
			t.Run(fmt.Sprintf("%s h%d", c.name, major), func(t *testing.T) {
				run(t, c.s, func(w *world) {
					w.prefer(0)
					a := w.client(major, w.pki.Alice).do("GET", listTarget, nil)
					if !c.lost {
						a.want(w, 200, `{"from":"raw"}`)
						return
					}
					a.want(w, 200, `{"from":"b"}`)
					if diff := cmp.Diff(map[string]int64{"backend=a reason=lost": 1}, w.retried()); diff != "" {
						w.Errorf("retries (-want +got):\n%s", diff)
					}
				})
			})
		}
	}
}

// TestHeldAnswerConcludes: only an answer that the client gets says anything of the
// request's token, and is what is counted.
func TestHeldAnswerConcludes(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.prefer(0)
		w.apis[0].on(object{size: 1000, sent: 500}.breaking(w.apis[0], ways["reset"]))
		w.apis[1].on(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(401) })
		w.client(2, nil).do("GET", listTarget, nil, "Authorization: Bearer t").want(w, 401, "")
		if good, _ := w.core.Tokens.Accepted(w.core.Tokens.Key("t"), time.Now()); good {
			w.Error("the token is taken for a good one, on the word of an answer that nobody got")
		}
		synctest.Wait()
		if diff := cmp.Diff(map[string]int64{"backend=b class=short code=401 credential=unproven_token verb=list": 1}, w.metric("apiserver_lb.requests")); diff != "" {
			w.Errorf("requests (-want +got):\n%s", diff)
		}
	})
}

// TestHeldAnswerReplaysBody: a read may have a body, which the second backend gets
// from its beginning.
func TestHeldAnswerReplaysBody(t *testing.T) {
	legsTo(t, setup{}, func(w *world, major int) {
		w.prefer(0)
		w.apis[0].on(object{size: 1000, sent: 500}.breaking(w.apis[0], ways["reset"]))
		body := strings.Repeat("a body of a GET. ", 10_000)
		w.client(major, w.pki.Alice).do("GET", listTarget, strings.NewReader(body)).want(w, 200, `{"from":"b"}`)
		if got := w.apis[1].one().body.String(); got != body {
			w.Errorf("the second backend got %d bytes of %d", len(got), len(body))
		}
	})
}

// TestHeldAnswerHead: what says how long a body would be, and has none, is whole.
func TestHeldAnswerHead(t *testing.T) {
	legs(t, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", "1000")
			rw.WriteHeader(200)
		})
		a := w.client(major, w.pki.Alice).do("HEAD", listTarget, nil)
		a.want(w, 200, "")
		if a.ContentLength != 1000 {
			w.Errorf("Content-Length = %d", a.ContentLength)
		}
	})
}

// TestNotHeld: what is no short read of one small object reaches the client while its
// backend is in the middle of it, and breaks off visibly.
func TestNotHeld(t *testing.T) {
	const page = 32 << 10 // more than net/http buffers
	for _, c := range []struct {
		name, method, target, contentType string
		length                            int
		noRoom                            bool
		clean                             bool // its end, when the backend is lost
	}{
		{name: "watch", method: "GET", target: watchTarget, contentType: "application/json", clean: true},
		{name: "log", method: "GET", target: logTarget, contentType: "text/plain"},
		{name: "proxy", method: "GET", target: proxyTarget, contentType: "application/json"},
		{name: "text", method: "GET", target: "/metrics", contentType: "text/plain; version=0.0.4"},
		{name: "events", method: "GET", target: "/x", contentType: "text/event-stream"},
		{name: "POST", method: "POST", target: listTarget, contentType: "application/json"},
		{name: "PATCH, declared", method: "PATCH", target: listTarget + "/p", contentType: "application/json", length: 2 * page},
		{name: "over the bound", method: "GET", target: listTarget, contentType: "application/json", length: balancer.AnswerHoldBytes + 1},
		{name: "no room", method: "GET", target: listTarget, contentType: "application/json", noRoom: true},
		{name: "no room, declared", method: "GET", target: listTarget, contentType: "application/json", length: 2 * page, noRoom: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			legsTo(t, setup{}, func(w *world, major int) {
				if c.noRoom {
					w.core.Answers.Take(answersRoom)
					defer w.core.Answers.Give(answersRoom)
				}
				w.prefer(0)
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					rw.Header().Set("Content-Type", c.contentType)
					if c.length > 0 {
						rw.Header().Set("Content-Length", strconv.Itoa(c.length))
					}
					flushed(rw, strings.Repeat("x", page))
					w.apis[0].pause()
					panic(http.ErrAbortHandler)
				})
				cl := w.client(major, w.pki.Alice)
				var body io.Reader
				if c.method != "GET" {
					body = strings.NewReader("{}")
				}
				res, err := cl.send(cl.request(c.method, c.target, body))
				if err != nil {
					w.Fatal(err)
				}
				defer res.Body.Close()
				if _, err := io.ReadFull(res.Body, make([]byte, page/2)); err != nil {
					w.Fatal(err)
				}
				w.step <- struct{}{}
				rest, err := io.ReadAll(res.Body)
				if len(rest) > page/2 || (err == nil) != c.clean {
					w.Errorf("the end after %d bytes is %v; clean must be %v", len(rest), err, c.clean)
				}
				if len(w.retried()) != 0 || len(w.apis[1].requests()) != 0 {
					w.Errorf("retries = %v, %d requests at the second backend", w.retried(), len(w.apis[1].requests()))
				}
			})
		})
	}
}

// TestHeldUntilTooLarge: a body that turns out to be large streams from there on,
// arrives whole, and breaks off visibly, the more so if there is less room.
func TestHeldUntilTooLarge(t *testing.T) {
	for _, room := range []int{answersRoom, 40_000, 5000, firstHold, firstHold - 1} {
		t.Run(fmt.Sprint(room), func(t *testing.T) {
			legsTo(t, setup{}, func(w *world, major int) {
				w.core.Answers.Take(int64(answersRoom - room))
				defer w.core.Answers.Give(int64(answersRoom - room))
				w.prefer(0)
				o := object{size: 300_000, sent: 100_000}
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					o.begin(w.apis[0], rw)
					w.apis[0].pause()
					if r.URL.RawQuery == "break" {
						panic(http.ErrAbortHandler)
					}
					io.WriteString(rw, o.text(w.apis[0])[o.sent:])
				})
				c := w.client(major, w.pki.Alice)
				for _, query := range []string{"", "break"} {
					res, err := c.send(c.request("GET", listTarget+"?"+query, nil))
					if err != nil {
						w.Fatal(err)
					}
					begin := make([]byte, o.sent) // it comes while the backend is silent
					if _, err := io.ReadFull(res.Body, begin); err != nil {
						w.Fatal(err)
					}
					synctest.Wait()
					if !w.core.Answers.Take(int64(room)) {
						w.Error("what has been passed on still takes room")
					} else {
						w.core.Answers.Give(int64(room))
					}
					w.step <- struct{}{}
					rest, err := io.ReadAll(res.Body)
					res.Body.Close()
					if got := string(begin) + string(rest); query == "" && (got != o.text(w.apis[0]) || err != nil) {
						w.Errorf("%d bytes of %d arrived, %v", len(got), o.size, err)
					}
					if query == "break" && err == nil {
						w.Errorf("a clean end after %d bytes", len(rest))
					}
				}
				if len(w.retried()) != 0 {
					w.Errorf("retries = %v", w.retried())
				}
			})
		})
	}
}

// TestHeldClientLeaves: a client that goes away while its answer is held, or has not
// been taken by it, frees the room and the backend, of which that says nothing.
func TestHeldClientLeaves(t *testing.T) {
	legsTo(t, setup{}, func(w *world, major int) {
		w.prefer(0)
		ended := make(chan struct{}, 1)
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			object{size: 20_000, sent: 10_000}.begin(w.apis[0], rw)
			<-r.Context().Done()
			ended <- struct{}{}
			panic(http.ErrAbortHandler)
		})
		c := w.client(major, w.pki.Alice)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			_, err := c.send(c.request("GET", listTarget, nil).WithContext(ctx))
			done <- err
		}()
		synctest.Wait()
		if w.core.Answers.Take(answersRoom) {
			w.Fatal("the answer is not held")
		}
		cancel()
		if err := await(w, done, "the client's request to end"); err == nil {
			w.Error("there was an answer")
		}
		await(w, ended, "the backend's request to end")
		synctest.Wait()
		w.quiet()
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
		if n := len(w.apis[1].requests()); n != 0 {
			w.Errorf("the second backend got %d requests", n)
		}
	})
	// The answer is whole, and its client does not read.
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(object{size: 60_000, declared: true}.whole(w.apis[0]))
		p := w.h2(nil)
		must(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}))
		p.ask(true, "GET", listTarget)
		time.Sleep(time.Second)
		if w.core.Answers.Take(answersRoom) {
			w.Fatal("the answer is not held")
		}
		p.conn.Close()
		time.Sleep(time.Second)
		w.quiet()
	})
}

// TestReadAhead: what is held and what comes after it are the body, byte for byte,
// with its end or its error, and no more of it is read than the bound says.
func TestReadAhead(t *testing.T) {
	broken := errors.New("broken")
	sizes := []int{0, 1, 1023, 1024, 1025, firstHold - 1, firstHold, firstHold + 1, balancer.AnswerHoldBytes - 1,
		balancer.AnswerHoldBytes, balancer.AnswerHoldBytes + 1, 2 * balancer.AnswerHoldBytes}
	sources := map[string]func(io.Reader) io.Reader{
		"at once":          func(r io.Reader) io.Reader { return r },
		"halves":           iotest.HalfReader,
		"end with data":    iotest.DataErrReader,
		"one byte a time":  iotest.OneByteReader,
		"end in an error":  func(r io.Reader) io.Reader { return io.MultiReader(r, iotest.ErrReader(broken)) },
		"error with bytes": func(r io.Reader) io.Reader { return iotest.DataErrReader(io.MultiReader(r, iotest.ErrReader(broken))) },
	}
	for name, source := range sources {
		for _, size := range sizes {
			for _, declared := range []bool{false, true} {
				for _, peeks := range []bool{false, true} {
					for _, limit := range []int64{answersRoom, 20_000, 100} {
						body := strings.Repeat("0123456789abcdef!", size/17+1)[:size]
						src := &countedBody{Reader: source(strings.NewReader(body))}
						room := balancer.NewRoom(limit, nil)
						r := &readAhead{src: src, room: room}
						what := fmt.Sprintf("%s, %d bytes, declared %v, peeks %v, limit %d", name, size, declared, peeks, limit)
						if peeks {
							if got := string(r.peek(1024)); got != body[:min(size, 1024)] {
								t.Errorf("%s: peek = %d bytes", what, len(got))
							}
						}
						length := int64(-1)
						if declared {
							length = int64(size)
						}
						err := r.hold(length)
						if src.n > balancer.AnswerHoldBytes+1 {
							t.Errorf("%s: %d bytes were read ahead", what, src.n)
						}
						fails := strings.Contains(name, "error")
						var lost *brokenAnswer
						switch {
						case limit == answersRoom && size <= balancer.AnswerHoldBytes && fails != errors.As(err, &lost):
							t.Errorf("%s: hold = %v", what, err)
						case errors.Is(err, broken):
							t.Errorf("%s: the error unwraps", what)
						}
						if err == nil {
							got, err := io.ReadAll(r)
							if string(got) != body || errors.Is(err, broken) != fails || err != nil && !fails {
								t.Errorf("%s: read %d bytes, %v", what, len(got), err)
							}
							if size > 0 && !room.Take(limit) {
								t.Errorf("%s: what has been read takes room", what)
							} else if size > 0 {
								room.Give(limit)
							}
						}
						r.Close()
						r.Close()
						if !room.Take(limit) || room.Take(1) {
							t.Errorf("%s: the room is not as it was", what)
						}
					}
				}
			}
		}
	}
}

// countedBody counts the bytes that are read of it.
type countedBody struct {
	io.Reader
	n int
}

func (c *countedBody) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += n
	return n, err
}

func (c *countedBody) Close() error { return nil }
