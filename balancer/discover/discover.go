// Package discover finds kube-apiservers: by DNS names that resolve again from time to
// time, and by the EndpointSlices of the Service default/kubernetes, listed and watched.
//
// What a source says is an answer: a list of addresses. Pure code turns answers into the
// list of backends ([Merge] and the ledger of each source); the sources and [Discovery.Run]
// do what has to wait. A source that fails, or that names nobody, changes nothing: what it
// said last counts on, across restarts if there is a cache file.
package discover

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// MaxBackends bounds the backends that are found, those of each answer and all together.
// Clusters have three to seven kube-apiservers; nobody should make us probe thousands.
const MaxBackends = 64

// The values of [Found.Origin].
const (
	OriginDNS            = "dns"
	OriginEndpointSlices = "endpointslices"
)

// Found is a kube-apiserver that a source has named.
type Found struct {
	Name       string // unique, and the same for as long as any source names the address
	Address    netip.AddrPort
	ServerName string // that its certificate must bear
	Origin     string // OriginDNS or OriginEndpointSlices
}

// Merge returns the backends to be used beside the static ones: those that are offered,
// without the static addresses, each address once, at most [MaxBackends]. One that was
// used before stays what it was, whoever offers it now, so that it keeps its name and its
// connections; of new ones the first offer counts.
func Merge(static []netip.AddrPort, before, offers []Found) []Found {
	offered := make(map[netip.AddrPort]bool, len(offers))
	for _, f := range offers {
		offered[f.Address] = true
	}
	for _, a := range static {
		delete(offered, a)
	}
	var merged []Found
	for _, f := range slices.Concat(before, offers) {
		if offered[f.Address] && len(merged) < MaxBackends {
			merged = append(merged, f)
			delete(offered, f.Address)
		}
	}
	return merged
}

// entry is an address that a source has named.
type entry struct {
	address netip.AddrPort
	missing time.Time // since when answers have been without it; zero: the last one had it
}

// ledger is what a source has named, by address. It is immutable.
type ledger []entry

// newLedger makes the ledger of a source that has named just these.
func newLedger(addresses []netip.AddrPort) ledger { return ledger(nil).answer(addresses, time.Time{}) }

// answer returns the ledger after an answer that is not empty. What the answer lacks is
// kept as missing: some servers name a part of their addresses, another each time. What
// has been missing longest makes room.
func (l ledger) answer(addresses []netip.AddrPort, now time.Time) ledger {
	var next ledger
	for _, a := range addresses {
		next = append(next, entry{address: a})
	}
	var gone ledger
	for _, e := range l {
		if slices.Contains(addresses, e.address) {
			continue
		}
		if e.missing.IsZero() {
			e.missing = now
		}
		gone = append(gone, e)
	}
	slices.SortStableFunc(gone, func(a, b entry) int { return b.missing.Compare(a.missing) })
	next = append(next, gone[:min(len(gone), max(0, MaxBackends-len(next)))]...)
	slices.SortFunc(next, func(a, b entry) int { return a.address.Compare(b.address) })
	return next
}

// expire returns the ledger without what has been missing for as long as given.
func (l ledger) expire(now time.Time, after time.Duration) ledger {
	var next ledger
	for _, e := range l {
		if e.missing.IsZero() || now.Sub(e.missing) < after {
			next = append(next, e)
		}
	}
	return next
}

// due returns when expire will have something to do; zero: not before the next answer.
func (l ledger) due(after time.Duration) time.Time {
	var first time.Time
	for _, e := range l {
		if at := e.missing.Add(after); !e.missing.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// named returns the addresses that the last answer had.
func (l ledger) named() []netip.AddrPort {
	var all []netip.AddrPort
	for _, e := range l {
		if e.missing.IsZero() {
			all = append(all, e.address)
		}
	}
	return all
}

// The reasons of a [Failure].
const (
	ReasonResolve = "resolve"  // a name did not resolve
	ReasonConnect = "connect"  // no backend could be asked
	ReasonRefused = "refused"  // the credential is not good for it: 401 or 403
	ReasonAnswer  = "answer"   // the answer makes no sense, or is too large
	ReasonEmpty   = "empty"    // it names no address that can be used
	ReasonTooMany = "too-many" // it names more than MaxBackends
)

// Failure is why a source has no answer.
type Failure struct {
	Reason string
	Err    error
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

func fail(reason, format string, args ...any) *Failure {
	return &Failure{reason, fmt.Errorf(format, args...)}
}

// sift returns the addresses of an answer that can be those of backends, sorted and each
// once. The others are those that Kubernetes forbids in EndpointSlices as well
// (ValidateEndpointIP in k8s.io/kubernetes/pkg/apis/core/validation/validation.go):
// unspecified, loopback, link-local and multicast; loopback counts where loopback is true.
// Without any, or with too many, there is no answer.
func sift(addresses []netip.AddrPort, loopback bool) ([]netip.AddrPort, error) {
	var good []netip.AddrPort
	var bad netip.AddrPort
	for _, a := range addresses {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if usable(a, loopback) {
			good = append(good, a)
		} else {
			bad = a
		}
	}
	slices.SortFunc(good, netip.AddrPort.Compare)
	good = slices.Compact(good)
	switch {
	case len(good) > MaxBackends:
		return nil, fail(ReasonTooMany, "%d addresses, and at most %d count", len(good), MaxBackends)
	case len(good) > 0:
		return good, nil
	case len(addresses) > 0 && bad.Addr().IsLoopback():
		return nil, fail(ReasonEmpty, "no address but loopback ones such as %s: set backends.discovery.allowLoopback if they are meant", bad)
	case len(addresses) > 0:
		return nil, fail(ReasonEmpty, "no address that a backend can have, but such as %s", bad)
	}
	return nil, fail(ReasonEmpty, "no address")
}

func usable(a netip.AddrPort, loopback bool) bool {
	ip := a.Addr()
	return ip.IsValid() && ip.Zone() == "" && a.Port() != 0 && !ip.IsUnspecified() && !ip.IsMulticast() &&
		!ip.IsLinkLocalUnicast() && (loopback || !ip.IsLoopback())
}
