// Package backend holds what the balancer knows of its backends while it runs:
// state, load and the connections that have one of them for a home. A set of
// backends is immutable, and a reload puts another one in its place; what changes of
// a backend is atomic, so that picking takes no lock.
package backend

import (
	"slices"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/pick"
	"apiserver-lb/health"
)

// Backend is one kube-apiserver.
type Backend struct {
	// Static after construction.
	Name       string
	Address    string // host:port
	ServerName string // that its certificate must bear
	Zone       string // until Reconfigure; see Settings
	Weight     int    // at least 1; likewise

	settings   atomic.Pointer[Settings]
	state      atomic.Uint32 // a health.State
	since      atomic.Int64  // when that began, nanoseconds since the epoch; 0: it was never told
	rampFrom   atomic.Int64  // when slow start began, nanoseconds since the epoch; 0: no slow start
	short      atomic.Int64
	long       atomic.Int64
	homed      atomic.Int64
	lastAnswer atomic.Int64 // nanoseconds since the epoch
	drained    atomic.Int64 // since when an operator keeps it out, nanoseconds since the epoch; 0: none does
	http1      atomic.Bool
}

// Settings are what may change of a backend while it is in use.
type Settings struct {
	Zone   string
	Weight int // at least 1
}

// Settings returns the current ones.
func (b *Backend) Settings() Settings {
	if s := b.settings.Load(); s != nil {
		return *s
	}
	return Settings{Zone: b.Zone, Weight: b.Weight}
}

// Reconfigure changes the settings.
func (b *Backend) Reconfigure(s Settings) { b.settings.Store(&s) }

// SpeaksHTTP2 notes whether the backend agreed on HTTP/2 when it was last asked
// (a kube-apiserver with --disable-http2-serving does not), and reports whether that
// is news. It is taken to, until it is asked.
func (b *Backend) SpeaksHTTP2(yes bool) (news bool) { return b.http1.Swap(!yes) == yes }

// HTTP2 reports whether the backend speaks HTTP/2, as far as is known.
func (b *Backend) HTTP2() bool { return !b.http1.Load() }

// State returns the state that the health checks last gave it.
func (b *Backend) State() health.State { return health.State(b.state.Load()) }

// Failing returns for how long the backend has failed its checks without being dead; 0
// where it does not.
func (b *Backend) Failing(now time.Time) time.Duration {
	if b.State() != health.Draining {
		return 0
	}
	return max(0, now.Sub(time.Unix(0, b.since.Load())))
}

// Drain keeps new requests from the backend from the time given on, as long as another one
// is ready, whatever its health checks say. What runs there goes on.
func (b *Backend) Drain(now time.Time) { b.drained.CompareAndSwap(0, now.UnixNano()) }

// Undrain ends that. The backend starts slowly, as after an outage.
func (b *Backend) Undrain(now time.Time) {
	if b.drained.Swap(0) != 0 {
		b.rampFrom.Store(now.UnixNano())
	}
}

// Drained returns since when an operator keeps the backend out, the zero time where none
// does.
func (b *Backend) Drained() time.Time {
	n := b.drained.Load()
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// Standing is what health.Usable needs to know.
func (b *Backend) Standing() health.Standing {
	return health.Standing{State: b.State(), Drained: b.drained.Load() != 0}
}

// Ready reports whether the backend gets new requests: it is ready by its health checks,
// and nobody has drained it.
func (b *Backend) Ready() bool { return b.Standing().Takes() }

// SetState notes a change of state at the time given. A backend that becomes
// ready again after it was out starts slowly; one that becomes ready for the
// first time does not, since then all of them are new.
func (b *Backend) SetState(s health.State, now time.Time) {
	b.since.Store(now.UnixNano())
	before := health.State(b.state.Swap(uint32(s)))
	if s == health.Ready && (before == health.Dead || before == health.Draining) {
		b.rampFrom.Store(now.UnixNano())
	}
}

// Answered notes that the backend answered a request; LastAnswer tells when the
// last one was. The health checker asks before it takes a slow probe for a hang.
func (b *Backend) Answered(now time.Time) { b.lastAnswer.Store(now.UnixNano()) }

// LastAnswer returns the time of the last answer, the zero time where there was none.
func (b *Backend) LastAnswer() time.Time {
	n := b.lastAnswer.Load()
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// Load returns the requests in flight, short and long-running, and the client
// connections that have this backend for a home.
func (b *Backend) Load() (short, long, homed int64) {
	return b.short.Load(), b.long.Load(), b.homed.Load()
}

// rampFloor is the share of its weight with which a backend starts after it was
// out: enough to warm its caches, too little to hurt if it is not well yet.
const rampFloor = 0.1

// ramp returns the share of its weight that slow start gives the backend, from
// rampFloor to 1 over the duration given.
func (b *Backend) ramp(slowStart time.Duration, now time.Time) float64 {
	from := b.rampFrom.Load()
	if from == 0 || slowStart <= 0 {
		return 1
	}
	passed := now.Sub(time.Unix(0, from))
	if passed >= slowStart {
		b.rampFrom.CompareAndSwap(from, 0)
		return 1
	}
	return max(rampFloor, float64(passed)/float64(slowStart))
}

// Slot is one request's place in a backend's load, from the choice of the backend
// to the end of the response body.
type Slot struct {
	Backend *Backend
	long    bool
	given   atomic.Bool
}

// Acquire counts one request in. Its Slot must be released when the body has ended.
func (b *Backend) Acquire(long bool) *Slot {
	b.counter(long).Add(1)
	return &Slot{Backend: b, long: long}
}

// Release gives the place back; calls after the first do nothing.
func (s *Slot) Release() {
	if !s.given.Swap(true) {
		s.Backend.counter(s.long).Add(-1)
	}
}

func (b *Backend) counter(long bool) *atomic.Int64 {
	if long {
		return &b.long
	}
	return &b.short
}

// Home is a client connection's tie to a backend; the zero Home has none.
type Home struct{ at atomic.Pointer[Backend] }

// gone is where the home of a client connection points that has ended.
var gone = new(Backend)

// At returns the home, or nil.
func (h *Home) At() *Backend {
	if b := h.at.Load(); b != gone {
		return b
	}
	return nil
}

// Move makes b the home (nil: none). It yields to a concurrent move, and to Leave,
// and returns the home that stands now.
func (h *Home) Move(from, b *Backend) *Backend {
	if b != nil {
		b.homed.Add(1) // before it can be left again, so that no count is ever negative
	}
	if !h.at.CompareAndSwap(from, b) {
		if b != nil {
			b.homed.Add(-1)
		}
		return h.At()
	}
	if from != nil {
		from.homed.Add(-1)
	}
	return b
}

// Leave ends the tie for good when the client connection has ended. A request of
// it that is still looking for a backend makes no home any more: nobody would
// ever leave that.
func (h *Home) Leave() {
	if b := h.at.Swap(gone); b != nil && b != gone {
		b.homed.Add(-1)
	}
}

// Set is an immutable list of backends.
type Set struct {
	backends  []*Backend
	slowStart time.Duration
}

// Backends is the set that is in use. Whoever decides on a request takes it once, and
// sees the same backends throughout.
type Backends struct{ set atomic.Pointer[Set] }

// NewBackends returns Backends with a first set.
func NewBackends(s *Set) *Backends {
	b := new(Backends)
	b.set.Store(s)
	return b
}

// Set returns the set in use.
func (b *Backends) Set() *Set { return b.set.Load() }

// Replace puts another set in its place.
func (b *Backends) Replace(s *Set) { b.set.Store(s) }

// NewSet makes a set of the backends given, in which slow start takes the
// duration given (0: none).
func NewSet(slowStart time.Duration, backends ...*Backend) *Set {
	return &Set{backends: backends, slowStart: slowStart}
}

// All returns the backends in configured order. The slice must not be changed.
func (s *Set) All() []*Backend { return s.backends }

// View appends to cs what a policy needs to know of each backend, in the order of
// All. Those in tried are not usable, and of the others only the best there are by
// health.Usable: a request that all ready backends failed may still go to a
// draining one.
func (s *Set) View(cs []pick.Candidate, tried []*Backend, now time.Time) []pick.Candidate {
	var room [8]health.Standing
	var indexRoom [8]int
	standings, index := room[:0], indexRoom[:0]
	first := len(cs)
	for i, b := range s.backends {
		short, long, homed := b.Load()
		cs = append(cs, pick.Candidate{
			Weight: float64(b.Settings().Weight) * b.ramp(s.slowStart, now),
			Short:  short,
			Long:   long,
			Homed:  homed,
		})
		if !slices.Contains(tried, b) {
			standings, index = append(standings, b.Standing()), append(index, first+i)
		}
	}
	usable, _ := health.Usable(standings)
	for _, i := range usable {
		cs[index[i]].Usable = true
	}
	return cs
}

// Panicking reports whether no backend is ready although they have been judged,
// so that those that fail their checks are used all the same.
func (s *Set) Panicking() bool {
	standings := make([]health.Standing, len(s.backends))
	for i, b := range s.backends {
		standings[i] = b.Standing()
	}
	_, panicking := health.Usable(standings)
	return panicking
}

// HTTP2 reports whether all backends speak HTTP/2, as far as is known.
func (s *Set) HTTP2() bool {
	return !slices.ContainsFunc(s.backends, func(b *Backend) bool { return !b.HTTP2() })
}

// Index returns b's place in All, negative where it is not in the set.
func (s *Set) Index(b *Backend) int { return slices.Index(s.backends, b) }
