// Command bench measures what a proxy costs: apiserver-lb, HAProxy, nginx,
// Caddy and no proxy at all, one after another in one run, in front of the same
// three backends, over loopback, TLS 1.3 and HTTP/2 with the same cipher and
// curve on both legs.
//
// It needs h2load (Debian: nghttp2-client) and the other proxies, and installs
// them with apt-get where they are missing and it runs as root; a proxy that it
// cannot have is left out aloud. h2load makes the load of requests; watches and
// handshakes are this program's own. For each case it reports the CPU time of
// the proxy (all threads and child processes, user and system), rates, latency
// at a fixed low rate, and memory, as medians of several runs; each figure's
// lowest and highest value shows the noise. Of apiserver-lb there are three: as it comes,
// with what can be switched off switched off, and with all that tells of requests. The peers take turns under each
// case, in an order that changes from run to run. The idle watches want 3,000
// open files of each process (ulimit -Hn).
//
// With -passthrough the TLS of clients ends at the backends, and the only other proxy is
// HAProxy in mode tcp.
//
// With -attacks it plays those of HTTP/2 instead, against apiserver-lb, HAProxy and a
// ReverseProxy of Go's library, each fresh, with a bystander that makes 50 requests a
// second meanwhile.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	balancer, haproxy string
	runs              int
	duration          time.Duration
	peers, cases      string
	output, plot      string
	attacks           bool
	passthrough       bool
}

// shortest is a duration that shows whether the benchmark works, no more.
const shortest = 500 * time.Millisecond

func init() {
	// The proxies are told to end with the thread that started them, so main
	// stays on the first one, which lives as long as the process.
	runtime.LockOSThread()
}

func main() {
	if len(os.Args) == 4 && os.Args[1] == "backends" {
		if err := runBackends(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintf(os.Stderr, "bench: backends: %v\n", err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 3 && os.Args[1] == "reverseproxy" {
		if err := runReverseProxy(os.Args[2]); err != nil {
			fmt.Fprintf(os.Stderr, "bench: reverseproxy: %v\n", err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.balancer, "balancer", "bin/apiserver-lb", "the apiserver-lb `program`")
	flag.StringVar(&o.haproxy, "haproxy", "haproxy", "the HAProxy `program`")
	flag.IntVar(&o.runs, "runs", 5, "`how many` runs; the report has their medians")
	flag.DurationVar(&o.duration, "duration", 5*time.Second, "`how long` each case is measured")
	var names []string
	for _, p := range allPeers("", "") {
		names = append(names, p.name)
	}
	flag.StringVar(&o.peers, "peers", strings.Join(names, ","), "`which` peers, comma-separated")
	flag.StringVar(&o.cases, "cases", "", "only the cases whose name has this `text` in it")
	flag.StringVar(&o.output, "o", "", "write the report to this `file` as well")
	flag.StringVar(&o.plot, "plot", "", "draw the ratios into this `file`, as SVG")
	flag.BoolVar(&o.attacks, "attacks", false, "measure attacks instead, beside HAProxy and a plain Go proxy; of the other flags -balancer, -haproxy and -cases apply")
	flag.BoolVar(&o.passthrough, "passthrough", false, "let TLS end at the backends: compares apiserver-lb with HAProxy in mode tcp, of those in -peers")
	flag.Parse()

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	run := bench
	if o.attacks {
		run = func(ctx context.Context, o options) error { return measureAttacks(ctx, o, os.Stdout) }
	}
	if err := run(ctx, o); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// choose picks the peers and cases that the options name.
func (o options) choose() ([]peer, []testCase, error) {
	if o.runs < 1 {
		return nil, nil, fmt.Errorf("-runs %d: want at least 1", o.runs)
	}
	if o.duration < shortest {
		return nil, nil, fmt.Errorf("-duration %v: want at least %v", o.duration, shortest)
	}
	var peers []peer
	known := allPeers(o.balancer, o.haproxy)
	passing := known
	if o.passthrough {
		passing = passthroughPeers(o.balancer, o.haproxy)
	}
	for name := range strings.SplitSeq(o.peers, ",") {
		is := func(p peer) bool { return p.name == name }
		i := slices.IndexFunc(passing, is)
		if i < 0 && slices.ContainsFunc(known, is) {
			continue // it cannot
		}
		if i < 0 {
			return nil, nil, fmt.Errorf("-peers: there is no %q", name)
		}
		peers = append(peers, passing[i])
	}
	if len(peers) == 0 {
		return nil, nil, errors.New("-peers: none of them can leave TLS to the backends, as -passthrough wants")
	}
	cases := slices.DeleteFunc(allCases(), func(c testCase) bool { return !strings.Contains(c.name, o.cases) })
	if len(cases) == 0 {
		return nil, nil, fmt.Errorf("-cases: none has %q in its name", o.cases)
	}
	return peers, cases, nil
}

func bench(ctx context.Context, o options) error {
	wanted, cases, err := o.choose()
	if err != nil {
		return err
	}
	if err := ensureTool(ctx, "h2load", "nghttp2-client", "to make the load"); err != nil {
		return err
	}
	peers, versions, leftOut, err := gather(ctx, wanted)
	if err != nil {
		return err
	}
	version, err := firstLine(ctx, "h2load", "--version")
	if err != nil {
		return err
	}
	head, err := describe(time.Now(), append(versions, version, runtime.Version()))
	if err != nil {
		return err
	}

	l, closeLab, err := openLab(ctx)
	if err != nil {
		return err
	}
	defer closeLab()
	got, err := measureAll(ctx, l, peers, cases, o)
	if err != nil {
		return err
	}

	var names []string
	for _, p := range peers {
		names = append(names, p.name)
	}
	report := fmt.Sprintf("%sEach figure is the median of %d (the lowest to the highest), each measured for %v.\n\n%s\n%s\n%s%s",
		head, o.runs, o.duration, figures(got, names, cases), ratios(got, names, cases), costs(got, names, cases), notes(l, peers, leftOut, got, cases))
	fmt.Print(report)
	if o.output != "" {
		if err := os.WriteFile(o.output, []byte(report), 0o600); err != nil {
			return err
		}
	}
	if o.plot != "" {
		if err := os.WriteFile(o.plot, []byte(plot(plotRows(got, names, cases), names)), 0o600); err != nil {
			return err
		}
	}
	if n := len(got.errs); n > 0 {
		return fmt.Errorf("%d measurements failed; the report says which", n)
	}
	return nil
}

// measureAll measures each peer under each case in each run. A peer that fails
// in a case is not measured in it again.
func measureAll(ctx context.Context, l *lab, peers []peer, cases []testCase, o options) (*results, error) {
	got := newResults()
	for run := range o.runs {
		for _, c := range cases {
			for i := range peers {
				p := peers[(run+i)%len(peers)]
				if !c.suits(p) || got.failed(p.name, c.name) {
					continue
				}
				s, err := measure(ctx, l, p, c, o.duration)
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				if err != nil {
					fmt.Fprintf(os.Stderr, "run %d of %d  %-12s  %s failed: %v\n", run+1, o.runs, p.name, c.name, err)
					got.fail(p.name, c.name, err)
					continue
				}
				fmt.Fprintf(os.Stderr, "run %d of %d  %-12s  %-50s  %s\n", run+1, o.runs, p.name, c.name, c.summary(p, s))
				got.add(p.name, c.name, s)
			}
		}
	}
	return got, nil
}
