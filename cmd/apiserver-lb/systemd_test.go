package main

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// manager is what systemd is to a service: a socket for its notifications.
type manager struct {
	*testing.T
	conn *net.UnixConn
	path string
}

// newManager makes NOTIFY_SOCKET, for this test alone: it must not be parallel.
func newManager(t *testing.T) *manager {
	t.Helper()
	// Not t.TempDir, since the path of a socket must be short.
	dir, err := os.MkdirTemp("", "notify")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "socket")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return &manager{t, conn, path}
}

// next returns the next notification.
func (m *manager) next() string {
	m.Helper()
	b := make([]byte, 4096)
	if err := m.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		m.Fatal(err)
	}
	n, err := m.conn.Read(b)
	if err != nil {
		m.Fatalf("no notification: %v", err)
	}
	return string(b[:n])
}

// want takes the next notification. Those come in order, mark's among them, so that
// one too many or too early is seen.
func (m *manager) want(state string) {
	m.Helper()
	if got := m.next(); got != state {
		m.Errorf("notification %q, want %q", got, state)
	}
}

// mark puts a notification of the test's own into the queue.
func (m *manager) mark(state string) {
	m.Helper()
	c, err := net.Dial("unixgram", m.path)
	if err != nil {
		m.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(state)); err != nil {
		m.Fatal(err)
	}
}

func TestNotifications(t *testing.T) {
	m := newManager(t)
	s := newSite(t, 1, 1)
	r := s.start()
	s.apis[0].await(t, "a probe", 0, to("/readyz"))
	m.mark("the first round is not over")
	r.hangUp(reloaded)
	m.mark("certificates were reloaded meanwhile")
	close(s.apis[0].gate)
	m.want("the first round is not over")
	m.want("certificates were reloaded meanwhile")
	m.want("READY=1")
	if a := r.ask("/readyz"); a.code != 200 {
		t.Errorf("/readyz = %d after READY=1, want 200", a.code)
	}

	for _, message := range []string{reloaded, "reload: what could not be read stays as it was"} {
		before := monotonicMicroseconds()
		r.hangUp(message)
		after := monotonicMicroseconds()
		lines := strings.Split(m.next(), "\n")
		if len(lines) != 2 || lines[0] != "RELOADING=1" {
			t.Fatalf("notification %q, want RELOADING=1 and MONOTONIC_USEC", lines)
		}
		value, ok := strings.CutPrefix(lines[1], "MONOTONIC_USEC=")
		at, err := strconv.ParseInt(value, 10, 64)
		if !ok || err != nil || at < before || at > after || before == 0 {
			t.Errorf("%q, want MONOTONIC_USEC from %d to %d", lines[1], before, after)
		}
		m.want("READY=1")
		replace(t, s.dir, "tls.crt", []byte("nonsense"))
	}

	done := r.held()
	m.mark("a request is in flight")
	r.signals.end <- syscall.SIGTERM
	m.want("a request is in flight")
	m.want("STOPPING=1")
	close(s.apis[0].release)
	<-done
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	m.mark("the end")
	m.want("the end")
}

// TestStoppingIsLast wants no READY=1 after STOPPING=1, although the first round
// ends between the two.
func TestStoppingIsLast(t *testing.T) {
	m := newManager(t)
	s := newSite(t, 1, 1)
	s.set("shutdown.delay", "1h")
	r := s.start()
	s.apis[0].await(t, "a probe", 0, to("/readyz"))
	r.signals.end <- syscall.SIGTERM
	m.want("STOPPING=1")
	close(s.apis[0].gate)
	r.log.await(t, became(s.apis[0], "ready"))
	// It serves, for those who have not noticed yet.
	r.mustGet(r.client(s.pki.alice), objectPath)
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	m.mark("the end")
	m.want("the end")
}

// TestNoManager wants a manager that has gone away to be worth a warning only.
func TestNoManager(t *testing.T) {
	m := newManager(t)
	m.conn.Close()
	r := newSite(t, 1, 0).startReady()
	r.log.await(t, said("systemd was not told"))
	r.mustGet(r.client(r.pki.alice), objectPath)
}
