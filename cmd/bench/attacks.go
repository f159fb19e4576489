package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/template"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/cmd/internal/attack"
)

// plainProxy is what Go's library gives to everybody: ReverseProxy over net/http.
const plainProxy = "ReverseProxy"

// attackPeers returns those that attacks are measured beside.
func attackPeers(balancer, haproxy string) ([]peer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	peers := slices.DeleteFunc(allPeers(balancer, haproxy), func(p peer) bool { return p.name != ours && p.name != reference })
	return append(peers, peer{
		name: plainProxy, program: self,
		config: template.Must(template.New(plainProxy).Parse("{{.Listen}}\n{{.Cert}}\n{{.Key}}\n{{index .Backends 0}}\n")),
		args:   func(configFile string) []string { return []string{"reverseproxy", configFile} },
	}), nil
}

// runReverseProxy serves as the file says: listener, certificate, key, backend, a line each.
func runReverseProxy(configFile string) error {
	b, err := os.ReadFile(configFile) //nolint:gosec // the operator of the measurement names it
	if err != nil {
		return err
	}
	f := strings.Fields(string(b))
	if len(f) != 4 {
		return fmt.Errorf("%s: want four lines", configFile)
	}
	backend := &url.URL{Scheme: "https", Host: f[3]}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(backend) }}
	proxy.Transport = &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}} //nolint:gosec // a proxy of a measurement, whose backend is this program's
	server := &http.Server{Addr: f[0], Handler: proxy, ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13}}
	return server.ListenAndServeTLS(f[1], f[2])
}

// assault is an attack to be measured.
type assault struct {
	name string
	unit string
	most int // units; a peer that has taken so many is not going to end it
	// connections that the attack has; the units are those of all
	connections int
	settings    []http2.Setting
	reads       bool // reads what comes
	begin       func(c *attack.Conn)
	units       func(c *attack.Conn, from, n int)
	atOnce      int           // units between flushes
	holds       time.Duration // how long the attack stands when all is sent
}

// attackFor bounds how long an attack sends.
const attackFor = 5 * time.Second

func allAssaults() []assault {
	var all []assault
	for _, r := range attack.Resets {
		all = append(all, assault{name: "reset: " + r.Name, unit: "requests", most: 10_000, connections: 1, reads: true, atOnce: 50,
			units: func(c *attack.Conn, from, n int) {
				for i := range n {
					id := attack.Stream(from + i)
					c.Get(id, smallPath)
					r.Reset(c, id)
				}
			}})
	}
	for i, k := range attack.Continuations {
		all = append(all, assault{name: "CONTINUATION " + k.Name, unit: "frames", most: 20_000, connections: 1, reads: true, atOnce: 1,
			begin: func(c *attack.Conn) { c.BeginContinuations(smallPath) },
			units: func(c *attack.Conn, _, n int) {
				for range n {
					c.Continue(i)
				}
			}})
	}
	all = append(all, assault{name: "HPACK bomb", unit: "blocks", most: 1000, connections: 1, reads: true, atOnce: 1,
		units: func(c *attack.Conn, from, _ int) { c.Headers(attack.Stream(from), true, c.Bomb(smallPath)) }})
	for _, k := range attack.Floods {
		all = append(all, assault{name: "flood: " + k.Name, unit: "frames", most: 200_000, connections: 1, reads: true, atOnce: 100,
			begin: func(c *attack.Conn) { c.Post(1, smallPath) },
			units: func(c *attack.Conn, _, n int) {
				for range n {
					k.Write(c)
				}
			}})
	}
	open := func(c *attack.Conn, from, n int) {
		for i := range n {
			c.Get(attack.Stream(from+i), largePath)
		}
	}
	window := func(n uint32) []http2.Setting {
		return []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: n}}
	}
	return append(all,
		assault{name: "windows of 0", unit: "streams", most: 2000, connections: 20, settings: window(0), reads: true, atOnce: 100, units: open, holds: attackFor},
		assault{name: "windows of 1 byte, not opened again", unit: "streams", most: 2000, connections: 20, settings: window(1), reads: true, atOnce: 100, units: open, holds: attackFor},
		assault{name: "sockets never read", unit: "streams", most: 2000, connections: 20, settings: window(1<<31 - 1), atOnce: 100, holds: attackFor,
			begin: func(c *attack.Conn) { _ = c.Frames.WriteWindowUpdate(0, 1<<31-1-65535) }, units: open},
	)
}

// outcome is what an attack has shown of a peer.
type outcome struct {
	sent    int           // units
	closed  bool          // the peer has ended the connections
	after   time.Duration // when it had, or when the attack gave up
	cpu     time.Duration // of the peer, a bystander's requests with it
	memory  int64         // bytes by which it has grown
	served  int           // percent of a bystander's requests
	slowest time.Duration // p99 of those
}

// under plays an attack against a peer of its own, beside a bystander. play gets what the
// peer used before.
func under(ctx context.Context, l *lab, p peer, play func(r *running, before usage) error) (bystander, error) {
	r, err := p.start(ctx, l)
	if err != nil {
		return bystander{}, err
	}
	defer r.stop()
	stop, seen := make(chan struct{}), make(chan bystander)
	go func() { seen <- watchOver(ctx, l, r.address, stop) }()
	time.Sleep(500 * time.Millisecond) // the bystander's connection stands
	before, err := r.usage()
	if err == nil {
		err = play(r, before)
	}
	close(stop)
	return <-seen, err
}

// measureAssault plays the attack.
func measureAssault(ctx context.Context, l *lab, p peer, a assault) (o outcome, err error) {
	b, err := under(ctx, l, p, func(r *running, before usage) error {
		begin := time.Now()
		err := a.play(l, r.address, &o)
		o.after = time.Since(begin)
		if a.holds > 0 && !o.closed {
			time.Sleep(time.Until(begin.Add(a.holds)))
		}
		after, uerr := r.usage()
		o.cpu, o.memory = after.cpu-before.cpu, after.rss-before.rss
		time.Sleep(time.Until(begin.Add(time.Second))) // for the bystander
		return errors.Join(err, uerr)
	})
	o.served, o.slowest = b.share(), b.p99()
	return o, err
}

// play sends until the peer ends it, or all is sent.
func (a assault) play(l *lab, address string, o *outcome) error {
	const patience = 2 * time.Second
	var conns []*attack.Conn
	ended := make(chan struct{}, a.connections)
	defer func() {
		for _, c := range conns {
			c.HangUp()
		}
	}()
	for range a.connections {
		c, err := attack.Dial(address, l.clientTLS, patience, "authorization", "Bearer "+token)
		if err != nil {
			return err
		}
		conns = append(conns, c)
		c.Greet(a.settings...)
		if a.begin != nil {
			a.begin(c)
		}
		if a.reads {
			go func() {
				_, _ = io.Copy(io.Discard, c.TLS)
				ended <- struct{}{}
			}()
		}
	}
	end := time.Now().Add(attackFor)
	each := a.most / a.connections
	for from := 0; from < each && time.Now().Before(end); from += a.atOnce {
		for _, c := range conns {
			a.units(c, from, a.atOnce)
			if err := c.Flush(patience); err != nil {
				o.closed = !errors.Is(err, os.ErrDeadlineExceeded)
				return nil
			}
			o.sent += a.atOnce
		}
		select {
		case <-ended:
			o.closed = true
			return nil
		default:
		}
	}
	if a.holds == 0 {
		select {
		case <-ended:
			o.closed = true
		case <-time.After(time.Second):
		}
	}
	return nil
}

// bystander is what a client sees that has nothing to do with an attack.
type bystander struct {
	lost int
	took []time.Duration
}

// watchOver makes 50 requests a second until stop.
func watchOver(ctx context.Context, l *lab, address string, stop <-chan struct{}) (b bystander) {
	transport := &http.Transport{TLSClientConfig: l.clientTLS.Clone(), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Second}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return b
		case <-tick.C:
		}
		start := time.Now()
		if err := ask(ctx, client, "https://"+address+smallPath); err != nil {
			b.lost++
		} else {
			b.took = append(b.took, time.Since(start))
		}
	}
}

// share is the percentage of requests that were served.
func (b bystander) share() int { return 100 * len(b.took) / max(1, len(b.took)+b.lost) }

func (b bystander) p99() time.Duration {
	if len(b.took) == 0 {
		return 0
	}
	slices.Sort(b.took)
	return b.took[len(b.took)*99/100]
}

// measureAttacks writes a table in Markdown: the attacks against one peer after the other.
func measureAttacks(ctx context.Context, o options, out io.Writer) error {
	peers, err := attackPeers(o.balancer, o.haproxy)
	if err != nil {
		return err
	}
	if o.haproxy == "haproxy" {
		if err := ensureTool(ctx, o.haproxy, "haproxy", "to compare with"); err != nil {
			return err
		}
	}
	l, closeLab, err := openLab(ctx)
	if err != nil {
		return err
	}
	defer closeLab()
	fmt.Fprintf(out, "| Attack | |")
	for _, p := range peers {
		fmt.Fprintf(out, " %s |", p.name)
	}
	fmt.Fprintf(out, "\n|---|---|%s\n", strings.Repeat("---|", len(peers)))
	for _, a := range allAssaults() {
		if !strings.Contains(a.name, o.cases) {
			continue
		}
		var rows [4]bytes.Buffer
		for _, p := range peers {
			got, err := measureAssault(ctx, l, p, a)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", p.name, a.name, err)
			}
			state := "open"
			if got.closed {
				state = "closed"
			}
			fmt.Fprintf(&rows[0], " %s after %d %s, %d ms |", state, got.sent, a.unit, got.after.Milliseconds())
			fmt.Fprintf(&rows[1], " %d ms |", got.cpu.Milliseconds()) // the kernel counts in steps of 10 ms
			fmt.Fprintf(&rows[2], " %+.0f MB |", float64(got.memory)/(1<<20))
			fmt.Fprintf(&rows[3], " %d %%, %d ms |", got.served, got.slowest.Milliseconds())
		}
		for i, what := range []string{"ended", "CPU, the bystander's with it", "memory", "bystander: served, p99"} {
			name := ""
			if i == 0 {
				name = a.name
			}
			fmt.Fprintf(out, "| %s | %s |%s\n", name, what, rows[i].String())
		}
	}
	for _, u := range allUnfinished() {
		if !strings.Contains("unfinished "+u.name, o.cases) {
			continue
		}
		fmt.Fprintf(out, "| unfinished %s | after %s; memory; bystander: served, p99 |", u.name, u.holds)
		for _, p := range peers {
			h, err := measureUnfinished(ctx, l, p, u)
			if err != nil {
				return fmt.Errorf("%s, unfinished %s: %w", p.name, u.name, err)
			}
			fmt.Fprint(out, h.row())
		}
		fmt.Fprintln(out)
	}
	return nil
}
