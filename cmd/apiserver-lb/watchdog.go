package main

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// loop is one of those that a process which serves nobody any more would have lost.
type loop struct {
	name  string
	moved time.Time     // last; zero: it waits for work, or has not begun
	rests time.Duration // at most, between two moves
}

// hangsAfter is how much longer than it may rest a loop takes before it counts as one
// that hangs. It is for machines so busy that a goroutine waits for its turn: a restart
// would cost such a machine more.
const hangsAfter = 20 * time.Second

// hanging names those that have not moved for too long.
func hanging(loops []loop, now time.Time) (names []string) {
	for _, l := range loops {
		if !l.moved.IsZero() && now.Sub(l.moved) > l.rests+hangsAfter {
			names = append(names, l.name)
		}
	}
	return names
}

// loops are those of this process. That timers and goroutines run at all is proved by
// whoever asks.
func (p *process) loops() []loop {
	all := []loop{{name: "what accepts clients", moved: p.front.Admitting()}}
	// It goes over all connections, and so meets the locks of the relay and the server.
	if seen := p.lapsesSeen.Load(); seen != 0 {
		all = append(all, loop{"what looks after connections", time.Unix(0, seen), lapsesEvery})
	}
	for _, w := range p.allWatches() {
		all = append(all, loop{"the probes of " + w.backend.Name, w.checker.Status().LastAt, w.rests})
	}
	return all
}

// keepWatchdog tells systemd that the process is alive, as long as it is and where
// systemd has asked (WatchdogSec= of systemd.service(5)), until ctx is done.
func (p *process) keepWatchdog(ctx context.Context) error {
	within, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		p.log.Warn("systemd's watchdog: it cannot be told that this process is alive, and may end it", "err", err)
		return nil
	}
	if within == 0 {
		return nil
	}
	// Half of it is advised (sd_watchdog_enabled(3)); a third forgives one that is late.
	tick := time.NewTicker(within / 3)
	defer tick.Stop()
	for {
		if names := hanging(p.loops(), time.Now()); len(names) == 0 {
			p.notify(daemon.SdNotifyWatchdog)
		} else {
			p.log.Error("this process hangs: systemd is not told that it is alive, and ends it", "hangs", names)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
