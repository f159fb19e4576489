package forward

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
)

// kubeAPI answers as kube-apiserver does: it knows the token "good" and certificates, and
// ends a connection of HTTP/2 with each request of anybody else
// (UnauthenticatedHTTP2DOSMitigation).
func (a *api) kubeAPI(rw http.ResponseWriter, r *http.Request) {
	token := r.Header.Get("Authorization")
	known := token == "Bearer good" || r.Header.Get("X-Remote-User") != ""
	if !known && r.ProtoMajor == 2 {
		rw.Header().Set("Connection", "close") // which is GOAWAY
	}
	if !known && token != "" {
		rw.WriteHeader(http.StatusUnauthorized)
		return
	}
	a.answer(rw, r)
}

// came returns on what the requests came, as "protocol connection", and forgets them.
func (a *api) came() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []string
	for _, s := range a.seen {
		all = append(all, fmt.Sprintf("%s %d", s.Proto, s.Conn))
	}
	a.seen = nil
	return all
}

// TestStrangersOverHTTP1: the requests that kube-apiserver would end a connection of HTTP/2
// with come over one of HTTP/1.1, which goes on; those of others over HTTP/2.
func TestStrangersOverHTTP1(t *testing.T) {
	const h1, h2 = "HTTP/1.1 1", "HTTP/2.0 1"
	for _, c := range []struct {
		name, method, body, token string
		cert                      func(*testpki.PKI) *testpki.Issued
		code                      int
		want                      []string
	}{
		{name: "anonymous", method: "GET", code: 200, want: []string{h1, h1, h1}},
		{name: "anonymous POST", method: "POST", body: "{}", code: 200, want: []string{h1, h1, h1}},
		{name: "bad token", method: "GET", token: "bad", code: 401, want: []string{h1, h1, h1}},
		{name: "bad token, POST", method: "POST", body: strings.Repeat("x", balancer.StrangerBodyBytes/2), token: "bad", code: 401, want: []string{h1, h1, h1}},
		{name: "bad token beside an expired certificate", method: "GET", token: "bad", code: 401, want: []string{h1, h1, h1},
			cert: func(p *testpki.PKI) *testpki.Issued { return p.Expired }},
		{name: "good token", method: "GET", token: "good", code: 200, want: []string{h1, "HTTP/2.0 2", "HTTP/2.0 2"}},
		{name: "certificate", method: "POST", body: "{}", code: 200, want: []string{h2, h2, h2},
			cert: func(p *testpki.PKI) *testpki.Issued { return p.Alice }},
		// What may be answered before it has come: with HTTP/1.1 that would wait.
		{name: "large body", method: "POST", body: strings.Repeat("x", balancer.StrangerBodyBytes), token: "bad", code: 401,
			want: []string{h2, "HTTP/2.0 2", "HTTP/2.0 3"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				a := w.apis[0]
				a.on(a.kubeAPI)
				var cert *testpki.Issued
				if c.cert != nil {
					cert = c.cert(w.pki)
				}
				var fields []string
				if c.token != "" {
					fields = []string{"Authorization: Bearer " + c.token}
				}
				for range 3 { // of several clients
					var body io.Reader
					if c.body != "" {
						body = strings.NewReader(c.body)
					}
					w.client(1, cert).do(c.method, "/api", body, fields...).want(w, c.code, "")
					synctest.Wait()
				}
				if diff := cmp.Diff(c.want, a.came()); diff != "" {
					w.Errorf("the requests came on (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// TestTokenBecomesGood: a token that is accepted after it was not has the connections of
// the good ones from then on.
func TestTokenBecomesGood(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		a := w.apis[0]
		c := w.client(1, nil)
		a.on(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusUnauthorized) })
		for range 2 {
			c.do("GET", "/api", nil, "Authorization: Bearer good").want(w, 401, "")
		}
		a.on(a.kubeAPI)
		for range 3 {
			c.do("POST", "/api", strings.NewReader("{}"), "Authorization: Bearer good").want(w, 200, "")
		}
		if diff := cmp.Diff([]string{"HTTP/1.1 1", "HTTP/1.1 1", "HTTP/1.1 1", "HTTP/2.0 2", "HTTP/2.0 2"}, a.came()); diff != "" {
			w.Errorf("the requests came on (-want +got):\n%s", diff)
		}
	})
}

// singles runs a test where connections to backends carry one request at a time, with the
// certificate of its clients.
func singles(t *testing.T, s setup, test func(w *world, cert *testpki.Issued)) {
	t.Run("of strangers", func(t *testing.T) {
		run(t, s, func(w *world) { test(w, nil) })
	})
	t.Run("to a backend of HTTP/1.1", func(t *testing.T) {
		s.h1 = true
		run(t, s, func(w *world) { test(w, w.pki.Alice) })
	})
}

// atOnce has a client of its own send each of n requests, and returns what waits for
// their answers, which come from the backend named.
func (w *world) atOnce(n int, cert *testpki.Issued, from string) (wait func()) {
	var wg sync.WaitGroup
	for range n {
		c := w.client(1, cert)
		wg.Go(func() { c.do("POST", "/api", strings.NewReader("{}")).want(w, 200, `{"from":"`+from+`"}`) })
	}
	synctest.Wait()
	return wg.Wait
}

// TestDialsApart: where connections carry one request at a time, nobody waits for the
// answer that somebody else gets, nor for more than one dial.
func TestDialsApart(t *testing.T) {
	const n = 20
	singles(t, setup{backends: 1, latency: 500 * time.Millisecond}, func(w *world, cert *testpki.Issued) {
		a := w.apis[0]
		arrived := make(chan struct{}, n)
		a.on(func(rw http.ResponseWriter, r *http.Request) {
			arrived <- struct{}{}
			a.pause()
			a.answer(rw, r)
		})
		begun := time.Now()
		wait := w.atOnce(n, cert, "a")
		for range n {
			await(w, arrived, "requests of which none is answered")
		}
		if took := time.Since(begun); took >= 2*a.setup.latency {
			w.Errorf("it took %v, and a dial takes %v", took, a.setup.latency)
		}
		for range n {
			w.step <- struct{}{}
		}
		wait()
		a.on(nil)
		for range n {
			w.client(1, cert).do("GET", "/api", nil).want(w, 200, "")
		}
		if dials := w.net.Dialled(a.b.Address); dials != n {
			w.Errorf("%d dials for %d requests at once", dials, n)
		}
	})
}

// TestCutWhileDiallingApart: all who dial a backend that is found dead go elsewhere at
// once, whatever their dials wait for.
func TestCutWhileDiallingApart(t *testing.T) {
	for _, handshake := range []bool{false, true} {
		singles(t, setup{}, func(w *world, cert *testpki.Issued) {
			a := w.apis[0]
			if handshake {
				a.ln.Close()
				deaf := w.net.Listen(a.b.Address)
				go func() {
					for _, err := deaf.Accept(); err == nil; _, err = deaf.Accept() {
					}
				}()
				defer deaf.Close()
			} else {
				w.net.Swallow(a.b.Address, true)
			}
			for range 20 {
				w.prefer(0) // for each client connection
			}
			begun := time.Now()
			wait := w.atOnce(20, cert, "b")
			if n := w.net.Dialled(a.b.Address); n != 20 {
				w.Errorf("%d dials", n)
			}
			w.dead(a)
			wait()
			if took := time.Since(begun); took > 0 {
				w.Errorf("it took %v", took)
			}
			for key, pl := range w.pools.pools {
				if n := len(pl.dialing); n != 0 {
					w.Errorf("%d dials to %s are under way", n, key.backend.Name)
				}
			}
		})
	}
}

// TestRetireWhileDiallingApart: connections whose handshake may have used the old
// certificate are not used, and each who waits for one dials anew.
func TestRetireWhileDiallingApart(t *testing.T) {
	singles(t, setup{backends: 1}, func(w *world, cert *testpki.Issued) {
		a := w.apis[0]
		open := w.net.Gate(a.b.Address)
		wait := w.atOnce(5, cert, "a")
		w.retire()
		open()
		wait()
		synctest.Wait()
		accepted := a.ln.Accepted()
		if n, o := w.net.Dialled(a.b.Address), a.ln.Open(); o == 0 || o != n-5 {
			w.Errorf("%d dials, %d open connections", n, o)
		}
		for _, s := range a.requests() {
			if accepted[s.Conn-1].IsClosed() {
				w.Error("a request came on a connection that is closed")
			}
		}
	})
}

// TestDialEndsWithClient: a dial for one client alone ends when that goes away.
func TestDialEndsWithClient(t *testing.T) {
	singles(t, setup{backends: 1}, func(w *world, cert *testpki.Issued) {
		a := w.apis[0]
		open := w.net.Gate(a.b.Address)
		ctx, cancel := context.WithCancel(w.Context())
		gone := make(chan error, 1)
		c := w.client(1, cert)
		go func() {
			_, err := c.send(c.request("GET", "/api", nil).WithContext(ctx))
			gone <- err
		}()
		synctest.Wait()
		wait := w.atOnce(1, cert, "a")
		cancel()
		if err := await(w, gone, "the end of the first"); err == nil {
			w.Error("the first was answered")
		}
		synctest.Wait()
		open()
		wait()
		if n := len(a.ln.Accepted()); n != 1 {
			w.Errorf("%d connections", n)
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
}

// TestIdleEnds: of connections that carry one request at a time only those stay that are
// used, and the others are closed before the backend would; what runs goes on.
func TestIdleEnds(t *testing.T) {
	singles(t, setup{backends: 1}, func(w *world, cert *testpki.Issued) {
		a := w.apis[0]
		open := func(want int) {
			w.Helper()
			synctest.Wait()
			if n := a.ln.Open(); n != want {
				w.Errorf("%d connections are open, want %d", n, want)
			}
		}
		a.on(func(rw http.ResponseWriter, r *http.Request) {
			a.pause()
			a.answer(rw, r)
		})
		wait := w.atOnce(5, cert, "a")
		time.Sleep(10 * maxIdle)
		open(5) // none is answered
		for range 5 {
			w.step <- struct{}{}
		}
		wait()
		a.on(nil)
		c := w.client(1, cert)
		for range 4 {
			open(5)
			time.Sleep(maxIdle / 4)
			c.do("GET", "/api", nil).want(w, 200, "")
		}
		time.Sleep(time.Millisecond)
		open(1)
		time.Sleep(maxIdle - 2*time.Millisecond)
		open(1)
		time.Sleep(2 * time.Millisecond)
		open(0)
		for key, pl := range w.pools.pools {
			if n := len(pl.conns); n != 0 {
				w.Errorf("the pool of %s knows %d connections", key.credential, n)
			}
		}
		before := w.net.Dialled(a.b.Address)
		c.do("POST", "/api", strings.NewReader("{}")).want(w, 200, "")
		if n := w.net.Dialled(a.b.Address) - before; n != 1 {
			w.Errorf("%d dials for the next request", n)
		}
		if got := w.verdicts(); len(got) != 0 {
			w.Errorf("health heard %q", got)
		}
	})
	// One of HTTP/2 is not closed: there are no more than are needed, and GOAWAY tells of
	// its end.
	run(t, setup{backends: 1}, func(w *world) {
		w.client(1, w.pki.Alice).do("GET", "/api", nil).want(w, 200, "")
		time.Sleep(10 * maxIdle)
		if n := w.apis[0].ln.Open(); n != 1 {
			w.Errorf("%d connections are open", n)
		}
	})
}

// TestReady: a body is read ahead no longer and no further than its bounds allow, and
// nothing of it is lost.
func TestReady(t *testing.T) {
	text := func(n int) io.Reader { return strings.NewReader(strings.Repeat("x", n)) }
	for _, c := range []struct {
		name        string
		src         io.Reader
		limit, room int
		want        bool
		most        int // bytes that are read ahead; 0: all
	}{
		{name: "empty", src: text(0), want: true},
		{name: "small", src: text(1000), want: true},
		{name: "byte by byte", src: iotest.OneByteReader(text(1000)), want: true},
		{name: "just small enough", src: text(balancer.StrangerBodyBytes - 1), want: true},
		{name: "too large", src: text(2 * balancer.StrangerBodyBytes), most: balancer.StrangerBodyBytes},
		{name: "larger than may be held", src: text(100_000), limit: 1000, most: fillBytes},
		{name: "no room", src: text(100_000), room: 10, most: fillBytes},
		{name: "broken", src: iotest.TimeoutReader(iotest.OneByteReader(text(1000)))},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if c.limit == 0 {
					c.limit = 3 << 20
				}
				if c.room == 0 {
					c.room = 3 << 20
				}
				h := newHeldBody(c.src, c.limit, balancer.NewRoom(int64(c.room), nil).Share(new(atomic.Int64)))
				if got := h.ready(); got != c.want {
					t.Errorf("ready = %v", got)
				}
				if c.most > 0 && len(h.held) > c.most {
					t.Errorf("%d bytes were read ahead", len(h.held))
				}
				h.end()
			})
		})
	}
	t.Run("withheld", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			from, to := io.Pipe()
			h := newHeldBody(from, 3<<20, plenty)
			go io.WriteString(to, "begun ")
			begun := time.Now()
			if h.ready() || time.Since(begun) != balancer.StrangerBodyWait {
				t.Errorf("it was ready, or known not to be after %v", time.Since(begun))
			}
			go func() {
				io.WriteString(to, "and ended")
				to.Close()
			}()
			if all, err := io.ReadAll(h.attempt()); string(all) != "begun and ended" || err != nil {
				t.Errorf("the body is %q, %v", all, err)
			}
			if !h.ready() {
				t.Error("it is not ready when it has ended")
			}
		})
	})
}
