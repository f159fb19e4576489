package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/discover"
	"apiserver-lb/configs"
	"apiserver-lb/tlsconf"
)

// originStatic is the origin of backends that the configuration lists; those of others are
// discover's.
const originStatic = "static"

// newDiscovery makes what looks for backends, of which those in use are asked for
// EndpointSlices; nil: nothing is to be looked for.
func newDiscovery(c *configs.Config, store *tlsconf.Store, inUse func() []*backend.Backend, observer discover.Observer, log *slog.Logger) (*discover.Discovery, error) {
	d := c.Backends.Discovery
	if !d.Configured() {
		return nil, nil
	}
	o := discover.Options{Interval: d.DNSInterval, AllowLoopback: d.AllowLoopback, RemoveAfter: d.RemoveAfter, CacheFile: d.CacheFile, Observer: observer, Log: log}
	for _, n := range d.DNS {
		if n.SRV != "" {
			o.Names = append(o.Names, discover.Name{Host: n.SRV, SRV: true, ServerName: n.ServerName})
			continue
		}
		host, port, err := net.SplitHostPort(n.Address)
		if err != nil {
			return nil, err
		}
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, err
		}
		o.Names = append(o.Names, discover.Name{Host: host, Port: uint16(number), ServerName: n.ServerName})
	}
	if d.EndpointSlices.Enabled {
		o.EndpointSlices = newEndpointSlices(d.EndpointSlices, store, inUse)
	}
	return discover.New(o), nil
}

func newEndpointSlices(c configs.EndpointSlices, store *tlsconf.Store, inUse func() []*backend.Backend) *discover.EndpointSlices {
	e := &discover.EndpointSlices{
		Targets:    func() []discover.Target { return targets(inUse()) },
		TLS:        func(serverName string) (*tls.Config, error) { return store.BackendConfig(serverName, false), nil },
		Dial:       dialer.DialContext,
		ServerName: c.ServerName,
	}
	if c.TokenFile != "" {
		e.Header = func() (http.Header, error) {
			return tokenHeader("backends.discovery.endpointSlices.tokenFile", c.TokenFile)
		}
		return e
	}
	e.TLS = func(serverName string) (*tls.Config, error) {
		pair, err := readKeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("backends.discovery.endpointSlices: %w", err)
		}
		config := store.BackendConfig(serverName, false)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
		return config, nil
	}
	return e
}

func readKeyPair(certFile, keyFile string) (*tls.Certificate, error) {
	key, err := tlsconf.ReadSecret(keyFile)
	if err != nil {
		return nil, err
	}
	cert, err := os.ReadFile(certFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", certFile, keyFile, err)
	}
	return &pair, nil
}

// targets are the backends that may be asked for EndpointSlices: those that are ready, or
// all where none is.
func targets(all []*backend.Backend) []discover.Target {
	ready := slices.DeleteFunc(slices.Clone(all), func(b *backend.Backend) bool { return !b.Ready() })
	if len(ready) > 0 {
		all = ready
	}
	var list []discover.Target
	for _, b := range all {
		list = append(list, discover.Target{Address: b.Address, ServerName: b.ServerName})
	}
	return list
}

// knownTimeout bounds how long a start waits for names when no backend is known.
const knownTimeout = 10 * time.Second

// firstFound returns what is known before discovery runs, and so what to begin with; nil
// where d is.
func firstFound(d *discover.Discovery, servers []configs.Server) ([]discover.Found, error) {
	if d == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), knownTimeout)
	defer cancel()
	offers, err := d.First(ctx, len(servers) == 0)
	if err != nil || len(servers)+len(offers) == 0 {
		return nil, fmt.Errorf("backends.discovery: no backend is known, since no name has an address, and backends.servers is empty: %w", err)
	}
	return offers, nil
}

// together are the servers of the configuration and those that were found.
func together(servers []configs.Server, found []discover.Found) []configs.Server {
	all := slices.Clone(servers)
	for _, f := range found {
		all = append(all, configs.Server{Address: f.Address.String(), Name: f.Name, ServerName: f.ServerName, Weight: configs.DefaultWeight})
	}
	return all
}

// merge returns what is used of the offers beside the servers.
func merge(servers []configs.Server, before, offers []discover.Found) []discover.Found {
	var static []netip.AddrPort
	for _, s := range servers {
		if a, err := netip.ParseAddrPort(s.Address); err == nil { // others are names
			static = append(static, a)
		}
	}
	return discover.Merge(static, before, offers)
}

// found are the backends that have been found.
type found struct {
	mu     sync.Mutex                // held while a list of backends is applied, by a reload or by discovery
	offers []discover.Found          // guarded by mu: all that there were last
	inUse  []discover.Found          // guarded by mu: those of them that are used
	origin map[string]string         // guarded by originMu: by name, of those in use
	own    func(netip.AddrPort) bool // whether it is the balancer's; static once it runs

	originMu sync.Mutex
}

// use notes what is used. Its caller holds mu.
func (f *found) use(list []discover.Found) {
	f.inUse = list
	origin := make(map[string]string, len(list))
	for _, b := range list {
		origin[b.Name] = b.Origin
	}
	f.originMu.Lock()
	f.origin = origin
	f.originMu.Unlock()
}

// originOf tells how a backend came to be one.
func (f *found) originOf(name string) string {
	f.originMu.Lock()
	defer f.originMu.Unlock()
	if o, ok := f.origin[name]; ok {
		return o
	}
	return originStatic
}

// findBackends makes the first set of backends, and what looks for more.
func (p *process) findBackends(c *configs.Config) error {
	observer, err := newDiscoveryMetrics(p.telemetry.meter)
	if err != nil {
		return err
	}
	inUse := func() []*backend.Backend { return p.backends.Set().All() } // once it runs
	if p.discovery, err = newDiscovery(c, p.store, inUse, observer, p.log); err != nil {
		return err
	}
	offers, err := firstFound(p.discovery, c.Backends.Servers)
	if err != nil {
		return err
	}
	if p.discovery != nil {
		observer.begin(p.discovery.Sources(), p.begun)
	}
	list := merge(c.Backends.Servers, nil, offers)
	p.found.offers = offers
	p.found.use(list)
	p.backends = newBackends(c, list...)
	return nil
}

// discover looks for backends until ctx is done. The checks of those it finds end with
// checks.
func (p *process) discover(ctx, checks context.Context, run func(func() error)) error {
	return p.discovery.Run(ctx, func(ctx context.Context, offers []discover.Found) bool {
		p.found.mu.Lock()
		defer p.found.mu.Unlock()
		// A name that leads to the balancer would send requests round in circles.
		offers = slices.DeleteFunc(slices.Clone(offers), func(f discover.Found) bool { return p.found.own(f.Address) })
		servers := p.config.Backends.Servers
		list := merge(servers, p.found.inUse, offers)
		if !p.replaceBackends(checks, ctx, run, byDiscovery, together(servers, list), p.config.Shutdown.GracePeriod) {
			return false
		}
		p.found.offers = offers
		p.found.use(list)
		return true
	})
}

// ownAddress tells the addresses at which the balancer itself listens.
func ownAddress(listen net.Addr) func(netip.AddrPort) bool {
	l, ok := listen.(*net.TCPAddr)
	if !ok {
		return func(netip.AddrPort) bool { return false }
	}
	at := l.AddrPort()
	return func(a netip.AddrPort) bool {
		if a.Port() != at.Port() {
			return false
		}
		if ip := at.Addr().Unmap(); ip.IsValid() && !ip.IsUnspecified() {
			return a.Addr() == ip
		}
		addresses, err := net.InterfaceAddrs()
		if err != nil {
			return false
		}
		return slices.ContainsFunc(addresses, func(local net.Addr) bool {
			n, ok := local.(*net.IPNet)
			if !ok {
				return false
			}
			ip, ok := netip.AddrFromSlice(n.IP)
			return ok && ip.Unmap() == a.Addr()
		})
	}
}

// discoveryMetrics counts what discovery finds; a discover.Observer.
type discoveryMetrics struct {
	failures metric.Int64Counter

	mu   sync.Mutex
	last map[string]discovered // guarded by mu; by source
}

// discovered is the last answer of a source.
type discovered struct {
	backends int
	at       time.Time
}

func newDiscoveryMetrics(m metric.Meter) (*discoveryMetrics, error) {
	d := &discoveryMetrics{last: map[string]discovered{}}
	var err error
	if d.failures, err = m.Int64Counter("apiserver_lb.discovery.failures",
		metric.WithDescription("Answers of a source of backends that could not be had or used, by source and reason.")); err != nil {
		return nil, err
	}
	backends, err := m.Int64ObservableGauge("apiserver_lb.discovery.backends",
		metric.WithDescription("Backends in the last good answer of a source."))
	if err != nil {
		return nil, err
	}
	success, err := m.Int64ObservableGauge("apiserver_lb.discovery.last_success.timestamp", metric.WithUnit("s"),
		metric.WithDescription("When a source gave its last good answer, in seconds since the epoch; the start of the process before the first."))
	if err != nil {
		return nil, err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		for source, l := range d.last {
			by := metric.WithAttributes(attribute.String("source", source))
			o.ObserveInt64(backends, int64(l.backends), by)
			o.ObserveInt64(success, l.at.Unix(), by)
		}
		return nil
	}, backends, success)
	return d, err
}

// begin has the sources counted from the start of the process on.
func (d *discoveryMetrics) begin(sources []string, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range sources {
		if _, ok := d.last[s]; !ok {
			d.last[s] = discovered{at: at}
		}
	}
}

// Answered notes a good answer.
func (d *discoveryMetrics) Answered(source string, backends int, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last[source] = discovered{backends, at}
}

// Failed counts an answer that is not good.
func (d *discoveryMetrics) Failed(source, reason string) {
	d.failures.Add(context.Background(), 1, metric.WithAttributes(attribute.String("source", source), attribute.String("reason", reason)))
}
