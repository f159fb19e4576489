package main

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSignalsApart floods the process with SIGHUPs that nobody takes: the SIGTERMs
// come through.
func TestSignalsApart(t *testing.T) {
	// One that is delivered late must not end the tests.
	late := make(chan os.Signal, 1)
	signal.Notify(late, syscall.SIGHUP)
	s := newSignals()
	defer s.stop()
	send := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		for range 1000 {
			send(syscall.SIGHUP)
		}
		select {
		case <-s.reload:
		case <-time.After(patience):
			t.Fatal("no SIGHUP has come")
		}
		send(sig)
		select {
		case got := <-s.end:
			if got != sig {
				t.Errorf("got %v, want %v", got, sig)
			}
		case <-time.After(patience):
			t.Fatalf("%v was lost", sig)
		}
	}
}

func TestSIGTERMBeforeFirstRound(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 1)
	r := s.start()
	s.apis[1].await(t, "a probe", 0, to("/readyz"))
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if len(r.log.list(said("ready for clients"))) != 0 {
		t.Error("it says to be ready for clients")
	}
	if c, err := net.Dial("tcp", r.clients); err == nil {
		c.Close()
		t.Error("the listener for clients is still open")
	}
}

// TestContextEnds wants serve to drain when its context ends, as for a signal.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	c, log := s.load(), new(logbook)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, c, nil, &signals{end: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)}, newLog(log, c.Log))
	}()
	log.await(t, said("ready for clients"))
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("serve = %v", err)
		}
	case <-time.After(patience):
		t.Fatal("serve has not returned")
	}
}

// TestDelay wants a balancer that is about to close to say so, and to serve on.
func TestDelay(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("shutdown.delay", "1h")
	r := s.startReady()
	r.signals.end <- syscall.SIGTERM
	e := r.log.await(t, said("draining"))
	if e["signal"] != "terminated" || e["delay"] != "1h0m0s" || e["gracePeriod"] != "30s" {
		t.Errorf("the log says %v", e)
	}
	eventually(t, "/readyz fails", func() bool { return r.ask("/readyz").code == 503 })
	r.wantReady(503,
		"[-]shutdown draining",
		"[+]probes ok",
		"[+]backend api-0 ready",
		"[+]backends ok")
	r.mustGet(r.client(s.pki.alice), objectPath)
	r.signals.end <- syscall.SIGINT
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if e := r.log.await(t, said("second signal")); e["signal"] != "interrupt" {
		t.Errorf("the log says %v", e)
	}
}

// held begins a request that its backend answers when it is told to.
func (r *running) held() <-chan answer {
	r.Helper()
	c, done := r.client(r.pki.alice), make(chan answer, 1)
	go func() { done <- r.get(c, heldPath) }()
	r.apis[0].await(r.T, "the request", 0, to(heldPath))
	return done
}

// TestDrain wants a request in flight to finish.
func TestDrain(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	r := s.startReady()
	done := r.held()
	r.signals.end <- syscall.SIGTERM
	r.log.await(t, said("draining"))
	eventually(t, "the listener closes", func() bool {
		c, err := net.Dial("tcp", r.clients)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case <-r.ended:
		t.Error("serve has returned with a request in flight")
	case a := <-done:
		t.Errorf("the request was ended: %+v", a)
	default:
	}
	if a := r.ask("/readyz"); a.code != 503 {
		t.Errorf("/readyz = %d while requests drain, want 503", a.code)
	}
	close(s.apis[0].release)
	if a := <-done; a.err != nil || a.code != 200 || !strings.Contains(a.body, `"name":"alice"`) {
		t.Errorf("the request in flight: %+v, want 200", a)
	}
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if len(r.log.list(said("drained"))) != 1 {
		t.Errorf("the log does not say that all has drained:\n%s", r.log)
	}
}

// TestSecondSignal wants a second signal to cut what is left.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("shutdown.gracePeriod", "1h")
	r := s.startReady()
	done := r.held()
	r.signals.end <- syscall.SIGTERM
	r.log.await(t, said("draining"))
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if a := <-done; a.err == nil {
		t.Errorf("the request in flight: %+v, want an error", a)
	}
	if e := r.log.await(t, said("connections cut")); e["connections"] != 1.0 || e["msg"] != "connections cut" {
		t.Errorf("the log says %v, want one connection cut, and nothing of the grace period", e)
	}
}

// TestGracePeriod wants the end of the grace period to cut what is left.
func TestGracePeriod(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("shutdown.gracePeriod", "200ms")
	r := s.startReady()
	done := r.held()
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if a := <-done; a.err == nil {
		t.Errorf("the request in flight: %+v, want an error", a)
	}
	if e := r.log.await(t, said("connections cut")); e["msg"] != "connections cut at the end of the grace period" {
		t.Errorf("the log says %v", e)
	}
}

// TestWatchDrains wants a watch to end cleanly when the balancer drains.
func TestWatchDrains(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("shutdown.gracePeriod", "1s")
	r := s.startReady()
	res, err := r.client(s.pki.alice).Get("https://" + r.clients + watchPath + "?watch=1")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	if !lines.Scan() || !strings.Contains(lines.Text(), `"ADDED"`) {
		t.Fatalf("the first event: %q, %v", lines.Text(), lines.Err())
	}
	r.signals.end <- syscall.SIGTERM
	if lines.Scan() || lines.Err() != nil {
		t.Errorf("the watch ended with %q, %v, want its clean end", lines.Text(), lines.Err())
	}
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if len(r.log.list(said("drained"))) != 1 {
		t.Errorf("the log does not say that all has drained:\n%s", r.log)
	}
}

// TestSIGHUPFlood keeps SIGHUP pending all the time: a SIGTERM is not held up.
func TestSIGHUPFlood(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	flood := make(chan struct{})
	go func() {
		defer close(flood)
		for {
			select {
			case r.signals.reload <- syscall.SIGHUP:
			case <-r.ended:
				return
			}
		}
	}()
	r.log.awaitNth(t, 10, said(reloaded))
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	<-flood
}

// TestListenerFails wants the failure of one part to end all of them.
func TestListenerFails(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	c, log := s.load(), new(logbook)
	p, err := build(c, newLog(log, c.Log))
	if err != nil {
		t.Fatal(err)
	}
	clients, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer clients.Close()
	operators, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	operators.Close()
	err = p.run(t.Context(), &listeners{clients: clients, admin: operators}, &signals{end: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)})
	if err == nil || !strings.HasPrefix(err.Error(), "admin listener: ") {
		t.Errorf("run = %v, want the error of the admin listener", err)
	}
}
