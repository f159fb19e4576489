package main

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/discover"
	"apiserver-lb/balancer/forward"
	"apiserver-lb/configs"
	"apiserver-lb/health"
)

// watch is a backend with its health checks.
type watch struct {
	backend *backend.Backend
	checker *health.Checker
	prober  *health.Prober
	rests   time.Duration      // at most, from the end of a probe to that of the next
	stop    context.CancelFunc // ends the checks; nil: they have not begun
	ended   chan struct{}      // closed by endWatch: nobody waits for a verdict any more

	failed atomic.Pointer[failure] // the last probe that failed; nil: none has
}

// newBackend makes a backend of what the configuration says of it.
func newBackend(s configs.Server) *backend.Backend {
	return &backend.Backend{Name: s.Name, Address: s.Address, ServerName: s.ServerName, Zone: s.Zone, Weight: s.Weight}
}

// newBackends makes the first set of backends, of those that are found as well.
func newBackends(c *configs.Config, found ...discover.Found) *backend.Backends {
	var list []*backend.Backend
	for _, s := range together(c.Backends.Servers, found) {
		list = append(list, newBackend(s))
	}
	return backend.NewBackends(backend.NewSet(c.Backends.SlowStart, list...))
}

// change is what a changed list of servers comes to.
type change struct {
	list           []*backend.Backend // in configured order
	added, removed []*backend.Backend
	settings       map[*backend.Backend]backend.Settings // that change
}

// revise compares the backends in use with a list of servers. One with the same name,
// address and server name stays what it is, with its state and its connections.
func revise(now []*backend.Backend, servers []configs.Server) change {
	r := change{settings: map[*backend.Backend]backend.Settings{}}
	for _, s := range servers {
		i := slices.IndexFunc(now, func(b *backend.Backend) bool {
			return b.Name == s.Name && b.Address == s.Address && b.ServerName == s.ServerName
		})
		if i < 0 {
			b := newBackend(s)
			r.list, r.added = append(r.list, b), append(r.added, b)
			continue
		}
		b := now[i]
		r.list = append(r.list, b)
		if want := (backend.Settings{Zone: s.Zone, Weight: s.Weight}); b.Settings() != want {
			r.settings[b] = want
		}
	}
	for _, b := range now {
		if !slices.Contains(r.list, b) {
			r.removed = append(r.removed, b)
		}
	}
	return r
}

// addWatch makes the health checks of a backend; startWatch begins them.
func (p *process) addWatch(b *backend.Backend) *watch {
	w := &watch{backend: b, prober: newProber(p.config, p.store, b, dialer.DialContext), ended: make(chan struct{})}
	w.rests = 2*p.config.Health.Interval + p.config.Health.Timeout // with room for jitter
	w.checker = health.NewChecker(b.Name, w.prober.Probe, health.CheckerOptions{
		Rules:    rules(p.config),
		Timeout:  p.config.Health.Timeout,
		OnChange: func(ch health.Change) { p.stateChanged(b, ch) },
		OnResult: func(r health.Result) {
			p.probes.observe(b.Name, r)
			w.noteFailure(r, time.Now())
		},
		LastAnswer: b.LastAnswer,
		Busy:       func() bool { short, _, _ := b.Load(); return short > 0 },
		Redial:     w.prober.Redial,
	})
	p.watchMu.Lock()
	p.watches[b] = w
	p.watchMu.Unlock()
	return w
}

// startWatch begins the checks. They end with ctx, or with endWatch.
func (p *process) startWatch(ctx context.Context, run func(func() error), w *watch) {
	ctx, w.stop = context.WithCancel(ctx)
	run(func() error {
		defer w.prober.Close()
		return w.checker.Run(ctx)
	})
}

// endWatch ends the checks of a backend that is not in use any more.
func (p *process) endWatch(b *backend.Backend) {
	p.watchMu.Lock()
	w := p.watches[b]
	delete(p.watches, b)
	p.watchMu.Unlock()
	if w == nil {
		return
	}
	close(w.ended)
	if w.stop != nil {
		w.stop()
	}
}

// allWatches returns the checks of all backends.
func (p *process) allWatches() []*watch {
	p.watchMu.RLock()
	defer p.watchMu.RUnlock()
	list := make([]*watch, 0, len(p.watches))
	for _, w := range p.watches {
		list = append(list, w)
	}
	return list
}

// passive tells the checks of a backend what traffic showed of it.
func (p *process) passive(b *backend.Backend, v health.Verdict) {
	p.watchMu.RLock()
	w := p.watches[b]
	p.watchMu.RUnlock()
	if w != nil {
		w.checker.Passive(v)
	}
}

// applied are the keys of which a reload applies a change. backends.serverName is the
// default of a part of backends.servers.
var applied = []string{"backends.servers", "backends.serverName", "passthrough.serverNames"}

// reconfigure applies a configuration that has been read again: the list of backends, and
// the server names that clients may ask for. What else has changed is named, and takes effect at the next start.
func (p *process) reconfigure(ctx, apply context.Context, run func(func() error), c *configs.Config) {
	var later []string
	for _, key := range configs.Changed(p.config, c) {
		if !slices.Contains(applied, key) {
			later = append(later, key)
		}
	}
	if len(later) > 0 {
		p.log.Warn("SIGHUP: changed keys take effect at the next start", "keys", later)
	}
	p.found.mu.Lock()
	defer p.found.mu.Unlock()
	list := merge(c.Backends.Servers, p.found.inUse, p.found.offers)
	if !p.replaceBackends(ctx, apply, run, bySIGHUP, together(c.Backends.Servers, list), p.config.Shutdown.GracePeriod) {
		return
	}
	p.found.use(list)
	changed := *p.config
	changed.Backends.Servers = c.Backends.Servers
	changed.Passthrough.ServerNames = c.Passthrough.ServerNames
	p.config = &changed
	p.front.SetServerNames(changed.Passthrough.ServerNames)
}

// listChange is how the log speaks of what changes the list of backends.
type listChange struct{ by, done, again string }

var (
	bySIGHUP    = listChange{"SIGHUP", "has been read again", "mend what the lines above name, and send SIGHUP again"}
	byDiscovery = listChange{"discovery", "has changed", "it is tried again from time to time"}
)

// replaceBackends puts another list of servers in the place of the one in use; false: that
// one stays. Its caller holds p.found.mu.
func (p *process) replaceBackends(ctx, apply context.Context, run func(func() error), why listChange, servers []configs.Server, grace time.Duration) bool {
	now := p.backends.Set().All()
	r := revise(now, servers)
	if len(r.list) == 0 {
		p.log.Error(why.by + ": the list of backends stays as it was, since there is none in the new one")
		return false
	}
	judged := p.judge(ctx, apply, run, r.added)
	worse := someReady(now) && !someReady(r.list)
	if !judged || worse {
		for _, b := range r.added {
			p.endWatch(b)
		}
		if judged {
			p.log.Error(why.by+": the list of backends stays as it was, since no backend of the new one is ready: "+why.again, "backends", names(r.list))
		}
		return false
	}
	for b, s := range r.settings {
		b.Reconfigure(s)
	}
	p.useBackends(backend.NewSet(p.config.Backends.SlowStart, r.list...), r)
	p.front.Resettle()
	for _, b := range r.removed {
		run(func() error {
			p.dismiss(ctx, b, grace)
			return nil
		})
	}
	p.tellPanic()
	p.log.Info(why.by+": the list of backends "+why.done, "backends", len(r.list),
		"added", names(r.added), "removed", names(r.removed), "changed", len(r.settings))
	return true
}

// someReady reports whether a backend of the list is ready, so that there is no panic.
func someReady(list []*backend.Backend) bool {
	return slices.ContainsFunc(list, func(b *backend.Backend) bool { return b.State() == health.Ready })
}

// dismissEvery is how often a backend that has been removed is looked after.
const dismissEvery = 100 * time.Millisecond

// dismiss lets what runs on a backend that has been removed finish within the grace
// period of a shutdown, in which watches end cleanly and spread. What is left then is
// cut. Its health is checked until then, so that nobody waits for one that has died.
func (p *process) dismiss(ctx context.Context, b *backend.Backend, grace time.Duration) {
	busy := func() (requests int64) {
		short, long, _ := b.Load()
		return short + long
	}
	tick := time.NewTicker(dismissEvery)
	defer tick.Stop()
	begun := time.Now()
	watchesBy := begun.Add(forward.Spread(grace))
	for busy() > 0 && time.Since(begun) < grace {
		p.front.EndWatches(b, watchesBy)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
	cut := busy()
	p.endWatch(b)
	if cut > 0 {
		p.log.Warn("removed backend: requests cut at the end of the grace period", "backend", b.Name, "address", b.Address, "requests", cut)
	} else {
		p.log.Info("removed backend: drained", "backend", b.Name, "address", b.Address)
	}
	for {
		p.front.Forget(b)
		if busy() == 0 {
			return
		}
		// A client that is slow to take its answer, or a connection that was being
		// dialled for an upgrade.
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// judge begins the checks of new backends and waits for a first verdict on each, so
// that none gets a request before it has shown that it is well; false: apply is done.
func (p *process) judge(ctx, apply context.Context, run func(func() error), added []*backend.Backend) bool {
	var watches []*watch
	for _, b := range added {
		w := p.addWatch(b)
		p.startWatch(ctx, run, w)
		watches = append(watches, w)
	}
	for _, w := range watches {
		select {
		case <-w.checker.WaitFirst():
		case <-apply.Done():
			return false
		}
	}
	p.learnProtocols(apply, added)
	return apply.Err() == nil
}

func names(list []*backend.Backend) []string {
	all := make([]string, 0, len(list))
	for _, b := range list {
		all = append(all, b.Name)
	}
	return all
}
