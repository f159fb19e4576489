package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// signals are those that serve acts on. os/signal drops what a full channel cannot
// take, so each kind has a channel of its own: any number of SIGHUPs is one, and
// cannot crowd out a SIGTERM.
type signals struct {
	end     chan os.Signal // SIGTERM, SIGINT: the first drains, the second ends
	reload  chan os.Signal // SIGHUP
	replace chan os.Signal // SIGUSR2
}

func newSignals() *signals {
	s := &signals{end: make(chan os.Signal, 2), reload: make(chan os.Signal, 1), replace: make(chan os.Signal, 1)}
	signal.Notify(s.end, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(s.reload, syscall.SIGHUP)
	signal.Notify(s.replace, syscall.SIGUSR2)
	return s
}

func (s *signals) stop() {
	signal.Stop(s.end)
	signal.Stop(s.reload)
	signal.Stop(s.replace)
}

// errEnding is why a hand-over is given up.
var errEnding = errors.New("this process is to end")

// control acts on signals until the process is to end, and then ends it. A reload or a
// hand-over goes on beside it, one at a time, and is given up when the process is to end:
// it may wait for a backend that is slow to answer.
func (p *process) control(ctx context.Context, run func(func() error), l *listeners, signals *signals) error {
	apply, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	if p.discovery != nil {
		p.found.own = ownAddress(l.clients.Addr())
		run(func() error { return p.discover(apply, ctx, run) })
	}
	var reloaded chan struct{}  // closed when the reload under way is over; nil: none is
	var handing chan *successor // gets the successor of the hand-over under way, nil where it failed; nil: none is
	end := func(signal os.Signal) {
		giveUp(errEnding)
		if reloaded != nil {
			<-reloaded
		}
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			if handing == nil {
				return
			}
			if next := <-handing; next != nil {
				next.stop()
			}
		}()
		if signal != nil {
			p.log.Info("draining", "signal", signal.String(), "delay", p.config.Shutdown.Delay, "gracePeriod", p.config.Shutdown.GracePeriod)
		}
		p.shutdown(signals)
		<-stopped
	}
	for {
		reload, replace := signals.reload, signals.replace
		if reloaded != nil {
			reload, replace = nil, nil
		}
		if handing != nil {
			reload = nil
		}
		select {
		case <-ctx.Done():
			// Something has failed: what can still finish may.
			end(nil)
			return nil
		case s := <-signals.end:
			end(s)
			return nil
		case <-reload:
			done := make(chan struct{})
			reloaded = done
			go func() {
				defer close(done)
				p.reload(ctx, apply, run)
			}()
		case <-reloaded:
			reloaded = nil
		case <-replace:
			if handing != nil {
				p.log.Warn("SIGUSR2: refused, since a hand-over is under way")
				continue
			}
			to := make(chan *successor, 1)
			handing = to
			go func() {
				next, err := p.handOver(apply, l)
				if err != nil {
					p.log.Error("SIGUSR2: not handed over", "err", err)
				}
				to <- next
			}()
		case next := <-handing:
			handing = nil
			if next == nil {
				continue
			}
			if left, err := p.leave(l, signals, next); left {
				return err
			}
		}
	}
}

// reload reads the certificate files and the configuration again. Before the first
// round of probes is over, systemd is told nothing of it: READY=1 would end the start.
//
// It is given up when apply is done; the checks of new backends end with ctx.
func (p *process) reload(ctx, apply context.Context, run func(func() error)) {
	if p.ready.probed.Load() {
		p.notify(reloading())
		defer p.notify(daemon.SdNotifyReady)
	}
	if err := p.store.Reload(); err != nil {
		p.log.Error("reload: what could not be read stays as it was", "err", err)
	} else {
		p.log.Info("SIGHUP: all certificate files have been read again")
	}
	if err := p.accessLog.reopen(); err != nil {
		p.log.Error("SIGHUP: the access log stays in the file that is open", "err", err)
	}
	if p.load == nil {
		return
	}
	c, err := p.load()
	if err != nil {
		p.log.Error("SIGHUP: the configuration is not usable, and stays as it was", "err", err)
		return
	}
	p.reconfigure(ctx, apply, run, c)
}

// shutdown ends the process: it drains, after shutdown.delay, in which those in front turn
// away. One that has not taken over from its predecessor has nobody in front.
func (p *process) shutdown(signals *signals) {
	p.ready.stopping.Store(true)
	p.notify(daemon.SdNotifyStopping)
	delay := p.config.Shutdown.Delay
	if p.predecessor != nil && !p.ready.serving.Load() {
		delay = 0
	}
	p.drain(context.Background(), signals, delay, 1)
}

// drain waits, lets what runs finish, and cuts what is left at the end of the grace
// period, when so many more signals to end have come or when ctx is done.
func (p *process) drain(ctx context.Context, signals *signals, delay time.Duration, more int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for ; more > 0; more-- {
			select {
			case s := <-signals.end:
				if more > 1 {
					p.log.Info("draining already, since another process has taken over", "signal", s.String())
					continue
				}
				p.log.Warn("second signal, not waiting any longer", "signal", s.String())
				cancel()
			case <-ctx.Done():
				return
			}
		}
	}()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
	}
	switch cut := p.front.Shutdown(ctx, p.config.Shutdown.GracePeriod); {
	case cut == 0:
		p.log.Info("drained")
	case ctx.Err() != nil:
		p.log.Warn("connections cut", "connections", cut)
	default:
		p.log.Warn("connections cut at the end of the grace period", "connections", cut)
	}
	p.pages.end()
	closing, closed := context.WithTimeout(context.Background(), time.Second)
	defer closed()
	_ = p.admin.Shutdown(closing) // what is left is closed
	p.admin.Close()
	p.operate.Close()
}
