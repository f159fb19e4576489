package main

import (
	"context"
	"log/slog"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/google/go-cmp/cmp"
)

func TestHanging(t *testing.T) {
	now := time.Unix(1000, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for name, test := range map[string]struct {
		loops []loop
		want  []string
	}{
		"it waits":               {loops: []loop{{"a", time.Time{}, 0}}},
		"it has just moved":      {loops: []loop{{"a", now, 0}}},
		"it rests":               {loops: []loop{{"a", ago(hangsAfter + time.Minute), time.Minute}}},
		"it rests for too long":  {loops: []loop{{"a", ago(hangsAfter + time.Minute + 1), time.Minute}}, want: []string{"a"}},
		"the clock was put back": {loops: []loop{{"a", now.Add(time.Hour), 0}}},
		"each that hangs, by name": {
			loops: []loop{{"a", ago(time.Hour), 0}, {"b", now, 0}, {"c", ago(time.Hour), time.Minute}}, want: []string{"a", "c"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, hanging(test.loops, now)); diff != "" {
				t.Errorf("hanging (-want +got):\n%s", diff)
			}
		})
	}
}

// askedEvery has systemd's watchdog ask for a sign of life within d.
func askedEvery(t *testing.T, d time.Duration, pid int) {
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(d.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(pid))
}

// TestWatchdog wants the signs of life to stop when a loop hangs, and to come again with it.
func TestWatchdog(t *testing.T) {
	m := newManager(t)
	askedEvery(t, 30*time.Millisecond, os.Getpid())
	s := newSite(t, 1, 0)
	log := new(logbook)
	p, err := build(s.load(), slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.keepWatchdog(ctx) }()
	m.want(daemon.SdNotifyWatchdog)
	m.want(daemon.SdNotifyWatchdog)

	p.lapsesSeen.Store(time.Now().Add(-time.Hour).UnixNano())
	log.await(t, said("this process hangs: systemd is not told that it is alive, and ends it"))
	m.mark("it hangs")
	for m.next() != "it hangs" { // those of before
	}
	time.Sleep(100 * time.Millisecond) // ten that it could have sent
	m.mark("still")
	m.want("still")

	p.lapsesSeen.Store(time.Now().UnixNano())
	m.want(daemon.SdNotifyWatchdog)

	// Not while another process is the service's, but while this one drains.
	p.mute()
	m.mark("another is in its place")
	for m.next() != "another is in its place" {
	}
	time.Sleep(100 * time.Millisecond)
	m.mark("still in its place")
	m.want("still in its place")
	p.ready.stopping.Store(true)
	m.want(daemon.SdNotifyWatchdog)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLoopsMove wants each loop of a process that serves to be seen moving.
func TestLoopsMove(t *testing.T) {
	m := newManager(t)
	askedEvery(t, time.Hour, os.Getpid())
	r := newSite(t, 2, 0).start()
	seen := map[string]bool{}
	for !seen["READY=1"] {
		seen[m.next()] = true
	}
	if !seen[daemon.SdNotifyWatchdog] {
		t.Error("no WATCHDOG=1 from a process that was asked for it")
	}
	r.mustGet(r.client(r.pki.alice), objectPath)
}

// The watchdog of another process is not for this one.
func TestWatchdogOfAnother(t *testing.T) {
	askedEvery(t, time.Hour, os.Getppid())
	p := &process{}
	if err := p.keepWatchdog(t.Context()); err != nil {
		t.Error(err)
	}
}
