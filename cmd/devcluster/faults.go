package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"apiserver-lb/cmd/devcluster/cluster"
	"apiserver-lb/cmd/devcluster/faults"
	"apiserver-lb/cmd/devcluster/load"
	"apiserver-lb/cmd/devcluster/peers"
)

const (
	// ours is the balancer among the endpoints.
	ours = "apiserver-lb"
	// loadUser is the user of --token-auth-file that all clients are.
	loadUser = "alice"
	// sharesAfter is when, after the recovery, shares are looked at, and sharesFor for how long.
	sharesAfter, sharesFor = 60 * time.Second, 10 * time.Second
	// warm is how long a load runs before the fault.
	warm = 3 * time.Second
)

// faultsOptions are the flags of faults.
type faultsOptions struct {
	dir                *string
	balancer           string
	faults, peers      []string
	onlyBalancer       bool
	duration, pause    time.Duration
	workers, informers int
	keepDir            bool
	report             string
}

func newFaults(dir *string) *cobra.Command {
	o := &faultsOptions{dir: dir}
	cmd := &cobra.Command{
		Use:   "faults",
		Short: "Make apiservers fail, and compare what clients notice behind the balancer and behind other proxies",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.balancer, "balancer", "", "the `path` of the apiserver-lb binary (required)")
	f.StringSliceVar(&o.faults, "faults", nil, "which faults, of "+strings.Join(names(faults.All(), func(f faults.Fault) string { return f.Name }), ", ")+" (default all)")
	f.StringSliceVar(&o.peers, "peers", nil, "which other proxies, of "+strings.Join(names(peers.All(), func(p peers.Peer) string { return p.Name }), ", ")+" (default all that are installed)")
	f.BoolVar(&o.onlyBalancer, "only-balancer", false, "no other proxies")
	f.DurationVar(&o.duration, "duration", 15*time.Second, "how long to go on after everything is in order again")
	f.IntVar(&o.workers, "workers", 6, "how many clients make requests, for each endpoint")
	f.IntVar(&o.informers, "informers", 3, "how many clients watch, for each endpoint")
	f.DurationVar(&o.pause, "pause", 500*time.Millisecond, "the mean time between two requests of a client, of each kind of request")
	f.BoolVar(&o.keepDir, "keep-dir", false, "leave the directory with all logs in place at the end")
	f.StringVar(&o.report, "report", "", "a `file` that gets the table, too")
	return cmd
}

// names are the names of some things.
func names[T any](all []T, name func(T) string) (out []string) {
	for _, x := range all {
		out = append(out, name(x))
	}
	return out
}

// choose returns those that are asked for, in the order of all; everything for nothing.
func choose[T any](flag string, all []T, asked []string, name func(T) string) ([]T, error) {
	for _, a := range asked {
		if !slices.Contains(names(all, name), a) {
			return nil, usageError{fmt.Errorf("%s: %q is not one of %s", flag, a, strings.Join(names(all, name), ", "))}
		}
	}
	if len(asked) == 0 {
		return all, nil
	}
	return slices.DeleteFunc(slices.Clone(all), func(x T) bool { return !slices.Contains(asked, name(x)) }), nil
}

// plan is what the flags come to.
type plan struct {
	faults []faults.Fault
	peers  []peers.Peer
	left   []string // peers that are left out, and why
}

func (o *faultsOptions) plan() (p plan, err error) {
	if o.balancer == "" {
		return p, usageError{errors.New("--balancer: give the path of the apiserver-lb binary")}
	}
	if _, err := exec.LookPath(o.balancer); err != nil {
		return p, usageError{fmt.Errorf("--balancer: %w: build it first: go build -o bin/apiserver-lb ./cmd/apiserver-lb", err)}
	}
	if p.faults, err = choose("--faults", faults.All(), o.faults, func(f faults.Fault) string { return f.Name }); err != nil {
		return p, err
	}
	if o.onlyBalancer {
		return p, nil
	}
	if p.peers, err = choose("--peers", peers.All(), o.peers, func(p peers.Peer) string { return p.Name }); err != nil {
		return p, err
	}
	p.peers = slices.DeleteFunc(p.peers, func(x peers.Peer) bool {
		if x.Installed() {
			return false
		}
		p.left = append(p.left, fmt.Sprintf("%s is left out: it is not installed (Debian: apt-get install %s)", x.Name, x.Package))
		return true
	})
	return p, nil
}

// endpoint is a proxy in front of the cluster.
type endpoint struct {
	name   string
	config *rest.Config
}

// run makes all faults and prints the table.
func (o *faultsOptions) run(ctx context.Context, out io.Writer) (err error) {
	p, err := o.plan()
	if err != nil {
		return err
	}
	c, b, err := startBalanced(ctx, out, *o.dir, o.keepDir, o.balancer)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	for _, why := range p.left {
		fmt.Fprintln(out, why)
	}
	r := &faultsRun{options: o, cluster: c, balancer: b, out: out}
	urls := map[string]string{ours: b.URL}
	order := []string{ours}
	for _, x := range p.peers {
		if urls[x.Name], err = x.Start(ctx, c); err != nil {
			return err
		}
		order = append(order, x.Name)
		fmt.Fprintf(out, "%-24s ready: %s\n", x.Name, urls[x.Name])
	}
	for _, name := range order {
		config, err := restConfig(c, name, urls[name], c.Token(loadUser))
		if err != nil {
			return err
		}
		r.endpoints = append(r.endpoints, endpoint{name, config})
	}
	if r.admins, err = adminConfigs(c); err != nil {
		return err
	}
	var rows []row
	for _, f := range p.faults {
		more, failed := r.fault(ctx, f)
		if failed != nil {
			err = failed // what has been measured is said all the same
			break
		}
		rows = append(rows, more...)
	}
	table := faultsTable(rows)
	fmt.Fprintf(out, "\n%s", table)
	for _, x := range p.peers {
		fmt.Fprintf(out, "%s: %s\n", x.Name, x.Note)
	}
	if o.report != "" {
		err = errors.Join(err, os.WriteFile(o.report, []byte(table), 0o600))
	}
	return err
}

// startBalanced starts a cluster and the balancer in front of it, in a network namespace of
// their own. dir may be empty: a temporary one.
func startBalanced(ctx context.Context, out io.Writer, dir string, keepDir bool, balancer string) (c *cluster.Cluster, b *cluster.Balancer, err error) {
	// Whatever comes from outside comes before the namespace is entered.
	if !cluster.InNamespace() {
		if _, err := cluster.Build(ctx, cluster.BuildOptions{Log: out}); err != nil {
			return nil, nil, err
		}
	}
	if err := cluster.EnterNamespace(); err != nil {
		return nil, nil, err
	}
	klog.SetLogger(logr.Discard()) // client-go tells of every watch that ends
	if dir != "" {
		if dir, err = clusterDir(dir); err != nil {
			return nil, nil, err
		}
	}
	if c, err = cluster.Start(ctx, cluster.Options{Dir: dir, KeepDir: keepDir, Log: out}); err != nil {
		return nil, nil, err
	}
	if b, err = c.StartBalancer(ctx, cluster.BalancerOptions{Path: balancer}); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("starting the balancer: %w", err), c.Stop())
	}
	return c, b, nil
}

// adminConfigs are the admin's configurations of client-go, directly at each apiserver.
func adminConfigs(c *cluster.Cluster) (configs []*rest.Config, err error) {
	for _, a := range c.Apiservers() {
		config, err := restConfig(c, fmt.Sprintf("direct-%d", a.Index), a.URL(), c.Admin())
		if err != nil {
			return nil, err
		}
		configs = append(configs, config)
	}
	return configs, nil
}

// restConfig is client-go's configuration of a user at a URL.
func restConfig(c *cluster.Cluster, name, url string, user cluster.User) (*rest.Config, error) {
	file := filepath.Join(c.Dir, "load-"+name+".kubeconfig")
	if err := c.Kubeconfig(file, url, user); err != nil {
		return nil, err
	}
	return clientcmd.BuildConfigFromFlags("", file)
}

// faultsRun is a cluster with endpoints in front of it.
type faultsRun struct {
	options   *faultsOptions
	cluster   *cluster.Cluster
	balancer  *cluster.Balancer
	endpoints []endpoint
	admins    []*rest.Config // by apiserver
	out       io.Writer
}

// fault makes one fault under load on every endpoint.
func (r *faultsRun) fault(ctx context.Context, f faults.Fault) ([]row, error) {
	fmt.Fprintf(r.out, "\n%s: %s\n", f.Name, f.Short)
	if len(f.Flags) > 0 {
		if err := faults.WithFlags(ctx, r.cluster, f.Flags...); err != nil {
			return nil, err
		}
		// Others come up without the flags at the end.
		defer func() {
			for _, a := range r.cluster.Apiservers() {
				a.SetFlags()
			}
		}()
	}
	if err := faults.Ready(ctx, r.cluster); err != nil {
		return nil, err
	}
	if err := load.Prepare(ctx, r.admins, f.Name, loadUser); err != nil {
		return nil, err
	}
	writers := r.admins[:1]
	if f.Everybody {
		writers = r.admins
	}
	w, err := load.StartWriter(ctx, f.Name, writers...)
	if err != nil {
		return nil, err
	}
	defer w.Stop()
	loads, err := r.startLoads(ctx, f, w)
	defer func() {
		for _, l := range loads {
			if l != nil {
				ended, cancel := context.WithCancel(ctx)
				cancel()
				l.Stop(ended)
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, warm); err != nil {
		return nil, err
	}
	times, err := f.Make(ctx, r.cluster, 0)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(r.out, "everything is in order again after %.1f s\n", times.Healed.Sub(times.Began).Seconds())
	after := r.options.duration
	if f.Shares {
		after = sharesAfter + sharesFor
	}
	if err := wait(ctx, time.Until(times.Healed.Add(after))); err != nil {
		return nil, err
	}
	var stopping sync.WaitGroup
	reports := make([]*load.Report, len(loads))
	for i, l := range loads {
		stopping.Go(func() { reports[i] = l.Stop(ctx) })
	}
	stopping.Wait()
	loads = nil
	var rows []row
	for i, e := range r.endpoints {
		row := row{fault: f.Name, endpoint: e.name, report: reports[i]}
		if f.Shares {
			if row.shares, err = r.shares(e, f, times); err != nil {
				return nil, err
			}
		}
		if first := row.report.FirstSuccess(times.Began.Add(time.Second)); !times.Ready.IsZero() && !first.IsZero() {
			row.first = first.Sub(times.Ready)
		}
		rows = append(rows, row)
		fmt.Fprintf(r.out, "%s: %s", e.name, row.report.Text(times.Began))
		for _, text := range row.report.Texts(times.Began, 8) {
			fmt.Fprintln(r.out, "  ", text)
		}
	}
	if len(f.Flags) > 0 {
		return rows, faults.WithFlags(ctx, r.cluster)
	}
	return rows, nil
}

// loadName names the load of a fault on an endpoint.
func loadName(e endpoint, f faults.Fault) string { return f.Name + "-" + e.name }

// startLoads starts a load on each endpoint.
func (r *faultsRun) startLoads(ctx context.Context, f faults.Fault, w *load.Writer) ([]*load.Load, error) {
	var group errgroup.Group
	loads := make([]*load.Load, len(r.endpoints))
	for i, e := range r.endpoints {
		group.Go(func() error {
			l, err := load.Start(ctx, load.Options{
				Name: loadName(e, f), Config: e.config, Writer: w,
				Workers: r.options.workers, Informers: r.options.informers, Pause: r.options.pause,
				Settle: 45 * time.Second,
			})
			loads[i] = l
			return err
		})
	}
	return loads, group.Wait()
}

// shares asks the audit logs how many requests each apiserver got a minute after the recovery.
func (r *faultsRun) shares(e endpoint, f faults.Fault, times faults.Times) ([]int, error) {
	var logs []string
	for _, a := range r.cluster.Apiservers() {
		logs = append(logs, a.AuditLog())
	}
	from := times.Healed.Add(sharesAfter)
	return load.Served(logs, load.UserAgent(loadName(e, f)), from, from.Add(sharesFor))
}

// wait sleeps, or returns the error of ctx when that ends first.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// row is what clients of an endpoint noticed of a fault.
type row struct {
	fault, endpoint string
	report          *load.Report
	shares          []int         // requests by apiserver, a minute after the recovery
	first           time.Duration // from the first ready apiserver to the first success; 0: not measured
}

// faultsTable is the table in Markdown.
func faultsTable(rows []row) string {
	var b strings.Builder
	b.WriteString("| Fault | Endpoint | Requests | Failed reads | Failed writes | Longest gap of a client: reads | writes | Nobody served | Events missed | Longest lag | Re-LISTs | Shares after 60 s |\n")
	b.WriteString("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|\n")
	last := ""
	for _, r := range rows {
		name := r.fault
		if name == last {
			name = ""
		}
		last = r.fault
		unknown := 0
		for _, f := range r.report.Failures {
			if f.Unknown() {
				unknown++
			}
		}
		writes := fmt.Sprint(r.report.FailedWrites())
		if unknown > 0 {
			writes += fmt.Sprintf(" (%d outcome unknown)", unknown)
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %s | %s | %s | %s | %d of %d | %s | %d | %s |\n", name, r.endpoint,
			r.report.Requests(), r.report.FailedReads(), writes,
			inSeconds(r.report.Longest(load.Get, load.List, load.Short).Duration()), inSeconds(r.report.Longest(load.Put, load.Apply).Duration()), inSeconds(r.report.Gap.Duration()),
			r.report.Missed, r.report.Events, inSeconds(r.report.LagMax), r.report.Relists, r.sharesText())
	}
	return b.String()
}

// sharesText is the ratio of the largest share to the smallest, and the shares.
func (r row) sharesText() string {
	if r.first != 0 {
		return fmt.Sprintf("first success %+.2f s after the first ready one", r.first.Seconds())
	}
	if len(r.shares) == 0 {
		return ""
	}
	var parts []string
	for _, n := range r.shares {
		parts = append(parts, fmt.Sprint(n))
	}
	ratio := math.Inf(1)
	if least := slices.Min(r.shares); least > 0 {
		ratio = float64(slices.Max(r.shares)) / float64(least)
	}
	return fmt.Sprintf("%.2f (%s)", ratio, strings.Join(parts, " "))
}

func inSeconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
