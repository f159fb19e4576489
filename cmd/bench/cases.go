package main

import "strings"

// testCase is one kind of load.
type testCase struct {
	name        string
	load        load
	measures    []measureOf // the first one tells most
	connections int
	// connectionsHTTP1 are the connections where each stream takes one of the
	// proxy's to a backend; 0: as many.
	connectionsHTTP1 int
	streams          int // requests in flight, or watches, per connection
	rate             int // requests per second over all connections; 0: as many as it takes
	path             string
}

// allCases returns every case, in the order of the report.
func allCases() []testCase {
	return []testCase{
		{name: "50 connections, 1 in flight", load: loadRequests, measures: requestMeasures, connections: 50, streams: 1, path: smallPath},
		{name: "50 connections, 10 in flight", load: loadRequests, measures: requestMeasures, connections: 50, streams: 10, path: smallPath},
		{name: "200 connections, 1 in flight", load: loadRequests, measures: requestMeasures, connections: 200, streams: 1, path: smallPath},
		{name: "1 MiB bodies, 8 connections", load: loadRequests, measures: requestMeasures, connections: 8, streams: 1, path: largePath},
		{name: "200 watches with 10 events/s each, 50 connections", load: loadEvents, measures: eventMeasures, connections: 50, streams: 4, path: busyWatch},
		// 2,000 connections to the backends for 400 clients, as against 10,000.
		{name: "2,000 connections with 5 idle watches each", load: loadIdle, measures: idleMeasures, connections: 2000, connectionsHTTP1: 400, streams: 5, path: idleWatch},
		{name: "new connections, 1 request each", load: loadHandshakes, measures: handshakeMeasures, connections: 8, streams: 1, path: smallPath},
		{name: "1,000 requests/s, 10 connections", load: loadRequests, measures: pacedMeasures, connections: 10, streams: 1, rate: 1000, path: smallPath},
	}
}

// suits says whether there is anything to measure of the peer.
func (c testCase) suits(p peer) bool {
	for _, m := range c.measures {
		if !m.proxy || p.name != noProxy {
			return true
		}
	}
	return false
}

// summary is a sample's first two figures, for the progress of a run.
func (c testCase) summary(p peer, s sample) string {
	var parts []string
	for _, m := range c.measures {
		if len(parts) == 2 || m.proxy && p.name == noProxy {
			continue
		}
		parts = append(parts, m.name+": "+number(m.value(s)))
	}
	return strings.Join(parts, "; ")
}
