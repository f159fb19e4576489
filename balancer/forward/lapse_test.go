package forward

import (
	"bufio"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer/internal/testpki"
)

// lapsing runs a test in which alice's certificate loses its worth by what take does,
// and what runs is looked at every two seconds from then on.
func lapsing(t *testing.T, s setup, test func(w *world, alice *testpki.Issued, take func())) {
	for _, way := range []string{"denied", "expired"} {
		t.Run(way, func(t *testing.T) {
			s.backends = 1
			run(t, s, func(w *world) {
				alice := testpki.Issue(w.pki.ClientCA, w.pki.Alice.Subject, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * time.Second) })
				ctx, stop := context.WithCancel(context.Background())
				defer stop()
				test(w, alice, func() {
					if way == "denied" {
						testpki.Deny(w, w.dir, w.store, fmt.Sprintf("serial %x client-ca\n", alice.SerialNumber))
					} else {
						time.Sleep(time.Until(alice.NotAfter.Add(time.Second)))
					}
					go func() {
						for ; ctx.Err() == nil; time.Sleep(2 * time.Second) {
							w.srv.EndLapsed()
						}
					}()
				})
			})
		})
	}
}

// lasting is a backend that begins what lasts: tunnels, streams, and what it keeps
// waiting for a head.
func (a *api) lasting() {
	a.on(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Upgrade") == "websocket":
			switching("websocket", "", func(conn net.Conn, from *bufio.Reader) { io.Copy(conn, from) })(rw, r)
			return
		case strings.Contains(r.URL.Path, "silent"):
		case r.URL.Path == "/version":
			a.answer(rw, r)
			return
		default:
			flushed(rw, "begin\n")
		}
		select {
		case <-r.Context().Done():
		case <-a.stopped:
		}
	})
}

// streamEnd is how a request ended for its client.
type streamEnd struct{ err error }

// ending makes a request in the background and tells of its end.
func (c *client) ending(method, target string, body io.Reader, fields ...string) <-chan streamEnd {
	c.w.Helper()
	ch := make(chan streamEnd, 1)
	go func() {
		res, err := c.send(c.request(method, target, body, fields...))
		if err == nil {
			_, err = io.ReadAll(res.Body)
			res.Body.Close()
		}
		ch <- streamEnd{err}
	}()
	synctest.Wait()
	return ch
}

// TestLapse: when a certificate does not count any more, what was asserted under it ends
// within 10 s: watches cleanly, tunnels and the rest with their connections, and those
// on which nothing runs too. Others do not notice.
func TestLapse(t *testing.T) {
	lapsing(t, setup{}, func(w *world, alice *testpki.Issued, take func()) {
		w.apis[0].lasting()
		watch := w.client(1, alice).ending("GET", watchTarget, nil)
		others := map[string]<-chan streamEnd{}
		for _, target := range []string{logTarget, listTarget, "/silent", "/silent?watch=1"} {
			others[target] = w.client(1, alice).ending("GET", target, nil)
		}
		others["POST"] = w.client(1, alice).ending("POST", "/silent", strings.NewReader("{}"))
		tunnel := w.raw(alice)
		tunnel.exec("GET", "websocket", "")
		tunnel.switched()
		asking := w.raw(alice)
		asking.say("GET /silent HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket2", "")
		idle := w.raw(alice)
		idle.say("GET /version HTTP/1.1", "Host: x", "")
		idle.hear("GET").want(w, 200, "")
		silent := w.raw(alice)
		bobs := w.client(1, w.pki.Bob).ending("GET", watchTarget, nil)
		bob := w.raw(w.pki.Bob)
		bob.exec("GET", "websocket", "")
		bob.switched()
		token := w.client(1, nil).ending("GET", watchTarget, nil, "Authorization: Bearer good")
		beside := w.client(1, w.pki.Expired).ending("GET", watchTarget, nil, "Authorization: Bearer good")

		w.srv.EndLapsed() // nothing has
		synctest.Wait()
		if len(watch) != 0 || strings.Contains(w.log.String(), "lapsed") {
			w.Errorf("something has ended although no certificate has lapsed")
		}
		take()
		begun := time.Now()
		if rest := tunnel.rest(); rest != "" || time.Since(begun) > time.Second {
			w.Errorf("the tunnel ended after %v with %q, want at once", time.Since(begun), rest)
		}
		if e := await(w, watch, "the end of the watch"); e.err != nil {
			w.Errorf("the watch ended with %v", e.err)
		}
		for target, ch := range others {
			if e := await(w, ch, "the end of "+target); e.err == nil {
				w.Errorf("%s ended well", target)
			}
		}
		for _, r := range []*raw{asking, idle} {
			if rest := r.rest(); rest != "" {
				w.Errorf("rest = %q", rest)
			}
		}
		if took := time.Since(begun); took > 10*time.Second {
			w.Errorf("it took %v", took)
		}
		if strings.HasSuffix(w.Name(), "denied") { // otherwise it has been silent for too long
			silent.say("GET /version HTTP/1.1", "Host: x", "")
			silent.hear("GET").want(w, 401, "")
		}
		time.Sleep(10 * time.Second)
		if len(bobs)+len(token)+len(beside) != 0 {
			w.Error("somebody else's watch has ended")
		}
		io.WriteString(bob, "still there")
		bob.expect("still there")
		if got := w.metric("apiserver_lb.refusals")["reason=certificate_lapsed"]; got != 8 {
			w.Errorf("%d requests counted as lapsed, want 8: %v", got, w.metric("apiserver_lb.refusals"))
		}
		if log := w.log.String(); strings.Count(log, "client certificate has lapsed") != 8 || !strings.Contains(log, "watches=1 others=0") || !strings.Contains(log, "watches=0 others=1") {
			w.Error("the log does not tell of each lapse once")
		}
		w.apis[0].kill() // ends the watches that are left
		for _, ch := range []<-chan streamEnd{bobs, token, beside} {
			<-ch
		}
		w.apis[0].start()
		for _, c := range w.clients {
			c.Close()
		}
		synctest.Wait()
		w.f.lapses.mu.Lock()
		defer w.f.lapses.mu.Unlock()
		if n := len(w.f.lapses.conns); n != 0 {
			w.Errorf("%d connections that have ended are still known", n)
		}
	})
}

// TestLapseHTTP2: the same on a connection that several requests share, which goes on
// for one that a token lets in, unless the certificate is revoked.
func TestLapseHTTP2(t *testing.T) {
	lapsing(t, setup{h1: true}, func(w *world, alice *testpki.Issued, take func()) {
		w.apis[0].lasting()
		revoked := strings.HasSuffix(w.Name(), "denied")
		c := w.client(2, alice)
		c.do("GET", "/version", nil).want(w, 200, "")
		watch := c.ending("GET", watchTarget, nil)
		log := c.ending("GET", logTarget, nil)
		silent := c.ending("POST", "/silent", strings.NewReader("{}"))
		take()
		var beside <-chan streamEnd
		if !revoked {
			beside = c.ending("GET", watchTarget, nil, "Authorization: Bearer good")
		}
		begun := time.Now()
		if e := await(w, watch, "the end of the watch"); e.err != nil {
			w.Errorf("the watch ended with %v", e.err)
		}
		for _, ch := range []<-chan streamEnd{log, silent} {
			if e := await(w, ch, "an end"); e.err == nil {
				w.Error("what is no watch ended well")
			}
		}
		if took := time.Since(begun); took > 4*time.Second {
			w.Errorf("it took %v", took)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if !revoked && len(beside) != 0 {
			w.Errorf("the watch of a token beside an expired certificate has ended: %v", (<-beside).err)
		}
		want := int64(1)
		if revoked {
			want = 0
		}
		if got := w.metric("apiserver_lb.client.connections")[""]; got != want {
			w.Errorf("%d client connections, want %d", got, want)
		}
		if !revoked {
			w.apis[0].kill() // ends the watch
			<-beside
			w.apis[0].start()
		}
	})
}
