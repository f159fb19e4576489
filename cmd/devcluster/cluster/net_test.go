package cluster

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

func TestEcho(t *testing.T) {
	p := testPKI(t)
	c := &Cluster{PKI: p}
	for _, tls := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%t", tls), func(t *testing.T) {
			e, err := c.StartEcho("127.0.0.1:0", tls)
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			hc, err := c.HTTPClient(User{Token: "t"})
			if err != nil {
				t.Fatal(err)
			}
			defer hc.CloseIdleConnections()
			scheme := "http"
			if tls {
				scheme = "https"
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, scheme+"://"+e.Address, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			req.URL.Opaque = "//" + e.Address + "/a//b/../%2f"
			req.URL.RawQuery = "x=1;y"
			resp, err := hc.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var got EchoReply
			if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
				t.Fatal(err)
			}
			if got.Method != "PUT" || got.RawQuery != "x=1;y" || !strings.HasSuffix(got.RequestURI, "/a//b/../%2f?x=1;y") ||
				got.Body != "body" || got.TLS != tls || got.Header.Get("Authorization") != "Bearer t" || got.Server != e.Address {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestFreeAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	busy := l.Addr().String()
	got, same, err := FreeAddress(busy)
	if err != nil || same || got == busy {
		t.Errorf("busy: %s, %t, %v", got, same, err)
	}
	ip := netip.MustParseAddrPort(busy)
	if err := portsFree([]netip.Addr{ip.Addr()}, int(ip.Port())); !matches(err, busy) || !matches(err, "choose another port") {
		t.Errorf("busy: %v", err)
	}
	l.Close()
	if got, same, err := FreeAddress(busy); err != nil || !same || got != busy {
		t.Errorf("free: %s, %t, %v", got, same, err)
	}
	if _, _, err := FreeAddress("nonsense"); err == nil {
		t.Error("no error for an address without a port")
	}
}

// named answers each connection with its name and then echoes lines.
func named(t *testing.T, name string) *Apiserver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, name)
			t.Cleanup(func() { conn.Close() })
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return &Apiserver{Address: l.Addr().String(), process: &Process{done: make(chan struct{})}}
}

func TestWayFollowsFaults(t *testing.T) {
	one, two := named(t, "one"), named(t, "two")
	w, err := newWay([]*Apiserver{one, two})
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	dial := func() *bufio.Reader {
		conn, err := net.Dial("tcp", w.address())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return bufio.NewReader(conn)
	}
	line := func(r *bufio.Reader) string {
		s, err := r.ReadString('\n')
		if err != nil {
			return "closed"
		}
		return strings.TrimSpace(s)
	}
	set := func(a *Apiserver, hung bool) {
		a.mu.Lock()
		a.hung = hung
		w.moved() // as Apiserver.signal calls it, with the lock held
		a.mu.Unlock()
	}

	first := dial()
	if got := line(first); got != "one" {
		t.Fatalf("the first connection goes to %s", got)
	}
	set(one, true)
	if got := line(first); got != "closed" {
		t.Errorf("after its apiserver hangs, the connection says %q", got)
	}
	second := dial()
	if got := line(second); got != "two" {
		t.Errorf("then a connection goes to %s", got)
	}
	set(two, true)
	if got := line(second); got != "closed" {
		t.Errorf("after both hang, the connection says %q", got)
	}
	if got := line(dial()); got != "closed" {
		t.Errorf("with none left, a connection goes to %s", got)
	}
	set(one, false)
	if got := line(dial()); got != "one" {
		t.Errorf("after the first continues, a connection goes to %s", got)
	}
}
