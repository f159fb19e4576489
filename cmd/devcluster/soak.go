package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/devcluster/cluster"
	"apiserver-lb/cmd/devcluster/faults"
	"apiserver-lb/cmd/devcluster/load"
)

// soakFaults are those that no read and no watch may suffer from: one apiserver is always
// left, and etcd.
var soakFaults = []string{"kill", "term0", "hang", "rolling", "blackhole", "notready", "reset"}

const (
	// soakSettle is how long the balancer has to itself before it is measured.
	soakSettle = 20 * time.Second
	// leastHold and mostHold bound how long a fault lasts, and leastPause and mostPause the
	// time between two.
	leastHold, mostHold   = 2 * time.Second, 12 * time.Second
	leastPause, mostPause = time.Second, 6 * time.Second
)

// soakOptions are the flags of soak.
type soakOptions struct {
	dir                *string
	balancer           string
	duration           time.Duration
	seed               uint64
	workers, informers int
}

func newSoak(dir *string) *cobra.Command {
	o := &soakOptions{dir: dir}
	cmd := &cobra.Command{
		Use:   "soak",
		Short: "Make apiservers fail at random, under load, and look for failed requests, missed events and leaks of the balancer",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context(), cmd.OutOrStdout()) },
	}
	f := cmd.Flags()
	f.StringVar(&o.balancer, "balancer", "", "the `path` of the apiserver-lb binary (required)")
	f.DurationVar(&o.duration, "duration", 20*time.Minute, "for how long faults are made")
	f.Uint64Var(&o.seed, "seed", 0, "the `number` that the faults follow from; 0: one at random, which is printed, so that a run can be repeated")
	f.IntVar(&o.workers, "workers", 6, "how many clients make requests")
	f.IntVar(&o.informers, "informers", 6, "how many clients watch")
	return cmd
}

// step is one fault of a soak.
type step struct {
	fault       string
	hold, pause time.Duration
}

// nextStep draws a fault. The same seed draws the same faults.
func nextStep(r *rand.Rand) step {
	between := func(least, most time.Duration) time.Duration {
		return least + time.Duration(r.Int64N(int64(most-least)))
	}
	return step{soakFaults[r.IntN(len(soakFaults))], between(leastHold, mostHold), between(leastPause, mostPause)}
}

// vitals are what a leak would show in.
type vitals struct{ goroutines, files, memory, clients float64 }

// readVitals asks the balancer's admin listener.
func readVitals(ctx context.Context, admin string) (v vitals, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, admin+"/metrics", nil)
	if err != nil {
		return v, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return v, err
	}
	defer res.Body.Close()
	return parseVitals(res.Body)
}

func parseVitals(metrics io.Reader) (v vitals, err error) {
	found := 0
	for lines := bufio.NewScanner(metrics); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		to := map[string]*float64{"go_goroutines": &v.goroutines, "process_open_fds": &v.files,
			"process_resident_memory_bytes": &v.memory, "apiserver_lb_client_connections": &v.clients}[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			return v, fmt.Errorf("%s: %w", name, err)
		}
		found++
	}
	if found != 4 {
		return v, fmt.Errorf("/metrics has %d of 4 vitals", found)
	}
	return v, nil
}

func (v vitals) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f descriptors, %.1f MiB, %.0f clients", v.goroutines, v.files, v.memory/(1<<20), v.clients)
}

// leaks compares what was before with what is after: a little more is other requests at the
// moment, and memory that the runtime keeps.
func leaks(before, after vitals) (found []string) {
	for _, x := range []struct {
		what                   string
		before, after, allowed float64
	}{
		{"goroutines", before.goroutines, after.goroutines, 15},
		{"descriptors", before.files, after.files, 15},
		{"clients", before.clients, after.clients, 10},
		{"bytes of memory", before.memory, after.memory, 24 << 20},
	} {
		if x.after > x.before+x.allowed {
			found = append(found, fmt.Sprintf("%.0f %s, %.0f before", x.after, x.what, x.before))
		}
	}
	return found
}

func (o *soakOptions) run(ctx context.Context, out io.Writer) (err error) {
	if _, err := exec.LookPath(o.balancer); err != nil {
		return usageError{fmt.Errorf("--balancer: %w: build it first: go build -o bin/apiserver-lb ./cmd/apiserver-lb", err)}
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	fmt.Fprintf(out, "the faults follow from --seed %d\n", o.seed)
	c, b, err := startBalanced(ctx, out, *o.dir, false, o.balancer)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	admins, err := adminConfigs(c)
	if err != nil {
		return err
	}
	if err := load.Prepare(ctx, admins, "soak", loadUser); err != nil {
		return err
	}
	w, err := load.StartWriter(ctx, "soak", admins...)
	if err != nil {
		return err
	}
	defer w.Stop()
	config, err := restConfig(c, "soak", b.URL, c.Token(loadUser))
	if err != nil {
		return err
	}
	l, err := load.Start(ctx, load.Options{Name: "soak", Config: config, Writer: w, Workers: o.workers, Informers: o.informers, Settle: 45 * time.Second})
	if err != nil {
		return err
	}
	before, after, err := o.soak(ctx, c, b.AdminURL, out)
	report := l.Stop(ctx)
	if err != nil {
		return err
	}
	return verdict(report, before, after, out)
}

// soak makes faults for as long as is asked for, and returns the vitals before and after.
func (o *soakOptions) soak(ctx context.Context, c *cluster.Cluster, admin string, out io.Writer) (before, after vitals, err error) {
	if err := wait(ctx, soakSettle); err != nil {
		return before, after, err
	}
	if before, err = readVitals(ctx, admin); err != nil {
		return before, after, err
	}
	fmt.Fprintf(out, "before: %s\n", before)
	begin := time.Now()
	all := faults.All()
	for r := rand.New(rand.NewPCG(o.seed, 0)); time.Since(begin) < o.duration; {
		s := nextStep(r)
		f := all[slices.IndexFunc(all, func(f faults.Fault) bool { return f.Name == s.fault })]
		at := time.Since(begin)
		times, err := f.Make(ctx, c, s.hold)
		if err != nil {
			return before, after, err
		}
		fmt.Fprintf(out, "%6.0f s: %s, in order again after %.1f s\n", at.Seconds(), f.Name, times.Healed.Sub(times.Began).Seconds())
		if err := wait(ctx, s.pause); err != nil {
			return before, after, err
		}
	}
	if err := wait(ctx, soakSettle); err != nil {
		return before, after, err
	}
	after, err = readVitals(ctx, admin)
	fmt.Fprintf(out, "after: %s\n", after)
	return before, after, err
}

// verdict says what the soak has shown; an error where that is not as it should be.
func verdict(r *load.Report, before, after vitals, out io.Writer) error {
	fmt.Fprint(out, r.Text(r.Began))
	var errs []error
	if n := r.FailedReads(); n > 0 {
		errs = append(errs, fmt.Errorf("%d reads failed", n))
	}
	if r.Missed > 0 {
		errs = append(errs, fmt.Errorf("%d of %d events were missed", r.Missed, r.Events))
	}
	for _, f := range r.Failures {
		if f.Verb.Write() && !f.Unknown() {
			errs = append(errs, fmt.Errorf("a write failed whose outcome is known: %v", f))
		}
	}
	for _, l := range leaks(before, after) {
		errs = append(errs, errors.New("a leak: "+l))
	}
	return errors.Join(errs...)
}
