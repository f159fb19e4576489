package main

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"math"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// state is what the balancer tells of itself at /status.json. Fields are only ever added.
type state struct {
	At        time.Time `json:"at"`
	Version   string    `json:"version"`
	Host      string    `json:"host"`
	Since     time.Time `json:"since"` // of the process
	Ready     bool      `json:"ready"` // as /readyz
	Panicking bool      `json:"panicking"`
	Stopping  bool      `json:"stopping"`

	Backends []backendState `json:"backends"`

	ClientConnections int            `json:"clientConnections"`
	InFlight          map[string]int `json:"inFlight"` // by class: short, long, upgrade
	// Since the process began.
	Retries  map[string]int `json:"retries"`  // by reason
	Refusals map[string]int `json:"refusals"` // by reason

	Certificates []certificateState `json:"certificates"` // the first to expire comes first
}

// backendState is one kube-apiserver.
type backendState struct {
	Name    string    `json:"name"`
	Address string    `json:"address"`
	Zone    string    `json:"zone,omitempty"`
	Weight  int       `json:"weight"`
	State   string    `json:"state"`
	Since   time.Time `json:"since,omitzero"` // of the state; absent before the first verdict
	// Drained is since when an operator keeps new requests out; absent: none does.
	Drained time.Time `json:"drained,omitzero"`

	// Requests in flight, short and long-running, and the clients that are at home there.
	Short int64 `json:"short"`
	Long  int64 `json:"long"`
	Homed int64 `json:"homed"`

	// Of short requests that ended within the last 15 to 30 s.
	RequestsPerSecond float64 `json:"requestsPerSecond"`
	// 99 of 100 took no longer, by the buckets of the histogram; absent without requests.
	// The bound of its last bucket, 60 s, stands for all that is longer.
	P99Seconds float64 `json:"p99Seconds,omitempty"`

	LastFailure *failure `json:"lastFailure,omitempty"` // of its checks
}

// failure is a check that failed.
type failure struct {
	At      time.Time `json:"at"`
	Verdict string    `json:"verdict"`
	Failed  []string  `json:"failed,omitempty"` // the checks that /readyz named
	Error   string    `json:"error,omitempty"`
}

// certificateState is a certificate or a list of them.
type certificateState struct {
	Use      string    `json:"use"`
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"notAfter"`
}

// state gathers what there is to be told.
func (p *process) state(now time.Time) (*state, error) {
	current, err := gather(p.telemetry.registry)
	if err != nil {
		return nil, err
	}
	before := p.recent.before(now)
	ready, _ := p.ready.report()
	set := p.backends.Set()
	s := &state{
		At: now, Version: version, Host: p.host, Since: p.begun,
		Ready: ready, Panicking: set.Panicking(), Stopping: p.ready.stopping.Load(),
		InFlight: current.sum("apiserver_lb_requests_in_flight", "class"),
		Retries:  current.sum("apiserver_lb_retries_total", "reason"),
		Refusals: current.sum("apiserver_lb_refusals_total", "reason"),
	}
	s.ClientConnections = current.sum("apiserver_lb_client_connections", "")[""]
	for _, b := range set.All() {
		t := p.backendState(b)
		if before != nil {
			did := current.durations(b.Name).less(before.durations(b.Name))
			if passed := current.at.Sub(before.at).Seconds(); passed > 0 {
				t.RequestsPerSecond = float64(did.count) / passed
			}
			t.P99Seconds = did.quantile(0.99)
		}
		s.Backends = append(s.Backends, t)
	}
	for _, e := range p.store.Expiries() {
		s.Certificates = append(s.Certificates, certificateState{e.Use, e.File, e.Subject, e.NotAfter})
	}
	slices.SortStableFunc(s.Certificates, func(a, b certificateState) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.Use, b.Use), cmp.Compare(a.File, b.File))
	})
	return s, nil
}

// backendState tells of a backend what it is, without what it did.
func (p *process) backendState(b *backend.Backend) backendState {
	settings := b.Settings()
	short, long, homed := b.Load()
	t := backendState{Name: b.Name, Address: b.Address, Zone: settings.Zone, Weight: settings.Weight,
		State: b.State().String(), Drained: b.Drained(), Short: short, Long: long, Homed: homed}
	p.watchMu.RLock()
	w := p.watches[b]
	p.watchMu.RUnlock()
	if w != nil {
		t.Since = w.checker.Status().Since
		t.LastFailure = w.failed.Load()
	}
	return t
}

// serveState answers GET /status.json.
func (p *process) serveState(w http.ResponseWriter, _ *http.Request) {
	s, err := p.state(time.Now())
	if err != nil {
		p.log.Error("/status.json", "err", err)
		http.Error(w, "what there is to tell could not be gathered; the log says why", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(s) // to whom is gone by then it is no matter
}

// noteFailure keeps the last probe that failed.
func (w *watch) noteFailure(r health.Result, now time.Time) {
	if r.Verdict == health.Pass || r.Verdict == health.NoVerdict {
		return
	}
	f := &failure{At: now, Verdict: r.Verdict.String(), Failed: r.Failed}
	if r.Err != nil {
		f.Error = r.Err.Error()
	}
	w.failed.Store(f)
}

// recentEvery is how often the counts are kept, for rates over the time since. With a
// few hundred series of requests it takes milliseconds.
const recentEvery = 15 * time.Second

// recent are the counts of a while ago.
type recent struct {
	mu        sync.Mutex
	last, old *counts // guarded by mu
}

// run keeps the counts from time to time.
func (r *recent) run(ctx context.Context, from prometheus.Gatherer) error {
	tick := time.NewTicker(recentEvery)
	defer tick.Stop()
	for {
		if c, err := gather(from); err == nil {
			r.mu.Lock()
			r.last, r.old = c, r.last
			r.mu.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// before returns counts that are at least as old as the time between two, if there are;
// nil: there are none yet.
func (r *recent) before(now time.Time) *counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.old == nil || r.last != nil && now.Sub(r.last.at) >= recentEvery {
		return r.last
	}
	return r.old
}

// counts are the metrics at a time, as far as the state is told by them.
type counts struct {
	at       time.Time
	families map[string]*dto.MetricFamily
}

// counted are the metrics that counts keep. Others may be of many thousand series.
var counted = []string{
	"apiserver_lb_client_connections",
	"apiserver_lb_refusals_total",
	"apiserver_lb_request_duration_seconds",
	"apiserver_lb_requests_in_flight",
	"apiserver_lb_retries_total",
}

func gather(from prometheus.Gatherer) (*counts, error) {
	list, err := from.Gather()
	if err != nil {
		return nil, err
	}
	c := &counts{at: time.Now(), families: map[string]*dto.MetricFamily{}}
	for _, f := range list {
		if slices.Contains(counted, f.GetName()) {
			c.families[f.GetName()] = f
		}
	}
	return c, nil
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// sum adds a counter or a gauge up, by the value of a label.
func (c *counts) sum(name, by string) map[string]int {
	sums := map[string]int{}
	for _, m := range c.families[name].GetMetric() {
		sums[label(m, by)] += int(m.GetCounter().GetValue() + m.GetGauge().GetValue())
	}
	return sums
}

// histogram is how many requests took how long.
type histogram struct {
	count uint64
	upTo  map[float64]uint64 // by the upper bound of each bucket, in seconds; cumulative
}

// durations are those of the short requests at a backend.
func (c *counts) durations(backend string) histogram {
	h := histogram{upTo: map[float64]uint64{}}
	for _, m := range c.families["apiserver_lb_request_duration_seconds"].GetMetric() {
		if label(m, "backend") != backend || label(m, "class") != "short" {
			continue
		}
		h.count += m.GetHistogram().GetSampleCount()
		for _, b := range m.GetHistogram().GetBucket() {
			h.upTo[b.GetUpperBound()] += b.GetCumulativeCount()
		}
	}
	return h
}

// less returns what h has beyond an earlier one.
func (h histogram) less(earlier histogram) histogram {
	d := histogram{count: h.count - min(h.count, earlier.count), upTo: map[float64]uint64{}}
	for bound, n := range h.upTo {
		d.upTo[bound] = n - min(n, earlier.upTo[bound])
	}
	return d
}

// quantile returns the time in seconds that the share q of requests did not exceed, by
// interpolation within its bucket, as Prometheus' histogram_quantile does: where it lies
// beyond the last finite bound, it is that bound; 0 where there are no requests.
func (h histogram) quantile(q float64) float64 {
	if h.count == 0 {
		return 0
	}
	rank := q * float64(h.count)
	from, below := 0.0, uint64(0)
	for _, bound := range slices.Sorted(maps.Keys(h.upTo)) {
		if math.IsInf(bound, 1) {
			break
		}
		n := h.upTo[bound]
		if float64(n) >= rank {
			return from + (bound-from)*(rank-float64(below))/float64(n-below)
		}
		from, below = bound, n
	}
	return from
}
