package forward

import (
	"bufio"
	"context"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/health"
)

// refusals are the counts of refusals by reason.
func (w *world) refusals() map[string]int64 { return w.metric("apiserver_lb.refusals") }

// Guards are the same over every protocol; nothing that they refuse reaches a backend.
func TestGuards(t *testing.T) {
	from := balancer.Networks{netip.MustParsePrefix("10.9.0.0/24")}
	guards := balancer.NewGuards([]balancer.SourceGuard{{Users: []string{"root"}, Groups: []string{"ops"}, From: from}}, true, []string{"/livez"})
	legsTo(t, setup{backends: 1, guards: guards, trusted: balancer.Networks{netip.MustParsePrefix("0.0.0.0/0")}}, func(w *world, major int) {
		for _, tt := range []struct {
			cert    *testpki.Issued
			address string
			target  string
			fields  []string
			code    int
		}{
			{w.pki.Alice, clientIP, "/api", nil, 403}, // of the group ops
			{w.pki.Alice, clientIP, "/api", []string{"X-Forwarded-For: 10.9.0.1"}, 403},
			{w.pki.Alice, "10.9.0.1", "/api", nil, 200},
			{w.pki.Bob, clientIP, "/api", nil, 200},
			{w.pki.Bob, clientIP, "/api", []string{"Impersonate-User: x"}, 200},
			{w.pki.Bob, clientIP, "/api", []string{"Impersonate-User: root"}, 403},
			{w.pki.Bob, clientIP, "/api", []string{"Impersonate-User: x", "Impersonate-Group: dev", "Impersonate-Group: ops"}, 403},
			{w.pki.Bob, "10.9.0.1", "/api", []string{"Impersonate-User: x", "Impersonate-Group: ops"}, 200},
			{nil, clientIP, "/api", []string{"Authorization: Bearer t", "Impersonate-User: root"}, 403},
			{nil, clientIP, "/api", []string{"Authorization: Bearer t"}, 200},
			{nil, clientIP, "/api", nil, 401},
			{nil, clientIP, "/livez", nil, 200},
			{nil, clientIP, "/livez?verbose", nil, 200},
			{nil, clientIP, "/livez%2f..%2fapi", nil, 401},
			{nil, clientIP, "/livez/../api", nil, 401},
		} {
			seen := len(w.apis[0].requests())
			a := w.clientFrom(major, tt.cert, tt.address, "").do("GET", tt.target, nil, tt.fields...)
			if a.StatusCode != tt.code {
				w.Errorf("%s from %s with %q = %d %s, want %d", tt.target, tt.address, tt.fields, a.StatusCode, a.body, tt.code)
			}
			if tt.code != 200 && (!strings.HasPrefix(a.body, `{"kind":"Status","apiVersion":"v1",`) || !strings.Contains(a.body, "lb-1: ") || a.Header.Get("Content-Type") != "application/json" || a.Header.Get("Retry-After") != "") {
				w.Errorf("the refusal is %v %s", a.Header, a.body)
			}
			if got := len(w.apis[0].requests()) - seen; (got == 1) != (tt.code == 200) {
				w.Errorf("%s from %s with %q: the backend saw %d requests", tt.target, tt.address, tt.fields, got)
			}
		}
		if got, want := w.refusals(), (map[string]int64{"reason=source": 5, "reason=anonymous": 3}); !maps.Equal(got, want) {
			w.Errorf("refusals = %v, want %v", got, want)
		}
	})
}

// HTTP/2 keeps the white space around a value, and a backend that speaks HTTP/1.1 takes
// it away: it must not hide whom a request impersonates.
func TestGuardSeesThroughSpaces(t *testing.T) {
	guards := balancer.NewGuards([]balancer.SourceGuard{{Groups: []string{"ops"}, From: balancer.Networks{netip.MustParsePrefix("10.9.0.0/24")}}}, false, nil)
	legsTo(t, setup{backends: 1, guards: guards}, func(w *world, major int) {
		if code, body := w.ask(major, "GET", "/api", "authorization: Bearer t", "impersonate-user: x", "impersonate-group:  ops\t"); code == 200 {
			for _, s := range w.apis[0].requests() {
				w.Errorf("the backend saw the groups %q: %s", s.Header["Impersonate-Group"], body)
			}
		}
	})
}

// Too much is answered 429, and client-go knows from the header when to come again. The
// backend sees nothing of it; leases, health checks and others pass.
func TestRequestLimits(t *testing.T) {
	legsTo(t, setup{backends: 1, limits: balancer.NewLimits(balancer.Limit{InFlight: 2, LongRunning: 1, Rate: 100}, nil)}, func(w *world, major int) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/wait" || r.URL.RawQuery == "watch=1" {
				flushed(rw, "begun")
				select {
				case <-r.Context().Done():
				case <-w.apis[0].stopped:
				}
				return
			}
			w.apis[0].answer(rw, r)
		})
		c := w.client(major, w.pki.Alice)
		var open []*http.Response
		for _, target := range []string{"/wait", "/wait", watchTarget} {
			res, err := c.send(c.request("GET", target, nil))
			if err != nil {
				w.Fatal(err)
			}
			open = append(open, res)
		}
		seen := len(w.apis[0].requests())
		for _, target := range []string{"/api", watchTarget} {
			for _, again := range []*client{c, w.client(3-major, w.pki.Alice)} { // however she comes
				a := again.do("GET", target, nil)
				a.want(w, 429, `{"kind":"Status"`)
				if a.Header.Get("Retry-After") != "1" || !strings.Contains(a.body, `"retryAfterSeconds":1`) || a.Header.Get("Audit-Id") == "" {
					w.Errorf("%v %s", a.Header, a.body)
				}
			}
		}
		if got := len(w.apis[0].requests()) - seen; got != 0 {
			w.Errorf("the backend saw %d of them", got)
		}
		c.do("GET", "/livez", nil).want(w, 200, "")
		c.do("PUT", "/apis/coordination.k8s.io/v1/namespaces/n/leases/l", strings.NewReader("{}")).want(w, 200, "")
		w.client(major, w.pki.Bob).do("GET", "/api", nil).want(w, 200, "")
		if got, want := w.refusals(), (map[string]int64{"reason=in_flight_limit": 2, "reason=long_running_limit": 2}); !maps.Equal(got, want) {
			w.Errorf("refusals = %v, want %v", got, want)
		}
		for _, res := range open {
			res.Body.Close()
		}
		synctest.Wait()
		c.do("GET", "/api", nil).want(w, 200, "")
	})
}

// finish is a way in which a request can end.
type finish func(w *world, c *client)

// endings are all of them. The backend does as the path says: see obedient.
var endings = map[string]finish{
	"whole":   func(_ *world, c *client) { c.do("GET", "/api", nil) },
	"HEAD":    func(_ *world, c *client) { c.do("HEAD", "/api", nil) },
	"large":   func(_ *world, c *client) { c.do("GET", "/large", nil) },
	"upload":  func(_ *world, c *client) { c.do("POST", "/api", strings.NewReader(strings.Repeat("x", 1<<20))) },
	"refused": func(_ *world, c *client) { c.do("TRACE", "/api", nil) },
	"lost, sent again": func(w *world, c *client) {
		w.prefer(0)
		c.do("GET", "/first-dies", nil)
	},
	"lost":          func(_ *world, c *client) { c.do("POST", "/die", strings.NewReader("{}")) },
	"shutting down": func(_ *world, c *client) { c.do("GET", "/shutdown", nil) },
	"broken off":    func(_ *world, c *client) { c.do("GET", "/half", nil) },
	"watch ends":    func(_ *world, c *client) { c.do("GET", watchTarget+"&short", nil) },
	"watch breaks":  func(_ *world, c *client) { c.do("GET", watchTarget+"&break", nil) },
	"given up before the answer": func(_ *world, c *client) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := c.t.RoundTrip(c.request("GET", "/silent", nil).WithContext(ctx)); err == nil {
			c.w.Error("the silent answer")
		}
	},
	"given up within the answer": func(_ *world, c *client) { c.leave("/wait") },
	"given up within a watch":    func(_ *world, c *client) { c.leave(watchTarget) },
	"given up within the body": func(_ *world, c *client) {
		if res, err := c.send(c.request("POST", "/api", io.MultiReader(strings.NewReader("{"), brokenReader{}))); err == nil {
			readAnswer(res)
		}
	},
	"backend dead": func(w *world, c *client) {
		res, err := c.send(c.request("GET", watchTarget, nil))
		if err != nil {
			w.Fatal(err)
		}
		for _, a := range w.apis {
			w.dead(a)
			a.b.SetState(health.Ready, time.Now())
		}
		readAnswer(res)
	},
	"no backend": func(w *world, c *client) {
		for _, a := range w.apis {
			w.cut(a)
			w.net.Swallow(a.b.Address, true)
		}
		c.do("GET", "/api", nil)
		for _, a := range w.apis {
			w.net.Swallow(a.b.Address, false)
		}
	},
	"exec": func(w *world, _ *client) {
		r := w.raw(w.pki.Alice)
		r.exec("GET", "websocket", "")
		r.switched()
		r.Close()
	},
	"exec, ended by the backend": func(w *world, _ *client) {
		r := w.raw(w.pki.Alice)
		r.exec("GET", "websocket", "", "X-End: now")
		r.switched()
		r.rest()
		r.Close() // its own half
	},
	"exec refused": func(w *world, _ *client) {
		r := w.raw(w.pki.Alice)
		r.exec("GET", "websocket", "", "X-End: refuse")
		r.hear("GET")
	},
	"exec dies": func(w *world, _ *client) {
		r := w.raw(w.pki.Alice)
		r.exec("GET", "websocket", "", "X-End: die")
		r.hear("GET")
	},
	"exec given up": func(w *world, _ *client) {
		r := w.raw(w.pki.Alice)
		r.exec("GET", "websocket", "", "X-End: silent")
		time.Sleep(time.Second)
		r.Close()
	},
}

// brokenReader is a body that cannot be read to its end.
type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// leave begins to read an answer and goes away.
func (c *client) leave(target string) {
	res, err := c.send(c.request("GET", target, nil))
	if err != nil {
		c.w.Fatal(err)
	}
	res.Body.Close()
}

// obedient is a backend that ends requests as their path says.
func (a *api) obedient(rw http.ResponseWriter, r *http.Request) {
	wait := func() {
		select {
		case <-r.Context().Done():
		case <-a.stopped:
		}
	}
	if r.Header.Get("Upgrade") != "" {
		switch r.Header.Get("X-End") {
		case "refuse":
			http.Error(rw, "no", http.StatusForbidden)
		case "die":
			panic(http.ErrAbortHandler)
		case "silent":
			wait()
		case "now":
			switching("websocket", "", func(net.Conn, *bufio.Reader) {})(rw, r)
		default:
			switching("websocket", "", func(_ net.Conn, from *bufio.Reader) { io.Copy(io.Discard, from) })(rw, r)
		}
		return
	}
	switch target := r.URL.RequestURI(); {
	case target == "/large":
		io.WriteString(rw, strings.Repeat("x", 1<<20))
	case target == "/first-dies" && a != a.w.apis[0]:
		a.answer(rw, r)
	case target == "/die", target == "/first-dies":
		panic(http.ErrAbortHandler)
	case target == "/shutdown":
		rw.Header().Set("Retry-After", "5")
		http.Error(rw, "The apiserver is shutting down, please try again later.", http.StatusTooManyRequests)
	case target == "/half":
		flushed(rw, strings.Repeat("x", 100<<10))
		panic(http.ErrAbortHandler)
	case target == "/silent":
		wait()
	case strings.HasPrefix(target, watchTarget):
		flushed(rw, "{}\n")
		if strings.HasSuffix(target, "break") {
			panic(http.ErrAbortHandler)
		}
		if !strings.HasSuffix(target, "short") {
			wait()
		}
	case target == "/wait":
		flushed(rw, "begun")
		wait()
	default:
		a.answer(rw, r)
	}
}

// However requests end, over whatever protocol and in whatever order: each gives its
// place back, once. With one place of each kind, the next one would be refused, or two
// would get in.
func TestLimitsGivenBack(t *testing.T) {
	names := slices.Sorted(maps.Keys(endings))
	legsTo(t, setup{backends: 2, limits: balancer.NewLimits(balancer.Limit{InFlight: 1, LongRunning: 1}, nil)}, func(w *world, major int) {
		for _, a := range w.apis {
			a.on(a.obedient)
		}
		c := w.client(major, w.pki.Alice)
		probe := func(after string) {
			w.Helper()
			synctest.Wait()
			if a := c.do("GET", "/api", nil); a.StatusCode != 200 {
				w.Errorf("after %q: a short request is answered %d %s", after, a.StatusCode, a.body)
			}
			watch, err := c.send(c.request("GET", watchTarget, nil))
			if err != nil {
				w.Fatal(err)
			}
			short, err := c.send(c.request("GET", "/wait", nil))
			if err != nil {
				w.Fatal(err)
			}
			if watch.StatusCode != 200 || short.StatusCode != 200 {
				w.Errorf("after %q: a watch is answered %d, a short request %d", after, watch.StatusCode, short.StatusCode)
			}
			for _, target := range []string{"/api", watchTarget} {
				if a := c.do("GET", target, nil); a.StatusCode != 429 {
					w.Errorf("after %q: one more for %s is answered %d", after, target, a.StatusCode)
				}
			}
			watch.Body.Close()
			short.Body.Close()
			time.Sleep(time.Second)
			synctest.Wait()
		}
		for _, name := range names {
			endings[name](w, c)
			time.Sleep(time.Second)
			probe(name)
		}
		for range 30 {
			var several []string
			for range 1 + rand.N(5) {
				name := names[rand.N(len(names))]
				several = append(several, name)
				endings[name](w, c)
				time.Sleep(time.Second) // it is held to the limit itself
			}
			if probe(strings.Join(several, ", ")); w.Failed() {
				break
			}
		}
	})
}
