package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/discover"
	"apiserver-lb/balancer/forward"
	"apiserver-lb/configs"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

func newServe() *cobra.Command {
	var flags configFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the load balancer",
		Long: "serve runs the load balancer until SIGTERM or SIGINT, then drains within\nshutdown.gracePeriod; a second signal ends it at once. SIGHUP reads the\nconfiguration again and applies a changed list of backends, and reloads certificates,\n" +
			"which are also reloaded by themselves when their files change. SIGUSR2 starts the\nprogram anew, with a new binary for instance, hands the listening sockets to it when\nit is able to serve, and then drains.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Before the first load: a signal that comes early must not kill.
			signals := newSignals()
			defer signals.stop()
			c, err := flags.load(cmd)
			if err != nil {
				return err
			}
			queue := newLogQueue(cmd.ErrOrStderr())
			defer queue.Close()
			load := func() (*configs.Config, error) { return flags.load(cmd) }
			return serve(cmd.Context(), c, load, signals, newLog(queue, c.Log))
		},
	}
	flags.register(cmd)
	return cmd
}

// process is all that runs.
type process struct {
	config *configs.Config // replaced by reconfigure; read by build, reload and, when none is under way, control
	log    *slog.Logger

	store      *tlsconf.Store
	host       string        // its name
	begun      time.Time     // when the process did
	spread     time.Duration // over which the watches of a backend that is drained end
	evacuation time.Duration // over which those of one end that fails its checks
	telemetry  *telemetry
	metrics    *balancer.Metrics
	history    *history
	pages      *pages
	probes     *probeMetrics
	backends   *backend.Backends
	discovery  *discover.Discovery // nil: only the configuration names backends
	found      found
	front      front
	rebalance  *balancer.Rebalance // nil: connections stay where they are
	accessLog  *accessLog          // nil: there is none
	ready      *readiness
	admin      *http.Server                    // tells operators, and changes nothing
	operate    *http.Server                    // does what they want
	load       func() (*configs.Config, error) // the configuration anew; nil: it cannot be had

	predecessor *predecessor // that hands over to this process; nil: none

	memory      balancer.Memory
	memoryLimit uint64 // bytes; 0: none

	watchMu sync.RWMutex
	watches map[*backend.Backend]*watch // guarded by watchMu

	operating sync.Mutex  // held while an operator's wish is done
	handing   atomic.Bool // a successor has begun

	clientsChanged chan struct{} // by judgeClients; never closed
	lapsesSeen     atomic.Int64  // by endLapsed, in Unix nanoseconds: its last round; 0: none yet

	filesMu           sync.Mutex
	backendGeneration uint64 // guarded by filesMu: that connections are made with

	panicMu   sync.Mutex
	panicking bool // guarded by panicMu: what was said last

	notifyMu sync.Mutex
	muted    bool // guarded by notifyMu: systemd is told nothing
}

// maxShards bounds the connections to each backend on machines of many cores.
const maxShards = 8

// serve is the composition root: it builds everything, then starts every
// goroutine, and returns when all of them have ended.
//
// load reads the configuration again; nil: SIGHUP leaves it alone.
func serve(ctx context.Context, c *configs.Config, load func() (*configs.Config, error), signals *signals, log *slog.Logger) error {
	p, err := build(c, log)
	if err != nil {
		return err
	}
	p.load = load
	passed, before, err := passedSockets()
	if err != nil {
		return err
	}
	if before != nil {
		defer before.link.Close()
		p.predecessor = before
		p.mute() // the service's process is the other
	}
	l, err := openListeners(ctx, c, passed, log)
	if err != nil {
		return err
	}
	defer l.Close()
	if l.control != nil {
		defer func() {
			// A successor that ends before it has taken over leaves it to its predecessor.
			mine := p.predecessor == nil || p.ready.serving.Load()
			if mine && !p.ready.handedOver.Load() {
				_ = os.Remove(l.control.Addr().String()) // the next process does where this one cannot
			}
		}()
	}
	p.drainAgain(before)
	warnAtStart(c, p.store, log)
	log.Info("starting", "version", version, "mode", c.Mode, "listen", l.clients.Addr().String(), "admin", l.admin.Addr().String(), "pid", os.Getpid(), "backends", len(p.backends.Set().All()))
	return p.run(ctx, l, signals)
}

// build makes all parts and starts none.
func build(c *configs.Config, log *slog.Logger) (*process, error) {
	p := &process{config: c, log: log, begun: time.Now(), spread: forward.Spread(c.Shutdown.GracePeriod), watches: map[*backend.Backend]*watch{}, clientsChanged: make(chan struct{}, 1), history: newHistory()}
	var err error
	if p.store, err = openStore(c, log); err != nil {
		return nil, err
	}
	if p.telemetry, err = newTelemetry(&c.OTLP, log); err != nil {
		return nil, err
	}
	metrics, err := balancer.NewMetrics(p.telemetry.meter)
	p.metrics = metrics
	if err != nil {
		return nil, err
	}
	if p.probes, err = newProbeMetrics(p.telemetry.meter); err != nil {
		return nil, err
	}
	if p.accessLog, err = openAccessLog(&c.AccessLog); err != nil {
		return nil, err
	}
	if err := registerAccessLog(p.telemetry.meter, p.accessLog); err != nil {
		return nil, err
	}
	p.memoryLimit = memoryLimit(log)
	if err := p.findBackends(c); err != nil {
		return nil, err
	}
	p.ready = &readiness{backends: p.backends}
	if err := registerGauges(p.telemetry.meter, p.backends, p.store, &p.memory); err != nil {
		return nil, err
	}
	p.pages = newPages(p.state, p.history.state)
	p.admin = newAdminServer(adminHandler(p.ready, p.telemetry.handler, p.serveState, p.pages))
	p.operate = newAdminServer(ofPeers(log, p.operateHandler()))
	p.operate.ConnContext = withPeer

	p.store.Subscribe(p.filesChanged)
	p.store.Subscribe(p.judgeClients)
	p.backendGeneration = p.store.BackendGeneration()

	for _, b := range p.backends.Set().All() {
		p.addWatch(b)
	}

	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("the host's name: %w", err)
	}
	p.host = host
	if c.Mode == configs.ModePassthrough {
		passing, err := p.newPassing(c)
		if err != nil {
			return nil, err
		}
		p.front, p.evacuation = passing, p.spread
		return p, nil
	}
	p.front, p.evacuation = p.newTerminating(c), evacuateWatches
	return p, nil
}

// stateChanged acts on a change of a backend's health.
func (p *process) stateChanged(b *backend.Backend, ch health.Change) {
	b.SetState(ch.To, ch.At)
	p.history.changed(b.Name, ch)
	level := slog.LevelInfo
	if ch.To != health.Ready {
		level = slog.LevelWarn
	}
	attrs := []any{"backend", b.Name, "from", ch.From.String(), "to", ch.To.String(), "verdict", ch.Verdict.String()}
	if len(ch.Failed) > 0 {
		attrs = append(attrs, "failedChecks", ch.Failed)
	}
	if ch.Err != nil {
		attrs = append(attrs, "err", ch.Err)
	}
	p.log.Log(context.Background(), level, "backend state changed", attrs...)
	switch {
	case ch.To == health.Dead:
		p.front.Cut(b)
	case ch.To == health.Ready && p.ready.probed.Load():
		// It may have been started anew, with other flags.
		go p.front.Learn(context.Background(), b)
	}
	p.tellPanic()
}

// filesChanged makes connections to backends anew when what they were made with
// has changed: the front-proxy certificate, that of the probes, or the backends' CA.
// Client CAs, CRLs and the deny list are asked for every request in any case.
func (p *process) filesChanged() {
	p.filesMu.Lock()
	defer p.filesMu.Unlock()
	now := p.store.BackendGeneration()
	if now == p.backendGeneration {
		return
	}
	p.backendGeneration = now
	p.front.Retire()
	for _, w := range p.allWatches() {
		w.prober.Redial()
	}
}

// judgeClients has endLapsed look at all clients now.
func (p *process) judgeClients() {
	select {
	case p.clientsChanged <- struct{}{}:
	default: // it is about to
	}
}

// lapsesEvery is how often the certificates of open connections are looked at: any may
// have expired. The second look, or the third, closes the connections of those who do
// not take the end of what runs there; with what closing takes that is within 10 s.
const lapsesEvery = 2 * time.Second

// endLapsed ends what runs under certificates that do not count any more, until ctx
// is done.
func (p *process) endLapsed(ctx context.Context) {
	tick := time.NewTicker(lapsesEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-p.clientsChanged:
		case <-ctx.Done():
			return
		}
		p.front.EndLapsed()
		p.lapsesSeen.Store(time.Now().UnixNano())
	}
}

// tellPanic logs that panic mode has begun or ended. Before the first round of
// probes is over, backends that nobody has asked yet are no reason for alarm.
func (p *process) tellPanic() {
	if !p.ready.probed.Load() {
		return
	}
	p.panicMu.Lock()
	defer p.panicMu.Unlock()
	now := p.backends.Set().Panicking()
	if now == p.panicking {
		return
	}
	p.panicking = now
	if now {
		p.log.Error("panic mode: no backend is ready, requests go to those that fail their checks")
	} else {
		p.log.Info("panic mode is over: a backend is ready")
	}
}

// run starts every goroutine and waits for their end.
func (p *process) run(ctx context.Context, l *listeners, signals *signals) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	// Connections are looked after until the last of them has been drained, even where it
	// is a failure elsewhere that ends the process.
	carrying, stopCarrying := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCarrying()
	go p.front.Run(carrying)
	go p.endLapsed(carrying)
	if p.accessLog != nil {
		go p.accessLog.run()
	}
	g, ctx := errgroup.WithContext(ctx)

	g.Go(func() error { return p.store.Run(ctx) })
	g.Go(func() error { return p.watchExpiries(ctx) })
	g.Go(func() error { return p.keepMemory(ctx, p.memoryLimit) })
	if p.rebalance != nil {
		g.Go(func() error { return p.rebalance.Run(ctx, p.backends) })
	}
	g.Go(func() error { return p.evacuate(ctx) })
	g.Go(func() error { return p.keepWatchdog(ctx) })
	g.Go(func() error { return p.keepHistory(ctx) })
	for _, w := range p.allWatches() {
		p.startWatch(ctx, g.Go, w)
	}
	mine := make(chan struct{}) // closed when the listeners are this process's to accept from
	if p.predecessor == nil {
		close(mine)
	}
	serve := func(name string, s *http.Server, l net.Listener) {
		g.Go(func() error {
			select {
			case <-mine:
			case <-ctx.Done():
				return nil
			}
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) && !p.ready.handedOver.Load() {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	serve("admin listener", p.admin, l.admin)
	if l.control != nil {
		serve("control socket", p.operate, l.control)
	}
	g.Go(func() error {
		// No client is served before every backend has been judged once.
		if !p.awaitProbes(ctx) {
			return nil
		}
		p.learnProtocols(ctx, p.backends.Set().All())
		p.ready.probed.Store(true)
		p.tellPanic()
		if !p.takeOver(ctx) {
			return nil
		}
		if p.predecessor != nil {
			close(mine)
		}
		p.ready.serving.Store(true)
		p.log.Info("ready for clients", "listen", l.clients.Addr().String())
		p.notify(daemon.SdNotifyReady)
		if err := p.front.Serve(l.clients); err != nil {
			return fmt.Errorf("listener: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		defer stop()
		return p.control(ctx, g.Go, l, signals)
	})

	err := g.Wait()
	p.front.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return errors.Join(err, p.accessLog.close(), p.telemetry.shutdown(ctx))
}

// expiriesEvery is how often certificates that are about to expire are named.
const expiriesEvery = 6 * time.Hour

// watchExpiries logs certificates that are about to expire, now and from time to time.
func (p *process) watchExpiries(ctx context.Context) error {
	tick := time.NewTicker(expiriesEvery)
	defer tick.Stop()
	for {
		warnExpiries(p.store.Expiries(), time.Now(), p.log)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// learnProtocols finds out which backends speak HTTP/2, all of them at once.
func (p *process) learnProtocols(ctx context.Context, backends []*backend.Backend) {
	var wg sync.WaitGroup
	for _, b := range backends {
		if b.State() != health.Dead {
			wg.Go(func() { p.front.Learn(ctx, b) })
		}
	}
	wg.Wait()
}

// awaitProbes waits for the first verdict on every backend, less those that a reload
// takes out meanwhile.
func (p *process) awaitProbes(ctx context.Context) bool {
	for _, w := range p.allWatches() {
		select {
		case <-w.checker.WaitFirst():
		case <-w.ended:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
