package health

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

// fake is a backend as its prober sees it.
type fake struct {
	mu      sync.Mutex
	latency time.Duration // of an answer
	mode    Verdict       // what probes find; Timeout: hung; NoVerdict: connections refused
	changed chan struct{} // closed when mode changes
	starts  []time.Time
	ends    []time.Time
}

const refusing = NoVerdict

func newFake(mode Verdict) *fake {
	return &fake{latency: 2 * time.Millisecond, mode: mode, changed: make(chan struct{})}
}

func (f *fake) set(mode Verdict) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mode = mode
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) setLatency(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latency = d
}

func (f *fake) now() (Verdict, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mode, f.changed
}

// probe is the probe function of a Checker.
func (f *fake) probe(ctx context.Context) Result {
	f.mu.Lock()
	f.starts = append(f.starts, time.Now())
	latency := f.latency
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ends = append(f.ends, time.Now())
	}()
	if mode, _ := f.now(); mode != refusing {
		time.Sleep(latency)
	}
	for {
		switch mode, changed := f.now(); mode {
		case Timeout:
			select {
			case <-ctx.Done():
				return Result{Verdict: Timeout, Err: ctx.Err()}
			case <-changed:
			}
		case refusing:
			return Result{Verdict: Unreachable, Err: fmt.Errorf("dial: %w", syscall.ECONNREFUSED)}
		case Pass:
			return Result{Verdict: Pass, Status: 200}
		default:
			return Result{Verdict: mode, Status: 500, Err: errors.New(mode.String()), Failed: []string{"etcd"}}
		}
	}
}

func (f *fake) probes() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.starts)
}

// recorder keeps the changes of a checker. Only the checker's goroutine writes;
// tests read after synctest.Wait.
type recorder struct {
	mu      sync.Mutex
	changes []Change
}

func (r *recorder) add(c Change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes = append(r.changes, c)
}

// text gives the changes since start as "1.002s unknown->ready pass".
func (r *recorder) text(start time.Time) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, c := range r.changes {
		out = append(out, fmt.Sprintf("%v %v->%v %v", c.At.Sub(start), c.From, c.To, c.Verdict))
	}
	return out
}

// bed is a running checker in a synctest bubble.
type bed struct {
	*testing.T
	c     *Checker
	f     *fake
	rec   *recorder
	start time.Time
}

// noJitter is the middle of the range.
func noJitter() float64 { return 0.5 }

// startBed runs a checker of f until the test ends. adjust may be nil.
func startBed(t *testing.T, f *fake, adjust func(*CheckerOptions)) *bed {
	t.Helper()
	b := &bed{T: t, f: f, rec: new(recorder), start: time.Now()}
	o := CheckerOptions{Rules: testRules, Timeout: testTimeout, OnChange: b.rec.add, Rand: noJitter}
	if adjust != nil {
		adjust(&o)
	}
	b.c = NewChecker("cp-1", f.probe, o)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return b
}

// until waits for a state and gives the time that took.
func (b *bed) until(want State, limit time.Duration) time.Duration {
	b.Helper()
	begin := time.Now()
	for b.c.State() != want {
		if time.Since(begin) > limit {
			b.Fatalf("still %v, not %v, after %v; changes: %v", b.c.State(), want, limit, b.rec.text(b.start))
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
	}
	return time.Since(begin)
}

func (b *bed) wantChanges(want ...string) {
	b.Helper()
	synctest.Wait()
	if diff := gocmp.Diff(want, b.rec.text(b.start)); diff != "" {
		b.Errorf("changes (-want +got):\n%s", diff)
	}
}
