package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"apiserver-lb/cmd/internal/attack"
)

// Upgrades take a descriptor on both sides, and still leave some for backends and for what
// is to be read. Then none is left, as when the whole host has too few: neither for clients,
// nor for backends, nor for a certificate. The balancer serves those whose connections
// stand, rests, and does what it had to put off when there is room.
func TestNoDescriptorLeft(t *testing.T) {
	const descriptors = 200
	r := startProgram(t, func(s *site) { s.descriptors = descriptors })
	client := r.client(r.pki.alice)
	r.mustGet(client, objectPath)
	var flood []*peer
	defer func() {
		for _, c := range flood {
			c.hangUp()
		}
	}()
	upgrade := func(c *peer) {
		fmt.Fprintf(&c.Out, "GET %s HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", heldPath)
		c.flush()
	}
	// Two at a time, since an upgrade takes two and one place may be over; and again and
	// again, since on a busy machine clients come faster than their upgrades, which are then
	// refused.
	eventually(t, "upgrades take what they may", func() bool {
		var pair []*peer
		for range 2 {
			if c, err := r.tryConnect("http/1.1"); err == nil {
				pair = append(pair, c)
			}
		}
		for _, c := range pair {
			upgrade(c)
		}
		flood = append(flood, pair...)
		return len(r.log.list(said("clients are turned away: there are as many connections as file descriptors allow (LimitNOFILE in a systemd unit)"))) > 0
	})
	if n := openFiles(t, r.pid); n > descriptors-4 {
		t.Errorf("%d of %d descriptors are taken", n, descriptors)
	}
	left := unix.Rlimit{Max: descriptors}
	eventually(t, "no descriptor is left", func() bool {
		left.Cur = freeDescriptor(t, r.pid)
		if err := unix.Prlimit(r.pid, unix.RLIMIT_NOFILE, &left, nil); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", r.clients)
		if err != nil {
			t.Fatal(err)
		}
		flood = append(flood, &peer{Conn: &attack.Conn{Raw: c.(*net.TCPConn)}})
		return len(r.log.list(said("a connection could not be accepted"))) > 0
	})

	renewed := issue(t, r.pki.clusterCA, "apiserver-lb", server("lb.example"), func(c *x509.Certificate) {
		c.IPAddresses = append(c.IPAddresses, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(r.clients)).IP)
	})
	replacePair(t, r.dir, "tls", renewed)
	before, begin := cpuTime(t, r.pid), time.Now()
	for time.Since(begin) < 4*time.Second {
		r.mustGet(client, objectPath)
		time.Sleep(20 * time.Millisecond)
	}
	if used := cpuTime(t, r.pid) - before; used > time.Since(begin)/2 {
		t.Errorf("%s of CPU in %s", used, time.Since(begin))
	}
	if err := syscall.Kill(r.pid, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	r.log.await(t, said("reload: what could not be read"))
	if n := len(r.log.list(said("backend state changed"))); n != 1 {
		t.Errorf("the backend's state has changed %d times, want once, at the start", n)
	}

	for _, c := range flood {
		c.hangUp()
	}
	left.Cur = descriptors
	if err := unix.Prlimit(r.pid, unix.RLIMIT_NOFILE, &left, nil); err != nil {
		t.Fatal(err)
	}
	flood, begin = nil, time.Now()
	eventually(t, "a new client is served, with the new certificate", func() bool {
		fresh := r.client(r.pki.alice)
		defer fresh.CloseIdleConnections()
		if r.get(fresh, objectPath).code != http.StatusOK {
			return false
		}
		return r.served().Equal(renewed.Certificate)
	})
	c, err := r.tryConnect("http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.hangUp()
	upgrade(c)
	eventually(t, "an upgrade goes through", func() bool { return r.backend.inFlight.Load() == 1 })
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

// freeDescriptor returns the lowest file descriptor that a process has not open, which is the
// next that it gets.
func freeDescriptor(t *testing.T, pid int) (free uint64) {
	t.Helper()
	for {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, free)); errors.Is(err, fs.ErrNotExist) {
			return free
		} else if err != nil {
			t.Fatal(err)
		}
		free++
	}
}
