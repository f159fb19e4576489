package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// done are totals in which a backend has ended so many short requests, each within 1 ms.
func done(n, failed int64) balancer.Totals {
	d := make([]int64, len(balancer.DurationBounds())+1)
	d[0] = n
	return balancer.Totals{Refusals: map[string]int64{"no_backend": failed}, Backends: map[string]balancer.Figures{"a": {Durations: d, Failed: failed, Retried: map[string]int64{"lost": failed}}}}
}

func TestHistory(t *testing.T) {
	h, begin := newHistory(), time.Date(2026, 11, 25, 3, 0, 0, 0, time.UTC)
	a := &backend.Backend{Name: "a"}
	a.SetState(health.Ready, begin)
	list := []*backend.Backend{a}
	if m := h.lastMinute(done(5, 0), begin); m.seconds != 0 || len(m.Backends) != 0 {
		t.Errorf("before the first sample: %+v", m)
	}
	h.take(done(0, 0), list, begin)
	if m := h.lastMinute(done(30, 1), begin.Add(10*time.Second)); m.seconds != 10 || sum(m.Backends["a"].Durations) != 30 || m.Refusals["no_backend"] != 1 {
		t.Errorf("after 10 s: %+v", m)
	}
	at := func(n int) time.Time { return begin.Add(time.Duration(n) * sampleEvery) }
	for n := 1; n <= 300; n++ {
		switch n {
		case 100: // it flaps between two samples
			h.changed("a", health.Change{From: health.Ready, To: health.Dead, At: at(n).Add(-2 * time.Second), Verdict: health.Unreachable, Err: fmt.Errorf("refused")})
			h.changed("a", health.Change{From: health.Dead, To: health.Ready, At: at(n).Add(-time.Second), Verdict: health.Pass})
		case 200:
			a.Drain(at(n))
		case 210:
			a.Undrain(at(n))
			a.SetState(health.Draining, at(n))
		}
		h.take(done(int64(30*n), int64(n/10)), list, at(n))
	}
	m := h.lastMinute(done(30*300+6, 31), at(300).Add(6*time.Second))
	if m.seconds != 66 || sum(m.Backends["a"].Durations) != 30*4+6 || m.Backends["a"].Failed != 2 || m.Backends["a"].Retried["lost"] != 2 {
		t.Errorf("the last minute: %+v", m)
	}
	s := h.state()
	p := s.Backends["a"]
	if len(p.Rate) != s.Points || len(p.P99) != s.Points || len(p.Failed) != s.Points || len(p.States) != s.Points || s.Points != 240 || !s.Until.Equal(at(300)) {
		t.Fatalf("%d points of %d: %+v", len(p.Rate), s.Points, p)
	}
	if p.Rate[0] != 2 || p.P99[0] <= 0 || p.P99[0] > 0.001 || sum(p.Failed) != 24 {
		t.Errorf("the figures are %v %v %v", p.Rate[0], p.P99[0], p.Failed)
	}
	// Points 61 to 300.
	if want := strings.Repeat("r", 39) + "x" + strings.Repeat("r", 99) + strings.Repeat("o", 10) + strings.Repeat("d", 91); p.States != want {
		t.Errorf("the states are %s\nwant           %s", p.States, want)
	}
	changes := h.latest()
	want := []stateChange{{at(100).Add(-time.Second), "a", "dead", "ready", "pass", nil, ""}, {at(100).Add(-2 * time.Second), "a", "ready", "dead", "unreachable", nil, "refused"}}
	if d := cmp.Diff(want, changes); d != "" {
		t.Error(d)
	}
	for range 3 * maxChanges {
		h.changed("a", health.Change{})
	}
	if changes := h.latest(); len(changes) != maxChanges {
		t.Errorf("%d changes are kept", len(changes))
	}
	h.take(done(0, 0), nil, at(301))
	if n := len(h.state().Backends); n != 0 {
		t.Errorf("%d backends are kept that are gone", n)
	}
}

func TestCountCertificates(t *testing.T) {
	h, end := newHistory(), time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	calls := 0
	each := func(add func(balancer.CertificateUse)) {
		calls++
		for i := range maxUses + 5 {
			for range i + 1 {
				add(balancer.CertificateUse{User: fmt.Sprintf("u%d", i), Serial: "1", NotAfter: end.Add(-time.Duration(i) * time.Hour)})
			}
		}
	}
	now := end.Add(-30 * 24 * time.Hour)
	uses, more := h.inUse(now, each)
	if len(uses) != maxUses || more != 5 || uses[0].User != "u54" || uses[0].Connections != 55 {
		t.Errorf("%d, %d more, the first is %+v", len(uses), more, uses[0])
	}
	// Who asks again soon is told the same, and all connections are not gone through for it.
	for after, want := range map[time.Duration]int{sampleEvery - 1: 1, sampleEvery: 2} {
		h, calls = newHistory(), 0
		h.inUse(now, each)
		if again, _ := h.inUse(now.Add(after), each); calls != want || len(again) != maxUses {
			t.Errorf("after %v: counted %d times, want %d; %d are told", after, calls, want, len(again))
		}
	}
}

func TestSummarize(t *testing.T) {
	now := time.Date(2026, 11, 25, 3, 12, 0, 0, time.UTC)
	b := func(name, state string, drained bool) backendState {
		s := backendState{Name: name, State: state, Since: now.Add(-2 * time.Minute)}
		if drained {
			s.Drained = now.Add(-time.Hour)
			s.Long = 7
		}
		if state == "dead" {
			s.LastFailure = &failure{Verdict: "unreachable", Error: "connection refused"}
		}
		if state == "draining" {
			s.LastFailure = &failure{Verdict: "not_ready", Failed: []string{"etcd", "ping"}}
		}
		return s
	}
	failing := func(name string, failed int64, rate float64) backendState {
		s := b(name, "ready", false)
		s.FailedLastMinute, s.RequestsPerSecond = failed, rate
		return s
	}
	for _, tt := range []struct {
		name string
		s    state
		want []remark
	}{
		{"well", state{Backends: []backendState{b("a", "ready", false), b("b", "ready", false)}}, []remark{{levelOK, "All 2 kube-apiservers are ready."}}},
		{"well, alone", state{Backends: []backendState{b("a", "ready", false)}}, []remark{{levelOK, "The only kube-apiserver is ready."}}},
		{"one is dead", state{Backends: []backendState{b("a", "ready", false), b("b", "dead", false), b("c", "ready", false)}, LastMinute: lastMinute{Retries: map[string]int64{"lost": 12, "died": 3}, Refusals: map[string]int64{"rate_limit": 5}}},
			[]remark{
				{levelWarn, "b is dead since 03:10:00 UTC (2m0s): unreachable, connection refused; its requests go to a and c."},
				{levelWarn, "In the last minute 15 requests were sent to another kube-apiserver, unseen by clients: died 3, lost 12."},
			}},
		{"one is dead, and nobody is hurt", state{Backends: []backendState{b("a", "ready", false), b("b", "dead", false)}, LastMinute: lastMinute{Seconds: 60}},
			[]remark{
				{levelWarn, "b is dead since 03:10:00 UTC (2m0s): unreachable, connection refused; its requests go to a."},
				{levelOK, "In the last minute the balancer refused no client for want of a kube-apiserver."},
			}},
		{"one is ready and fails", state{Backends: []backendState{failing("a", 9, 0), failing("b", 10, 3), failing("c", 31, 10), failing("d", 30, 10)}, LastMinute: lastMinute{Seconds: 60}},
			[]remark{
				{levelBad, "b answered 10 requests of the last minute with errors (5xx)."},
				{levelBad, "c answered 31 requests of the last minute with errors (5xx)."},
				{levelOK, "All 4 kube-apiservers are ready."},
			}},
		{"one is drained, writes are lost", state{Backends: []backendState{b("a", "ready", true), b("b", "ready", false)}, LastMinute: lastMinute{Retries: map[string]int64{"lost": 1}, Refusals: map[string]int64{"backend_lost": 2}}},
			[]remark{
				{levelBad, "In the last minute clients were refused: backend_lost 2."},
				{levelWarn, "a has been drained by an operator since 02:12:00 UTC (1h0m); 7 requests still run there."},
				{levelWarn, "In the last minute 1 request was sent to another kube-apiserver, unseen by clients: lost 1."},
			}},
		{"panic", state{Panicking: true, Backends: []backendState{b("a", "draining", false), b("b", "dead", false)}},
			[]remark{
				{levelBad, "No kube-apiserver is ready. Requests go to those that fail their checks: look at etcd first."},
				{levelWarn, "a is draining since 03:10:00 UTC (2m0s): not ready (etcd, ping); no other is ready, so that it may get requests all the same."},
				{levelWarn, "b is dead since 03:10:00 UTC (2m0s): unreachable, connection refused; no other is ready, so that it may get requests all the same."},
			}},
		{"all that is ready is drained", state{Backends: []backendState{b("a", "ready", true), b("b", "dead", false)}},
			[]remark{
				{levelWarn, "No kube-apiserver is ready that is not drained, so that requests go to a all the same."},
				{levelWarn, "a has been drained by an operator since 02:12:00 UTC (1h0m); 7 requests still run there."},
				{levelWarn, "b is dead since 03:10:00 UTC (2m0s): unreachable, connection refused; its requests go to what is drained, a."},
			}},
		{"certificates", state{Stopping: true, Backends: []backendState{b("a", "unknown", false)}, Certificates: []certificateState{{"serving", "/tls.crt", "", now.Add(-time.Second)}, {"frontProxy", "/fp.crt", "", now.Add(25 * time.Hour)}, {"probe", "/fp.crt", "", now.Add(25 * time.Hour)}, {"clientCA", "/ca.crt", "", now.Add(15 * 24 * time.Hour)}}},
			[]remark{
				{levelBad, "The certificate /tls.crt (serving) has expired, at 2026-11-25T03:11:59Z."},
				{levelWarn, "a has not been judged yet."},
				{levelWarn, "The certificate /fp.crt (frontProxy and probe) expires in 1d1h."},
				{levelWarn, "This balancer is shutting down."},
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.s.At = now
			if d := cmp.Diff(tt.want, summarize(&tt.s)); d != "" {
				t.Error(d)
			}
		})
	}
}
