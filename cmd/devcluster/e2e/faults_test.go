package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	"apiserver-lb/cmd/devcluster/faults"
	loadgen "apiserver-lb/cmd/devcluster/load"
)

// faultUser is whom the clients of loads are.
const faultUser = "alice"

// underFault runs a load through a balancer of its own while a fault is made, and for a
// while after everything is in order again. everybody says that no apiserver is spared.
func underFault(t *testing.T, everybody bool, after time.Duration, fault func(context.Context) (faults.Times, error)) (*loadgen.Report, faults.Times) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	t.Cleanup(func() {
		for _, a := range shared.Apiservers() {
			repair(t, a)
		}
	})
	own := ownBalancer(t, func(config map[string]any) { section(config, "log")["level"] = "info" })
	var direct []*rest.Config
	for _, a := range shared.Apiservers() {
		direct = append(direct, restConfig(t, a.URL(), shared.Admin()))
	}
	const namespace = "faults"
	if err := loadgen.Prepare(ctx, direct, namespace, faultUser); err != nil {
		t.Fatal(err)
	}
	if !everybody {
		direct = direct[:1]
	}
	w, err := loadgen.StartWriter(ctx, namespace, direct...)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	l, err := loadgen.Start(ctx, loadgen.Options{
		Name: fmt.Sprint("e2e-", time.Now().UnixMilli()), Config: restConfig(t, own.URL, shared.Token(faultUser)),
		Writer: w, Workers: 6, Informers: 3,
	})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	times, err := fault(ctx)
	if err == nil {
		time.Sleep(time.Until(times.Healed.Add(after)))
	}
	r := l.Stop(ctx)
	t.Log(r.Text(times.Began))
	for _, text := range r.Texts(times.Began, 8) {
		t.Log(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	if r.Requests() < 300 || r.Events < 50 {
		t.Errorf("only %d requests and %d events: too few to prove anything", r.Requests(), r.Events)
	}
	return r, times
}

// named makes the fault of this name last for hold.
func named(t *testing.T, name string, hold time.Duration) (faults.Fault, func(context.Context) (faults.Times, error)) {
	t.Helper()
	all := faults.All()
	i := slices.IndexFunc(all, func(f faults.Fault) bool { return f.Name == name })
	if i < 0 {
		t.Fatalf("no fault is named %s", name)
	}
	return all[i], func(ctx context.Context) (faults.Times, error) { return all[i].Make(ctx, shared, hold) }
}

// noReadFails wants every read to have succeeded, and no client to have waited for longer.
func noReadFails(t *testing.T, r *loadgen.Report, longest time.Duration) {
	t.Helper()
	if n := r.FailedReads(); n > 0 {
		t.Errorf("%d reads failed", n)
	}
	for _, v := range []loadgen.Verb{loadgen.Get, loadgen.List, loadgen.Short} {
		if gap := r.Longest(v).Duration(); gap > longest {
			t.Errorf("a client had no %s for %v, want at most %v", v, gap.Round(time.Millisecond), longest)
		}
	}
}

// writesFailUnknown wants writes to have failed only where their outcome is unknown, and
// no client to have waited for longer.
func writesFailUnknown(t *testing.T, r *loadgen.Report, longest time.Duration) {
	t.Helper()
	for _, f := range r.Failures {
		if f.Verb.Write() && !f.Unknown() {
			t.Errorf("%s failed, and its outcome is not unknown: %v", f.Verb, f.Err)
		}
	}
	for _, v := range []loadgen.Verb{loadgen.Put, loadgen.Apply} {
		if gap := r.Longest(v).Duration(); gap > longest {
			t.Errorf("a client had no %s for %v, want at most %v", v, gap.Round(time.Millisecond), longest)
		}
	}
}

// noEventMissed wants every informer to have seen every change.
func noEventMissed(t *testing.T, r *loadgen.Report, longest time.Duration) {
	t.Helper()
	if r.Missed > 0 {
		t.Errorf("%d events were missed, with %d new LISTs", r.Missed, r.Relists)
	}
	if r.LagMax > longest {
		t.Errorf("an event came after %v, want at most %v", r.LagMax.Round(time.Millisecond), longest)
	}
}

// Faults of one apiserver of three, or of the network to it, under all kinds of requests:
// no read fails, no event is lost, and writes fail only where their outcome is unknown.
func TestFaultOfOne(t *testing.T) {
	for _, tt := range []struct {
		fault   string
		hold    time.Duration
		longest time.Duration
	}{
		{"kill", 2 * time.Second, 3 * time.Second},
		{"hang", 7 * time.Second, 5 * time.Second},
		{"blackhole", 9 * time.Second, 8 * time.Second},
		{"reset", 2 * time.Second, 3 * time.Second},
	} {
		t.Run(tt.fault, func(t *testing.T) {
			f, fault := named(t, tt.fault, tt.hold)
			if f.Network {
				needNamespace(t)
				needTool(t, "iptables")
				needTool(t, "ss")
			}
			r, _ := underFault(t, false, 3*time.Second, fault)
			noReadFails(t, r, tt.longest)
			writesFailUnknown(t, r, tt.longest)
			noEventMissed(t, r, tt.longest)
		})
	}
}

// An apiserver that loses sight of etcd answers what it has cached, and lets the rest
// wait, for 20 s and more: once its /readyz fails it gets no more requests, reads that
// wait there go elsewhere, and its watches end.
func TestFaultCutFromEtcd(t *testing.T) {
	needNamespace(t)
	needTool(t, "iptables")
	_, fault := named(t, "notready", 20*time.Second)
	r, _ := underFault(t, false, 3*time.Second, fault)
	noReadFails(t, r, 10*time.Second)
	noEventMissed(t, r, 12*time.Second) // watches end spread over 5 s
	if gap := r.Gap.Duration(); gap > time.Second {
		t.Errorf("nobody was served for %v", gap)
	}
}

// Lost packets between the balancer and every apiserver delay requests, and fail none.
func TestFaultLoss(t *testing.T) {
	needNamespace(t)
	needTool(t, "iptables")
	_, fault := named(t, "loss", 6*time.Second)
	r, _ := underFault(t, true, 2*time.Second, fault)
	noReadFails(t, r, 8*time.Second)
	writesFailUnknown(t, r, 8*time.Second)
	noEventMissed(t, r, 8*time.Second)
}

// Apiservers that end by SIGTERM, one after the other, each in another of the ways that it
// can be configured: no request of any kind fails, no event is lost.
func TestFaultTerminate(t *testing.T) {
	flags := [][]string{
		nil,
		{"--shutdown-delay-duration=4s"},
		{"--shutdown-delay-duration=4s", "--shutdown-send-retry-after=true"},
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var starting errgroup.Group
	for i, a := range shared.Apiservers() {
		if flags[i] == nil {
			continue
		}
		a.SetFlags(flags[i]...)
		t.Cleanup(func() { a.SetFlags() })
		starting.Go(func() error { return a.Restart(ctx) })
	}
	if err := starting.Wait(); err != nil {
		t.Fatal(err)
	}
	allReady(t)
	r, _ := underFault(t, true, 2*time.Second, func(ctx context.Context) (faults.Times, error) {
		times := faults.Times{Began: time.Now()}
		for _, a := range shared.Apiservers() {
			a.SetFlags() // the next start is without them
			t.Logf("%+.1f s: SIGTERM to kube-apiserver-%d %q", time.Since(times.Began).Seconds(), a.Index, flags[a.Index-1])
			if err := a.RestartGently(ctx); err != nil {
				return times, err
			}
			t.Logf("%+.1f s: kube-apiserver-%d is ready again", time.Since(times.Began).Seconds(), a.Index)
			time.Sleep(2 * time.Second)
		}
		times.Healed = time.Now()
		return times, nil
	})
	noReadFails(t, r, 3*time.Second)
	writesFailUnknown(t, r, 3*time.Second)
	noEventMissed(t, r, 3*time.Second)
	if n := r.FailedWrites(); n > 0 {
		t.Errorf("%d writes failed, want none", n)
	}
}

// Without etcd no apiserver is ready: all are used rather than none, so that whatever
// fails, fails by their word, and once etcd is back everything goes on at once.
func TestFaultEtcd(t *testing.T) {
	_, fault := named(t, "etcd", 5*time.Second)
	r, times := underFault(t, true, 6*time.Second, fault)
	for _, f := range r.Failures {
		if f.At.After(times.Healed.Add(3 * time.Second)) {
			t.Errorf("%.1f s after etcd is back: %s: %v", f.At.Sub(times.Healed).Seconds(), f.Verb, f.Err)
		}
	}
	for _, v := range loadgen.Verbs {
		if gap := r.Longest(v); gap.To.After(times.Healed.Add(5 * time.Second)) {
			t.Errorf("a client had its first %s %.1f s after etcd was back", v, gap.To.Sub(times.Healed).Seconds())
		}
	}
	if r.Missed > 0 {
		t.Errorf("%d events were missed", r.Missed)
	}
}

// When all apiservers have been gone and are back, the first ready one serves at once, and
// informers know everything again.
func TestFaultAll(t *testing.T) {
	_, fault := named(t, "all", 3*time.Second)
	r, times := underFault(t, true, 3*time.Second, fault)
	first := r.FirstSuccess(times.Began.Add(time.Second))
	if late := first.Sub(times.Ready); first.IsZero() || late > time.Second {
		t.Errorf("the first success came %v after the first ready apiserver, want at most 1s", late)
	}
	for _, f := range r.Failures {
		if f.At.After(times.Healed.Add(2 * time.Second)) {
			t.Errorf("%.1f s after all are ready: %s: %v", f.At.Sub(times.Healed).Seconds(), f.Verb, f.Err)
		}
	}
}
