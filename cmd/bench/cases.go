package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// testCase is one kind of load.
type testCase struct {
	name        string
	connections int
	streams     int // requests in flight per connection
	rate        int // requests per second over all connections; 0: as many as it takes
	path        string
}

// allCases returns every case, in the order of the report.
func allCases() []testCase {
	return []testCase{
		{name: "50 connections, 1 in flight", connections: 50, streams: 1, path: smallPath},
		{name: "50 connections, 10 in flight", connections: 50, streams: 10, path: smallPath},
		{name: "200 connections, 1 in flight", connections: 200, streams: 1, path: smallPath},
		{name: "1 MiB bodies, 8 connections", connections: 8, streams: 1, path: largePath},
		{name: "1,000 requests/s, 10 connections", connections: 10, streams: 1, rate: 1000, path: smallPath},
	}
}

// sample is one measurement of a peer under a case.
type sample struct {
	cpu      time.Duration // of the proxy, per request
	rate     float64       // requests per second
	p50, p99 time.Duration // of the latency; cases with a rate only
	peakRSS  int64         // bytes, since the start of the proxy
}

const (
	// warmUp comes before each measurement: connections to the backends,
	// buffers, the collector's pace.
	warmUp = time.Second
	// skipFirst is the part of a measurement that latencies leave out.
	skipFirst = 500 * time.Millisecond
)

// measure starts the peer for this case alone, warms it up and measures.
func measure(ctx context.Context, l *lab, p peer, c testCase, d time.Duration) (sample, error) {
	r, err := p.start(ctx, l)
	if err != nil {
		return sample{}, err
	}
	defer r.stop()
	if _, err := h2load(ctx, c, r.address, l.clientThreads, warmUp, ""); err != nil {
		return sample{}, fmt.Errorf("warming up: %w", err)
	}

	var before, after usage
	if pid := r.pid(); pid != 0 {
		if before, err = usageOf(pid); err != nil {
			return sample{}, err
		}
	}
	var logFile string
	if c.rate > 0 {
		logFile = filepath.Join(l.dir, "h2load.log")
		if err := os.RemoveAll(logFile); err != nil {
			return sample{}, err
		}
	}
	got, err := h2load(ctx, c, r.address, l.clientThreads, d, logFile)
	if err != nil {
		return sample{}, err
	}
	if pid := r.pid(); pid != 0 {
		if after, err = usageOf(pid); err != nil {
			return sample{}, err
		}
	}
	s := sample{
		cpu:     (after.cpu - before.cpu) / time.Duration(got.succeeded),
		rate:    got.rate,
		peakRSS: after.peakRSS,
	}
	if logFile != "" {
		file, err := os.ReadFile(logFile)
		if err != nil {
			return sample{}, err
		}
		requests, err := parseLog(file)
		if err != nil {
			return sample{}, fmt.Errorf("h2load's log: %w", err)
		}
		sorted := latencies(requests, skipFirst)
		if len(sorted) == 0 {
			return sample{}, fmt.Errorf("h2load logged no request after the first %v", skipFirst)
		}
		s.p50, s.p99 = percentile(sorted, 50), percentile(sorted, 99)
	}
	return s, nil
}
