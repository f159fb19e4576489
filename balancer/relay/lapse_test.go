package relay

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/tlsconf"
)

// lastMoment is when a certificate expires: soon after the beginning of a bubble, so that
// no client is asked by a PING whether it is there.
var lastMoment = time.Date(2000, 1, 1, 0, 0, 20, 0, time.UTC)

// lapsing runs a test with a client certificate that loses its worth by what take does.
func lapsing(t *testing.T, test func(w *world, cert *testpki.Issued, take func())) {
	for _, way := range []struct {
		name string
		cert func(p *testpki.PKI) *testpki.Issued
		take func(w *world, dir string)
	}{
		{"denied", func(p *testpki.PKI) *testpki.Issued { return p.Alice }, func(w *world, dir string) { testpki.Deny(w, dir, w.store, "user alice\n") }},
		{"CA withdrawn", func(p *testpki.PKI) *testpki.Issued { return p.Alice }, func(w *world, dir string) { testpki.TrustClientsOf(w, dir, w.store, testpki.Authority("another")) }},
		{"expired", func(p *testpki.PKI) *testpki.Issued {
			return testpki.Issue(p.ClientCA, pkix.Name{CommonName: "alice"}, func(c *x509.Certificate) {
				c.NotAfter = lastMoment
			})
		}, func(*world, string) { time.Sleep(time.Until(lastMoment.Add(time.Second))) }},
	} {
		t.Run(way.name, func(t *testing.T) {
			dir := t.TempDir()
			p := testpki.Certificates()
			run(t, setup{store: testpki.OpenStore(t, dir, p), options: patientWithBackends}, func(w *world) {
				test(w, way.cert(p), func() { way.take(w, dir) })
			})
		})
	}
}

// TestLapse: when a certificate does not count any more, what was asserted under it ends:
// watches cleanly, the rest by resets, at both ends; then the connection ends.
func TestLapse(t *testing.T) {
	lapsing(t, func(w *world, cert *testpki.Issued, take func()) {
		c := w.client(cert).greet()
		b, watches := c.openWatches(w.apis[0], 2)
		log := c.ask(true, "GET", logPath)
		b.headers(b.wantRequest(true, "GET", logPath).id, false, ":status: 200")
		c.wantStatus(log, false, 200)
		list := c.ask(true, "GET", "/api/v1/pods")
		b.wantRequest(true, "GET", "/api/v1/pods")
		post := c.ask(false, "POST", "/api/v1/pods")
		b.wantRequest(false, "POST", "/api/v1/pods")
		other := w.client(w.pki.Bob).greet()
		bobs := other.ask(true, "GET", watchPath)
		e := b.wantRequest(true, "GET", watchPath)
		b.headers(e.id, false, ":status: 200")
		other.wantStatus(bobs, false, 200)

		w.relay.EndLapsed() // nothing has
		c.wantNothing()
		b.wantNothing()
		if strings.Contains(w.log.String(), "lapsed") {
			w.Error("the log speaks of a lapse that is none")
		}

		withdrawn := strings.HasSuffix(w.Name(), "withdrawn") // which is bob's CA too
		take()
		c.drain() // PINGs
		b.drain()
		w.relay.EndLapsed()
		heard := texts(c.drain())
		for _, want := range []string{
			fmt.Sprintf(`DATA %d end=true ""`, watches[0]), fmt.Sprintf(`DATA %d end=true ""`, watches[1]),
			fmt.Sprintf("RST_STREAM %d CANCEL", log), fmt.Sprintf("RST_STREAM %d CANCEL", list), fmt.Sprintf("RST_STREAM %d CANCEL", post),
			fmt.Sprintf("GOAWAY %d", maxStreamID),
		} {
			if !strings.Contains(heard, "\n\t"+want) {
				w.Errorf("the client hears %s\nwant %s", heard, want)
			}
		}
		if strings.Count(heard, "\n\t") != 6 {
			w.Errorf("the client hears %s\nwant 6 things", heard)
		}
		resets := 5
		if withdrawn {
			resets++
		}
		if heard := texts(b.drain()); strings.Count(heard, "RST_STREAM") != resets || strings.Count(heard, "CANCEL") != resets {
			w.Errorf("the backend hears %s\nwant %d resets", heard, resets)
		}
		if got := w.metric("apiserver_lb.refusals")["reason=certificate_lapsed"]; got != int64(resets) {
			w.Errorf("%d requests counted as lapsed, want %d: %v", got, resets, w.metric("apiserver_lb.refusals"))
		}
		if log := w.log.String(); !strings.Contains(log, "client certificate has lapsed") || !strings.Contains(log, `subject="CN=alice`) || !strings.Contains(log, "watches=2 others=3") {
			w.Errorf("the log does not tell of the lapse: %s", log)
		}

		// What comes meanwhile is refused as on any connection.
		late := c.ask(true, "GET", "/version")
		c.wantStatus(late, false, 401)
		c.drain()
		time.Sleep(leaveAfter + 2*tickEvery)
		c.wantGoAway(late, http2.ErrCodeNo)
		time.Sleep(2 * linger)
		c.wantEnd()

		// Who has a certificate that counts goes on.
		other.drain()
		if !withdrawn {
			b.data(e.id, false, "event")
			other.wantData(bobs, false, "event")
			other.reset(bobs, http2.ErrCodeCancel)
		}
	})
}

// TestLapseBesideToken: a request that a token lets in goes on beside a certificate that
// has expired, and does not beside one that is revoked. A certificate that never let
// anybody in costs nobody the connection.
func TestLapseBesideToken(t *testing.T) {
	lapsing(t, func(w *world, cert *testpki.Issued, take func()) {
		c := w.client(cert).greet()
		b, asserted := c.openWatches(w.apis[0], 1)
		stale := w.client(w.pki.Expired).greet()
		beside := stale.ask(true, "GET", watchPath, "authorization: Bearer good")
		tb := w.apis[0].accepted()
		tb.headers(tb.wantRequest(true, "GET", watchPath).id, false, ":status: 200")
		stale.wantStatus(beside, false, 200)
		take()
		c.drain()
		stale.drain()
		tb.drain()
		// Before anybody has noticed: by now the token counts.
		mixed := c.ask(true, "GET", watchPath, "authorization: Bearer good")
		revoked := strings.HasSuffix(w.Name(), "denied")
		if revoked {
			c.wantStatus(mixed, false, 401)
			c.drain()
		} else {
			// The first answer has proved the token, and another connection is for such.
			tb2 := w.apis[0].accepted()
			tb2.headers(tb2.wantRequest(true, "GET", watchPath).id, false, ":status: 200")
			c.wantStatus(mixed, false, 200)
		}
		for range 5 {
			w.relay.EndLapsed()
			time.Sleep(time.Second)
		}
		if got := texts(c.drain()); !strings.Contains(got, fmt.Sprintf("DATA %d end=true", asserted[0])) || strings.Contains(got, fmt.Sprintf("DATA %d end=true", mixed)) {
			w.Errorf("the client hears %s\nwant the end of the watch under the certificate alone", got)
		}
		if c.ended() != revoked {
			w.Errorf("the connection has ended: %v, want %v", c.ended(), revoked)
		}
		stale.wantNothing()
		b.drain()
		if !revoked {
			c.reset(mixed, http2.ErrCodeCancel)
		}
		stale.reset(beside, http2.ErrCodeCancel)
	})
}

// TestLapseIdle: a connection on which nothing runs ends too, so that its client comes
// again with the certificate that it has by now.
func TestLapseIdle(t *testing.T) {
	lapsing(t, func(w *world, cert *testpki.Issued, take func()) {
		c := w.client(cert).greet()
		id := c.ask(true, "GET", "/api/v1/pods")
		b := w.apis[0].accepted()
		b.finish(b.wantRequest(true, "GET", "/api/v1/pods").id, c, id)
		take()
		c.drain()
		w.relay.EndLapsed()
		c.wantGoAway(maxStreamID, http2.ErrCodeNo)
		time.Sleep(leaveAfter + 2*tickEvery + linger)
		c.wantGoAway(id, http2.ErrCodeNo)
		time.Sleep(linger)
		c.wantEnd()
	})
}

// verifications notes whose certificates are verified.
type verifications struct {
	balancer.Verifier
	names []string
}

func (v *verifications) Verify(chain []*x509.Certificate) tlsconf.Verdict {
	v.names = append(v.names, chain[0].Subject.CommonName)
	return v.Verifier.Verify(chain)
}

// TestLapseOrder: however many show certificates that were never good for anything, or
// that name nobody, whoever has something to lose is looked at first.
func TestLapseOrder(t *testing.T) {
	dir := t.TempDir()
	run(t, setup{store: testpki.OpenStore(t, dir, testpki.Certificates()), shards: 2}, func(w *world) {
		seen := &verifications{Verifier: w.store}
		w.core.Verifier = seen
		nobody := testpki.Issue(w.pki.ClientCA, pkix.Name{})
		beside := func(cert *testpki.Issued) {
			c := w.client(cert).greet()
			id := c.ask(true, "GET", "/api", "authorization: Bearer x", "connection: x") // refused, once it is judged
			c.reset(id, http2.ErrCodeCancel)
		}
		for range 5 {
			beside(nobody)
			beside(w.pki.Expired)
		}
		c := w.client(w.pki.Alice).greet()
		c.reset(c.ask(true, "GET", watchPath), http2.ErrCodeCancel)
		for range 5 {
			beside(nobody)
		}
		synctest.Wait()
		testpki.TrustClientsOf(w, dir, w.store, testpki.Authority("another"))
		seen.names = nil
		w.relay.EndLapsed()
		if want := append([]string{"alice"}, make([]string, 10)...); !slices.Equal(seen.names, want) {
			w.Errorf("verified %q, want %q", seen.names, want)
		}
		w.apis[0].accepted()
	})
}

// TestLapseDeaf: a client that does not read, and grants no window, is cut all the same.
func TestLapseDeaf(t *testing.T) {
	lapsing(t, func(w *world, cert *testpki.Issued, take func()) {
		c := w.client(cert).greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		b, _ := c.openWatches(w.apis[0], 1)
		b.data(1, false, "an event that waits for a window")
		short := c.ask(true, "GET", "/api/v1/pods")
		e := b.wantRequest(true, "GET", "/api/v1/pods")
		b.headers(e.id, false, ":status: 200", "content-length: 2")
		b.data(e.id, true, "ok")
		c.wantStatus(short, false, 200)
		take()
		c.drain()
		c.setDeaf(true)
		begun := time.Now()
		for !c.cut(w) && time.Since(begun) < time.Minute {
			w.relay.EndLapsed()
			time.Sleep(2 * time.Second)
		}
		if took := time.Since(begun); took > 10*time.Second {
			w.Errorf("it took %v", took)
		}
		b.until("RST_STREAM")
		c.setDeaf(false)
	})
}

// cut reports whether the relay has let go of all client connections.
func (p *peer) cut(w *world) bool {
	n := 0
	for _, sh := range w.relay.shards {
		sh.mu.Lock()
		n += len(sh.clients)
		sh.mu.Unlock()
	}
	return n == 0
}
