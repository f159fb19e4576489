package relay

import (
	"bufio"
	"crypto/tls"
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

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
	"apiserver-lb/health"
)

// http1Peer is a backend's end of a connection over HTTP/1.1, which says what it is told.
type http1Peer struct {
	a    *kubeAPIServer
	conn *tls.Conn

	mu    sync.Mutex
	heard strings.Builder
	err   error // of reading; nil: it goes on
}

// serveHTTP1 hears until the connection ends.
func (a *kubeAPIServer) serveHTTP1(t *tls.Conn) {
	p := &http1Peer{a: a, conn: t}
	a.mu.Lock()
	a.http1 = append(a.http1, p)
	a.mu.Unlock()
	defer t.NetConn().Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := t.Read(buf)
		p.mu.Lock()
		p.heard.Write(buf[:n])
		p.err = err
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// acceptedHTTP1 returns the next connection of HTTP/1.1 to the backend.
func (a *kubeAPIServer) acceptedHTTP1() *http1Peer {
	a.w.Helper()
	return next(a, "HTTP/1.1", &a.http1)
}

// soFar returns what has come that the test has not checked yet.
func (p *http1Peer) soFar() string {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.heard.String()
}

// want checks what has come, literally.
func (p *http1Peer) want(text string) {
	p.a.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if got := p.heard.String(); got != text {
		p.a.w.Fatalf("backend %s hears\n%q\nwant\n%q", p.a.b.Name, got, text)
	}
	p.heard.Reset()
}

// wantRequest checks the first line of a head without a body, and returns the head.
func (p *http1Peer) wantRequest(line string) string {
	p.a.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.heard.String()
	if !strings.HasPrefix(got, line+" HTTP/1.1\r\n") || !strings.HasSuffix(got, "\r\n\r\n") || strings.Count(got, "\r\n\r\n") != 1 {
		p.a.w.Fatalf("backend %s hears\n%q\nwant the head of %s", p.a.b.Name, got, line)
	}
	p.heard.Reset()
	return got
}

// wantEnd checks that the connection has ended, and that nothing came before.
func (p *http1Peer) wantEnd() {
	p.a.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil || p.heard.Len() > 0 {
		p.a.w.Fatalf("backend %s hears %q (connection: %v), want its end", p.a.b.Name, p.heard.String(), p.err)
	}
}

func (p *http1Peer) say(text string) { p.conn.Write([]byte(text)) }

// unauthorized is what kube-apiserver answers to a bad token.
const unauthorized = "HTTP/1.1 401 Unauthorized\r\nAudit-Id: x\r\nContent-Length: 3\r\n\r\nbad"

func (p *peer) wantUnauthorized(id uint32) {
	p.w.Helper()
	p.wantHeaders(id, false, ":status: 401", "audit-id: x", "content-length: 3")
	p.wantData(id, true, "bad")
}

// badToken is a field by which kube-apiserver knows nobody.
const badToken = "authorization: Bearer bad"

// afterGoAway returns a client whose request with a bad token has ended a connection.
func (w *world) afterGoAway() *peer {
	w.Helper()
	c := w.client(nil).greet()
	id := c.ask(true, "GET", "/", badToken)
	b := w.apis[0].accepted()
	b.wantRequest(true, "GET", "/")
	b.headers(1, true, ":status: 401")
	c.wantStatus(id, true, 401)
	b.goAway(1, http2.ErrCodeNo)
	b.wantEnd()
	return c
}

// TestStrangersHTTP1: where kube-apiserver has ended a connection because of a bad token,
// the next requests of that kind share one of HTTP/1.1, one after the other, which it does
// not end; and others go on over HTTP/2.
func TestStrangersHTTP1(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(false, "POST", "/api/v1/pods?x=%20y", badToken, "cookie: a=1", "x-a: b", "cookie: c=2", "content-length: 5", "te: trailers", "x-remote-user: admin")
		b := w.apis[0].acceptedHTTP1()
		c.data(id, false, "he")
		b.want("") // it goes when it is whole
		c.data(id, true, "llo")
		b.want("POST /api/v1/pods?x=%20y HTTP/1.1\r\nhost: balancer.example\r\n" + badToken + "\r\nx-a: b\r\n" +
			"x-forwarded-for: " + clientIP + "\r\naudit-id: audit-2\r\ncookie: a=1; c=2\r\ncontent-length: 5\r\n\r\nhello")
		if certificates := b.conn.ConnectionState().PeerCertificates; len(certificates) != 0 {
			w.Errorf("a stranger's connection bears the certificate of %s", certificates[0].Subject)
		}
		b.say(unauthorized)
		c.wantUnauthorized(id)

		for range 3 {
			id = c.ask(true, "GET", "/version", badToken)
			b.wantRequest("GET /version")
			b.say(unauthorized)
			c.wantUnauthorized(id)
		}
		// Another one meanwhile has a connection of its own.
		id = c.ask(true, "GET", "/version", badToken)
		other := c.ask(true, "HEAD", "/version", badToken)
		b2 := w.apis[0].acceptedHTTP1()
		b2.wantRequest("HEAD /version")
		b2.say("HTTP/1.1 401 Unauthorized\r\nContent-Length: 3\r\n\r\n")
		c.wantHeaders(other, true, ":status: 401", "content-length: 3")
		b.wantRequest("GET /version")
		b.say(unauthorized)
		c.wantUnauthorized(id)

		// Who is known, or has not offended, goes over HTTP/2.
		alice := w.client(w.pki.Alice).greet()
		id = alice.ask(true, "GET", "/")
		h2 := w.apis[0].accepted()
		h2.wantRequest(true, "GET", "/")
		h2.finish(1, alice, id)
		id = c.ask(true, "GET", "/") // without a token
		h2 = w.apis[0].accepted()
		h2.wantRequest(true, "GET", "/")
		h2.finish(1, c, id)

		// In the end HTTP/2 is tried again, and what is idle ends.
		time.Sleep(http1For + tickEvery)
		b.wantEnd()
		b2.wantEnd()
		id = c.ask(true, "GET", "/", badToken)
		h2 = w.apis[0].accepted()
		h2.wantRequest(true, "GET", "/")
		h2.finish(1, c, id)
		w.apis[0].wantNoConn()
		if v := w.verdicts(); len(v) != 0 {
			w.Errorf("health heard %q", v)
		}
	})
}

// TestHTTP1Proves: a token that is good has shown it over HTTP/1.1 as well.
func TestHTTP1Proves(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(true, "GET", "/", token)
		b := w.apis[0].acceptedHTTP1()
		b.wantRequest("GET /")
		b.say("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n5\r\nhello\r\n")
		c.wantNothing() // a short answer waits until it is whole
		b.say("0\r\nX-T: 1\r\n\r\n")
		c.wantHeaders(id, false, ":status: 200", "content-type: application/json")
		c.wantData(id, false, "hello")
		c.wantHeaders(id, true, "x-t: 1")
		id = c.ask(true, "GET", "/", token)
		h2 := w.apis[0].accepted()
		h2.wantRequest(true, "GET", "/")
		h2.finish(1, c, id)
	})
}

// TestUnfitForHTTP1: what HTTP/1.1 would change, or hold up, stays with HTTP/2.
func TestUnfitForHTTP1(t *testing.T) {
	for _, tt := range []struct {
		name   string
		path   string
		end    bool
		fields []string
		http1  bool
	}{
		{"a read", "/", true, nil, true},
		{"an empty value", "/", true, []string{"x-a: "}, true},
		{"no body, and it says so", "/", true, []string{"content-length: 0"}, true},
		{"a small body", "/", false, []string{"content-length: 65535"}, true},
		{"two slashes", "//x", true, nil, true},
		{"a large body", "/", false, []string{"content-length: 65536"}, false},
		{"a body of unknown length", "/", false, nil, false},
		{"a watch", "/api/v1/pods?watch=1", true, nil, false},
		{"a proxy", "/api/v1/namespaces/a/pods/b/proxy/", true, nil, false},
		{"a connection to a pod", "/api/v1/namespaces/a/pods/b/portforward", true, nil, false},
		{"expect", "/", false, []string{"content-length: 1", "expect: 100-continue"}, false},
		{"a space before a value", "/", true, []string{"impersonate-user:  admin"}, false},
		{"a tab behind a value", "/", true, []string{"impersonate-group: admins\t"}, false},
		{"a large header", "/", true, []string{"x-a: " + strings.Repeat("a", maxHTTP1Head)}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.afterGoAway()
				id := c.ask(tt.end, "GET", tt.path, append([]string{badToken}, tt.fields...)...)
				if !tt.end {
					c.data(id, tt.http1, strings.Repeat("x", declared(tt.fields)))
				}
				time.Sleep(redialAfter)
				if tt.http1 {
					if b := w.apis[0].acceptedHTTP1(); tt.end {
						b.wantRequest("GET " + tt.path)
					}
				} else {
					w.apis[0].accepted().wantRequest(tt.end, "GET", tt.path)
				}
				w.apis[0].wantNoConn()
				c.reset(id, http2.ErrCodeCancel)
			})
		})
	}
}

// declared is the length of a body that the fields announce.
func declared(fields []string) (n int) {
	for _, f := range fields {
		fmt.Sscanf(f, "content-length: %d", &n)
	}
	return n
}

// TestHTTP1Connections are bounded, and beyond that there is HTTP/2.
func TestHTTP1Connections(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		var ids []uint32
		for range maxHTTP1Conns {
			ids = append(ids, c.ask(true, "GET", "/", badToken))
		}
		more := c.ask(true, "GET", "/more", badToken)
		var all []*http1Peer
		for range ids {
			all = append(all, w.apis[0].acceptedHTTP1())
		}
		time.Sleep(redialAfter)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/more")
		b.finish(1, c, more)
		w.apis[0].wantNoConn()
		for _, b := range all {
			b.wantRequest("GET /")
			b.say(unauthorized)
		}
		if got := strings.Count(texts(c.drain()), `":status: 401"`); got != len(ids) {
			w.Errorf("%d answers, want %d", got, len(ids))
		}
	})
}

// TestHTTP1Lost: a connection that ends in the middle of a request is a failed attempt
// like any other.
func TestHTTP1Lost(t *testing.T) {
	for _, tt := range []struct {
		name   string
		method string
		do     func(w *world, b *http1Peer)
		again  bool   // it is sent to the other backend
		said   string // to health
	}{
		{"a read", "GET", func(_ *world, b *http1Peer) { b.conn.Close() }, true, "a connection_lost"},
		{"a write", "POST", func(_ *world, b *http1Peer) { b.conn.Close() }, false, "a connection_lost"},
		{"nonsense", "GET", func(_ *world, b *http1Peer) { b.say("hello\r\n\r\n") }, true, "a connection_lost"},
		{"a bad status", "GET", func(_ *world, b *http1Peer) { b.say("HTTP/1.1 101 Switching Protocols\r\n\r\n") }, true, "a connection_lost"},
		{"a bad name", "GET", func(_ *world, b *http1Peer) { b.say("HTTP/1.1 200 OK\r\nx\x01: y\r\n\r\n") }, true, "a connection_lost"},
		{"two lengths", "GET", func(_ *world, b *http1Peer) {
			b.say("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
		}, true, "a connection_lost"},
		{"a head without an end", "GET", func(_ *world, b *http1Peer) {
			b.say("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswerHead))
		}, true, "a connection_lost"},
		{"more fields than there may be", "GET", func(_ *world, b *http1Peer) {
			b.say("HTTP/1.1 200 OK\r\n" + strings.Repeat("X: x\r\n", maxFields) + "\r\n")
		}, true, "a connection_lost"},
		{"answers that are not final, again and again", "GET", func(_ *world, b *http1Peer) {
			b.say(strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxInterim+1))
		}, true, "a connection_lost"},
		{"a body that is cut", "GET", func(_ *world, b *http1Peer) {
			b.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
			b.conn.Close()
		}, true, "a connection_lost"},
		{"trailers that are of connections", "GET", func(_ *world, b *http1Peer) { b.say(badTrailer) }, true, "a connection_lost"},
		{"the backend dies", "GET", func(w *world, b *http1Peer) {
			w.apis[0].b.SetState(health.Dead, time.Now())
			w.relay.Cut(w.apis[0].b)
		}, true, ""},
		{"the backend stands still", "GET", func(w *world, b *http1Peer) { w.relay.Unstall(w.apis[0].b) }, true, ""},
		{"the backend shuts down", "GET", func(_ *world, b *http1Peer) {
			const body = "The apiserver is shutting down, please try again later.\n"
			b.say(fmt.Sprintf("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
		}, true, "a shutdown_announced"},
		{"the backend shuts down at length", "GET", func(_ *world, b *http1Peer) {
			body := "The apiserver is shutting down, please try again later.\n" + strings.Repeat(" ", balancer.ShutdownBodyBytes)
			b.say(fmt.Sprintf("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nX-T: 1\r\n\r\n", len(body), body))
		}, true, "a shutdown_announced"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{backends: 2}, func(w *world) {
				w.prefer(0)
				c := w.afterGoAway()
				id := c.ask(true, tt.method, "/", badToken)
				b := w.apis[0].acceptedHTTP1()
				b.wantRequest(tt.method + " /")
				tt.do(w, b)
				synctest.Wait()
				if tt.again {
					b2 := w.apis[1].accepted()
					b2.wantRequest(true, tt.method, "/")
					b2.headers(1, true, ":status: 200")
					if got := texts(c.drain()); !strings.Contains(got, fmt.Sprintf(`HEADERS %d end=true [":status: 200"]`, id)) {
						w.Errorf("client hears %s", got)
					}
				} else {
					c.wantStatus(id, false, 502)
					c.drain()
				}
				if got := strings.Join(w.verdicts(), ", "); got != tt.said {
					w.Errorf("health heard %q, want %q", got, tt.said)
				}
				b.mu.Lock()
				defer b.mu.Unlock()
				if b.err == nil {
					w.Error("the connection is still open")
				}
			})
		})
	}
}

const badTrailer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nUpgrade: x\r\n\r\n"

// TestHTTP1GivenUp: a request that is taken back, or that nobody has to answer any more,
// ends its connection.
func TestHTTP1GivenUp(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		for _, said := range []string{"", "HTTP/1.1 401 Unauthorized\r\nContent-Type: text/plain\r\nContent-Length: 100000\r\n\r\nhello"} {
			id := c.ask(true, "GET", "/", badToken)
			b := w.apis[0].acceptedHTTP1()
			b.wantRequest("GET /")
			b.say(said)
			synctest.Wait()
			c.reset(id, http2.ErrCodeCancel)
			b.wantEnd()
			c.drain()
		}
		// While it is dialled.
		open := w.net.Gate(w.apis[0].b.Address)
		id := c.ask(true, "GET", "/", badToken)
		synctest.Wait()
		c.reset(id, http2.ErrCodeCancel)
		synctest.Wait()
		open()
		w.apis[0].wantNoConn()
		// While its body is waited for.
		id = c.ask(false, "POST", "/", badToken, "content-length: 5")
		b := w.apis[0].acceptedHTTP1()
		c.reset(id, http2.ErrCodeCancel)
		b.wantEnd()
	})
}

// TestHTTP1Withheld: a request whose body does not come goes over HTTP/2, where the answer
// does not wait for that; and the connection carries others.
func TestHTTP1Withheld(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(false, "POST", "/", badToken, "content-length: 5")
		c.data(id, false, "hell")
		b := w.apis[0].acceptedHTTP1()
		time.Sleep(balancer.StrangerBodyWait - time.Nanosecond)
		w.apis[0].wantNoConn()
		time.Sleep(redialAfter)
		h2 := w.apis[0].accepted()
		h2.wantRequest(false, "POST", "/")
		h2.wantData(1, false, "hell")
		h2.headers(1, true, ":status: 401")
		c.wantStatus(id, true, 401)
		c.wantRST(id, http2.ErrCodeNo)
		next := c.ask(true, "GET", "/", badToken)
		b.wantRequest("GET /")
		b.say(unauthorized)
		c.wantUnauthorized(next)
		w.apis[0].wantNoConn()
	})
}

// TestHTTP1Idle: what an idle connection says, or its end, is nobody's answer; and after a
// change of certificates it is not used again.
func TestHTTP1Idle(t *testing.T) {
	for name, do := range map[string]func(w *world, b *http1Peer){
		"an answer to nothing": func(_ *world, b *http1Peer) { b.say(unauthorized) },
		"its end":              func(_ *world, b *http1Peer) { b.conn.Close() },
		"certificates change":  func(w *world, _ *http1Peer) { w.relay.Retire() },
		"an end was announced": nil,
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.afterGoAway()
				id := c.ask(true, "GET", "/", badToken)
				b := w.apis[0].acceptedHTTP1()
				b.wantRequest("GET /")
				if do == nil {
					b.say(strings.Replace(unauthorized, "\r\n", "\r\nConnection: close\r\n", 1))
				} else {
					b.say(unauthorized)
				}
				c.wantUnauthorized(id)
				if do != nil {
					do(w, b)
				}
				b.wantEnd()
				id = c.ask(true, "GET", "/", badToken)
				b = w.apis[0].acceptedHTTP1()
				b.wantRequest("GET /")
				b.say(unauthorized)
				c.wantUnauthorized(id)
				if v := w.verdicts(); len(v) != 0 {
					w.Errorf("health heard %q", v)
				}
			})
		})
	}
}

// TestHTTP1SlowClient: of an answer that its client does not take, no more comes than has
// room.
func TestHTTP1SlowClient(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.afterGoAway()
		c.settings(initialWindow(0))
		c.wantSettingsAck()
		id := c.ask(true, "GET", "/", badToken)
		b := w.apis[0].acceptedHTTP1()
		b.wantRequest("GET /")
		const size = 10 << 20
		b.say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", size))
		sent := make(chan struct{})
		go func() {
			b.say(strings.Repeat("x", size))
			close(sent)
		}()
		c.wantStatus(id, false, 200)
		w.relay.each(func(sh *shard) {
			for cc := range sh.clients {
				if n := cc.waiting(); n > maxStreamWindow {
					w.Errorf("%d bytes wait for the client", n)
				}
			}
		})
		c.window(0, size)
		c.window(id, size)
		<-sent
		if got := total(c.drain())[id]; got != size {
			w.Errorf("%d bytes came, want %d", got, size)
		}
	})
}

// FuzzHTTP1: what net/http reads is the request that was meant, whatever its fields.
func FuzzHTTP1(f *testing.F) {
	f.Add("GET", "/", "x-a", "b", "h", int64(-1))
	f.Add("POST", "//a?b=c d", "cookie", "a=b", "", int64(5))
	f.Add("QUERY", "*", "transfer-encoding", "chunked", "h:1", int64(0))
	f.Add("GET", "/%2f", "x_a", "\xff\t", "[::1]:6443", int64(-1))
	f.Fuzz(checkHTTP1)
}

func checkHTTP1(t *testing.T, method, path, name, value, host string, length int64) {
	list := []hpack.Field{{Name: ":method", Value: method}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: path}}
	if host != "" {
		list = append(list, hpack.Field{Name: ":authority", Value: host})
	}
	list = append(list, hpack.Field{Name: name, Value: value})
	h, problem := parseRequest(list)
	if problem != "" || method == "CONNECT" || h.unusable() != nil || length < -1 || length > 0 {
		return
	}
	s := &stream{ask: &asking{head: h.outgoing(&decide(t, &h).Edits, nil)}}
	s.up.end = true
	if !s.suitsHTTP1() {
		return
	}
	text := string(appendHTTP1(nil, s.ask.head, "10.0.0.1:6443", length))
	in := bufio.NewReader(strings.NewReader(text))
	req, err := http.ReadRequest(in)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if rest, _ := io.ReadAll(in); len(rest) != 0 {
		t.Fatalf("%q is followed by %q", text, rest)
	}
	if host == "" {
		host = "10.0.0.1:6443"
	}
	if h.authority != "" {
		host = h.authority
	}
	if req.Method != method || req.RequestURI != path || req.Host != host || req.ContentLength > 0 || len(req.TransferEncoding) != 0 {
		t.Fatalf("%q is read as %s %q to %q, %d bytes, %q", text, req.Method, req.RequestURI, req.Host, req.ContentLength, req.TransferEncoding)
	}
	var got []string
	for n, values := range req.Header {
		for _, v := range values {
			got = append(got, strings.ToLower(n)+": "+v)
		}
	}
	var want []string
	for i := range s.ask.head {
		if f := &s.ask.head[i]; !f.IsPseudo() && f.Name != "te" && f.Name != "content-length" {
			want = append(want, f.Name+": "+f.Value)
		}
	}
	if length == 0 {
		want = append(want, "content-length: 0")
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("%q is read with %q, want %q", text, got, want)
	}
}

// gatedConn is a connection whose writing can be held up.
type gatedConn struct {
	net.Conn
	mu   sync.Mutex
	gate chan struct{} // guarded by mu; closed: it is open
}

func (c *gatedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	gate := c.gate
	c.mu.Unlock()
	<-gate
	return c.Conn.Write(p)
}

// shut holds writes up until open is called.
func (c *gatedConn) shut() (open func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gate = make(chan struct{})
	return sync.OnceFunc(func() { close(c.gate) })
}

// gated makes all connections to backends such, open; last is the one that was dialled last.
func gated(last **gatedConn) func(*Options) {
	return wrapped(func(c net.Conn, _ string) net.Conn {
		*last = &gatedConn{Conn: c}
		(*last).shut()()
		return *last
	})
}

// TestHTTP1AnswerFirst: an answer may come before the last byte of the request has been
// written. The connection is not used again before that: what is written to it then would be
// taken for the rest of the body.
func TestHTTP1AnswerFirst(t *testing.T) {
	var last *gatedConn // that was dialled
	run(t, setup{options: gated(&last)}, func(w *world) {
		c := w.afterGoAway()
		id := c.ask(false, "POST", "/", badToken, "content-length: 5")
		b := w.apis[0].acceptedHTTP1()
		open := last.shut()
		defer open()
		c.data(id, true, "hello")
		synctest.Wait()
		b.say(unauthorized)
		c.wantUnauthorized(id)

		id = c.ask(true, "GET", "/1", badToken)
		b2 := w.apis[0].acceptedHTTP1()
		b2.wantRequest("GET /1")
		open()
		synctest.Wait()
		next := c.ask(true, "GET", "/2", badToken)
		_, heard, _ := strings.Cut(b.soFar(), "\r\n\r\n") // behind the head of the first
		if !strings.HasPrefix(heard, "helloGET /2 HTTP/1.1\r\n") {
			w.Fatalf("after the head comes %q", heard)
		}
		b.say(unauthorized)
		c.wantUnauthorized(next)
		b2.say(unauthorized)
		c.wantUnauthorized(id)
	})
}
