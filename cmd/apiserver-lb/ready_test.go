package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wantReady checks the answer of /readyz?verbose.
func (r *running) wantReady(code int, lines ...string) {
	r.Helper()
	a := r.ask("/readyz?verbose")
	got := strings.Split(strings.TrimSuffix(a.body, "\n"), "\n")
	if d := cmp.Diff(lines, got); d != "" || a.code != code {
		r.Errorf("/readyz?verbose = %d, want %d (-want +got):\n%s", a.code, code, d)
	}
}

// TestFirstRound follows a start: nobody is served, and /readyz fails, until every
// backend has been judged once.
func TestFirstRound(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 2)
	r := s.start()
	s.apis[0].await(t, "a probe", 0, to("/readyz"))
	s.apis[1].await(t, "a probe", 0, to("/readyz"))

	r.wantReady(503,
		"[+]shutdown ok",
		"[-]probes the first round is not over",
		"[-]backend api-0 unknown",
		"[-]backend api-1 unknown",
		"[-]backends none answers")
	if a := r.ask("/livez"); a.code != 200 || a.body != "ok\n" {
		t.Errorf("/livez = %d %q, want 200 ok", a.code, a.body)
	}

	// A client that comes early waits.
	c := r.client(s.pki.alice)
	early := make(chan answer, 1)
	go func() { early <- r.get(c, objectPath) }()

	close(s.apis[0].gate)
	r.log.await(t, became(s.apis[0], "ready"))
	r.wantReady(503,
		"[+]shutdown ok",
		"[-]probes the first round is not over",
		"[+]backend api-0 ready",
		"[-]backend api-1 unknown",
		"[+]backends ok")
	select {
	case a := <-early:
		t.Errorf("a request was answered before the first round was over: %+v", a)
	default:
	}

	close(s.apis[1].gate)
	r.log.await(t, said("ready for clients"))
	r.wantReady(200,
		"[+]shutdown ok",
		"[+]probes ok",
		"[+]backend api-0 ready",
		"[+]backend api-1 ready",
		"[+]backends ok")
	if a := r.ask("/readyz"); a.code != 200 || a.body != "ok\n" {
		t.Errorf("/readyz = %d %q, want 200 ok", a.code, a.body)
	}
	if a := <-early; a.err != nil || a.code != 200 || !strings.Contains(a.body, `"name":"alice"`) {
		t.Errorf("the first request: %+v, want an answer for alice", a)
	}
}

// TestPanicMode wants a balancer without a ready backend to stay ready, and to say
// once that panic mode has begun, and once that it is over.
func TestPanicMode(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	r := s.startReady()
	entering, leaving := said("panic mode: no backend is ready"), said("panic mode is over")

	for round := range 2 {
		s.apis[0].set(500, 200)
		r.log.awaitNth(t, round, became(s.apis[0], "draining"))
		if n := len(r.log.list(entering)); n != round {
			t.Errorf("panic mode was entered %d times with a backend ready, want %d", n, round)
		}
		s.apis[1].set(500, 200)
		e := r.log.awaitNth(t, round, entering)
		if e["level"] != "ERROR" {
			t.Errorf("panic mode is logged as %v, want ERROR", e["level"])
		}
		r.wantReady(200,
			"[+]shutdown ok",
			"[+]probes ok",
			"[-]backend api-0 draining",
			"[-]backend api-1 draining",
			"[-]backends panic mode: none is ready, all are used")
		r.mustGet(r.client(s.pki.alice), objectPath)

		s.apis[0].set(200, 200)
		s.apis[1].set(200, 200)
		r.log.awaitNth(t, round, leaving)
		r.log.awaitNth(t, 2*round+1, func(e map[string]any) bool {
			return became(s.apis[0], "ready")(e) && e["from"] == "draining" || became(s.apis[1], "ready")(e) && e["from"] == "draining"
		})
	}
	if n, m := len(r.log.list(entering)), len(r.log.list(leaving)); n != 2 || m != 2 {
		t.Errorf("entered %d times, left %d times, want 2 and 2; log:\n%s", n, m, r.log)
	}
}

// TestPanicAtStart wants no alarm before all backends have been asked.
func TestPanicAtStart(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 1)
	s.apis[0].set(500, 200)
	s.apis[1].set(500, 200)
	r := s.start()
	r.log.await(t, became(s.apis[0], "draining"))
	entering := said("panic mode: no backend is ready")
	if len(r.log.list(entering)) != 0 {
		t.Error("alarm although a backend has yet to be asked")
	}
	close(s.apis[1].gate)
	r.log.await(t, said("ready for clients"))
	if n := len(r.log.list(entering)); n != 1 {
		t.Errorf("panic mode was logged %d times, want once", n)
	}
	e := r.log.await(t, became(s.apis[0], "draining"))
	if e["level"] != "WARN" || e["from"] != "unknown" || e["verdict"] != "not_ready" || !cmp.Equal(e["failedChecks"], []any{"etcd"}) {
		t.Errorf("the change of state says %v", e)
	}
}

// TestDeadBackends wants /readyz to fail when nothing behind it answers, and to come
// back.
func TestDeadBackends(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	r := s.startReady()
	for _, a := range s.apis {
		a.server.Close()
	}
	r.log.await(t, became(s.apis[0], "dead"))
	r.log.await(t, became(s.apis[1], "dead"))
	r.wantReady(503,
		"[+]shutdown ok",
		"[+]probes ok",
		"[-]backend api-0 dead",
		"[-]backend api-1 dead",
		"[-]backends none answers")
	a := r.get(r.client(s.pki.alice), objectPath)
	if a.code != 503 || !strings.Contains(a.body, `"message":"apiserver-lb on `) {
		t.Errorf("a request = %+v, want a 503 of the balancer's own", a)
	}
	if a := r.ask("/livez"); a.code != 200 {
		t.Errorf("/livez = %d, want 200: a restart would not help", a.code)
	}
}

// TestAdmin wants the admin listener to offer nothing else.
func TestAdmin(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	for path, code := range map[string]int{"/": 200, "/status": 404, "/page.js": 404, "/debug/pprof/": 404, objectPath: 404, "/healthz": 404, "/metrics": 200, "/livez": 200} {
		if a := r.ask(path); a.code != code {
			t.Errorf("%s = %d, want %d", path, a.code, code)
		}
	}
}
