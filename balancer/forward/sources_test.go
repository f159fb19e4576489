package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
)

// from opens a TCP connection to the balancer from an address.
func (w *world) from(address string) net.Conn {
	w.Helper()
	c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(address), frontAddress)
	if err != nil {
		w.Fatal(err)
	}
	w.clients = append(w.clients, c)
	synctest.Wait()
	return c
}

// turnedAway reports whether the balancer has closed a connection on which it has said
// nothing.
func turnedAway(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(time.Second))
	defer c.SetReadDeadline(time.Time{})
	_, err := c.Read(make([]byte, 1))
	var ne net.Error
	return !errors.As(err, &ne) || !ne.Timeout()
}

// shake makes the TLS handshake on a connection.
func (w *world) shake(c net.Conn, alpn ...string) *tls.Conn {
	w.Helper()
	t := tls.Client(c, w.clientConfig(nil, alpn...))
	if err := t.Handshake(); err != nil {
		w.Fatal(err)
	}
	return t
}

// heard reports whether a new connection is heard, and closes it.
func (w *world) heard(alpn ...string) bool {
	w.Helper()
	c := w.from(clientIP)
	defer func() {
		c.Close()
		time.Sleep(100 * time.Millisecond)
	}()
	c.SetDeadline(time.Now().Add(time.Second))
	return tls.Client(c, w.clientConfig(nil, alpn...)).Handshake() == nil
}

// refused returns how often the metrics say that something was refused for the reason.
func (w *world) refused(reason string) int64 {
	w.Helper()
	return w.metric("apiserver_lb.refusals")["reason="+reason]
}

// A source gets so many connections and no more; others get theirs, and whoever closes
// one gets another.
func TestSourceConnections(t *testing.T) {
	run(t, setup{sources: balancer.SourceLimits{Connections: 3}}, func(w *world) {
		var first []net.Conn
		for range 3 {
			c := w.from("198.51.100.7")
			w.shake(c)
			first = append(first, c)
		}
		for range 5 {
			if !turnedAway(w.from("198.51.100.7")) {
				t.Error("a fourth connection of a source stands")
			}
		}
		if turnedAway(w.from("198.51.100.8")) {
			t.Error("another source is turned away")
		}
		if n := w.refused(balancer.ReasonSourceConnections); n != 5 {
			t.Errorf("the metrics know of %d that were turned away, not 5", n)
		}
		if n := strings.Count(w.log.String(), "a client is turned away"); n != 1 {
			t.Errorf("logged %d times, want once", n)
		}
		first[0].Close()
		time.Sleep(time.Second)
		if turnedAway(w.from("198.51.100.7")) {
			t.Error("no new connection in place of one that was closed")
		}
	})
}

// IPv6 addresses of one /64 are one source.
func TestSourceIPv6(t *testing.T) {
	run(t, setup{sources: balancer.SourceLimits{Connections: 1}}, func(w *world) {
		w.from("2001:db8:1:2::1")
		if !turnedAway(w.from("2001:db8:1:2:ffff::2")) {
			t.Error("an address of the same /64 gets a connection of its own")
		}
		if turnedAway(w.from("2001:db8:1:3::1")) {
			t.Error("another /64 is turned away")
		}
	})
}

// A connection is unfinished until its first request head is whole, in all protocols.
// Where a source has as many as it may, the next one waits, and has its turn when one of
// them is finished or gone.
func TestSourceUnfinished(t *testing.T) {
	for _, tt := range []struct {
		name  string
		setup setup
		alpn  []string
		begin []string // said over TLS, one after the other, which is not enough
		last  string
	}{
		{"HTTP/1.1", setup{}, nil, []string{"GET /api HTTP/1.1\r\n", "Host: a\r\n"}, "\r\n"},
		{"HTTP/2", setup{}, []string{"h2"}, []string{preface, "\x00\x00\x00\x04\x00\x00\x00\x00\x00"}, headersOfGET},
		{"HTTP/2 over net/http", setup{h1: true}, []string{"h2"}, []string{preface, "\x00\x00\x00\x04\x00\x00\x00\x00\x00"}, headersOfGET},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.setup.sources.Unfinished = 1
			run(t, tt.setup, func(w *world) {
				still := func(what string) {
					t.Helper()
					time.Sleep(100 * time.Millisecond)
					synctest.Wait()
					if w.heard(tt.alpn...) {
						t.Errorf("after %s the connection counts as finished", what)
					}
				}
				c := w.from(clientIP)
				still("nothing")
				secure := w.shake(c, tt.alpn...)
				still("the handshake")
				for _, piece := range tt.begin {
					io.WriteString(secure, piece)
					still("a beginning")
				}
				io.WriteString(secure, tt.last)
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				if !w.heard(tt.alpn...) {
					t.Error("after its first request the connection counts as unfinished")
				}
				w.shake(w.from(clientIP), tt.alpn...)
				if late := w.from(clientIP); turnedAway(late) {
					t.Error("one that waits is closed at once")
				} else if time.Sleep(10 * time.Second); !turnedAway(late) {
					t.Error("one that has waited for as long as it may is not closed")
				}
				go io.Copy(io.Discard, secure)
				time.Sleep(time.Second)
			})
		})
	}
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// headersOfGET is HEADERS of GET https://a/ on stream 1.
const headersOfGET = "\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x84\x87\x41\x01a"

// A handshake that fails, or is not made in time, is given back.
func TestSourceHandshakeFails(t *testing.T) {
	run(t, setup{sources: balancer.SourceLimits{Connections: 1}}, func(w *world) {
		c := w.from(clientIP)
		io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
		time.Sleep(time.Second)
		silent := w.from(clientIP)
		time.Sleep(11 * time.Second)
		if !turnedAway(silent) {
			t.Error("who does not make a handshake is not closed")
		}
		if turnedAway(w.from(clientIP)) {
			t.Error("what a failed handshake had is not given back")
		}
	})
}

// A tunnel counts until it ends.
func TestSourceTunnel(t *testing.T) {
	run(t, setup{sources: balancer.SourceLimits{Connections: 1}, backends: 1}, func(w *world) {
		w.apis[0].on(switching("SPDY/3.1", "", func(conn net.Conn, _ *bufio.Reader) { io.Copy(io.Discard, conn) }))
		c := w.shake(w.from(clientIP))
		io.WriteString(c, "GET "+execTarget+" HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
		b := make([]byte, 1000)
		n, err := c.Read(b)
		if err != nil || !strings.Contains(string(b[:n]), "101 ") {
			t.Fatalf("%q, %v", b[:n], err)
		}
		time.Sleep(time.Second)
		if !turnedAway(w.from(clientIP)) {
			t.Error("a tunnel counts for nothing")
		}
		c.Close()
		time.Sleep(10 * time.Second)
		if turnedAway(w.from(clientIP)) {
			t.Error("a tunnel that has ended still counts")
		}
	})
}

// When the balancer is nearly full, a source with many is turned away and a newcomer is
// not.
func TestSourceShare(t *testing.T) {
	const most = 90
	run(t, setup{most: most, sources: balancer.SourceLimits{Most: most}}, func(w *world) {
		for range 2 * most {
			w.from("198.51.100.7")
		}
		for i := range 4 {
			if c := w.from(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 2)}).String()); turnedAway(c) {
				t.Errorf("newcomer %d is turned away", i)
			}
		}
		if n := w.refused(balancer.ReasonSourceShare); n < most {
			t.Errorf("%d of the flood were turned away for its share", n)
		}
		if n := w.refused(balancer.ReasonConnections); n != 0 {
			t.Errorf("%d were turned away because there was no place at all", n)
		}
	})
}

// Behind a proxy that speaks the PROXY protocol, the source is what it announces.
func TestSourceAnnounced(t *testing.T) {
	run(t, setup{sources: balancer.SourceLimits{Connections: 1}, proxies: balancer.Networks{netip.MustParsePrefix(clientIP + "/32")}}, func(w *world) {
		announce := func(from string) net.Conn {
			c := w.from(clientIP)
			io.WriteString(c, "PROXY TCP4 "+from+" 192.0.2.1 40000 6443\r\n")
			return c
		}
		first := announce("203.0.113.7")
		if turnedAway(announce("203.0.113.8")) {
			t.Error("another client of the proxy is turned away")
		}
		if !turnedAway(announce("203.0.113.7")) {
			t.Error("a client of the proxy gets a second connection")
		}
		first.Close()
		time.Sleep(time.Second)
		if turnedAway(announce("203.0.113.7")) {
			t.Error("a connection through the proxy is not given back")
		}
	})
}

// The certificates that the clients of a source have shown do not fill the memory; one with
// a usual certificate does not notice.
func TestSourceCertificates(t *testing.T) {
	for _, major := range []int{1, 2} {
		run(t, setup{backends: 1, sources: balancer.SourceLimits{Certificates: balancer.NewRoom(256<<10, nil)}}, func(w *world) {
			large := testpki.Issue(w.pki.ClientCA, pkix.Name{CommonName: "large", Organization: []string{strings.Repeat("x", 16<<10)}})
			served := 0
			for range 10 {
				c := w.client(major, large)
				if res, err := c.send(c.request("GET", "/version", nil)); err == nil {
					io.Copy(io.Discard, res.Body) // so that the connection is kept
					res.Body.Close()
					served++
				}
			}
			if served != 2 || w.refused(balancer.ReasonSourceCertificates) == 0 {
				w.Errorf("HTTP %d: %d of 10 large certificates are heard, %d counted", major, served, w.refused(balancer.ReasonSourceCertificates))
			}
			w.client(major, w.pki.Alice).do("GET", "/version", nil).want(w, 200, "")
			for _, c := range w.clients {
				c.Close()
			}
			synctest.Wait()
			w.client(major, large).do("GET", "/version", nil).want(w, 200, "")
		})
	}
}
