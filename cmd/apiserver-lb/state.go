package main

import (
	"cmp"
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/passthrough"
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

	// Summary says in words what is out of order, and what the balancer does about it; the
	// worst comes first. Its words may change.
	Summary []remark `json:"summary"`

	ClientConnections int64 `json:"clientConnections"`
	// Passed is, by backend, what has passed since the process began, where TLS does not end
	// here; then each connection counts as one long request there, and nothing is known of
	// requests.
	Passed   map[string]passthrough.Figures `json:"passed,omitempty"`
	InFlight map[string]int64               `json:"inFlight"` // by class: short, long, upgrade
	// Since the process began.
	Retries  map[string]int64 `json:"retries"`  // by reason
	Refusals map[string]int64 `json:"refusals"` // by reason

	LastMinute lastMinute `json:"lastMinute"`

	Certificates []certificateState `json:"certificates"` // the first to expire comes first

	// Changes are the last ones of a backend's state, the latest first.
	Changes []stateChange `json:"changes"`
	// ClientCertificates are those as whose users requests have come on connections that
	// are open, the first to expire first, up to a bound; and how many are beyond it.
	ClientCertificates     []clientCertificate `json:"clientCertificates"`
	MoreClientCertificates int                 `json:"moreClientCertificates,omitempty"`
}

// lastMinute is what was done within the last minute, or since the process began.
type lastMinute struct {
	Seconds  float64          `json:"seconds"`  // how long it was
	Retries  map[string]int64 `json:"retries"`  // by reason
	Refusals map[string]int64 `json:"refusals"` // by reason
}

// stateChange is one of a backend's state by its health checks.
type stateChange struct {
	At      time.Time `json:"at"`
	Backend string    `json:"backend"`
	From    string    `json:"from"`
	To      string    `json:"to"`
	Verdict string    `json:"verdict"`
	Failed  []string  `json:"failed,omitempty"` // the checks that /readyz named
	Error   string    `json:"error,omitempty"`
}

// clientCertificate is one that clients use.
type clientCertificate struct {
	balancer.CertificateUse
	Connections int `json:"connections"`
}

// backendState is one kube-apiserver.
type backendState struct {
	Name    string    `json:"name"`
	Origin  string    `json:"origin"` // static, dns or endpointslices
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

	// Of short requests that ended within the last minute.
	RequestsPerSecond float64 `json:"requestsPerSecond"`
	// Half of them, and 99 of 100, took no longer, by the buckets of the histogram; absent
	// without requests. The bound of its last bucket, 60 s, stands for all that is longer.
	P50Seconds float64 `json:"p50Seconds,omitempty"`
	P99Seconds float64 `json:"p99Seconds,omitempty"`
	// Requests of any class that ended with a status of 5xx within the last minute.
	FailedLastMinute int64 `json:"failedLastMinute"`
	// Requests that were sent elsewhere since the process began, by reason.
	Retries map[string]int64 `json:"retries"`

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
func (p *process) state(now time.Time) *state {
	totals := p.metrics.Totals()
	minute := p.history.lastMinute(totals, now)
	ready, _ := p.ready.report()
	set := p.backends.Set()
	s := &state{
		At: now, Version: version, Host: p.host, Since: p.begun,
		Ready: ready, Panicking: set.Panicking(), Stopping: p.ready.stopping.Load(),
		ClientConnections: totals.Clients,
		Passed:            p.front.Passed(),
		InFlight:          totals.InFlight,
		Retries:           map[string]int64{},
		Refusals:          totals.Refusals,
		LastMinute:        lastMinute{Seconds: minute.seconds, Retries: map[string]int64{}, Refusals: minute.Refusals},
	}
	for _, b := range set.All() {
		t := p.backendState(b)
		did := minute.Backends[b.Name]
		if minute.seconds > 0 {
			t.RequestsPerSecond = float64(sum(did.Durations)) / minute.seconds
		}
		t.P50Seconds = balancer.Quantile(did.Durations, 0.5).Seconds()
		t.P99Seconds = balancer.Quantile(did.Durations, 0.99).Seconds()
		t.FailedLastMinute = did.Failed
		t.Retries = totals.Backends[b.Name].Retried
		s.Backends = append(s.Backends, t)
	}
	for _, f := range totals.Backends { // also of those that are gone
		add(s.Retries, f.Retried)
	}
	for _, f := range minute.Backends {
		add(s.LastMinute.Retries, f.Retried)
	}
	for _, e := range p.store.Expiries() {
		s.Certificates = append(s.Certificates, certificateState{e.Use, e.File, e.Subject, e.NotAfter})
	}
	slices.SortStableFunc(s.Certificates, func(a, b certificateState) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.Use, b.Use), cmp.Compare(a.File, b.File))
	})
	s.Changes = p.history.latest()
	s.ClientCertificates, s.MoreClientCertificates = p.history.inUse(now, p.front.CertificateUses)
	s.Summary = summarize(s)
	return s
}

// add adds counts to others.
func add(to, counts map[string]int64) {
	for name, n := range counts {
		to[name] += n
	}
}

// backendState tells of a backend what it is, without what it did.
func (p *process) backendState(b *backend.Backend) backendState {
	settings := b.Settings()
	short, long, homed := b.Load()
	t := backendState{Name: b.Name, Origin: p.found.originOf(b.Name), Address: b.Address, Zone: settings.Zone, Weight: settings.Weight,
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
	s := p.state(time.Now())
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
