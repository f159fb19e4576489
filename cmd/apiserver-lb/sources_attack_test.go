package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// newcomer returns a client of alice's that connects anew for each request.
func (r *program) newcomer() *http.Client {
	c := r.client(r.pki.alice)
	c.Transport.(*http.Transport).DisableKeepAlives = true
	return c
}

// TestSlotsTaken: one source takes every connection that it can get, and opens a new
// one for each that is closed. Others come and are served all the same.
func TestSlotsTaken(t *testing.T) {
	for _, test := range []struct {
		name  string
		begin func(c net.Conn) // what it says
	}{
		{"handshakes never begun", func(net.Conn) {}},
		{"heads of HTTP/1.1 that drip", func(c net.Conn) {
			t := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
			for _, b := range []byte("GET /api HTTP/1.1\r\nHost: a\r\nX-Long: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa") {
				if _, err := t.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}},
		{"idle HTTP/2", func(c net.Conn) {
			t := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			if t.Handshake() != nil {
				return
			}
			t.Write([]byte(http2.ClientPreface))
			http2.NewFramer(t, t).WriteSettings()
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := startProgram(t, func(s *site) { s.descriptors = 300 })
			newcomer := r.newcomer()
			base := r.bystander(newcomer)

			ctx, stop := context.WithCancel(t.Context())
			flood := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, Timeout: soon}
			var attackers sync.WaitGroup
			defer attackers.Wait()
			defer stop()
			for range 400 { // more than there are descriptors
				attackers.Go(func() {
					for ctx.Err() == nil {
						c, err := flood.DialContext(ctx, "tcp", r.clients)
						if err == nil {
							end := context.AfterFunc(ctx, func() { c.Close() })
							test.begin(c)
							c.Read(make([]byte, 1000))
							for err == nil { // until it is closed
								_, err = c.Read(make([]byte, 1000))
							}
							end()
							c.Close()
						}
						select {
						case <-ctx.Done():
						case <-time.After(time.Second):
						}
					}
				})
			}
			time.Sleep(3 * time.Second)
			during := r.bystander(newcomer)
			turned := r.metric(`apiserver_lb_refusals_total{reason="source_share"`)
			t.Logf("newcomers: %d of %d, median %s; before: %d, %s; the attacker was turned away %v times", during.served, asked, during.median, base.served, base.median, turned)
			if base.served < asked*95/100 {
				t.Errorf("before the attack, %d of %d newcomers were served in %s: the machine is too slow to tell", base.served, asked, inTime)
			}
			if during.served < asked*95/100 {
				t.Errorf("%d of %d newcomers were served in %s, want 95 %%", during.served, asked, inTime)
			}
			if turned == 0 {
				t.Error("the attacker was not turned away")
			}
		})
	}
}
