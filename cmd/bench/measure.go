package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// sample is one measurement of a peer under a case.
type sample struct {
	cpu            time.Duration // of the proxy, per request, event or connection
	rate           float64       // requests, events or connections per second
	p50, p99, p999 time.Duration // of the latency; cases with a rate only
	rss            int64         // bytes, by which it grew; with idle watches, per connection
	peakRSS        int64         // bytes, since the start of the proxy
}

// load puts a case's load on a running peer for the given time.
type load func(ctx context.Context, l *lab, r *running, c testCase, d time.Duration) (sample, error)

// warmUp comes before each measurement: connections, buffers, the collector's
// pace.
const warmUp = time.Second

// measure starts the peer for this case alone, warms it up and measures.
func measure(ctx context.Context, l *lab, p peer, c testCase, d time.Duration) (sample, error) {
	if p.http1 && c.connectionsHTTP1 > 0 {
		c.connections = c.connectionsHTTP1
	}
	r, err := p.start(ctx, l)
	if err != nil {
		return sample{}, err
	}
	defer r.stop()
	return c.load(ctx, l, r, c, d)
}

// loadRequests asks as often as the case says, over connections that stay.
func loadRequests(ctx context.Context, l *lab, r *running, c testCase, d time.Duration) (sample, error) {
	var logFile string
	if c.rate > 0 {
		logFile = filepath.Join(l.dir, "h2load.log")
		if err := os.RemoveAll(logFile); err != nil {
			return sample{}, err
		}
	}
	m := newMeter(r.usage)
	got, err := h2load(ctx, c, r.address, l.clientThreads, d, logFile, m)
	if err != nil {
		return sample{}, err
	}
	s, err := m.sample(got.succeeded)
	if err != nil {
		return sample{}, err
	}
	s.rate = got.rate
	if logFile == "" {
		return s, nil
	}
	file, err := os.ReadFile(logFile)
	if err != nil {
		return sample{}, err
	}
	sorted, err := parseLog(file)
	if err != nil {
		return sample{}, fmt.Errorf("h2load's log: %w", err)
	}
	s.p50, s.p99, s.p999 = percentile(sorted, 50), percentile(sorted, 99), percentile(sorted, 99.9)
	return s, nil
}

// loadEvents holds watches on which events come.
func loadEvents(ctx context.Context, l *lab, r *running, c testCase, d time.Duration) (sample, error) {
	w, err := openWatches(ctx, r.address, l.clientTLS, c.connections, c.streams, c.path)
	if err != nil {
		return sample{}, err
	}
	defer w.close()
	if err := w.hold(ctx, warmUp); err != nil {
		return sample{}, err
	}
	m := newMeter(r.usage)
	first := w.events.Load()
	m.begin()
	if err := w.hold(ctx, d); err != nil {
		return sample{}, err
	}
	m.end()
	return m.sample(int(w.events.Load() - first))
}

// loadIdle holds watches on which nothing comes any more.
func loadIdle(ctx context.Context, l *lab, r *running, c testCase, d time.Duration) (sample, error) {
	m := newMeter(r.usage)
	m.begin()
	w, err := openWatches(ctx, r.address, l.clientTLS, c.connections, c.streams, c.path)
	if err != nil {
		return sample{}, err
	}
	defer w.close()
	if err := w.hold(ctx, d); err != nil {
		return sample{}, err
	}
	m.end()
	s, err := m.sample(c.connections)
	s.rss /= int64(c.connections)
	return s, err
}

// loadHandshakes connects anew for each request.
func loadHandshakes(ctx context.Context, l *lab, r *running, c testCase, d time.Duration) (sample, error) {
	if _, err := connectAgain(ctx, r.address, l.clientTLS, c.connections, c.path, warmUp); err != nil {
		return sample{}, fmt.Errorf("warming up: %w", err)
	}
	m := newMeter(r.usage)
	m.begin()
	n, err := connectAgain(ctx, r.address, l.clientTLS, c.connections, c.path, d)
	if err != nil {
		return sample{}, err
	}
	m.end()
	return m.sample(n)
}
