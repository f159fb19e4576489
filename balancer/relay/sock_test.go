package relay

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// sockPair returns a kernel socket that the relay has taken over, and its peer.
func sockPair(t *testing.T) (*Sock, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := NewSock(c)
	s.take()
	t.Cleanup(func() {
		peer.Close()
		s.Close()
	})
	return s, peer
}

// discard takes what has come, as TLS does.
func discard(s *Sock) {
	var p [1 << 16]byte
	for {
		if _, err := s.Read(p[:]); errors.Is(err, errWouldBlock) {
			return
		}
	}
}

// within fails the test unless readAll ends soon.
func within(t *testing.T, ended <-chan error) {
	t.Helper()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("readAll ended without an error")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("readAll has not ended")
	}
}

// A peer that never stops sending keeps the queue full, so that there is always
// something to be read; the connection must be closed all the same.
func TestCloseUnderFlood(t *testing.T) {
	for _, lazy := range []bool{false, true} {
		s, peer := sockPair(t)
		s.lazy = lazy
		go func() {
			flood := make([]byte, 1<<20)
			for {
				if _, err := peer.Write(flood); err != nil {
					return
				}
			}
		}()
		ended, reading := make(chan error, 1), make(chan struct{})
		n := 0
		go func() {
			ended <- s.readAll(func() error {
				discard(s)
				if n++; n == 10 {
					close(reading)
				}
				return nil
			})
		}()
		<-reading
		closed := make(chan struct{})
		go func() {
			s.Close()
			close(closed)
		}()
		within(t, ended)
		<-closed
	}
}

// The end of a connection that comes while its reader is at work is not lost, even
// where the reader would then wait for the poller to tell.
func TestAbortWhileHandling(t *testing.T) {
	for _, lazy := range []bool{false, true} {
		s, peer := sockPair(t)
		s.lazy = lazy
		if _, err := peer.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			ended <- s.readAll(func() error {
				discard(s)
				s.abort() // as unlockAndFlush does, for this connection too
				return nil
			})
		}()
		within(t, ended)
	}
}

// A parked reader learns of it as well, and of the peer's end.
func TestEndWhileParked(t *testing.T) {
	for _, end := range []func(s *Sock, peer net.Conn){
		func(s *Sock, _ net.Conn) { s.abort() },
		func(s *Sock, _ net.Conn) { s.Close() },
		func(_ *Sock, peer net.Conn) { peer.Close() },
	} {
		s, peer := sockPair(t)
		s.lazy = true
		parked, ended := make(chan struct{}), make(chan error, 1)
		if _, err := peer.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		go func() {
			ended <- s.readAll(func() error {
				discard(s)
				close(parked) // or about to be
				return nil
			})
		}()
		<-parked
		end(s, peer)
		within(t, ended)
	}
}

// crypto/tls ends its sending side with a deadline in the past; its last alert must
// be sent nevertheless.
func TestAlertAfterDeadline(t *testing.T) {
	s, peer := sockPair(t)
	if err := s.SetWriteDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("alert")); err != nil {
		t.Fatal(err)
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	var got [5]byte
	if _, err := io.ReadFull(peer, got[:]); err != nil || string(got[:]) != "alert" {
		t.Errorf("%q, %v", got, err)
	}
}

// What a slow peer does not take is finished later, whole and in order.
func TestFlushAndFinish(t *testing.T) {
	s, peer := sockPair(t)
	const size = 7 << 20
	sent := make([]byte, size)
	for i := range sent {
		sent[i] = byte(i * 7 >> 3)
	}
	if _, err := s.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := s.flush(); !errors.Is(err, errUnfinished) {
		t.Fatalf("flush = %v, want %v: the peer reads nothing", err, errUnfinished)
	}
	finished := make(chan error, 1)
	go func() { finished <- s.finish() }()
	got := make([]byte, size)
	if _, err := io.ReadFull(peer, got); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != sent[i] {
			t.Fatalf("byte %d is %d, want %d", i, got[i], sent[i])
		}
	}
	if err := <-finished; err != nil {
		t.Error(err)
	}
}
