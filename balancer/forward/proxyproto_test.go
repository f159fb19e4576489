package forward

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/rawhttp"
)

var v2 = rawhttp.ProxyV2

// The addresses and ports of headers of version 2.
const (
	v2IPv4 = rawhttp.V2IPv4
	v2IPv6 = rawhttp.V2IPv6
)

var (
	proxyIP      = "203.0.113.5"
	proxyNetwork = balancer.Networks{netip.MustParsePrefix("203.0.113.0/24")}
)

// What a proxy announces is where the client comes from, to the backend and in the log.
func TestProxyProtocolSource(t *testing.T) {
	for _, tt := range []struct{ name, header, want string }{
		{"v1", "PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443\r\n", "192.0.2.9"},
		{"v2", v2(0x21, 0x21, v2IPv6), "2001:db8::9"},
		{"the proxy itself", v2(0x20, 0x00, ""), proxyIP},
	} {
		for _, major := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/HTTP %d", tt.name, major), func(t *testing.T) {
				run(t, setup{backends: 1, proxies: proxyNetwork}, func(w *world) {
					c := w.clientFrom(major, nil, proxyIP, tt.header)
					c.do("GET", "/version", nil, "Authorization: Bearer t", "X-Forwarded-For: 10.9.9.9")
					c.do("TRACE", "/version", nil)
					if got := w.apis[0].one().Header["X-Forwarded-For"]; !slices.Equal(got, []string{tt.want}) {
						t.Errorf("the backend saw X-Forwarded-For %q, want %s", got, tt.want)
					}
					if peer := netip.AddrPortFrom(netip.MustParseAddr(tt.want), 40000).String(); tt.want != proxyIP && !strings.Contains(w.log.String(), "peer="+peer) && !strings.Contains(w.log.String(), fmt.Sprintf("peer=%q", peer)) {
						t.Errorf("the log does not name the peer %s", peer)
					}
				})
			})
		}
	}
}

// Where a proxy announces nobody, its own address opens no guard.
func TestProxyProtocolUnannounced(t *testing.T) {
	guards := balancer.NewGuards([]balancer.SourceGuard{{Users: []string{"root"}, From: append(balancer.Networks{netip.MustParsePrefix("192.0.2.9/32")}, proxyNetwork...)}}, false, nil)
	for _, tt := range []struct {
		header string
		code   int
	}{
		{"PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443\r\n", 200},
		{v2(0x21, 0x11, v2IPv4), 200},
		{"PROXY TCP4 192.0.2.8 198.51.100.1 40000 6443\r\n", 403},
		{"PROXY UNKNOWN\r\n", 403},
		{"PROXY UNKNOWN 192.0.2.9 198.51.100.1 40000 6443\r\n", 403},
		{v2(0x20, 0x00, ""), 403},
		{v2(0x20, 0x11, v2IPv4), 403},
	} {
		for _, major := range []int{1, 2} {
			run(t, setup{backends: 1, proxies: proxyNetwork, guards: guards}, func(w *world) {
				c := w.clientFrom(major, nil, proxyIP, tt.header)
				if a := c.do("GET", "/api", nil, "Authorization: Bearer t", "Impersonate-User: root"); a.StatusCode != tt.code {
					t.Errorf("HTTP %d after %q: %d %s, want %d", major, tt.header, a.StatusCode, a.body, tt.code)
				}
				if a := c.do("GET", "/api", nil, "Authorization: Bearer t"); a.StatusCode != 200 {
					t.Errorf("HTTP %d after %q: %d %s", major, tt.header, a.StatusCode, a.body)
				}
			})
		}
	}
}

// From others no header is read, whatever address they would like to have.
func TestProxyProtocolFromStrangers(t *testing.T) {
	for _, proxies := range []balancer.Networks{nil, proxyNetwork} {
		run(t, setup{backends: 1, proxies: proxies}, func(w *world) {
			for _, header := range []string{"PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443\r\n", v2(0x21, 0x11, v2IPv4)} {
				c := w.clientFrom(1, nil, clientIP, header)
				if res, err := c.send(c.request("GET", "/version", nil)); err == nil {
					t.Errorf("%q was answered %d", header, res.StatusCode)
				}
			}
			w.client(2, nil).do("GET", "/version", nil)
			if got := w.apis[0].one().Header["X-Forwarded-For"]; !slices.Equal(got, []string{clientIP}) {
				t.Errorf("the backend saw X-Forwarded-For %q, want %s", got, clientIP)
			}
		})
	}
}

// A connection from a proxy that has no header, or not all of it in the time that a
// client has for its handshake, is closed; meanwhile others are served.
func TestProxyProtocolMissing(t *testing.T) {
	run(t, setup{backends: 1, proxies: proxyNetwork}, func(w *world) {
		plain := w.clientFrom(2, nil, proxyIP, "")
		if res, err := plain.send(plain.request("GET", "/version", nil)); err == nil {
			t.Errorf("a connection without a header was answered %d", res.StatusCode)
		}
		started := time.Now()
		var slow []net.Conn
		for _, part := range []string{"", "PROXY TCP4 ", v2(0x21, 0x11, v2IPv4)[:14]} {
			c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(proxyIP), frontAddress)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, part)
			slow = append(slow, c)
		}
		// The time that is left of the header's is the handshake's.
		c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(proxyIP), frontAddress)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		time.Sleep(9 * time.Second)
		io.WriteString(c, "PROXY UNKNOWN\r\n")
		slow = append(slow, c)
		w.client(2, nil).do("GET", "/version", nil)
		for _, c := range slow {
			if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, net.ErrClosed) {
				t.Errorf("%d bytes, %v: want the end of the connection", n, err)
			}
		}
		if took := time.Since(started); took != 10*time.Second {
			t.Errorf("the last one was closed after %v, want 10s", took)
		}
	})
}

// A connection that a proxy makes to see whether we are there leaves nothing behind.
func TestProxyProtocolHealthCheck(t *testing.T) {
	run(t, setup{backends: 1, proxies: proxyNetwork}, func(w *world) {
		for _, hello := range []string{v2(0x20, 0x00, ""), "PROXY UNKNOWN\r\n", ""} {
			c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(proxyIP), frontAddress)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, hello)
			c.Close()
		}
		c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(proxyIP), frontAddress)
		if err != nil {
			t.Fatal(err)
		}
		// TLS in the same segment as the header, as a proxy may send them.
		tc := tls.Client(&joined{Conn: c, first: v2(0x20, 0x00, "")}, w.clientConfig(nil, "h2"))
		if err := tc.Handshake(); err != nil {
			t.Errorf("header and TLS in one piece: %v", err)
		}
		tc.Close()
	})
}

// joined sends something before the first bytes that are written, in one piece.
type joined struct {
	net.Conn
	first string
}

func (j *joined) Write(p []byte) (int, error) {
	first := j.first
	j.first = ""
	n, err := j.Conn.Write(append([]byte(first), p...))
	return max(0, n-len(first)), err
}
