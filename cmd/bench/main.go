// Command bench measures what a proxy costs: apiserver-lb, HAProxy and no proxy
// at all, one after another in one run, in front of the same three backends,
// over loopback, TLS 1.3 and HTTP/2 on both legs with the same cipher and curve.
//
// It needs h2load (Debian: nghttp2-client) and haproxy, and installs them with
// apt-get where they are missing and it runs as root. For each case it reports
// the CPU time of the proxy per request (all threads, user and system), the
// throughput, the latency at a fixed low rate and the peak of resident memory,
// as medians of several runs; each figure's lowest and highest value shows the
// noise. The order of the peers changes from run to run.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
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
	output            string
}

func init() {
	// The proxies are told to die with the thread that started them, so main
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
	var o options
	flag.StringVar(&o.balancer, "balancer", "bin/apiserver-lb", "the apiserver-lb `program`")
	flag.StringVar(&o.haproxy, "haproxy", "haproxy", "the HAProxy `program`")
	flag.IntVar(&o.runs, "runs", 5, "`how many` runs; the report has their medians")
	flag.DurationVar(&o.duration, "duration", 5*time.Second, "`how long` each case is measured")
	flag.StringVar(&o.peers, "peers", strings.Join([]string{noProxy, ours, reference}, ","), "`which` peers, comma-separated")
	flag.StringVar(&o.cases, "cases", "", "only the cases whose name has this `text` in it")
	flag.StringVar(&o.output, "o", "", "write the report to this `file` as well")
	flag.Parse()

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := bench(ctx, o); err != nil {
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
	if o.duration < time.Second {
		return nil, nil, fmt.Errorf("-duration %v: want at least 1s", o.duration)
	}
	var peers []peer
	known := allPeers(o.balancer, o.haproxy)
	for name := range strings.SplitSeq(o.peers, ",") {
		i := slices.IndexFunc(known, func(p peer) bool { return p.name == name })
		if i < 0 {
			return nil, nil, fmt.Errorf("-peers: there is no %q", name)
		}
		peers = append(peers, known[i])
	}
	cases := slices.DeleteFunc(allCases(), func(c testCase) bool { return !strings.Contains(c.name, o.cases) })
	if len(cases) == 0 {
		return nil, nil, fmt.Errorf("-cases: none has %q in its name", o.cases)
	}
	return peers, cases, nil
}

func bench(ctx context.Context, o options) error {
	peers, cases, err := o.choose()
	if err != nil {
		return err
	}
	if err := ensureTool(ctx, "h2load", "nghttp2-client", "to make the load"); err != nil {
		return err
	}
	var names, versions []string
	for _, p := range peers {
		names = append(names, p.name)
		if p.name == reference && o.haproxy == "haproxy" {
			if err := ensureTool(ctx, "haproxy", "haproxy", "to compare with"); err != nil {
				return err
			}
		}
		if p.version != nil {
			version, err := p.version(ctx)
			if err != nil {
				return err
			}
			versions = append(versions, version)
		}
	}
	version, err := firstLine(ctx, "h2load", "--version")
	if err != nil {
		return err
	}
	versions = append(versions, version, runtime.Version())
	head, err := describe(time.Now(), versions)
	if err != nil {
		return err
	}

	l, closeLab, err := openLab(ctx)
	if err != nil {
		return err
	}
	defer closeLab()
	got := results{}
	for run := range o.runs {
		for i := range peers {
			p := peers[(run+i)%len(peers)]
			for _, c := range cases {
				s, err := measure(ctx, l, p, c, o.duration)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", p.name, c.name, err)
				}
				fmt.Fprintf(os.Stderr, "run %d of %d  %-12s  %-32s  %8.0f requests/s  %6.1f µs of CPU each\n",
					run+1, o.runs, p.name, c.name, s.rate, float64(s.cpu)/float64(time.Microsecond))
				got.add(p.name, c.name, s)
			}
		}
	}

	report := fmt.Sprintf("%sEach figure is the median of %d (the lowest to the highest), each measured for %v.\n\n%s",
		head, o.runs, o.duration, table(got, names, cases))
	fmt.Print(report)
	if o.output != "" {
		return os.WriteFile(o.output, []byte(report), 0o600)
	}
	return nil
}

// openLab makes the certificates and starts the backends.
func openLab(ctx context.Context) (*lab, func(), error) {
	dir, err := os.MkdirTemp("", "apiserver-lb-bench-")
	if err != nil {
		return nil, nil, err
	}
	fail := func(err error) (*lab, func(), error) {
		_ = os.RemoveAll(dir)
		return nil, nil, err
	}
	p, err := newPKI(dir)
	if err != nil {
		return fail(err)
	}
	ca, err := os.ReadFile(p.ca)
	if err != nil {
		return fail(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	backends, stop, err := startBackends(ctx, p)
	if err != nil {
		return fail(err)
	}
	l := &lab{
		dir:           dir,
		pki:           p,
		backends:      backends,
		threads:       runtime.NumCPU(),
		clientThreads: max(1, runtime.NumCPU()/2),
		client: &http.Client{
			Timeout: 2 * time.Second,
			Transport: &http.Transport{
				TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
				ForceAttemptHTTP2: true,
				DisableKeepAlives: true,
			},
		},
	}
	return l, func() {
		stop()
		_ = os.RemoveAll(dir)
	}, nil
}

// ensureTool installs a Debian package if its program is missing and this
// process may install it.
func ensureTool(ctx context.Context, program, pkg, why string) error {
	if _, err := exec.LookPath(program); err == nil {
		return nil
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("%s is missing, %s: install it (Debian: apt-get install %s)", program, why, pkg)
	}
	fmt.Fprintf(os.Stderr, "installing %s with apt-get, %s\n", pkg, why)
	for _, args := range [][]string{{"update", "-q"}, {"install", "-q", "-y", "--no-install-recommends", pkg}} {
		cmd := exec.CommandContext(ctx, apt, args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return nil
}
