package discover

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"
)

// Resolver looks DNS names up; a *net.Resolver does.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
}

// Name is a DNS name that stands for backends.
type Name struct {
	// Host is looked up for its addresses, which have this Port; with SRV for SRV records
	// (RFC 2782), of which each has a port of its own. Priorities and weights do not count.
	Host string
	Port uint16
	SRV  bool
	// ServerName is what the certificates of the backends must bear. What DNS says has no
	// part in it: nobody vouches for that.
	ServerName string
}

// lookupTimeout bounds all look-ups for one answer.
const lookupTimeout = 5 * time.Second

type dnsSource struct {
	name     Name
	resolver Resolver
	interval time.Duration
	jitter   func() float64 // 0 to 1
	loopback bool
}

// run gives an answer now and then one in each interval, give or take a tenth of it,
// until ctx is done.
func (s *dnsSource) run(ctx context.Context, tell tell) {
	for {
		if addresses, err := s.lookup(ctx); ctx.Err() == nil {
			tell(ctx, addresses, err)
		}
		if !sleep(ctx, time.Duration(float64(s.interval)*(0.9+0.2*s.jitter()))) {
			return
		}
	}
}

func (s *dnsSource) lookup(ctx context.Context) ([]netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	targets := []net.SRV{{Target: s.name.Host, Port: s.name.Port}}
	if s.name.SRV {
		_, records, err := s.resolver.LookupSRV(ctx, "", "", s.name.Host)
		if err != nil {
			return nil, lookupFailure(err)
		}
		if len(records) > MaxBackends {
			return nil, fail(ReasonTooMany, "%d SRV records, and at most %d count", len(records), MaxBackends)
		}
		targets = nil
		for _, r := range records {
			if r.Target != "." { // decidedly not available
				// No search list (resolv.conf(5)) applies to what a record holds.
				targets = append(targets, net.SRV{Target: strings.TrimSuffix(r.Target, ".") + ".", Port: r.Port})
			}
		}
	}
	var all []netip.AddrPort
	for _, t := range targets {
		ips, err := s.resolver.LookupNetIP(ctx, "ip", t.Target)
		if err != nil {
			// A part of the answer would look as if the others were gone.
			return nil, lookupFailure(err)
		}
		for _, ip := range ips {
			all = append(all, netip.AddrPortFrom(ip, t.Port))
		}
	}
	return sift(all, s.loopback)
}

// lookupFailure tells a name that is not there from a resolver that is not.
func lookupFailure(err error) *Failure {
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound {
		return &Failure{ReasonEmpty, err}
	}
	return &Failure{ReasonResolve, err}
}

// sleep waits; false: ctx is done.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
