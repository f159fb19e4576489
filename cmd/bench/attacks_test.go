package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestBystander(t *testing.T) {
	b := bystander{lost: 1}
	if b.share() != 0 || b.p99() != 0 {
		t.Errorf("nothing served: %d %%, %s", b.share(), b.p99())
	}
	for i := range 199 {
		b.took = append(b.took, time.Duration(199-i)*time.Millisecond)
	}
	if b.share() != 99 || b.p99() != 198*time.Millisecond {
		t.Errorf("%d %%, %s; want 99 %%, 198ms", b.share(), b.p99())
	}
}

// Attacks are told apart by name, and share their units among connections evenly.
func TestAssaults(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range allAssaults() {
		if seen[a.name] {
			t.Errorf("two are %q", a.name)
		}
		seen[a.name] = true
		if a.connections < 1 || a.atOnce < 1 || a.most%(a.connections*a.atOnce) != 0 {
			t.Errorf("%s: %d units on %d connections, %d at once", a.name, a.most, a.connections, a.atOnce)
		}
	}
}

func TestReverseProxyFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if runReverseProxy(file) == nil {
		t.Error("no error without a file")
	}
	if err := os.WriteFile(file, []byte("a b c"), 0o600); err != nil {
		t.Fatal(err)
	}
	if runReverseProxy(file) == nil {
		t.Error("no error for a file with three words")
	}
}

// What an attack holds is let go of when its peer ends the connection, and is not before.
func TestHostage(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	h, err := unfinished{raw: []byte{22}}.begin(nil, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer h.conn.Close()
	c := <-accepted
	if h.over() {
		t.Error("over before anybody ended it")
	}
	c.Close()
	select {
	case <-h.ended:
	case <-time.After(10 * time.Second):
		t.Error("not over 10s after it was ended")
	}
}
