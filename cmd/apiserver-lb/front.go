package main

import (
	"context"
	"net"
	"runtime"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/forward"
	"apiserver-lb/balancer/passthrough"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/balancer/relay"
	"apiserver-lb/configs"
)

// front carries clients to backends, as the mode of the configuration has it. It may be
// used by several goroutines at once.
type front interface {
	// Serve accepts connections until Shutdown; it returns nil then.
	Serve(l net.Listener) error
	// Admitting returns since when what accepts connections is busy with one; zero: it waits.
	Admitting() time.Time
	// Run looks after connections until ctx is done.
	Run(ctx context.Context)
	// Shutdown drains within the grace period, and returns how many connections were cut
	// at its end, or when ctx was done.
	Shutdown(ctx context.Context, grace time.Duration) (cut int)
	// Close frees what is left after Shutdown.
	Close()

	// Learn finds out how a backend is to be spoken to.
	Learn(ctx context.Context, b *backend.Backend)
	// Cut ends what runs on a backend that is dead.
	Cut(b *backend.Backend)
	// EndWatches ends, until by, what can go on elsewhere of what runs on a backend that
	// gets no more. It is to be called from time to time.
	EndWatches(b *backend.Backend, by time.Time)
	// Unstall moves what waits for a backend.
	Unstall(b *backend.Backend)
	// Resettle takes note of another set of backends.
	Resettle()
	// Forget ends all that is left on a backend that is not in the set any more.
	Forget(b *backend.Backend)
	// SetServerNames changes which names clients may ask for where TLS does not end here.
	SetServerNames(list []string)
	// Retire makes connections to backends anew, with other certificates.
	Retire()
	// EndLapsed ends what runs under certificates of clients that do not count any more.
	EndLapsed()
	// CertificateUses tells of the certificates as whose users clients are connected.
	CertificateUses(add func(balancer.CertificateUse))
	// Relieve makes about so many bytes of memory free, by ending the connections of
	// clients for which most waits, and returns how many.
	Relieve(bytes int) int
	// Passed tells what has passed, by backend, where TLS does not end here.
	Passed() map[string]passthrough.Figures
}

// terminating ends the TLS of clients.
type terminating struct {
	pools  *forward.Pools // HTTP/1.1 and upgrades
	relay  *relay.Relay   // HTTP/2
	server *forward.Server
}

// newTerminating makes what mode: terminate needs; it starts nothing.
func (p *process) newTerminating(c *configs.Config) *terminating {
	name := "apiserver-lb on " + p.host
	opened := func(b *backend.Backend, cr balancer.Credential, delta int64) {
		p.metrics.BackendConnections(b.Name, cr, delta)
	}
	core := newCore(c, p.backends, p.store, &p.memory, p.memoryLimit)
	refusals := balancer.NewRefusalLog(p.log)
	core.Records = newRecords(&c.AccessLog, p.accessLog, newTraces(&c.OTLP, p.telemetry))
	p.rebalance = core.Rebalance
	t := &terminating{pools: forward.NewPools(p.store, dialer.DialContext, c.Backends.DialTimeout, opened)}
	t.relay = relay.New(relay.Options{
		Core:              core,
		Metrics:           p.metrics,
		Refusals:          refusals,
		Name:              name,
		MaxHeldBody:       int(c.Backends.MaxHeldBodyBytes),
		Passive:           p.passive,
		Log:               p.log,
		TLS:               p.store,
		Dial:              dialer.DialContext,
		DialTimeout:       c.Backends.DialTimeout,
		Opened:            opened,
		MaxHeaderBytes:    c.HTTP.MaxHeaderBytes,
		ReadHeaderTimeout: c.HTTP.ReadHeaderTimeout,
		IdleTimeout:       c.HTTP.IdleTimeout,
		StallTimeout:      c.HTTP.StallTimeout,
		PingAfter:         c.Backends.PingAfter,
		PingTimeout:       c.Backends.PingTimeout,
		Limits: relay.Limits{
			Streams:      c.HTTP2.MaxStreams,
			ResetBurst:   c.HTTP2.ResetBurst,
			ResetRate:    c.HTTP2.ResetRate,
			ControlBurst: c.HTTP2.ControlBurst,
			ControlRate:  c.HTTP2.ControlRate,
		},
		Shards: min(runtime.GOMAXPROCS(0), maxShards),
	})
	f := forward.New(forward.Options{
		Core:         core,
		Pools:        t.pools,
		Metrics:      p.metrics,
		Refusals:     refusals,
		Name:         name,
		MaxHeldBody:  int(c.Backends.MaxHeldBodyBytes),
		Passive:      p.passive,
		StallTimeout: c.HTTP.StallTimeout,
		Log:          p.log,
	})
	most := maxConnections(descriptors())
	t.server = forward.NewServer(f, forward.ServerOptions{
		TLS:               p.store.ListenerConfig(),
		HTTP2:             t.relay,
		ReadHeaderTimeout: c.HTTP.ReadHeaderTimeout,
		IdleTimeout:       c.HTTP.IdleTimeout,
		MaxHeaderBytes:    c.HTTP.MaxHeaderBytes,
		MaxStreams:        c.HTTP2.MaxStreams,
		MaxConnections:    most,
		Sources:           newSources(c, most, &p.memory, p.memoryLimit),
		ProxyProtocol:     c.ProxyProtocol.From,
	})
	return t
}

func (t *terminating) Serve(l net.Listener) error { return t.server.Serve(l) }
func (t *terminating) Admitting() time.Time       { return t.server.Admitting() }
func (t *terminating) Run(ctx context.Context)    { _ = t.relay.Run(ctx) } // it ends without an error
func (t *terminating) Shutdown(ctx context.Context, grace time.Duration) (cut int) {
	return t.server.Shutdown(ctx, grace)
}
func (t *terminating) Close() {
	t.pools.Close()
	t.relay.Close()
}

func (t *terminating) Learn(ctx context.Context, b *backend.Backend) { t.relay.Learn(ctx, b) }
func (t *terminating) Cut(b *backend.Backend) {
	t.pools.Cut(b)
	t.relay.Cut(b)
}
func (t *terminating) EndWatches(b *backend.Backend, by time.Time) {
	t.relay.EndWatches(b, by)
	t.server.EndWatches(b, by)
}
func (t *terminating) Unstall(b *backend.Backend) {
	t.relay.Unstall(b)
	t.server.Unstall(b)
}
func (t *terminating) SetServerNames([]string) {}
func (t *terminating) Resettle()               { t.relay.Resettle() }
func (t *terminating) Forget(b *backend.Backend) {
	t.pools.Forget(b)
	t.relay.Forget(b)
}
func (t *terminating) Retire() {
	t.pools.Retire()
	t.relay.Retire()
}
func (t *terminating) EndLapsed() {
	t.relay.EndLapsed()
	t.server.EndLapsed()
}
func (t *terminating) CertificateUses(add func(balancer.CertificateUse)) {
	t.relay.CertificateUses(add)
	t.server.CertificateUses(add)
}
func (t *terminating) Relieve(bytes int) int                  { return t.relay.Relieve(bytes) }
func (t *terminating) Passed() map[string]passthrough.Figures { return nil }

// passing leaves TLS to clients and backends. Of them it sees connections only.
type passing struct{ *passthrough.Server }

// maxPipes is how many pipes there are at most for bytes that are on their way: what an
// unprivileged user may have of the usual size (pipe-user-pages-soft, pipe(7)), and half
// of that for others of the same user.
const maxPipes = 512

// newPassing makes what mode: passthrough needs; it starts nothing.
func (p *process) newPassing(c *configs.Config) (*passing, error) {
	most := maxConnections(descriptors())
	pipes := min(maxPipes, most/8)
	most -= 2 * pipes
	s, err := passthrough.New(passthrough.Options{
		Core: &balancer.Core{
			Backends: p.backends,
			Policy:   balancer.Policy(c.Backends.Policy),
			Bound:    pick.Bound{Factor: c.Backends.Affinity.Bound, Floor: int64(c.Backends.Affinity.Floor)},
			Memory:   &p.memory,
		},
		Metrics:          p.metrics,
		Log:              p.log,
		Dial:             dialer.DialContext,
		DialTimeout:      c.Backends.DialTimeout,
		HandshakeTimeout: c.HTTP.ReadHeaderTimeout,
		Passive:          p.passive,
		ServerNames:      c.Passthrough.ServerNames,
		MaxAge:           c.Passthrough.MaxConnectionAge,
		SendProxy:        c.Passthrough.SendProxyProtocol,
		Sources:          newSources(c, most/2, &p.memory, p.memoryLimit),
		ProxyProtocol:    c.ProxyProtocol.From,
		MaxConnections:   most,
		MaxPipes:         pipes,
	}, p.telemetry.meter)
	return &passing{s}, err
}

func (p *passing) Shutdown(ctx context.Context, grace time.Duration) (cut int) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	return p.Server.Shutdown(ctx, forward.Spread(grace))
}

func (p *passing) EndWatches(b *backend.Backend, by time.Time) { p.EndConnections(b, by) }
func (p *passing) Forget(b *backend.Backend)                   { p.EndConnections(b, time.Now()) }
func (p *passing) Passed() map[string]passthrough.Figures      { return p.Figures() }

// What is about requests, or about certificates, is between clients and backends.

func (p *passing) Learn(context.Context, *backend.Backend)       {}
func (p *passing) Unstall(*backend.Backend)                      {}
func (p *passing) Resettle()                                     {}
func (p *passing) Retire()                                       {}
func (p *passing) EndLapsed()                                    {}
func (p *passing) CertificateUses(func(balancer.CertificateUse)) {}
func (p *passing) Relieve(int) int                               { return 0 } // nothing waits here but in the kernel
