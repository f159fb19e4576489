package balancer

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"
)

// Figures are what a backend has done since the process began, for whoever shows it every
// few seconds: to gather all series of the instruments takes tenths of a second where there
// are thousands.
type Figures struct {
	// Durations are how many short requests have ended within each of DurationBounds, and
	// beyond the last of them.
	Durations []int64
	// Failed are those requests, of any class, that ended with a status of 5xx.
	Failed int64
	// Retried are the requests that were sent to another backend, by why.
	Retried map[string]int64
}

// DurationBounds returns the upper bounds of the classes of durations, in seconds.
func DurationBounds() []float64 { return slices.Clone(durationBounds[:]) }

// figures are Figures as they are counted.
type figures struct {
	durations [len(durationBounds) + 1]atomic.Int64
	failed    atomic.Int64
	retried   [len(eventNames)]atomic.Int64
}

// ended counts a request that has ended.
func (f *figures) ended(o *Observation) {
	if o.Class == Short {
		took := o.Took.Seconds()
		i := 0
		for i < len(durationBounds) && took > durationBounds[i] {
			i++
		}
		f.durations[i].Add(1)
	}
	if o.Code >= 500 {
		f.failed.Add(1)
	}
}

func (f *figures) read() Figures {
	r := Figures{Durations: make([]int64, len(f.durations)), Failed: f.failed.Load(), Retried: map[string]int64{}}
	for i := range f.durations {
		r.Durations[i] = f.durations[i].Load()
	}
	for i := range f.retried {
		if n := f.retried[i].Load(); n > 0 {
			r.Retried[eventNames[i]] = n
		}
	}
	return r
}

// figuresOf returns the figures of a backend. m.mu is not held.
func (m *Metrics) figuresOf(backend string) *figures {
	if f := (*m.figures.Load())[backend]; f != nil {
		return f
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(*m.figures.Load())
	f := all[backend]
	if f == nil {
		f = new(figures)
		all[backend] = f
		m.figures.Store(&all)
	}
	return f
}

// Totals are what the process does now and has done, as Figures are.
type Totals struct {
	Clients  int64            // connections that are open
	InFlight map[string]int64 // requests, by class
	Refusals map[string]int64 // by reason
	Backends map[string]Figures
}

// Totals returns them as they are now.
func (m *Metrics) Totals() Totals {
	t := Totals{Clients: m.open.n.Load(), InFlight: map[string]int64{}, Refusals: map[string]int64{}, Backends: map[string]Figures{}}
	for c := range m.inFlight {
		t.InFlight[Class(c).String()] = m.inFlight[c].n.Load()
	}
	m.refused.Range(func(reason, n any) bool {
		t.Refusals[reason.(string)] = n.(*atomic.Int64).Load()
		return true
	})
	for name, f := range *m.figures.Load() {
		if name != "" {
			t.Backends[name] = f.read()
		}
	}
	return t
}

// Quantile returns the time that the share q of requests did not exceed, by interpolation
// within its class, as Prometheus' histogram_quantile does: where it lies beyond the last
// bound, it is that bound. 0: there are no requests.
func Quantile(durations []int64, q float64) time.Duration {
	var count int64
	for _, n := range durations {
		count += n
	}
	if count <= 0 {
		return 0
	}
	rank, from, below := q*float64(count), 0.0, int64(0)
	for i, bound := range durationBounds {
		n := durations[i]
		if n > 0 && float64(below+n) >= rank {
			return time.Duration((from + (bound-from)*(rank-float64(below))/float64(n)) * float64(time.Second))
		}
		from, below = bound, below+n
	}
	return time.Duration(from * float64(time.Second))
}
