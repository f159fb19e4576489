package main

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// What the history keeps.
const (
	sampleEvery = 15 * time.Second
	historyOf   = time.Hour
	minuteOf    = time.Minute
	maxChanges  = 100
	maxUses     = 50 // client certificates that are told
)

// history is what has been lately, for the status.
type history struct {
	mu sync.Mutex
	// Guarded by mu.
	totals  []sample                   // of the last minute, the oldest first
	points  map[string]*backendHistory // by backend
	until   time.Time                  // of the last point
	worst   map[string]health.State    // since the last point, by backend; absent: it has not changed
	changes []stateChange              // the latest last
	uses    []clientCertificate
	more    int       // that are not in uses
	counted time.Time // when these two were found; zero: nobody has asked
}

// sample is what the process had done at a time.
type sample struct {
	balancer.Totals
	at time.Time
}

// backendHistory is the last hour of a backend, a point for each sampleEvery, the latest
// last.
type backendHistory struct {
	Rate   []float64 `json:"rate"`   // short requests per second
	P99    []float64 `json:"p99"`    // of them, in seconds; 0 without any
	Failed []int64   `json:"failed"` // requests that ended with 5xx
	// States has a letter for each point: the worst state within it. r ready, o ready and
	// drained, d draining, x dead, u unknown.
	States string `json:"states"`
}

// historyState is the history of all backends.
type historyState struct {
	Until        time.Time                  `json:"until"` // of the last point
	EverySeconds float64                    `json:"everySeconds"`
	Points       int                        `json:"points"` // of a whole hour
	Backends     map[string]*backendHistory `json:"backends"`
}

func newHistory() *history {
	return &history{points: map[string]*backendHistory{}, worst: map[string]health.State{}}
}

// changed notes a change of a backend's state.
func (h *history) changed(name string, ch health.Change) {
	c := stateChange{At: ch.At, Backend: name, From: ch.From.String(), To: ch.To.String(), Verdict: ch.Verdict.String(), Failed: ch.Failed}
	if ch.Err != nil {
		c.Error = ch.Err.Error()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.changes) == maxChanges {
		h.changes = slices.Delete(h.changes, 0, 1)
	}
	h.changes = append(h.changes, c)
	for _, s := range []health.State{ch.From, ch.To} {
		if worst, ok := h.worst[name]; s != health.Unknown && (!ok || badness[s] > badness[worst]) {
			h.worst[name] = s
		}
	}
}

// badness orders the states.
var badness = map[health.State]int{health.Ready: 0, health.Unknown: 1, health.Draining: 2, health.Dead: 3}

// take adds a point for each backend.
func (h *history) take(t balancer.Totals, backends []*backend.Backend, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.totals) > 0 {
		last := h.totals[len(h.totals)-1]
		seconds := now.Sub(last.at).Seconds()
		points := map[string]*backendHistory{}
		for _, b := range backends {
			p := h.points[b.Name]
			if p == nil {
				p = new(backendHistory)
			}
			did := less(t.Backends[b.Name], last.Backends[b.Name])
			state := b.State()
			if worst, ok := h.worst[b.Name]; ok && badness[worst] > badness[state] {
				state = worst
			}
			points[b.Name] = &backendHistory{ // anew, since who shows the old one holds no lock
				Rate:   next(p.Rate, float64(sum(did.Durations))/seconds),
				P99:    next(p.P99, balancer.Quantile(did.Durations, 0.99).Seconds()),
				Failed: next(p.Failed, did.Failed),
				States: string(next([]byte(p.States), letter(state, !b.Drained().IsZero()))),
			}
		}
		h.points, h.until = points, now // without those that are gone
		clear(h.worst)
	}
	h.totals = append(h.totals, sample{t, now})
	for len(h.totals) > 2 && now.Sub(h.totals[1].at) >= minuteOf {
		h.totals = slices.Delete(h.totals, 0, 1)
	}
}

// next returns a list with one more, and without the first where it would be too long.
func next[T any](list []T, v T) []T {
	const most = int(historyOf / sampleEvery)
	longer := append(slices.Clone(list), v)
	return longer[max(0, len(longer)-most):]
}

// letter stands for a state.
func letter(s health.State, drained bool) byte {
	switch s {
	case health.Ready:
		if drained {
			return 'o'
		}
		return 'r'
	case health.Draining:
		return 'd'
	case health.Dead:
		return 'x'
	}
	return 'u'
}

// latest returns the changes, the latest first.
func (h *history) latest() []stateChange {
	h.mu.Lock()
	defer h.mu.Unlock()
	changes := slices.Clone(h.changes)
	slices.Reverse(changes)
	return changes
}

// inUse returns the client certificates in use, those that expire first where there are many,
// and how many others there are. each tells of all connections: it is called anew when that
// was sampleEvery ago, for those who look and not for nobody.
func (h *history) inUse(now time.Time, each func(func(balancer.CertificateUse))) (uses []clientCertificate, more int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.counted.IsZero() || now.Sub(h.counted) >= sampleEvery {
		h.uses, h.more = countUses(each)
		h.counted = now
	}
	return h.uses, h.more
}

// state returns what the page draws.
func (h *history) state() historyState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return historyState{Until: h.until, EverySeconds: sampleEvery.Seconds(), Points: int(historyOf / sampleEvery), Backends: h.points}
}

// minute is what was done within the last minute.
type minute struct {
	balancer.Totals
	seconds float64 // that it took
}

// lastMinute compares with what had been done a minute ago, or when the process began.
func (h *history) lastMinute(t balancer.Totals, now time.Time) minute {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := minute{Totals: balancer.Totals{Refusals: map[string]int64{}, Backends: map[string]balancer.Figures{}}}
	if len(h.totals) == 0 {
		return m
	}
	before := h.totals[0]
	m.seconds = now.Sub(before.at).Seconds()
	for reason, n := range t.Refusals {
		m.Refusals[reason] = n - before.Refusals[reason]
	}
	for name, f := range t.Backends {
		m.Backends[name] = less(f, before.Backends[name])
	}
	return m
}

// less returns what f has beyond earlier figures.
func less(f, earlier balancer.Figures) balancer.Figures {
	d := balancer.Figures{Durations: slices.Clone(f.Durations), Failed: f.Failed - earlier.Failed, Retried: map[string]int64{}}
	for i, n := range earlier.Durations {
		d.Durations[i] -= n
	}
	for reason, n := range f.Retried {
		d.Retried[reason] = n - earlier.Retried[reason]
	}
	return d
}

func sum(list []int64) (total int64) {
	for _, n := range list {
		total += n
	}
	return total
}

func countUses(each func(func(balancer.CertificateUse))) (shown []clientCertificate, more int) {
	connections := map[balancer.CertificateUse]int{}
	each(func(u balancer.CertificateUse) { connections[u]++ })
	uses := make([]clientCertificate, 0, len(connections))
	for u, n := range connections {
		uses = append(uses, clientCertificate{u, n})
	}
	slices.SortFunc(uses, func(a, b clientCertificate) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.User, b.User), cmp.Compare(a.Serial, b.Serial))
	})
	n := min(len(uses), maxUses)
	return slices.Clone(uses[:n]), len(uses) - n
}

// keepHistory takes a sample from time to time.
func (p *process) keepHistory(ctx context.Context) error {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		p.history.take(p.metrics.Totals(), p.backends.Set().All(), time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
