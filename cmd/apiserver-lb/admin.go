package main

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// readiness is whether this balancer is able to serve: what keepalived and cloud
// balancers ask.
type readiness struct {
	backends *backend.Backends // static
	probed   atomic.Bool       // the first probe round is over
	serving  atomic.Bool       // clients are accepted, or were
	stopping atomic.Bool

	handedOver atomic.Bool // another process accepts in place of this one
}

// report says whether the balancer is ready and why, a line for each check.
//
// A balancer that panics is still ready: all balancers see the same backends, and
// sending clients to another one would not help them. It says so in its lines.
func (r *readiness) report() (ready bool, lines []string) {
	ready = true
	line := func(ok bool, name, why string) {
		mark := "[+]"
		if !ok {
			mark = "[-]"
		}
		lines = append(lines, fmt.Sprintf("%s%s %s", mark, name, why))
	}
	if r.stopping.Load() {
		ready = false
		line(false, "shutdown", "draining")
	} else {
		line(true, "shutdown", "ok")
	}
	if !r.probed.Load() {
		ready = false
		line(false, "probes", "the first round is not over")
	} else {
		line(true, "probes", "ok")
	}
	usable := false
	set := r.backends.Set()
	for _, b := range set.All() {
		s := b.State()
		usable = usable || s == health.Ready || s == health.Draining
		why := s.String()
		if !b.Drained().IsZero() {
			why += ", drained by an operator"
		}
		line(s == health.Ready, "backend "+b.Name, why)
	}
	if !usable {
		ready = false
		line(false, "backends", "none answers")
	} else if set.Panicking() {
		line(false, "backends", "panic mode: none is ready, all are used")
	} else {
		line(true, "backends", "ok")
	}
	return ready, lines
}

// adminHandler is what the admin listener serves. It changes nothing.
func adminHandler(r *readiness, metrics http.Handler, state http.HandlerFunc, pages *pages) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, req *http.Request) {
		ready, lines := r.report()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		if !ready {
			w.WriteHeader(http.StatusServiceUnavailable)
		} else if !req.URL.Query().Has("verbose") {
			fmt.Fprintln(w, "ok")
			return
		}
		for _, l := range lines {
			fmt.Fprintln(w, l)
		}
	})
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /status.json", state)
	mux.HandleFunc("GET /{$}", servePage)
	mux.Handle("GET /status/events", pages)
	return mux
}

// newAdminServer serves operators. What is long-running sets deadlines of its own.
func newAdminServer(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
}
