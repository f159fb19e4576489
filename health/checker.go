package health

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

const (
	// probeGap is the least time between two probes, whatever traffic reports.
	probeGap = 50 * time.Millisecond

	// jitter is the part by which the time to the next probe is varied, either
	// way, so that many balancers do not probe in step.
	jitter = 0.1
)

// CheckerOptions are what a Checker needs to know; only Rules are required.
// The functions must not block, for the loop waits for them.
type CheckerOptions struct {
	Rules Rules
	// Timeout bounds each probe; 0 means 1.5 s.
	Timeout time.Duration
	// OnChange is told of each change of state, in order, from Run's goroutine.
	OnChange func(Change)
	// OnResult is told of each probe, from Run's goroutine, after OnChange.
	OnResult func(Result)
	// LastAnswer tells when the backend last answered traffic, by whatever
	// counts as that, bytes in the middle of a response included; zero for
	// never. It may be used together with Passive(Answered), or not at all.
	LastAnswer func() time.Time
	// Busy says whether requests to the backend are in flight, on connections
	// that are intact. Then a refused connection means a graceful shutdown
	// and not death. Watches should not count: kube-apiserver keeps them for
	// up to a minute after it has closed its listener, and they lose nothing
	// when they move. nil means never.
	Busy func() bool
	// Redial is called before the probe that follows a DialFailed, so that the
	// probe tries a new connection too: Prober.Redial.
	Redial func()
	// Rand gives a number in [0,1) for the jitter; nil means math/rand.
	Rand func() float64
}

// Change is a change of state.
type Change struct {
	Name     string // of the checker
	From, To State
	Verdict  Verdict  // that brought it
	Err      error    // of the probe that brought it; nil for Pass and for verdicts of traffic
	Failed   []string // checks that /readyz reported as failed
	At       time.Time
}

// Status is a view of a Checker for metrics and status pages.
type Status struct {
	Name       string
	State      State
	Since      time.Time // of the state; zero while Unknown
	Suspicious bool      // the state is in doubt
	Last       Result    // of the last probe
	LastAt     time.Time // of its end; zero before the first
}

// Checker keeps the health of one backend. All its methods may be called
// concurrently, Run once at a time.
type Checker struct {
	// Static after construction.
	name  string
	probe func(context.Context) Result
	o     CheckerOptions
	epoch time.Time     // answered counts from it
	wake  chan struct{} // written by Passive, read by Run, one slot, never closed
	first chan struct{} // closed by Run after the first probe

	running  atomic.Bool
	pending  atomic.Uint32 // verdicts of traffic that Run has not taken up: bit 1<<v
	answered atomic.Int64  // nanoseconds since epoch of the last Passive(Answered), 0 for never
	status   atomic.Pointer[Status]

	// Owned by Run.
	m      Machine
	last   Result
	lastAt time.Time
}

// NewChecker makes a checker named name, for logs and metrics, of the backend
// that probe asks. probe must return soon after its context is done, and may
// be Prober.Probe. Nothing happens before Run.
func NewChecker(name string, probe func(context.Context) Result, o CheckerOptions) *Checker {
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	c := &Checker{
		name:  name,
		probe: probe,
		o:     o,
		epoch: time.Now(),
		wake:  make(chan struct{}, 1),
		first: make(chan struct{}),
	}
	c.status.Store(&Status{Name: name})
	return c
}

// State is the state of now.
func (c *Checker) State() State { return c.status.Load().State }

// Status is the state of now and what it came from.
func (c *Checker) Status() Status { return *c.status.Load() }

// WaitFirst gives a channel that is closed after the first probe, when the
// state has followed from it.
func (c *Checker) WaitFirst() <-chan struct{} { return c.first }

// Passive reports a verdict of traffic: DialFailed, ConnLost, NoAnswer,
// ShutdownAnnounced or Answered; others are ignored. It never blocks, and a
// thousand reports cost no more probes than one. Answered is cheap enough for
// every request.
func (c *Checker) Passive(v Verdict) {
	switch {
	case v == Answered:
		c.answered.Store(int64(time.Since(c.epoch)))
		return
	case !v.passive():
		return
	}
	bit := uint32(1) << v
	if c.pending.Or(bit)&bit != 0 {
		return // Run has yet to take up the last one
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// lastAnswer is when traffic was last answered, by either way of telling.
func (c *Checker) lastAnswer() time.Time {
	var t time.Time
	if d := c.answered.Load(); d != 0 {
		t = c.epoch.Add(time.Duration(d))
	}
	if c.o.LastAnswer != nil {
		if u := c.o.LastAnswer(); u.After(t) {
			t = u
		}
	}
	return t
}

// errRunning is of a second Run beside the first.
var errRunning = errors.New("health: the checker runs already")

// finished is a probe that has ended.
type finished struct {
	res          Result
	began, ended time.Time
}

// run is the state of one Run.
type run struct {
	*Checker
	timer   *time.Timer   // for the next probe; stopped or stale while one is under way
	results chan finished // written by the probe's goroutine, one slot
	probing bool
	ended   time.Time // of the last probe
	kicked  bool      // traffic failed: probe at once
	doubted bool      // traffic failed since the last probe began
	redial  bool      // no connection could be made: probe over a new one
}

// Run probes until ctx is done, then waits for the probe under way and returns
// nil. The first probe comes at once.
func (c *Checker) Run(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		return errRunning
	}
	defer c.running.Store(false)
	r := &run{Checker: c, timer: time.NewTimer(0), results: make(chan finished, 1)}
	defer r.timer.Stop()
	for {
		select {
		case <-ctx.Done():
			if r.probing {
				<-r.results
			}
			return nil
		case <-r.timer.C:
			r.start(ctx)
		case f := <-r.results:
			r.probing = false
			r.ended = f.ended
			if ctx.Err() == nil {
				r.finish(f)
				r.schedule()
			}
		case <-c.wake:
			if r.traffic(); r.kicked && !r.probing {
				r.schedule()
			}
		}
	}
}

// start begins a probe.
func (r *run) start(ctx context.Context) {
	if r.redial && r.o.Redial != nil {
		r.o.Redial()
	}
	r.probing, r.kicked, r.doubted, r.redial = true, false, false, false
	go r.probeOnce(ctx)
}

// probeOnce is the goroutine of a probe.
func (r *run) probeOnce(ctx context.Context) {
	f := finished{began: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, r.o.Timeout)
	defer cancel()
	f.res = r.probe(ctx)
	f.ended = time.Now()
	r.results <- f
}

// schedule sets the timer for the next probe.
func (r *run) schedule() {
	wait := probeGap
	if !r.kicked {
		d := float64(r.m.Next(r.o.Rules))
		wait = max(wait, time.Duration(d*(1-jitter+2*jitter*r.o.Rand())))
	}
	r.timer.Reset(time.Until(r.ended.Add(wait)))
}

// finish takes up the result of a probe.
func (r *run) finish(f finished) {
	answered := r.lastAnswer()
	if answered.After(r.m.LastCut()) {
		r.m = r.m.Step(Answered, r.o.Rules, f.ended)
	}
	f.res.Verdict = interpret(f, answered, r.o.Busy != nil && r.o.Busy())
	isFirst := r.lastAt.IsZero()
	r.last, r.lastAt = f.res, f.ended
	v := f.res.Verdict
	if v == Pass && r.doubted && r.m.State() != Unknown {
		// The pass may be older than the failure that traffic has seen. The
		// next probe, which that failure has asked for, will tell.
		v = NoVerdict
	}
	r.step(v, f.res, f.ended)
	if r.o.OnResult != nil {
		r.o.OnResult(f.res)
	}
	if isFirst {
		close(r.first)
	}
}

// interpret sees a probe's verdict in the light of traffic: when that was last
// answered, and whether requests are in flight.
func interpret(f finished, answered time.Time, busy bool) Verdict {
	switch v := f.res.Verdict; {
	case v == Timeout && answered.After(f.began.Add(f.ended.Sub(f.began)/3)):
		// An answer of the first third does not count: the backend may have
		// hung right after it, and a whole probe would be lost.
		return Slow
	case v == Unreachable && busy && f.res.refused():
		return Closing
	default:
		return v
	}
}

// traffic takes up the verdicts of traffic.
func (r *run) traffic() {
	pending := r.pending.Swap(0)
	for v := DialFailed; v <= ShutdownAnnounced; v++ {
		if pending&(1<<v) == 0 || r.m.State() == Dead {
			// A dead backend is asked often enough, and sees traffic only
			// where there is no better one.
			continue
		}
		if v == ShutdownAnnounced && r.m.State() == Draining {
			continue // known
		}
		r.kicked = true
		r.doubted = true
		r.redial = r.redial || v == DialFailed
		r.step(v, Result{}, time.Now())
	}
}

// step takes v into the machine and tells what became of it. res is of the
// probe, if it was one.
func (r *run) step(v Verdict, res Result, at time.Time) {
	from := r.m.State()
	r.m = r.m.Step(v, r.o.Rules, at)
	to := r.m.State()
	r.status.Store(&Status{
		Name: r.name, State: to, Since: r.m.Since(), Suspicious: r.m.Suspicious(),
		Last: r.last, LastAt: r.lastAt,
	})
	if from != to && r.o.OnChange != nil {
		r.o.OnChange(Change{
			Name: r.name, From: from, To: to,
			Verdict: v, Err: res.Err, Failed: res.Failed, At: at,
		})
	}
}
