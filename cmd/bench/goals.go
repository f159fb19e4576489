package main

import "fmt"

// goal is how much of the reference's figure ours may be.
type goal struct {
	label          string // in the plot
	testCase, name string // the row: a case and one of its measures
	most           float64
}

// goals are what the balancer is meant to cost, in the order of the plot.
var goals = []goal{
	{"Small requests, 50 connections, 1 in flight", "50 connections, 1 in flight", cpuPerRequest, 0.40},
	{"Small requests, 50 connections, 10 in flight", "50 connections, 10 in flight", cpuPerRequest, 0.12},
	{"Small requests, 200 connections, 1 in flight", "200 connections, 1 in flight", cpuPerRequest, 0.40},
	{"1 MiB bodies", "1 MiB bodies, 8 connections", cpuPerRequest, 0.40},
	{"A watch event", "200 watches with 10 events/s each, 50 connections", cpuPerEvent, 0.5},
	{"RSS per connection with 5 idle watches", "2,000 connections with 5 idle watches each", rssEach, 0.5},
	{"TLS handshake", "new connections, 1 request each", cpuPerHandshake, 1.05},
	{"Added latency at 1,000 requests/s, p50", "1,000 requests/s, 10 connections", addedP50, 0.8},
	{"Added latency at 1,000 requests/s, p99", "1,000 requests/s, 10 connections", addedP99, 0.8},
}

// goalOf returns the goal of a row, if it has one.
func goalOf(testCase, name string) (goal, bool) {
	for _, g := range goals {
		if g.testCase == testCase && g.name == name {
			return g, true
		}
	}
	return goal{}, false
}

// verdict is "0.40: met". A ratio that is not known meets nothing.
func (g goal) verdict(ratio float64, known bool) string {
	switch {
	case !known:
		return fmt.Sprintf("%.2f", g.most)
	case ratio <= g.most:
		return fmt.Sprintf("%.2f: met", g.most)
	}
	return fmt.Sprintf("%.2f: missed", g.most)
}
