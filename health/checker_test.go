package health

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestFirstVerdictIsImmediate(t *testing.T) {
	for _, tc := range []struct {
		mode Verdict
		want string
	}{
		{Pass, "2ms unknown->ready pass"},
		{Failing, "2ms unknown->draining failing"},
		{Untrusted, "2ms unknown->dead untrusted"},
		{refusing, "0s unknown->dead unreachable"},
		{Timeout, "1.5s unknown->dead timeout"},
	} {
		t.Run(tc.mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := startBed(t, newFake(tc.mode), nil)
				if !strings.HasPrefix(tc.want, "0s") { // else it may be over by now
					select {
					case <-b.c.WaitFirst():
						t.Fatal("WaitFirst is done before the first probe")
					default:
					}
				}
				<-b.c.WaitFirst()
				b.wantChanges(tc.want)
				if s := b.c.Status(); s.Name != "cp-1" || s.LastAt.IsZero() || s.State != b.c.State() || s.Since != s.LastAt {
					t.Errorf("Status = %+v", s)
				}
			})
		})
	}
}

func TestPace(t *testing.T) {
	for _, tc := range []struct {
		name     string
		mode     Verdict
		rand     float64
		after    time.Duration // let the state settle
		min, max time.Duration // from the end of a probe to the next
	}{
		{"ready", Pass, 0.5, 0, time.Second, time.Second},
		{"ready, least jitter", Pass, 0, 0, 900 * time.Millisecond, 900 * time.Millisecond},
		{"ready, most jitter", Pass, 0.999999, 0, 1099 * time.Millisecond, 1100 * time.Millisecond},
		{"etcd gone", Failing, 0.5, 0, time.Second, time.Second},
		{"just died", refusing, 0.5, 0, 250 * time.Millisecond, 250 * time.Millisecond},
		{"long dead", refusing, 0.5, time.Minute, 500 * time.Millisecond, 500 * time.Millisecond},
		{"hung", Timeout, 0.5, 0, 250 * time.Millisecond, 250 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(tc.mode)
				startBed(t, f, func(o *CheckerOptions) { o.Rand = func() float64 { return tc.rand } })
				time.Sleep(tc.after)
				from := f.probes()
				time.Sleep(10 * time.Second)
				f.mu.Lock()
				defer f.mu.Unlock()
				if len(f.ends) < from+4 {
					t.Fatalf("only %d probes in 10 s", len(f.ends)-from)
				}
				for i := from + 1; i < len(f.ends); i++ {
					if gap := f.starts[i].Sub(f.ends[i-1]); gap < tc.min || gap > tc.max {
						t.Errorf("probe %d came %v after the last, want %v to %v", i, gap, tc.min, tc.max)
					}
				}
			})
		})
	}
}

// TestKnownInTime holds the promises on time, over random jitter and random
// moments of failure. The bounds are those of the default rules.
func TestKnownInTime(t *testing.T) {
	for _, tc := range []struct {
		name    string
		from    Verdict // what the backend was
		to      Verdict // what it becomes
		report  Verdict // what traffic reports of it, once a ms; NoVerdict for no traffic
		answers bool    // traffic was answered up to the moment
		want    State
		within  time.Duration
		slowest time.Duration // answer to a probe before the moment; 0 means 20 ms
	}{
		{"SIGSTOP, no traffic", Pass, Timeout, NoVerdict, false, Dead, 5 * time.Second, 0},
		{"SIGSTOP under load", Pass, Timeout, NoVerdict, true, Dead, 5 * time.Second, 0},
		{"SIGSTOP of a slow one under load", Pass, Timeout, NoVerdict, true, Dead, 5 * time.Second, 1400 * time.Millisecond},
		{"SIGSTOP, requests without an answer reported", Pass, Timeout, NoAnswer, true, Dead, 5 * time.Second, 0},
		{"SIGSTOP of a draining one", Failing, Timeout, NoVerdict, false, Dead, 5 * time.Second, 0},
		{"kill -9 under load", Pass, refusing, ConnLost, true, Dead, 200 * time.Millisecond, 0},
		{"kill -9, only dials fail", Pass, refusing, DialFailed, false, Dead, 200 * time.Millisecond, 0},
		{"kill -9 without traffic", Pass, refusing, NoVerdict, false, Dead, 1500 * time.Millisecond, 0},
		{"SIGTERM", Pass, ShutdownAnnounced, NoVerdict, false, Draining, 1200 * time.Millisecond, 0},
		{"SIGTERM seen by traffic", Pass, ShutdownAnnounced, ShutdownAnnounced, true, Draining, 2 * time.Millisecond, 0},
		{"etcd gone", Pass, Failing, NoVerdict, false, Draining, 1500 * time.Millisecond, 0},
		{"recovery of a dead one", refusing, Pass, NoVerdict, false, Ready, time.Second, 0},
		{"SIGCONT", Timeout, Pass, NoVerdict, false, Ready, time.Second, 0},
		{"a dead one is not ready yet", refusing, NotReady, NoVerdict, false, Draining, time.Second, 0},
		{"etcd back", Failing, Pass, NoVerdict, false, Ready, 1500 * time.Millisecond, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var worst time.Duration
			for seed := range uint64(30) {
				synctest.Test(t, func(t *testing.T) {
					rnd := rand.New(rand.NewPCG(seed, 1))
					f := newFake(tc.from)
					b := startBed(t, f, func(o *CheckerOptions) { o.Rand = rand.New(rand.NewPCG(seed, 2)).Float64 })
					f.setLatency(time.Duration(rnd.Int64N(int64(cmp.Or(tc.slowest, 20*time.Millisecond)))))
					time.Sleep(5 * time.Second)
					// A moment at random, some right before, in or after a probe.
					settle := time.Duration(rnd.Int64N(int64(40 * time.Second)))
					time.Sleep(settle)
					if tc.answers {
						// Only the last answer matters: at the very moment.
						b.c.Passive(Answered)
					}
					f.set(tc.to)
					begin := time.Now()
					if tc.report != NoVerdict {
						stop := make(chan struct{})
						defer close(stop)
						go func() {
							for {
								b.c.Passive(tc.report)
								select {
								case <-stop:
									return
								case <-time.After(time.Millisecond):
								}
							}
						}()
					}
					b.until(tc.want, tc.within)
					worst = max(worst, time.Since(begin))
				})
			}
			t.Logf("worst: %v of %v", worst, tc.within)
		})
	}
}

func TestSlowIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		var results []Verdict
		b := startBed(t, f, func(o *CheckerOptions) {
			o.OnResult = func(r Result) { results = append(results, r.Verdict) }
		})
		time.Sleep(10 * time.Second)
		f.set(Timeout)
		for range 300 {
			time.Sleep(200 * time.Millisecond)
			b.c.Passive(Answered)
		}
		b.wantChanges("2ms unknown->ready pass")
		if s := b.c.Status(); !s.Suspicious || s.Last.Verdict != Slow {
			t.Errorf("after a minute of slowness: %+v, want suspicion and Slow", s)
		}
		// Traffic is no longer answered either.
		b.until(Dead, 5*time.Second)
		synctest.Wait()
		if last := results[len(results)-2:]; last[0] != Timeout || last[1] != Timeout {
			t.Errorf("last results %v, want two timeouts", last)
		}
	})
}

// TestEarlyAnswer: an answer in the first third of a probe is no excuse for a
// timeout, as the backend may have hung since, but it is evidence against the
// timeouts before it.
func TestEarlyAnswer(t *testing.T) {
	t.Run("then it hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(Pass)
			b := startBed(t, f, nil)
			time.Sleep(time.Second)
			f.set(Timeout)
			time.Sleep(100 * time.Millisecond) // the probe began at 1.002 s
			b.c.Passive(Answered)
			time.Sleep(5 * time.Second)
			b.wantChanges("2ms unknown->ready pass", "4.252s ready->dead timeout")
		})
	})
	t.Run("and goes on answering", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(Pass)
			b := startBed(t, f, nil)
			time.Sleep(time.Second)
			f.set(Timeout)
			time.Sleep(100 * time.Millisecond)
			for range 30 { // in the first third of each probe
				b.c.Passive(Answered)
				time.Sleep(testTimeout + testRules.SuspiciousInterval)
			}
			b.wantChanges("2ms unknown->ready pass", "4.252s ready->draining timeout")
		})
	})
}

// TestLastAnswer is TestSlowIsNotDead by the other way of telling.
func TestLastAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		var answering atomic.Bool
		answering.Store(true)
		b := startBed(t, f, func(o *CheckerOptions) {
			o.LastAnswer = func() time.Time {
				if answering.Load() {
					return time.Now()
				}
				return time.Time{}
			}
		})
		f.set(Timeout)
		time.Sleep(time.Minute)
		b.wantChanges() // not even a first verdict
		answering.Store(false)
		b.until(Dead, 5*time.Second)
	})
}

// TestEtcdGone: nobody's connections are cut, however long it takes.
func TestEtcdGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		b := startBed(t, f, nil)
		time.Sleep(2500 * time.Millisecond)
		f.set(Failing)
		time.Sleep(time.Hour)
		f.set(Pass)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		var states []string
		for _, c := range b.rec.changes {
			states = append(states, fmt.Sprintf("%v %v %v", c.To, c.Err, c.Failed))
		}
		want := []string{"ready <nil> []", "draining failing [etcd]", "ready <nil> []"}
		if diff := gocmp.Diff(want, states); diff != "" {
			t.Errorf("changes (-want +got):\n%s", diff)
		}
	})
}

// TestGracefulShutdown: the listener is closed while a request is in flight.
func TestGracefulShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		var busy atomic.Bool
		busy.Store(true)
		b := startBed(t, f, func(o *CheckerOptions) { o.Busy = busy.Load })
		time.Sleep(time.Second)
		f.set(refusing)
		time.Sleep(30 * time.Second)
		b.wantChanges("2ms unknown->ready pass", "1.002s ready->draining closing")
		busy.Store(false)
		time.Sleep(time.Second)
		b.wantChanges("2ms unknown->ready pass", "1.002s ready->draining closing", "31.252s draining->dead unreachable")
	})
}

func TestPassiveReportsCoalesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		b := startBed(t, f, nil)
		time.Sleep(1500 * time.Millisecond) // probes at 0 and 1.002 s
		for range 1000 {
			b.c.Passive(ConnLost)
			b.c.Passive(DialFailed)
			b.c.Passive(NoAnswer)
		}
		time.Sleep(time.Second) // a probe at 1.5 s and, as that passed, one at 2.502 s
		synctest.Wait()
		if got := f.probes(); got != 3 {
			t.Errorf("%d probes, want 3", got)
		}
		time.Sleep(10 * time.Millisecond)
		if got := f.probes(); got != 4 {
			t.Errorf("%d probes after a pass has ended the doubt, want 4", got)
		}
		b.wantChanges("2ms unknown->ready pass")
	})
}

func TestNoProbeStorm(t *testing.T) {
	for _, v := range []Verdict{ConnLost, DialFailed, NoAnswer, ShutdownAnnounced} {
		for _, mode := range []Verdict{Pass, Failing, refusing} {
			t.Run(v.String()+" while "+mode.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFake(mode)
					b := startBed(t, f, nil)
					end := time.Now().Add(5 * time.Second)
					for time.Now().Before(end) {
						b.c.Passive(v)
						time.Sleep(time.Millisecond)
					}
					f.mu.Lock()
					defer f.mu.Unlock()
					for i := 1; i < len(f.ends); i++ {
						if gap := f.starts[i].Sub(f.ends[i-1]); gap < probeGap {
							t.Fatalf("probe %d came %v after the last, want at least %v", i, gap, probeGap)
						}
					}
					if mode == refusing && len(f.starts) > 21 {
						t.Errorf("%d probes of a dead backend in 5 s, want the usual 20", len(f.starts))
					}
				})
			})
		}
	}
}

// TestPassOlderThanFailure: a pass of a probe that began before traffic failed
// must not undo what traffic saw.
func TestPassOlderThanFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		b := startBed(t, f, func(o *CheckerOptions) { o.Rules.Rise = 1 })
		time.Sleep(time.Second)
		f.setLatency(100 * time.Millisecond)
		time.Sleep(50 * time.Millisecond) // in the middle of the second probe
		b.c.Passive(ShutdownAnnounced)
		time.Sleep(90 * time.Millisecond)
		// That probe has passed, and the next has begun; it may undo it.
		b.wantChanges("2ms unknown->ready pass", "1.05s ready->draining shutdown_announced")
		time.Sleep(200 * time.Millisecond)
		b.wantChanges("2ms unknown->ready pass", "1.05s ready->draining shutdown_announced", "1.252s draining->ready pass")
	})
}

func TestRedialAfterDialFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var redials int
		b := startBed(t, newFake(Pass), func(o *CheckerOptions) { o.Redial = func() { redials++ } })
		want := 0
		for _, v := range []Verdict{ConnLost, DialFailed, NoAnswer, DialFailed, Answered} {
			b.c.Passive(v)
			time.Sleep(3 * time.Second)
			synctest.Wait()
			if v == DialFailed {
				want++
			}
			if redials != want {
				t.Fatalf("%d redials after %v, want %d", redials, v, want)
			}
		}
	})
}

// TestPassiveTakesOnlyTraffic: a caller cannot make states with verdicts that
// only a probe may reach.
func TestPassiveTakesOnlyTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(Pass)
		b := startBed(t, f, nil)
		for range 10 {
			for _, v := range []Verdict{NoVerdict, Pass, NotReady, Failing, Unreachable, Timeout, Slow, Closing, verdictCount, 200} {
				b.c.Passive(v)
			}
			time.Sleep(time.Millisecond)
		}
		b.wantChanges("2ms unknown->ready pass")
		if f.probes() != 1 {
			t.Errorf("%d probes, want 1", f.probes())
		}
	})
}

func TestRun(t *testing.T) {
	t.Run("ends with its probe", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(Timeout)
			rec := new(recorder)
			c := NewChecker("cp-1", f.probe, CheckerOptions{Rules: testRules, OnChange: rec.add})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- c.Run(ctx) }()
			time.Sleep(time.Second)
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v", err)
			}
			if len(f.ends) != 1 {
				t.Error("Run ended before its probe")
			}
			if len(rec.changes) > 0 || c.State() != Unknown {
				t.Errorf("the cancelled probe was taken for a verdict: %+v", rec.changes)
			}
		})
	})
	t.Run("the default timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := startBed(t, newFake(Timeout), func(o *CheckerOptions) { o.Timeout = 0 })
			b.until(Dead, 1500*time.Millisecond)
		})
	})
	t.Run("once at a time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := startBed(t, newFake(Pass), nil)
			synctest.Wait()
			if err := b.c.Run(t.Context()); !errors.Is(err, errRunning) {
				t.Errorf("second Run = %v, want %v", err, errRunning)
			}
		})
	})
	t.Run("again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(Pass)
			c := NewChecker("cp-1", f.probe, CheckerOptions{Rules: testRules})
			for range 2 {
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				if err := c.Run(ctx); err != nil {
					t.Fatalf("Run = %v", err)
				}
				cancel()
			}
			if f.probes() != 2 || c.State() != Ready {
				t.Errorf("%d probes and %v, want 2 and ready", f.probes(), c.State())
			}
		})
	})
}

// TestPassiveNeverBlocks hammers a checker whose Run is not even started.
func TestPassiveNeverBlocks(t *testing.T) {
	c := NewChecker("cp-1", newFake(Pass).probe, CheckerOptions{Rules: testRules})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 1000 {
				c.Passive(DialFailed + Verdict(i)%5)
				_ = c.Status()
			}
		})
	}
	wg.Wait()
}
