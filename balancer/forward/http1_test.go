package forward

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer/internal/testpki"
)

// TestPipelining: requests that come in one write are answered in order.
func TestPipelining(t *testing.T) {
	for _, h1 := range []bool{false, true} {
		run(t, setup{h1: h1}, func(w *world) {
			for _, a := range w.apis {
				a.on(func(rw http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					if r.URL.Path == "/slow" {
						time.Sleep(time.Second)
					}
					fmt.Fprintf(rw, "%s %s %s", r.Method, r.URL.Path, body)
				})
			}
			r := w.raw(w.pki.Alice)
			r.say("GET /slow HTTP/1.1", "Host: x", "",
				"POST /two HTTP/1.1", "Host: x", "Content-Length: 5", "",
				"hello"+"POST /three HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "",
				"3", "abc", "0", "",
				"HEAD /four HTTP/1.1", "Host: x", "",
				"GET /five HTTP/1.1", "Host: x", "Connection: close", "")
			r.hear("GET").want(w, 200, "GET /slow ")
			r.hear("POST").want(w, 200, "POST /two hello")
			r.hear("POST").want(w, 200, "POST /three abc")
			r.hear("HEAD").want(w, 200, "")
			a := r.hear("GET")
			a.want(w, 200, "GET /five ")
			if rest := r.rest(); rest != "" || !a.Close {
				w.Errorf("h1 %v: rest = %q, close %v", h1, rest, a.Close)
			}
		})
	}
}

// TestKeepAlive: a connection serves request after request, refused ones too.
func TestKeepAlive(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		r := w.raw(w.pki.Alice)
		for range 10 {
			r.say("PUT /api HTTP/1.1", "Host: x", "Content-Length: 3", "", "abc"+"GET /api HTTP/1.1", "Host: x", "", "GET /api HTTP/1.1", "Host: x", "Connection: Authorization", "")
			r.hear("PUT").want(w, 200, "")
			r.hear("GET").want(w, 200, "")
			r.hear("GET").want(w, 400, `{"kind":"Status"`)
		}
		time.Sleep(4 * time.Minute)
		if rest := r.rest(); rest != "" {
			w.Errorf("rest = %q", rest)
		}
	})
}

// TestHTTP10: the old version is answered, a stream by the end of the connection.
func TestHTTP10(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			for i := range 3 {
				flushed(rw, fmt.Sprintf("event %d\n", i))
				time.Sleep(time.Second)
			}
			if r.URL.Query().Get("broken") != "" {
				panic(http.ErrAbortHandler)
			}
		})
		for _, target := range []string{watchTarget, watchTarget + "&broken=1", listTarget} {
			r := w.raw(nil)
			r.say("GET "+target+" HTTP/1.0", "Host: x", "Connection: keep-alive", "")
			a := r.hear("GET")
			a.want(w, 200, "event 0\nevent 1\nevent 2\n")
			if len(a.TransferEncoding) != 0 || !a.Close {
				w.Errorf("framing is %v, close %v", a.TransferEncoding, a.Close)
			}
			r.rest()
		}
		w.apis[0].on(nil)
		r := w.raw(nil)
		for range 2 {
			r.say("GET /api HTTP/1.0", "Connection: keep-alive", "")
			r.hear("GET").want(w, 200, `{"from":"a"}`)
		}
		r.say("GET /api HTTP/1.0", "")
		r.hear("GET").want(w, 200, `{"from":"a"}`)
		r.rest()
	})
}

// TestRefusedMethods: CONNECT and TRACE get a Status, and reach nobody.
func TestRefusedMethods(t *testing.T) {
	const want = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the method %s is not served","reason":"MethodNotAllowed","code":405}` + "\n"
	run(t, setup{backends: 1}, func(w *world) {
		for _, c := range []struct{ method, target string }{{"TRACE", "/api"}, {"CONNECT", "/api"}, {"CONNECT", "10.0.0.1:443"}} {
			r := w.raw(w.pki.Alice)
			r.say(c.method+" "+c.target+" HTTP/1.1", "Host: x", "")
			res, err := http.ReadResponse(r.from, nil)
			if err != nil {
				w.Fatal(err)
			}
			readAnswer(res).want(w, 405, fmt.Sprintf(want, c.method))
		}
		p := w.h2(w.pki.Alice)
		if a := p.hear(p.ask(true, "TRACE", "/api")); a.code != 405 || a.body != fmt.Sprintf(want, "TRACE") {
			w.Errorf("answer = %+v", a)
		}
		p.head(3, true, ":method: CONNECT", ":authority: 10.0.0.1:443")
		if a := p.hear(3); a.code != 405 || a.body != fmt.Sprintf(want, "CONNECT") {
			w.Errorf("answer = %+v", a)
		}
		if n := len(w.apis[0].requests()); n != 0 {
			w.Errorf("%d requests arrived", n)
		}
	})
}

// TestHeadRefused: an error in answer to HEAD says how long it would be, and is not
// sent.
func TestHeadRefused(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		r := w.raw(w.pki.Expired)
		r.say("HEAD /api HTTP/1.1", "Host: x", "", "GET /api HTTP/1.1", "Host: x", "")
		a := r.hear("HEAD")
		if a.StatusCode != 401 || a.body != "" || a.Header.Get("Content-Length") == "" {
			w.Errorf("answer = %d %q %v", a.StatusCode, a.body, a.Header)
		}
		b := r.hear("GET")
		b.want(w, 401, `{"kind":"Status"`)
		if got := b.Header.Get("Content-Length"); got != a.Header.Get("Content-Length") {
			w.Errorf("lengths differ: %s and %s", a.Header.Get("Content-Length"), got)
		}
		p := w.h2(w.pki.Expired)
		if a := p.hear(p.ask(true, "HEAD", "/api")); a.code != 401 || a.body != "" {
			w.Errorf("answer = %+v", a)
		}
	})
}

// TestSlowHead: heads, and handshakes, that do not come end.
func TestSlowHead(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		r := w.raw(nil)
		io.WriteString(r, "GET / HTTP/1.1\r\nHost: ")
		begun := time.Now()
		r.rest()
		if took := time.Since(begun); took != 10*time.Second {
			w.Errorf("it took %v", took)
		}
		c, err := w.net.Dial(w.Context(), "tcp", frontAddress)
		if err != nil {
			w.Fatal(err)
		}
		begun = time.Now()
		io.Copy(io.Discard, c)
		c.Close()
		if took := time.Since(begun); took != 10*time.Second {
			w.Errorf("a handshake took %v", took)
		}
	})
}

// TestSlowBody: a body may take its time, as long as something comes of it.
func TestSlowBody(t *testing.T) {
	legs(t, func(w *world, major int) {
		body, write := io.Pipe()
		answered := make(chan answer, 1)
		c := w.client(major, w.pki.Alice)
		go func() { answered <- c.do("POST", "/api", body) }()
		for i := range 5 {
			fmt.Fprint(write, i)
			time.Sleep(50 * time.Second)
		}
		write.Close()
		await(w, answered, "the answer").want(w, 200, `{"from":"a"}`)
		if got := w.apis[0].one().body.String(); got != "01234" {
			w.Errorf("body = %q", got)
		}
	})
}

// TestLeftover: what a client sends beside a request that is refused before its
// body is read is not taken for a request.
func TestLeftover(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		r := w.raw(w.pki.Expired)
		r.say("POST /api HTTP/1.1", "Host: x", "Content-Length: 47", "", "GET /smuggled HTTP/1.1\r\nHost: x\r\nX: aaaaaaaaa\r\n\r\n"[:47])
		a := r.hear("POST")
		a.want(w, 401, `{"kind":"Status"`)
		synctest.Wait()
		r.Close()
		synctest.Wait()
		if n := len(w.apis[0].requests()); n != 0 {
			w.Errorf("%d requests arrived", n)
		}
		if got := w.metric("apiserver_lb.refusals"); got["reason=certificate"] != 1 {
			w.Errorf("refusals = %v", got)
		}
	})
}

// TestManyConnections: places and counts come back after many short connections.
func TestManyConnections(t *testing.T) {
	run(t, setup{backends: 3}, func(w *world) {
		for i := range 60 {
			r := w.raw([]*testpki.Issued{nil, w.pki.Alice, w.pki.Expired}[i%3])
			r.say("GET /api HTTP/1.1", "Host: x", "Connection: close", "")
			if a := r.hear("GET"); a.StatusCode != 200 && a.StatusCode != 401 {
				w.Errorf("answer = %d %s", a.StatusCode, a.body)
			}
			if rest := r.rest(); strings.TrimSpace(rest) != "" {
				w.Errorf("rest = %q", rest)
			}
		}
		synctest.Wait()
		if n := w.metric("apiserver_lb.client.connections")[""]; n != 0 {
			w.Errorf("%d client connections are counted", n)
		}
		w.atRest()
	})
}
