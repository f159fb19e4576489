package main

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/forward"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/configs"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

// TCP liveness of both legs: a peer that has vanished is noticed after about 15 s,
// whether the connection is idle (keepalive) or has data unacknowledged
// (TCP_USER_TIMEOUT, which tunnels and clients of HTTP/1.1 go without).
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 9 * time.Second, Interval: 2 * time.Second, Count: 3}

const userTimeout = 15 * time.Second

// dialer dials backends, for requests and for probes.
var dialer = &net.Dialer{KeepAliveConfig: keepAlive, Control: control}

// control sets TCP_USER_TIMEOUT; sockets that a listener accepts inherit it.
func control(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	}); cerr != nil {
		return cerr
	}
	return err
}

// openStore loads all certificates and refuses a front proxy that is a user.
func openStore(c *configs.Config, log *slog.Logger) (*tlsconf.Store, error) {
	files := tlsconf.Files{
		ClientCA:   c.TLS.ClientCAFile,
		ClientCRL:  c.TLS.ClientCRLFile,
		ClientDeny: c.TLS.ClientDenyFile,
		BackendCA:  c.Backends.CAFile,
		MinVersion: tls.VersionTLS12,

		AllowSharedCA: c.FrontProxy.AllowSharedCA,
	}
	if c.TLS.MinVersion == configs.TLS13 {
		files.MinVersion = tls.VersionTLS13
	}
	if c.Mode == configs.ModePassthrough {
		files.NoListener = true
	} else {
		files.Serving = []tlsconf.KeyPairFiles{{Cert: c.TLS.CertFile, Key: c.TLS.KeyFile}}
	}
	for _, p := range c.TLS.Certificates {
		files.Serving = append(files.Serving, tlsconf.KeyPairFiles{Cert: p.CertFile, Key: p.KeyFile})
	}
	if c.FrontProxy.Configured() {
		files.FrontProxy = &tlsconf.KeyPairFiles{Cert: c.FrontProxy.CertFile, Key: c.FrontProxy.KeyFile}
	}
	if c.Health.CertFile != "" {
		files.Probe = &tlsconf.KeyPairFiles{Cert: c.Health.CertFile, Key: c.Health.KeyFile}
	}
	store, err := tlsconf.Open(files, time.Now, log)
	if err != nil {
		return nil, &usageError{err}
	}
	return store, nil
}

// answersHeld bounds, in bytes, the answers that are held until they are whole, all
// together. Most are a few KB: this is enough for thousands at once, and what finds
// no room is streamed.
const answersHeld = 4 << 20

// bodiesKept bounds the request bodies of all clients that are kept to be sent again, in
// bytes. One connection has at most half of what is left (balancer.Share). Where there is
// no room, a request is sent once.
const bodiesKept = 64 << 20

// certificatesHeld bounds, in bytes, what the certificates that clients have shown take of
// memory beyond what is usual. One source has half of it at most: that is enough for 500
// connections with certificates that name 500 groups.
const certificatesHeld = 64 << 20

// heldShare is the share of a memory limit that any of these takes at most: a backend
// that is stuck, or clients that show what they like, must not make memory short.
const heldShare = 8

// holds returns a bound, in bytes, as a memory limit allows it; 0: there is none.
func holds(bound, limit uint64) int64 {
	if limit > 0 {
		bound = min(bound, limit/heldShare)
	}
	return int64(bound)
}

// newAuditID returns an audit ID as kube-apiserver makes them, a UUID of version 4
// (k8s.io/apiserver/pkg/audit/context.go). It is no secret: that of the runtime's
// generator does.
func newAuditID() string {
	var u uuid.UUID
	binary.LittleEndian.PutUint64(u[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(u[8:], rand.Uint64())
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u.String()
}

// newCore makes what decides. memoryLimit is in bytes; 0: there is none.
func newCore(c *configs.Config, backends *backend.Backends, store *tlsconf.Store, memory *balancer.Memory, memoryLimit uint64) *balancer.Core {
	return &balancer.Core{
		Backends:   backends,
		Verifier:   store,
		FrontProxy: func(now time.Time) balancer.FrontProxy { return frontProxy(store, now) },
		Headers:    identityHeaders(c),
		Trusted:    c.TrustedProxies,
		Guards:     guards(&c.Guards),
		Limits:     requestLimits(&c.RequestLimits),
		Policy:     balancer.Policy(c.Backends.Policy),
		Bound:      pick.Bound{Factor: c.Backends.Affinity.Bound, Floor: int64(c.Backends.Affinity.Floor)},
		Budget:     balancer.NewBudget(c.Backends.RetryBudget),
		Strangers:  balancer.NewBudget(c.Backends.RetryBudget),
		Tokens:     balancer.NewTokens(65536, 5*time.Minute),
		Rebalance:  balancer.NewRebalance(c.Backends.SlowStart),
		Answers:    balancer.NewRoom(holds(answersHeld, memoryLimit), memory),
		Bodies:     balancer.NewRoom(holds(bodiesKept, memoryLimit), memory),
		Memory:     memory,
		NewAuditID: newAuditID,
	}
}

func guards(c *configs.Guards) *balancer.Guards {
	var sources []balancer.SourceGuard
	for _, s := range c.Sources {
		sources = append(sources, balancer.SourceGuard{Users: s.Users, Groups: s.Groups, From: s.From})
	}
	return balancer.NewGuards(sources, c.Anonymous.Refuse, c.Anonymous.Paths)
}

func requestLimits(c *configs.RequestLimits) *balancer.Limits {
	var overrides []balancer.LimitOverride
	for _, o := range c.Overrides {
		overrides = append(overrides, balancer.LimitOverride{Users: o.Users, Groups: o.Groups, Sources: o.Sources,
			Limit: balancer.Limit{InFlight: o.InFlight, LongRunning: o.LongRunning, Rate: o.Rate, Burst: o.Burst}})
	}
	return balancer.NewLimits(balancer.Limit{InFlight: c.InFlight, LongRunning: c.LongRunning, Rate: c.Rate, Burst: c.Burst}, overrides)
}

// newSources makes the table of sources, where there may be at most so many connections.
// memoryLimit is in bytes; 0: there is none.
func newSources(c *configs.Config, most int, memory *balancer.Memory, memoryLimit uint64) *balancer.Sources {
	l := c.SourceLimits
	limits := balancer.SourceLimits{
		Connections: l.Connections, Unfinished: l.Unfinished, Most: most, Exempt: l.Exempt,
		Certificates: balancer.NewRoom(holds(certificatesHeld, memoryLimit), memory),
	}
	limits.Abuse[balancer.AbuseResets] = balancer.Refill{Burst: float64(l.ResetBurst), Rate: float64(l.ResetRate)}
	limits.Abuse[balancer.AbuseControl] = balancer.Refill{Burst: float64(l.ControlBurst), Rate: float64(l.ControlRate)}
	return balancer.NewSources(limits)
}

// frontProxyMargin is how long before its certificate expires the front proxy is given
// up, so that no request is still on its way to a backend that would not accept it.
const frontProxyMargin = 100 * time.Millisecond

// frontProxy says whether the front-proxy certificate is good for anything at the time.
func frontProxy(store *tlsconf.Store, now time.Time) balancer.FrontProxy {
	switch {
	case !store.FrontProxyConfigured():
		return balancer.FrontProxyNone
	case now.Add(frontProxyMargin).After(store.FrontProxyNotAfter()):
		return balancer.FrontProxyExpired
	}
	return balancer.FrontProxyValid
}

func identityHeaders(c *configs.Config) *balancer.IdentityHeaders {
	f := c.FrontProxy
	return balancer.NewIdentityHeaders(f.UserHeaders, f.GroupHeaders, f.UIDHeaders, f.ExtraHeaderPrefixes)
}

// newProber makes the prober of a backend. Its credential is the one configured,
// else the front proxy's assertion of health.user, so that a backend which does
// not trust the front proxy is not ready either; else it has none.
func newProber(c *configs.Config, store *tlsconf.Store, b *backend.Backend, dial forward.Dial) *health.Prober {
	t := health.Target{Address: b.Address, Dial: dial, TLS: func() *tls.Config { return store.ProbeConfig(b.ServerName) }}
	switch {
	case c.Health.TokenFile != "":
		t.Header = func() (http.Header, error) { return tokenHeader("health.tokenFile", c.Health.TokenFile) }
	case c.Health.CertFile != "":
	case store.FrontProxyConfigured():
		// An expired certificate of ours says nothing of the backend: then as anonymous.
		// That begins in time for a probe not to be overtaken by the end.
		valid := func() bool { return frontProxy(store, time.Now().Add(c.Health.Timeout)) == balancer.FrontProxyValid }
		t.TLS = func() *tls.Config {
			if !valid() {
				return store.ProbeConfig(b.ServerName)
			}
			return store.BackendConfig(b.ServerName, true)
		}
		asserted := http.Header{}
		for _, f := range identityHeaders(c).Assert(&tlsconf.Identity{User: c.Health.User}) {
			asserted.Add(f.Name, f.Value)
		}
		var prober *health.Prober
		var anonymous atomic.Bool
		t.Header = func() (http.Header, error) {
			if valid() {
				anonymous.Store(false)
				return asserted, nil
			}
			if !anonymous.Swap(true) {
				// The kept connection bears the certificate, for which
				// kube-apiserver would answer 401. A renewal redials by itself.
				prober.Redial()
			}
			return nil, nil
		}
		prober = health.NewProber(t)
		return prober
	}
	return health.NewProber(t)
}

// tokenHeader reads the token anew each time, since it may be rotated.
func tokenHeader(key, file string) (http.Header, error) {
	b, err := tlsconf.ReadSecret(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; keep the token in a regular file that only this process can read (chmod 600)", key, err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return nil, fmt.Errorf("%s: %q is empty", key, file)
	}
	return http.Header{"Authorization": {"Bearer " + token}}, nil
}

// rules are those of the health checks.
func rules(c *configs.Config) health.Rules {
	return health.Rules{Rise: c.Health.Rise, Fall: c.Health.Fall, Interval: c.Health.Interval, SuspiciousInterval: c.Health.SuspiciousInterval}
}

// warnAtStart says what an operator should know of the configuration.
func warnAtStart(c *configs.Config, store *tlsconf.Store, log *slog.Logger) {
	switch {
	case c.Mode == configs.ModePassthrough:
	case c.TLS.ClientCAFile == "":
		log.Warn("client certificates are not asked for, because tls.clientCAFile is not set; clients need bearer tokens")
	case !store.FrontProxyConfigured():
		log.Warn("client certificates cannot be passed on, because frontProxy.certFile and frontProxy.keyFile are not set; requests with one are answered 401, clients need bearer tokens")
	}
	if store.FrontProxySharesClientCA() {
		log.Warn("the front-proxy certificate verifies against tls.clientCAFile, allowed by frontProxy.allowSharedCA: a request that reached a backend without identity headers would act as the front proxy")
	}
}

// expiresSoon is how long before its end a certificate is worth a warning.
const expiresSoon = 14 * 24 * time.Hour

// warnExpiries names the certificates, CAs and CRLs that have expired or will soon.
func warnExpiries(all []tlsconf.Expiry, now time.Time, log *slog.Logger) {
	for _, e := range all {
		attrs := []any{"use", e.Use, "file", e.File, "subject", e.Subject, "notAfter", e.NotAfter}
		switch left := e.NotAfter.Sub(now); {
		case left <= 0:
			log.Error("expired: renew it", attrs...)
		case left < expiresSoon:
			log.Warn("expires soon: renew it", append(attrs, "left", left.Round(time.Minute))...)
		}
	}
}

// maxConnections returns how many clients a process with a number of file descriptors
// may have at once, so that some are left for backends, probes and files. Without,
// those who connect to the balancer could make every backend look dead.
func maxConnections(descriptors uint64) int {
	reserve := min(max(64, descriptors/10), descriptors/2)
	return int(min(descriptors-reserve, math.MaxInt32))
}

// descriptors returns how many the process may have open.
func descriptors() uint64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return math.MaxInt32
	}
	return l.Cur
}
