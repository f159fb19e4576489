package main

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// reloading tells systemd that something changes, until READY=1 (sd_notify(3)).
func reloading() string {
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, monotonicMicroseconds())
}

// notify tells systemd, where it asked to be told. Nothing follows STOPPING=1, as
// READY=1 could where the first round of probes ends during the delay of a shutdown.
func (p *process) notify(state string) {
	p.notifyMu.Lock()
	defer p.notifyMu.Unlock()
	// What drains is watched over as well.
	if p.muted && (state != daemon.SdNotifyWatchdog || !p.ready.stopping.Load()) {
		return
	}
	p.muted = p.muted || state == daemon.SdNotifyStopping
	if _, err := daemon.SdNotify(false, state); err != nil {
		p.log.Warn("systemd was not told", "state", state, "err", err)
	}
}

// mute keeps from systemd what is said until speak: the service's process is another.
func (p *process) mute() { p.setMuted(true) }

func (p *process) speak() { p.setMuted(false) }

func (p *process) setMuted(muted bool) {
	p.notifyMu.Lock()
	defer p.notifyMu.Unlock()
	p.muted = muted
}

// monotonicMicroseconds is the time that systemd wants beside RELOADING=1
// (sd_notify(3)).
func monotonicMicroseconds() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return ts.Nano() / int64(time.Microsecond)
}
